"""Rewards: where a step ends, whether an answer is right, what a response earns and what credit follows."""

"""Rollouts: the truncation decisions, the vLLM engine and the Ray worker around them."""

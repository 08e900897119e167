"""Step-GRPO."""

"""Random models for measurements of which only the shape matters."""

from __future__ import annotations

from pathlib import Path


def save_qwen3(directory: Path, *, dtype: str = "float32", **shape: int) -> Path:
    """Write a random Qwen3 with tied embeddings and heads of 64; ``shape``: more of its configuration."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen3Config(num_key_value_heads=4, head_dim=64, tie_word_embeddings=True, **shape)
    Qwen3ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(directory)
    return directory

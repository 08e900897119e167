"""Random models for measurements of which only the shape matters."""

from __future__ import annotations

from pathlib import Path

QWEN3: dict[str, dict[str, int]] = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
for _shape in QWEN3.values():
    _shape |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960}
"""Shapes of real models, for a GPU."""


def save_qwen3(directory: Path, *, dtype: str = "float32", device: str = "cpu", **shape: int) -> Path:
    """Write a random Qwen3 with tied embeddings; ``shape``: more of its configuration."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen3Config(**{"num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True} | shape)
    with torch.device(device):
        model = Qwen3ForCausalLM(config)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    return directory

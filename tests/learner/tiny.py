"""A Qwen3 small enough to train in a test."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCAB = 40


def make_model(directory: Path, tied: bool, *, seed: int = 1, dtype: torch.dtype = torch.float32, **more: Any) -> None:
    """``more``: of its configuration."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 64,
        "initializer_range": 0.2,
    }
    config = Qwen3Config(tie_word_embeddings=tied, **(shape | more))
    Qwen3ForCausalLM(config).to(dtype).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)

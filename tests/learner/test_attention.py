"""Sequences that lie end to end see themselves alone, whatever lies beside them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Gemma2Config, Gemma3nConfig, GraniteConfig

from stepgrpo.learner.attention import SHORTEST, blocks_of, check_logits, packed_sdpa, varlen

CPU = torch.device("cpu")
HEADS, KV_HEADS, SIZE = 4, 2, 8
MODULE: Any = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, is_causal=True)


def positions_of(lengths: list[int]) -> np.ndarray:
    return np.concatenate([np.arange(n) for n in lengths])[None]


def random_states(num_tokens: int, value_size: int = SIZE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (HEADS, SIZE), (KV_HEADS, SIZE), (KV_HEADS, value_size)
    return [torch.randn(1, heads, num_tokens, size, generator=generator, requires_grad=True) for heads, size in shapes]


@pytest.mark.parametrize("value_size", [SIZE, 4])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [[1], [5], [3, 9, 1, 8, 9, 2], [40, 39, 1, 1, 33]])
def test_values_and_gradients_are_those_of_each_sequence_alone(
    lengths: list[int], window: int | None, value_size: int
) -> None:
    packed, alone = (random_states(sum(lengths), value_size) for _ in range(2))
    layout = blocks_of(positions_of(lengths), CPU)
    got, _ = packed_sdpa(MODULE, *packed, None, **layout, scaling=0.3, sliding_window=window, dropout=0.0)
    parts = []
    for q, k, v in zip(*(s.split(lengths, dim=2) for s in alone), strict=True):
        at = torch.arange(q.shape[2])
        back = at[:, None] - at
        mask = (back >= 0) & (back < (window or len(at)))
        parts.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True))
    expected = torch.cat(parts, dim=2).transpose(1, 2)
    torch.testing.assert_close(got, expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for result in (got, expected):
        (result * weights).sum().backward()
    for ours, theirs in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_rows_of_their_own_are_sequences_too() -> None:
    """[B, L], as a plan of padded rows has them: the padding on the right is of the row's sequence."""
    rows = [s.unflatten(2, (3, 4)).squeeze(0).transpose(0, 1) for s in random_states(12)]
    got, _ = packed_sdpa(MODULE, *rows, None, **blocks_of(np.tile(np.arange(4), (3, 1)), CPU))
    expected = scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(got, expected)


def test_each_token_has_one_place_and_a_fifth_at_most_of_a_block_is_padding() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = np.exp(rng.normal(4, 1, rng.integers(1, 60))).astype(int) + 1
        found = blocks_of(positions_of(lengths.tolist()), CPU)["blocks"]
        assert sorted(found.tokens[~found.padding].tolist()) == list(range(lengths.sum()))
        assert found.tokens[found.places].tolist() == list(range(lengths.sum()))
        assert sum(num for num, _ in found.shapes) == len(lengths)
        sizes = [num * width for num, width in found.shapes]
        for padding in found.padding.split(sizes):
            assert padding.float().mean() <= 1 - SHORTEST


def test_what_a_model_asks_of_its_attention_beyond_this_is_refused() -> None:
    q, k, v = random_states(3)
    layout = blocks_of(positions_of([3]), CPU)
    with pytest.raises(ValueError, match=r"^model\.path: SimpleNamespace asks its attention for s_aux, takes a model"):
        packed_sdpa(MODULE, q, k, v, None, **layout, s_aux=torch.zeros(HEADS))
    mask = torch.ones(3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^model\.attention: takes sdpa with SimpleNamespace, which has a mask"):
        packed_sdpa(MODULE, q, k, v, mask, **layout)
    bounds = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="got varlen, takes packed_sdpa: SimpleNamespace has values of another size"):
        varlen(MODULE, q, k, v[..., :4], None, cu_seq_lens_q=bounds, max_length_q=3)


def test_a_model_whose_logits_are_capped_or_scaled_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^model\.path: gemma2 has attn_logit_softcapping, final_logit_softcapping"):
        check_logits(Gemma2Config())
    check_logits(Gemma2Config(attn_logit_softcapping=None, final_logit_softcapping=None))
    with pytest.raises(ValueError, match=r"^model\.path: granite has logits_scaling, takes a model without"):
        check_logits(GraniteConfig(logits_scaling=8.0))
    check_logits(GraniteConfig())
    with pytest.raises(ValueError, match="has final_logit_softcapping"):
        check_logits(Gemma3nConfig())  # of its part that reads

"""Attention over packed rows, without a mask: each sequence sees itself alone.

Importing this registers among transformers' attention implementations `varlen`, the flash attention that comes with
torch, for half precision on a GPU, and `packed_sdpa`, which is for anything else: sequences of like length lie side by
side for attention alone, padded to the longest of them, and all else of the model computes no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

SHORTEST = 0.8
"""Of a block's longest sequence, so much is its shortest at least: a fifth of its places at most is padding."""
UNKNOWN = ("s_aux", "softcap", "position_bias")
"""What some models ask of their attention, and would go without unnoticed."""
DONE_TO_LOGITS = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "lm_head_multiplier": 1.0,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
}
"""Settings of models -> the value that does nothing."""
LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of transformer layers that know sequences apart."""


def check_logits(config: PreTrainedConfig) -> None:
    """Refuse a model whose logits are not what its head computes, nor its attention's what queries and keys give.

    Raises:
        ValueError: it caps or scales them.
    """
    text = config.get_text_config()  # a part of its own in a model that also sees
    done = [name for name, nothing in DONE_TO_LOGITS.items() if getattr(text, name, None) not in (None, nothing)]
    if done:
        raise ValueError(f"model.path: {config.model_type} has {', '.join(done)}, takes a model without")


def check_packs(model: PreTrainedModel) -> None:
    """Refuse a model that cannot have its rows packed.

    Raises:
        ValueError: sequences that lie end to end would see each other, as in layers with a state.
    """
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    knows_how = model._supports_flash_attn and model._supports_attention_backend
    if not knows_how or model._is_stateful or layers - LAYERS:
        raise ValueError(f"model.attention: takes sdpa with {type(model).__name__}, which cannot have its rows packed")


def bounds(position_ids: NDArray, device: torch.device) -> dict[str, Any]:
    """Where the sequences of a packed row begin, as transformers' flash attention and `varlen` take it.

    Counted once here on the host: derived from positions on the device it would stop the device in every layer.

    Args:
        position_ids: [1, L], beginning again at 0.

    Returns:
        Keyword arguments for a model's forward pass: cumulative lengths [S + 1] int32, and the longest sequence.

    >>> import numpy as np
    >>> bounds(np.array([[0, 1, 2, 0, 1]]), torch.device("cpu"))["cu_seq_lens_q"].tolist()
    [0, 3, 5]
    """
    starts = [*(position_ids[0] == 0).nonzero()[0].tolist(), position_ids.shape[1]]
    longest = max(b - a for a, b in pairwise(starts))
    cumulative = torch.tensor(starts, dtype=torch.int32).to(device, non_blocking=True)
    return {
        "cu_seq_lens_q": cumulative,
        "cu_seq_lens_k": cumulative,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of one packed row.

    Args:
        query, key, value: [1, heads, L, D]; keys and values may have fewer heads.

    Returns:
        [1, L, heads, D], as transformers wants it.

    Raises:
        ValueError: the model wants more of it than this.
    """
    _check_known(module, more, attention_mask)
    if value.shape[-1] != query.shape[-1]:
        kind = type(module).__name__
        raise ValueError(f"model.attention: got varlen, takes packed_sdpa: {kind} has values of another size than keys")
    q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)  # nothing to the right: causal
    states = varlen_attn(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=window,
        enable_gqa=k.shape[1] < q.shape[1],
    )
    assert isinstance(states, Tensor)
    return states.unsqueeze(0), None


@dataclass(frozen=True, slots=True)
class Blocks:
    """Where a packed row's tokens lie while sequences of like length are side by side: P places, block after block."""

    shapes: tuple[tuple[int, int], ...]
    """(sequences, places of each) of every block."""
    tokens: Tensor
    """[P] the token of each place; the sequence's last one where it has no more."""
    padding: Tensor
    """[P] True there."""
    places: Tensor
    """[L] the place of each token."""

    def lay_out(self, states: Tensor) -> Tensor:
        """[L, ...] of tokens -> [P, ...] of places."""
        return _Move.apply(states, self.tokens, self.places, None)  # type: ignore[no-untyped-call]

    def take_back(self, states: Tensor) -> Tensor:
        """[P, ...] of places -> [L, ...] of tokens."""
        return _Move.apply(states, self.places, self.tokens, self.padding)  # type: ignore[no-untyped-call]


def blocks_of(position_ids: NDArray, device: torch.device) -> dict[str, Any]:
    """What `packed_sdpa` takes: computed once on the host, for all layers.

    Args:
        position_ids: [B, L], beginning again at 0; padding on a row's right is of its sequence.

    >>> import numpy as np
    >>> b = blocks_of(np.array([[0, 1, 0, 1, 2, 3, 4, 0, 1, 2, 3]]), torch.device("cpu"))["blocks"]
    >>> b.shapes, b.tokens.tolist()
    (((2, 5), (1, 2)), [2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 0, 1])
    """
    positions = position_ids.ravel()
    starts = np.flatnonzero(positions == 0)
    lengths = np.diff([*starts, len(positions)])
    order = np.argsort(-lengths, kind="stable")
    shapes, tokens, padding = [], [], []
    while len(order):
        width = int(lengths[order[0]])
        num = int((lengths[order] >= SHORTEST * width).sum())
        members, order = order[:num, None], order[num:]
        place = np.arange(width)
        shapes.append((num, width))
        tokens.append((starts[members] + np.minimum(place, lengths[members] - 1)).ravel())
        padding.append((place >= lengths[members]).ravel())
    of_place, is_padding = np.concatenate(tokens), np.concatenate(padding)
    places = np.empty(len(positions), np.int64)
    places[of_place[~is_padding]] = np.flatnonzero(~is_padding)
    moved = (torch.from_numpy(a).to(device, non_blocking=True) for a in (of_place, is_padding, places))
    return {"blocks": Blocks(tuple(shapes), *moved)}


class _Move(torch.autograd.Function):
    """Tokens to places, or places to tokens. The gradient goes the same way back: a place without a token is seen by
    none that has one, and nobody reads what it sees."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, there: Tensor, back: Tensor, padding: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, padding)
        return states.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        back, padding = ctx.saved_tensors
        gradient = gradient.index_select(0, back)
        if padding is not None:
            gradient = gradient.masked_fill_(padding[:, None, None], 0)
        return gradient, None, None, None


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    blocks: Blocks,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence, by PyTorch's scaled dot product attention. No dropout: rollouts have none.

    Args:
        query, key, value: [B, heads, L, D]; keys and values may have fewer heads.

    Returns:
        [B, L, heads, D], as transformers wants it.

    Raises:
        ValueError: the model wants more of it than this.
    """
    _check_known(module, more, attention_mask)
    sizes = [num * width for num, width in blocks.shapes]
    laid_out = (torch.split(blocks.lay_out(s.transpose(1, 2).flatten(0, 1)), sizes) for s in (query, key, value))
    seen = []
    for (num, width), *block in zip(blocks.shapes, *laid_out, strict=True):
        heads = (states.view(num, width, *states.shape[1:]).transpose(1, 2) for states in block)
        window = _window(width, sliding_window, query.device)
        seen.append(sdpa_attention_forward(module, *heads, window, scaling=scaling, is_causal=True)[0].flatten(0, 1))
    states = blocks.take_back(torch.cat(seen))
    return states.view(query.shape[0], query.shape[2], *states.shape[1:]), None


def _window(width: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """[width, width] what a sequence's tokens see; None: all before them."""
    if sliding_window is None or width <= sliding_window:
        return None
    return torch.ones(width, width, dtype=torch.bool, device=device).tril().triu(1 - sliding_window)


def _check_known(module: nn.Module, more: Mapping[str, Any], attention_mask: Tensor | None) -> None:
    kind = type(module).__name__
    if wanted := [name for name in UNKNOWN if more.get(name) is not None]:
        raise ValueError(f"model.path: {kind} asks its attention for {', '.join(wanted)}, takes a model that does not")
    if attention_mask is not None:
        raise ValueError(f"model.attention: takes sdpa with {kind}, which has a mask of its own")


LAYOUTS: dict[str, Callable[[NDArray, torch.device], dict[str, Any]]] = {
    "varlen": bounds,
    "flash_attention_2": bounds,
    "packed_sdpa": blocks_of,
    "sdpa": lambda *_: {},
}
"""What each attention must know of a micro-batch: position_ids [B, L] -> keyword arguments for a model's forward."""
AttentionInterface.register("varlen", varlen)
AttentionInterface.register("packed_sdpa", packed_sdpa)
AttentionMaskInterface.register("varlen", flash_attention_mask)  # none
AttentionMaskInterface.register("packed_sdpa", flash_attention_mask)

"""Attention over packed rows by the flash attention that comes with torch: nothing to build, no padding, no mask.

Importing this registers `varlen` among transformers' attention implementations.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

UNKNOWN = ("s_aux", "softcap", "position_bias")
"""What some models ask of their attention, and would go without unnoticed."""
LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of transformer layers that know sequences apart."""


def check_packs(model: PreTrainedModel) -> None:
    """Refuse a model that cannot have its rows packed.

    Raises:
        ValueError: sequences that lie end to end would see each other, as in layers with a state.
    """
    layers = set(getattr(model.config, "layer_types", None) or ())
    knows_how = model._supports_flash_attn and model._supports_attention_backend
    if not knows_how or model._is_stateful or layers - LAYERS:
        raise ValueError(f"model.attention: takes sdpa with {type(model).__name__}, which cannot have its rows packed")


def bounds(position_ids: NDArray, device: torch.device) -> dict[str, Any]:
    """Where the sequences of a packed row begin, as transformers' flash attention and ours take it.

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
    wanted = [name for name in UNKNOWN if more.get(name) is not None]
    if attention_mask is not None or wanted or value.shape[-1] != query.shape[-1]:
        what = ", ".join(wanted) or "a mask or values of another size than keys"
        raise ValueError(f"model.attention: got varlen, takes sdpa: {type(module).__name__} asks for {what}")
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


AttentionInterface.register("varlen", varlen)
AttentionMaskInterface.register("varlen", flash_attention_mask)  # none

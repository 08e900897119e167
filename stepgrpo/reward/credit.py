"""From rewards to advantages: what each response of a group earned relative to its siblings."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]

EPSILON = 1e-6
"""Added to a standard deviation before dividing by it."""


def advantages(rewards: Sequence[ArrayLike], normalization: Literal["std", "none", "batch"] = "std") -> list[Floats]:
    """Advantages of a batch of groups: each group's rewards less their mean, on the scale ``normalization`` names.

    ``std``: divided by the group's sample standard deviation (ddof 1), GRPO's and the paper's. Every group that has any
    spread gets the same weight, however small the spread.

    ``none``: not divided (Dr. GRPO, arXiv 2503.20783). The reward's own scale is the advantage's.

    ``batch``: divided by one number for the whole batch, the pooled within-group standard deviation: the root of the
    batch's summed squared deviations from the group means over (responses - groups), the degrees of freedom that are
    left once every group has spent one on its mean. Unlike ``std``, it keeps a group that nearly agrees small beside
    one that does not; unlike ``none``, it is free of the reward's scale. One group alone gives what ``std`` gives.

    Groups whose rewards are exactly equal get exactly 0.

    Args:
        rewards: One [G] array per group; groups may differ in size.

    Returns:
        One float64 [G] array per group.

    Raises:
        ValueError: a group of fewer than two rewards, which has nothing to be relative to.
    """
    centred = [_centre(np.asarray(r, np.float64)) for r in rewards]
    match normalization:
        case "none":
            return centred
        case "std":
            return [c / (_pooled_std([c]) + EPSILON) for c in centred]
        case "batch":
            scale = _pooled_std(centred) + EPSILON
            return [c / scale for c in centred]
    raise ValueError(f"normalization: got {normalization!r}, takes std, none or batch")


def has_signal(rewards: ArrayLike) -> bool:
    """Whether one group's rewards [G] differ at all; a group without signal moves nothing."""
    return bool(np.ptp(np.asarray(rewards, np.float64)) > 0)


def _centre(rewards: Floats) -> Floats:
    if rewards.ndim != 1 or len(rewards) < 2:
        raise ValueError(
            f"rewards: got a group of shape {rewards.shape}, takes at least 2 responses per group: raise group_size"
        )
    # The mean of equal numbers may differ from them in its last bit, and 1e-6 would blow that up.
    return rewards - rewards.mean() if has_signal(rewards) else np.zeros_like(rewards)


def _pooled_std(centred: Sequence[Floats]) -> float:
    """Of groups that are centred already; for a single group its sample standard deviation (ddof 1)."""
    squares, freedom = sum(float(c @ c) for c in centred), sum(len(c) - 1 for c in centred)
    return float(np.sqrt(squares / freedom)) if freedom else 0.0

"""Rewards of whole batches of graded groups: the step-aware reward and what it is compared with.

A scheme sees the batch's scalars, because some schemes need more than one group. A new one is a function and a line in
``SCHEMES``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from stepgrpo.config import RewardConfig
    from stepgrpo.types import GradedGroup

Rewards: TypeAlias = NDArray[np.float64]
"""[G] rewards of one group."""

Scheme: TypeAlias = "Callable[[Sequence[GradedGroup]], list[Rewards]]"
"""Graded groups of a batch -> each group's rewards, in the same order."""


def step_aware(
    correct: ArrayLike,
    formatted: ArrayLike,
    num_steps: ArrayLike,
    *,
    alpha: float = 0.9,
    beta: float = 0.5,
    baseline: Literal["correct", "all"] = "correct",
) -> Rewards:
    """Step-aware relative reward of one group (Eq. 4 and 5 of arXiv 2604.16890).

        R = alpha * correct * [1 - beta * tanh((k - mu) / mu)] + (1 - alpha) * formatted

    ``mu`` is the mean number of steps k of the group's correct responses (``baseline="correct"``, the paper's) or of
    all of them. Where none is correct the bracket has nothing to weigh, and R is the format's part alone.

    Args:
        correct: [G] whether the answer is right.
        formatted: [G] whether there is an answer in a box after thinking.
        num_steps: [G] reasoning steps, at least 1 each.

    Returns:
        [G] rewards in [0, 1 + alpha * beta).

    Raises:
        ValueError: the three differ in length, or a response has less than one step.
    """
    correct, formatted, k = np.asarray(correct, bool), np.asarray(formatted, bool), np.asarray(num_steps, np.float64)
    if not (correct.shape == formatted.shape == k.shape and k.ndim == 1 and np.all(k >= 1)):
        raise ValueError(
            f"got correct {correct.shape}, formatted {formatted.shape} and num_steps {k}: "
            "takes one of each per response, and at least one step"
        )
    yardstick = k[correct] if baseline == "correct" else k
    bracket = np.ones_like(k)
    if yardstick.size:
        mu = yardstick.mean()
        bracket -= beta * np.tanh((k - mu) / mu)
    return alpha * correct * bracket + (1 - alpha) * formatted


def outcome_reward(correct: ArrayLike, formatted: ArrayLike, *, alpha: float = 0.9) -> Rewards:
    """Plain GRPO's reward of one group, alpha * correct + (1 - alpha) * formatted: [G] in [0, 1]."""
    return alpha * np.asarray(correct, np.float64) + (1 - alpha) * np.asarray(formatted, np.float64)


def make_scheme(config: RewardConfig) -> Scheme:
    """The scheme that ``config.scheme`` names, with its settings."""
    return SCHEMES[config.scheme](config)


def _step_aware(config: RewardConfig) -> Scheme:
    settings: dict[str, Any] = {"alpha": config.alpha, "beta": config.beta, "baseline": config.baseline}
    return lambda groups: [step_aware(g.correct, g.formatted, g.num_steps, **settings) for g in groups]


def _outcome(config: RewardConfig) -> Scheme:
    return lambda groups: [outcome_reward(g.correct, g.formatted, alpha=config.alpha) for g in groups]


SCHEMES: dict[str, Callable[[RewardConfig], Scheme]] = {"step_aware": _step_aware, "outcome": _outcome}

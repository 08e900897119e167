"""Rewards of whole batches of graded groups: the step-aware reward and what it is compared with.

A scheme sees the graded groups of the whole batch, because some schemes need more than one group. A user's own is a
function ``(groups, config.reward) -> one [G] array per group``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepgrpo.config import ConfigError, is_own
from stepgrpo.plugin import load_own

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


def length_penalty(correct: ArrayLike, num_tokens: ArrayLike, *, alpha: float = 0.4) -> Rewards:
    """Efficient reasoning's reward of one group (Arora and Zanette, arXiv 2502.04463).

        R = correct * [1 - alpha * sigmoid((L - mean L) / (std L + 1e-7))],  mean and std over the correct responses

    Args:
        correct: [G] whether the answer is right.
        num_tokens: [G] response tokens L.

    Returns:
        [G] rewards in [0, 1).
    """
    correct, length = np.asarray(correct, bool), np.asarray(num_tokens, np.float64)
    rewards = np.zeros(len(length))
    if correct.any():
        right = length[correct]
        z = (right - right.mean()) / (right.std() + 1e-7)
        rewards[correct] = 1 - alpha / (1 + np.exp(-z))
    return rewards


def overlong(correct: ArrayLike, num_tokens: ArrayLike, *, max_tokens: int, share: float = 0.2) -> Rewards:
    """Correctness with DAPO's soft overlong punishment, of one group (arXiv 2503.14476, Eq. 13).

    Whatever its correctness, a response loses nothing up to ``(1 - share) * max_tokens`` tokens, and from there
    linearly more, up to 1 at ``max_tokens``.

    Args:
        correct: [G] whether the answer is right.
        num_tokens: [G] response tokens.

    Returns:
        [G] rewards in [-1, 1].
    """
    buffer = share * max_tokens
    ramp = np.clip((np.asarray(num_tokens, np.float64) - (max_tokens - buffer)) / buffer, 0, 1)
    return np.asarray(correct, np.float64) - ramp


def easy_length_penalty(
    correct: Sequence[ArrayLike], num_tokens: Sequence[ArrayLike], *, alpha: float = 0.4, share: float = 0.2
) -> list[Rewards]:
    """GRPO-lambda's reward of a batch (arXiv 2505.18086): ``length_penalty`` in the most accurate groups, else 0 or 1.

    A model that is not sure of a problem is thereby left the room to think about it.

    Args:
        correct: For each group [G] whether the answer is right.
        num_tokens: For each group [G] response tokens.
        share: Of the groups, rounded to at least one; of equally accurate groups the earlier.

    Returns:
        Each group's [G] rewards.
    """
    accuracy = np.array([np.asarray(c, bool).mean() for c in correct])
    easy = set(np.argsort(-accuracy, kind="stable")[: max(1, round(share * len(accuracy)))].tolist())
    return [
        length_penalty(c, n, alpha=alpha) if i in easy else np.asarray(c, np.float64)
        for i, (c, n) in enumerate(zip(correct, num_tokens, strict=True))
    ]


def make_scheme(config: RewardConfig, max_tokens: int) -> Scheme:
    """The scheme that ``config.scheme`` names, with its settings.

    Args:
        max_tokens: token limit of a response.

    Raises:
        ConfigError: the user's own cannot be imported.
    """
    if is_own(config.scheme):
        return _own(config)
    match config.scheme:
        case "step_aware":
            settings: dict[str, Any] = {"alpha": config.alpha, "beta": config.beta, "baseline": config.baseline}
            return lambda groups: [step_aware(g.correct, g.formatted, g.num_steps, **settings) for g in groups]
        case "outcome":
            return lambda groups: [outcome_reward(g.correct, g.formatted, alpha=config.alpha) for g in groups]
        case "length_penalty":
            return lambda groups: [length_penalty(g.correct, g.num_tokens, alpha=config.length_alpha) for g in groups]
        case "overlong":
            ramp: dict[str, Any] = {"max_tokens": max_tokens, "share": config.overlong_share}
            return lambda groups: [overlong(g.correct, g.num_tokens, **ramp) for g in groups]
        case "easy_length_penalty":
            easy: dict[str, Any] = {"alpha": config.length_alpha, "share": config.easy_share}
            return lambda groups: easy_length_penalty(
                [g.correct for g in groups], [g.num_tokens for g in groups], **easy
            )
    raise ValueError(f"reward.scheme: got {config.scheme!r}")


def _own(config: RewardConfig) -> Scheme:
    """A user's scheme, whose rewards are looked at before they can harm."""
    scheme = load_own(config.scheme, "reward.scheme")

    def checked(groups: Sequence[GradedGroup]) -> list[Rewards]:
        rewards = [np.asarray(r, np.float64) for r in scheme(groups, config)]
        wanted = [(len(g.facts),) for g in groups]
        if [r.shape for r in rewards] != wanted or not all(np.isfinite(r).all() for r in rewards):
            raise ConfigError(
                f"reward.scheme: {config.scheme} returned arrays of shapes {[r.shape for r in rewards]}; takes one "
                f"finite reward per trajectory of each group, {wanted}"
            )
        return rewards

    return checked

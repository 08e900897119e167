"""Functions of one's own, one or two of each kind. Copy one into a module of yours and name it in the config; what each
is given and must return: docs/extending.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from stepgrpo.actors.truncation import Answer, Preset, Trigger
from stepgrpo.config import ProbeConfig, RewardConfig, RolloutConfig
from stepgrpo.reward.outcome import extract_answer
from stepgrpo.reward.schemes import Rewards, outcome_reward
from stepgrpo.reward.steps import PatternRule
from stepgrpo.tokens import Codec
from stepgrpo.types import GradedGroup


def step_price(groups: Sequence[GradedGroup], config: RewardConfig) -> list[Rewards]:
    """`reward.scheme`: every step after the first costs the same, however many the rest of the group took.

    `reward.options`: `price`, the share of a right answer's reward that one step costs.
    """
    price = float(config.options.get("price", 0.05))
    return [
        outcome_reward(g.correct * np.maximum(0, 1 - price * (g.num_steps - 1)), g.formatted, alpha=config.alpha)
        for g in groups
    ]


def within_one_percent(response: str, truth: str) -> bool:
    """`reward.grader`: right are numbers, with blanks between them, that are off by 1 % at most. A truth that is no
    number raises, and so counts as a failure of the grader, not of the response."""
    expected = [float(number) for number in truth.split()]
    try:
        found = [float(number) for number in (extract_answer(response) or "none").split()]
    except ValueError:
        return False
    return len(found) == len(expected) and all(map(partial(math.isclose, rel_tol=0.01), found, expected))


class FixedBudget:
    """`rollout.probe.policy`: thinking ends after a fixed number of steps, without asking for an answer.

    `rollout.probe.options`: `steps`.
    """

    def __init__(self, config: ProbeConfig, preset: Preset, codec: Codec) -> None:
        self._steps = int(config.options["steps"])

    def question(self, trigger: Trigger) -> tuple[int, ...] | None:
        return None

    def hopeless(self, logprobs: Sequence[float]) -> bool:
        return False

    def confident(self, answers: Sequence[Answer]) -> bool:
        return len(answers) == self._steps


class Consistency:
    """`rollout.probe.policy`: thinking ends where the same tentative answer came several times in a row.

    `rollout.probe.options`: `times`.
    """

    def __init__(self, config: ProbeConfig, preset: Preset, codec: Codec) -> None:
        self._times = int(config.options.get("times", 3))
        self._question = tuple(codec.encode(preset.inducer))

    def question(self, trigger: Trigger) -> tuple[int, ...] | None:
        return self._question

    def hopeless(self, logprobs: Sequence[float]) -> bool:
        return False

    def confident(self, answers: Sequence[Answer]) -> bool:
        last = answers[-self._times :]
        return len(last) == self._times and len({a.token_ids for a in last}) == 1


SENTENCE = r"(?:(?<=[.!?]\s)|(?<=[.!?]\n\n))[A-Z]"


def pattern(config: RolloutConfig) -> PatternRule:
    """`rollout.step_rule`: a step opens where a regular expression matches; with none given, with each sentence.

    `rollout.options`: `pattern`, and as `reach` the most characters that it spans or looks at.
    """
    return PatternRule(config.options.get("pattern", SENTENCE), reach=int(config.options.get("reach", 64)))

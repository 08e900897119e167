"""Plain decoding of held-out problems, and what the graded responses say about a checkpoint, with 95 % intervals."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepgrpo.types import GradedGroup, Prompt, TrajectoryFacts

NUM_RESAMPLES = 2000
CHUNK = 25
"""Problems of one call to a worker: few enough for a progress bar that moves."""


async def decode(
    workers: Sequence[Any], prompts: Sequence[Prompt], progress: Callable[[int], None] = lambda done: None
) -> list[GradedGroup]:
    """Let rollout workers answer ``prompts`` by plain decoding; one graded group per problem, in their order.

    The weights are those the workers hold: the caller sees to it that none loads others meanwhile.

    Args:
        workers: handles of ``actors.worker.RolloutWorker`` actors.
        progress: told the number of finished problems.
    """
    done = 0

    async def one(worker: Any, chunk: Sequence[Prompt]) -> list[GradedGroup]:
        nonlocal done
        graded: list[GradedGroup] = await worker.evaluate.remote(list(chunk))
        done += len(chunk)
        progress(done)
        return graded

    chunks = [prompts[i : i + CHUNK] for i in range(0, len(prompts), CHUNK)]
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one(workers[i % len(workers)], chunk)) for i, chunk in enumerate(chunks)]
    return [g for t in running for g in t.result()]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def scaled(self, factor: float) -> Estimate:
        return Estimate(self.mean * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Plain decoding of held-out problems by one version of the weights."""

    version: int
    problems: int
    samples: int
    """Responses per problem."""
    accuracy: Estimate
    tokens: Estimate
    """Response tokens."""
    steps: Estimate
    incomplete: float
    """Share of responses that hit the token budget."""
    grader_failures: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluation(groups: Sequence[GradedGroup], *, version: int, seconds: float) -> Evaluation:
    """Summarise graded responses, one group per problem."""
    facts = [f for g in groups for f in g.facts]
    resample = _resamples(len(groups))

    def estimate(select: Callable[[TrajectoryFacts], float]) -> Estimate:
        return _interval(_per_problem(groups, select), resample)

    return Evaluation(
        version=version,
        problems=len(groups),
        samples=len(groups[0].facts),
        accuracy=estimate(lambda f: f.correct),
        tokens=estimate(lambda f: f.num_tokens),
        steps=estimate(lambda f: f.num_steps),
        incomplete=float(np.mean([not f.complete for f in facts])),
        grader_failures=sum(f.error is not None for f in facts),
        seconds=seconds,
    )


def compression(before: Sequence[GradedGroup], after: Sequence[GradedGroup]) -> Estimate:
    """Tokens after over tokens before, paired by problem: the interval resamples problems, not responses.

    Raises:
        ValueError: the two are not of the same problems.
    """
    if [g.key for g in before] != [g.key for g in after]:
        raise ValueError("compression compares evaluations of the same problems; these differ")
    a, b = (_per_problem(x, lambda f: f.num_tokens) for x in (after, before))
    resample = _resamples(len(before))
    ratios = a[resample].mean(1) / b[resample].mean(1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Estimate(float(a.mean() / b.mean()), float(low), float(high))


def _per_problem(groups: Sequence[GradedGroup], select: Callable[[TrajectoryFacts], float]) -> NDArray[np.float64]:
    return np.array([np.mean([select(f) for f in g.facts]) for g in groups], float)


def _resamples(n: int) -> NDArray[np.int64]:
    """[NUM_RESAMPLES, n]: the same resamples for every quantity, so that a table does not jitter between columns."""
    return np.random.default_rng(0).integers(0, n, (NUM_RESAMPLES, n))


def _interval(values: NDArray[np.float64], resample: NDArray[np.int64]) -> Estimate:
    low, high = np.percentile(values[resample].mean(1), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))

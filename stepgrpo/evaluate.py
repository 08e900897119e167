"""Answers to held-out problems, and what they say about a checkpoint, with 95 % intervals."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stepgrpo.config import ConfigError, brief
from stepgrpo.metrics import ExitCounts
from stepgrpo.types import Exit, GradedGroup, Prompt, TrajectoryFacts

NUM_RESAMPLES = 2000
What = Literal["correct", "tokens", "steps", "probe_tokens", "decoded"]
"""A field of ``Answers``, or ``decoded``: the response's tokens and those of its probes, which is what it costs."""
COLUMNS: dict[str, What] = {
    "accuracy": "correct",
    "tokens": "tokens",
    "steps": "steps",
}
"""Name of a figure -> what it is the mean of."""
CHUNK = 25
"""Problems of one call to a worker: few enough for a progress bar that moves."""


async def decode(
    ask: Callable[[Callable[[Any], Awaitable[Any]]], Awaitable[Any]],
    prompts: Sequence[Prompt],
    progress: Callable[[int, int], None] | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
) -> list[GradedGroup]:
    """Let rollout workers answer ``prompts`` as `eval` says; one graded group per problem, in their order.

    The weights are those the workers hold: the caller sees to it that none loads others meanwhile.

    Args:
        ask: lets one of several ``actors.worker.RolloutWorker`` actors answer, see ``pool.Pool.ask``.
        progress: told the number of finished problems, and of all.
        keep: given each problem's answers with their texts (``actors.describe``), in order of arrival.
    """
    done = 0

    async def one(chunk: Sequence[Prompt]) -> list[GradedGroup]:
        nonlocal done
        answered: list[tuple[GradedGroup, Any]] = await ask(lambda w: w.evaluate.remote(list(chunk), keep is not None))
        done += len(chunk)
        if progress:
            progress(done, len(prompts))
        if keep:
            for _, description in answered:
                keep(description)
        return [graded for graded, _ in answered]

    chunks = [prompts[i : i + CHUNK] for i in range(0, len(prompts), CHUNK)]
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one(chunk)) for chunk in chunks]
    return [g for t in running for g in t.result()]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, mean: float, draws: NDArray[np.float64]) -> Estimate:
        """``draws``: resamples of the mean."""
        low, high = np.percentile(draws, [2.5, 97.5])
        return cls(float(mean), float(low), float(high))


@dataclass(frozen=True, slots=True)
class Answers:
    """What is kept of an evaluation to compare it with others: for each problem, one entry per response."""

    key: list[str]
    correct: list[list[int]]
    tokens: list[list[int]]
    steps: list[list[int]]
    probe_tokens: list[list[int]] = field(default_factory=list)
    """Empty: nothing was probed."""

    @classmethod
    def of(cls, groups: Sequence[GradedGroup]) -> Answers:
        probed = any(f.probe_tokens for g in groups for f in g.facts)
        return cls(
            key=[g.key for g in groups],
            correct=[[int(f.correct) for f in g.facts] for g in groups],
            tokens=[[f.num_tokens for f in g.facts] for g in groups],
            steps=[[f.num_steps for f in g.facts] for g in groups],
            probe_tokens=[[f.probe_tokens for f in g.facts] for g in groups] if probed else [],
        )

    def means(self, what: What) -> NDArray[np.float64]:
        """[problems]"""
        if what == "decoded":
            tokens = self.means("tokens")
            return tokens + self.means("probe_tokens") if self.probe_tokens else tokens
        return np.array([np.mean(values) for values in getattr(self, what)], float)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out problems answered by one version of the weights."""

    version: int
    problems: int
    samples: int
    """Responses per problem."""
    accuracy: Estimate
    """Of one response: with several samples per problem, mean@k."""
    pass_at: dict[int, Estimate]
    """k -> chance that one of k responses is right, k up to ``samples``."""
    tokens: Estimate
    """Response tokens."""
    steps: Estimate
    probe_tokens: float
    """Decoded for probes, per response; 0 for plain decoding. They come on top of ``tokens``."""
    exited: float
    """Share of responses that a confident probe ended."""
    incomplete: float
    """Share of responses that hit the token budget."""
    grader_failures: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """As JSON gives it back, whose keys are texts."""
        return asdict(self) | {"pass_at": {str(k): asdict(e) for k, e in self.pass_at.items()}}


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
        pass_at={
            k: _interval(np.array([_pass_at(k, [f.correct for f in g.facts]) for g in groups]), resample)
            for k in range(1, len(groups[0].facts) + 1)
            if k & (k - 1) == 0 or k == len(groups[0].facts)
        },
        tokens=estimate(lambda f: f.num_tokens),
        steps=estimate(lambda f: f.num_steps),
        probe_tokens=float(np.mean([f.probe_tokens for f in facts])),
        exited=float(np.mean([f.exit is Exit.CONFIDENT for f in facts])),
        incomplete=float(np.mean([not f.complete for f in facts])),
        grader_failures=sum(f.error is not None for f in facts),
        seconds=seconds,
    )


def shown(result: Evaluation) -> str:
    """The gist, for a line on the screen."""
    return f"accuracy {result.accuracy.mean:.1%}  tokens {result.tokens.mean:.1f}  steps {result.steps.mean:.2f}"


def compression(before: Answers, after: Answers) -> Estimate:
    """Decoded tokens after over those before, probes included, paired by problem: the interval resamples problems, not
    responses.

    Raises:
        ValueError: the two are not of the same problems.
    """
    if before.key != after.key:
        raise ValueError("compression compares evaluations of the same problems; these differ")
    a, b = after.means("decoded"), before.means("decoded")
    resample = _resamples(len(a))
    return Estimate.of(a.mean() / b.mean(), a[resample].mean(1) / b[resample].mean(1))


def record(results: dict[str, tuple[Evaluation, Answers]], before: dict[str, Answers]) -> dict[str, Any]:
    """Everything that is kept of an evaluation of several benchmarks.

    Args:
        before: answers of another evaluation to the same problems, by benchmark; {}: nothing to compare with.
    """
    benchmarks: dict[str, Any] = {}
    for name, (result, answers) in results.items():
        benchmarks[name] = {**result.as_dict(), "answers": answers.as_dict()}
        if before:
            benchmarks[name]["share"] = asdict(compression(before[name], answers))
    mean = {k: asdict(macro([a for _, a in results.values()], w)) for k, w in COLUMNS.items()}
    if before:
        mean["share"] = asdict(macro_ratio([before[name] for name in results], [a for _, a in results.values()]))
    return {"benchmarks": benchmarks, "mean": mean}


def read_answers(path: Path) -> dict[str, Answers]:
    """What ``record`` kept, by benchmark.

    Raises:
        ConfigError: it is not such a file.
    """
    try:
        return {n: Answers(**b["answers"]) for n, b in json.loads(path.read_text())["benchmarks"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConfigError(f"--reference: {path}: takes the --output of `stepgrpo eval` ({brief(e)})") from None


def macro(answers: Sequence[Answers], what: What) -> Estimate:
    """Mean over benchmarks of their means, each weighing the same; the interval resamples problems within each."""
    return Estimate.of(*_macro(answers, what))


def macro_ratio(before: Sequence[Answers], after: Sequence[Answers]) -> Estimate:
    """Mean decoded tokens over benchmarks after over before, paired by problem."""
    (a, resampled_a), (b, resampled_b) = _macro(after, "decoded"), _macro(before, "decoded")
    return Estimate.of(a / b, resampled_a / resampled_b)


def _macro(answers: Sequence[Answers], what: What) -> tuple[float, NDArray[np.float64]]:
    """Mean over benchmarks, and [NUM_RESAMPLES] of its resamples."""
    means = [a.means(what) for a in answers]
    resampled = [m[_resamples(len(m), seed=i)].mean(1) for i, m in enumerate(means)]
    return float(np.mean([m.mean() for m in means])), np.mean(resampled, axis=0)


def exit_cost(counts: Sequence[ExitCounts]) -> Estimate | None:
    """Accuracy of control samples less that of samples that may be cut, over the batches that have both; the interval
    resamples batches. None where there is no such batch.
    """
    a = np.array([c for c in counts if c.control and c.treated], float)
    if not len(a):
        return None
    drawn = a[_resamples(len(a))].sum(1)  # [NUM_RESAMPLES, 4]

    def cost(sums: NDArray[np.float64]) -> Any:
        control, control_right, treated, treated_right = sums.T
        return control_right / control - treated_right / treated

    return Estimate.of(cost(a.sum(0)), cost(drawn))


def _pass_at(k: int, correct: Sequence[bool]) -> float:
    """Unbiased (arXiv 2107.03374): the share of all k-subsets of a problem's responses that hold a right one."""
    n, c = len(correct), sum(correct)
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def _per_problem(groups: Sequence[GradedGroup], select: Callable[[TrajectoryFacts], float]) -> NDArray[np.float64]:
    return np.array([np.mean([select(f) for f in g.facts]) for g in groups], float)


def _resamples(n: int, seed: int = 0) -> NDArray[np.int64]:
    """[NUM_RESAMPLES, n]: the same resamples for every quantity, so that a table does not jitter between columns."""
    return np.random.default_rng(seed).integers(0, n, (NUM_RESAMPLES, n))


def _interval(values: NDArray[np.float64], resample: NDArray[np.int64]) -> Estimate:
    return Estimate.of(values.mean(), values[resample].mean(1))

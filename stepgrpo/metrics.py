"""Named floats: what each means, how it follows from a batch, and where it is written.

`METRICS` is the one list of names; docs/metrics.md is made from it, and `RunLog` refuses a name that is not in it.
Names are `part/quantity`. What depends on the clock or on timing lives under `time/`, `rate/` and `discarded/` alone:
everything else is the same in two runs with one seed, where `max_staleness` is 0 and the arithmetic is float32 on CPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from stepgrpo.tracking import Tracker
from stepgrpo.types import Exit, GradedGroup, TrajectoryFacts, Verdict

METRICS: dict[str, str] = {
    "update": "Optimizer updates done, this one included.",
    "batch": "Rollout batch, from 0; also the version of the weights that trained on it.",
    "restart": "How often the run was begun before.",
    "epoch": "Passes over the training problems when the batch closed.",
    "reward/mean": "Mean reward of the update's trajectories.",
    "reward/std": "Standard deviation of the rewards within their groups, averaged over groups.",
    "reward/accuracy": "Share of correct responses.",
    "reward/format": "Share of responses with a boxed answer after thinking.",
    "reward/step_factor": "Mean, over correct responses, of what accuracy was multiplied by because of its steps.",
    "reward/signal": "Share of groups whose rewards are not all equal: only those teach.",
    "reward/filtered": "Groups without signal that were replaced, in the whole batch (`train.refill`).",
    "reward/missing": "Groups the batch is short of, because `train.refill_limit` was reached.",
    "reward/grader_failures": "Responses the grader failed on (time, memory, unreadable truth); counted as wrong.",
    "accuracy/exited": "Accuracy of trajectories that a confident probe ended.",
    "accuracy/natural": "Accuracy of trajectories that closed thinking themselves, control samples included.",
    "accuracy/control": "Accuracy of control samples, which are never cut.",
    "accuracy/treated": "Accuracy of all samples that may be cut: against `accuracy/control`, what exits cost.",
    "rollout/steps": "Mean number of reasoning steps.",
    "rollout/tokens": "Mean response tokens.",
    "rollout/tokens_per_step": "Response tokens over steps: it rises when the policy stops SAYING the trigger.",
    "rollout/tokens_max": "Longest response.",
    "rollout/incomplete": "Share of responses that hit the token budget.",
    "rollout/tokens_saved": "Mean tokens of control samples minus tokens and probe tokens of the others.",
    "exit/natural": "Share of trajectories whose thinking the model closed.",
    "exit/confident": "Share that a confident probe closed.",
    "exit/budget": "Share that the token budget closed.",
    "exit/eos": "Share that ended inside thinking.",
    "exit/repetition": "Share closed for repeating themselves.",
    "probe/per_trajectory": "Answered probes per trajectory.",
    "probe/tokens": "Tokens decoded for answered probes, per trajectory.",
    "probe/confident": "Share of answered probes that ended thinking.",
    "probe/stale": "Share of probes answered by other weights than had thought; they count as declined.",
    "probe/confidence_p10": "10 % quantile of the confidence of probes read to their end.",
    "probe/confidence_p50": "Its median.",
    "probe/confidence_p90": "Its 90 % quantile.",
    "closing/logprob": "Mean log-probability of a confident exit's closing: would the policy have stopped there?",
    "closing/logprob_rewarded": "The same, where the advantage is positive.",
    "closing/logprob_punished": "The same, where it is negative. Pushing unlikely tokens down is unbounded: watch it.",
    "policy/loss": "Loss of the update.",
    "policy/grad_norm": "Gradient norm before clipping.",
    "policy/lr": "Learning rate.",
    "policy/entropy": "Mean entropy of the policy at the trained tokens, in nats.",
    "policy/kl": "Mean k3 estimate of the KL divergence from the original model, in nats per token.",
    "policy/clipped_low": "Share of tokens clipped below.",
    "policy/clipped_high": "Share of tokens clipped above.",
    "policy/dual_clipped": "Share of tokens bounded by the dual clip.",
    "policy/loss_tokens": "Tokens the loss read.",
    "policy/skipped": "1 if the update was skipped because its loss or gradient was not finite.",
    "importance/mean": "Mean importance weight old/behaviour before its cap.",
    "importance/capped": "Share of tokens at the cap.",
    "mismatch/mean": "Mean |log p| difference of vLLM and learner, on tokens sampled under the learner's own version.",
    "mismatch/max": "The largest.",
    "staleness/mean": "Versions between a trajectory's oldest token and its update.",
    "staleness/max": "The largest; never above `train.max_staleness`.",
    "staleness/mixed": "Share of trajectories during which weights changed; 0 without `rollout.in_flight_updates`.",
    "discarded/tokens": "Tokens decoded and thrown away: past a cut, and for probes that an earlier decision overtook.",
    "time/checkpoint": "Seconds from the batch's end to a committed checkpoint, of the last one.",
    "checkpoint/bytes": "Size of the last checkpoint.",
    "checkpoint/failed": "Checkpoints that could not be written, so far.",
    "store/spilled": "Bytes that object stores, for want of memory, have written to disk so far.",
    "workers/up": "Rollout workers that sample, when the batch is done.",
    "workers/deaths": "Rollout workers lost so far; `events.jsonl` says which and why.",
    "weights/bytes": "Bytes of one published version.",
    "weights/sent": "Bytes put into the object store for it; fewer with `learner.full_every`, all after a restart.",
    "weights/delta": "Share of the version of which only what changed was put there.",
    "time/batch": "Seconds from the previous batch's end to this one's. Times stand on a batch's last update.",
    "time/wait": "Seconds the learner waited for the batch to close.",
    "time/generate": "Seconds in which at least one rollout was in flight.",
    "time/grade": "Seconds spent grading, summed over groups; it overlaps with generation.",
    "time/train": "Seconds of the updates.",
    "time/publish": "Seconds to put the new weights into the object store.",
    "time/sync": "Seconds from there until the slowest engine held the version before: engines decode for most of it.",
    "time/paused": "Seconds the slowest engine stood still for it.",
    "rate/tokens": "Response tokens per second.",
}

Floats = NDArray[np.floating[Any]]


def of_groups(groups: Sequence[GradedGroup], rewards: Sequence[Floats], version: int, alpha: float) -> dict[str, float]:
    """Metrics of the groups of one update, trained under weights ``version``."""
    facts = [f for g in groups for f in g.facts]
    reward = np.concatenate([np.asarray(r, float) for r in rewards])

    def mean(select: Callable[[TrajectoryFacts], float], of: Sequence[TrajectoryFacts] = facts) -> float:
        return float(np.mean([select(f) for f in of])) if of else math.nan

    correct = np.array([f.correct for f in facts])
    formatted = np.array([f.formatted for f in facts], float)
    probes = [p for f in facts for p in zip(f.probe_confidences, f.probe_verdicts, strict=True)]
    answered = [(c, v) for c, v in probes if v is not Verdict.UNUSED]
    read = [c for c, _ in answered if not math.isnan(c)]
    treated = [f for f in facts if not f.control]
    control = [f for f in facts if f.control]
    stale = [version - f.oldest_version for f in facts]
    return {
        "reward/mean": float(reward.mean()),
        "reward/std": float(np.mean([np.std(r, ddof=1) for r in rewards])),
        "reward/accuracy": float(correct.mean()),
        "reward/format": float(formatted.mean()),
        "reward/signal": float(np.mean([np.ptp(r) > 0 for r in rewards])),
        "reward/step_factor": _ratio((reward - (1 - alpha) * formatted)[correct].sum(), alpha * correct.sum()),
        "reward/grader_failures": float(sum(f.error is not None for f in facts)),
        "accuracy/exited": mean(lambda f: f.correct, [f for f in facts if f.exit is Exit.CONFIDENT]),
        "accuracy/natural": mean(lambda f: f.correct, [f for f in facts if f.exit is Exit.NATURAL]),
        "accuracy/control": mean(lambda f: f.correct, control),
        "accuracy/treated": mean(lambda f: f.correct, treated),
        "rollout/steps": mean(lambda f: f.num_steps),
        "rollout/tokens": mean(lambda f: f.num_tokens),
        "rollout/tokens_per_step": _ratio(sum(f.num_tokens for f in facts), sum(f.num_steps for f in facts)),
        "rollout/tokens_max": float(max(f.num_tokens for f in facts)),
        "rollout/incomplete": mean(lambda f: not f.complete),
        "rollout/tokens_saved": mean(lambda f: f.num_tokens, control)
        - mean(lambda f: f.num_tokens + f.probe_tokens, treated),
        **{f"exit/{e.value}": float(np.mean([f.exit is e for f in facts])) for e in Exit},
        "probe/per_trajectory": len(answered) / len(facts),
        "probe/tokens": mean(lambda f: f.probe_tokens),
        "probe/confident": _ratio(sum(v is Verdict.CONFIDENT for _, v in answered), len(answered)),
        "probe/stale": _ratio(sum(v is Verdict.STALE for _, v in answered), len(answered)),
        **{f"probe/confidence_p{q}": float(np.percentile(read, q)) if read else math.nan for q in (10, 50, 90)},
        "staleness/mean": float(np.mean(stale)),
        "staleness/max": float(np.max(stale)),
        "staleness/mixed": float(np.mean([f.newest_version > f.oldest_version for f in facts])),
        "discarded/tokens": float(sum(f.discarded_tokens for f in facts)),
    }


def probes_of(groups: Sequence[GradedGroup]) -> dict[str, list[Any]]:
    """Confidence, verdict, and whether the tentative answer was right, of every probe that was read to its end."""
    read = [
        (round(c, 4), v.value, int(right))
        for g in groups
        for f in g.facts
        for c, v, right in zip(f.probe_confidences, f.probe_verdicts, f.probe_correct, strict=True)
        if right is not None and not math.isnan(c)
    ]
    return {
        "confidence": [c for c, _, _ in read],
        "verdict": [v for _, v, _ in read],
        "correct": [right for _, _, right in read],
    }


class ExitCounts(NamedTuple):
    """What a batch says about the cost of exits: control samples are a random share of the same groups."""

    control: int
    control_right: int
    treated: int
    treated_right: int


def exit_counts(groups: Sequence[GradedGroup]) -> ExitCounts:
    facts = [f for g in groups for f in g.facts]
    control, treated = [f for f in facts if f.control], [f for f in facts if not f.control]
    return ExitCounts(len(control), sum(f.correct for f in control), len(treated), sum(f.correct for f in treated))


class TriggerWatch:
    """Notices a policy that stops SAYING its trigger without getting shorter: fewer steps of the same length in all."""

    FELL = 0.15
    """Share by which steps must have fallen."""
    FOLLOWS = 1 / 3
    """Least part of it by which tokens must have fallen too."""

    def __init__(self, window: int) -> None:
        """``window``: observations that are averaged, the first ones against the last."""
        self._window = window
        self._seen: list[tuple[float, float]] = []
        self._told = False

    def see(self, steps: float, tokens: float) -> str | None:
        """Take the next means; returns what to tell the user, once."""
        self._seen.append((steps, tokens))
        if self._told or len(self._seen) < 2 * self._window:
            return None
        first, last = (np.mean(part, axis=0) for part in (self._seen[: self._window], self._seen[-self._window :]))
        steps_fell, tokens_fell = 1 - last / first
        if steps_fell < self.FELL or tokens_fell > self.FOLLOWS * steps_fell:
            return None
        self._told = True
        return (
            f"steps fell by {steps_fell:.0%}, tokens by {tokens_fell:.0%}: the policy may have stopped saying its "
            "trigger instead of thinking less; compare rollout/tokens_per_step, and ask `stepgrpo triggers` what it "
            "says now"
        )


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """With None for a figure that is not finite, which JSON cannot say."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _ratio(a: float, b: float) -> float:
    return float(a) / float(b) if b else math.nan


class RunLog:
    """Appends one JSON line per update to ``metrics.jsonl``, and mirrors it to Weights & Biases if there is a tracker.

    A quantity that does not exist in an update (the accuracy of control samples where there are none) is null.
    """

    def __init__(self, directory: Path, tracker: Tracker | None = None) -> None:
        self._file = (directory / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
        self._tracker = tracker

    def write(self, values: Mapping[str, float]) -> None:
        unknown = sorted(values.keys() - METRICS.keys())
        assert not unknown, f"metrics without a description in METRICS: {unknown}"
        clean = finite(values)
        self._file.write(json.dumps(clean) + "\n")
        if self._tracker:
            self._tracker.log(clean, int(values["update"]))

    def evaluation(self, values: Mapping[str, float], update: int) -> None:
        """Mirror an evaluation; the file of record is ``evaluations.jsonl``."""
        if self._tracker:
            self._tracker.log(values, update)

    def sample(self, line: Mapping[str, Any], update: int) -> None:
        """Mirror a line of ``samples.jsonl``."""
        if self._tracker:
            self._tracker.sample(line, update)

    def close(self, *, patient: bool = True) -> None:
        """``patient``: wait until all is uploaded; a run that ends early has no time for it."""
        self._file.close()
        if self._tracker:
            self._tracker.close(patient)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        self.close(patient=failed is None)

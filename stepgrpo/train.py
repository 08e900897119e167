"""The loop. It holds references and scalars, never a token.

    PromptStream --draw--> RolloutWorker.roll --> group (stays in that node's object store)
                               ^                    |
              Ledger.may_admit |                    v ref
        (bounds staleness, by  |              LearnerWorker.ingest --> GradedGroup (scalars)
         the version the worker|                    |
         holds)                |                    v
                               |              Ledger.settle ... Ledger.close: first N groups in draw order
                               |                    |
                               |                    v   rewards, advantages, ONE plan for all ranks
        RolloutWorker.load <---+--- publish <-- LearnerWorker.update
        (one version at a time per worker; an evaluation holds its workers' versions until it is done)

In flight: draws the ledger has admitted. What waits for what: admission for a worker's place and version (woken by a
finished rollout, a closed batch or a loaded version); the learner for the next batch's draws to settle (woken by
`settle`); a worker's `load` for an evaluation's end.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError

from stepgrpo import metrics
from stepgrpo.admission import ClosedBatch, Ledger
from stepgrpo.config import Config
from stepgrpo.console import Display, Phase, clock
from stepgrpo.data import PromptStream
from stepgrpo.evaluate import Answers, Evaluation, decode, evaluation, shown
from stepgrpo.launch import together
from stepgrpo.learner.batch import Plan, make_plan
from stepgrpo.reward.credit import advantages, has_signal
from stepgrpo.reward.schemes import make_scheme
from stepgrpo.rundir import append_json
from stepgrpo.types import GradedGroup, Prompt, WeightVersion


class TrainError(RuntimeError):
    """The run cannot go on; the message holds the first cause."""


@dataclass(slots=True)
class Seat:
    """What the loop knows of one rollout worker."""

    actor: Any
    capacity: int
    """Groups it works on at the same time."""
    version: int = 0
    in_flight: int = 0
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while its weights change, and by an evaluation while they may not."""


@dataclass(frozen=True, slots=True)
class Settled:
    graded: GradedGroup
    ref: Any


class Loop:
    """One training run over actors that are up."""

    def __init__(
        self,
        config: Config,
        stream: PromptStream,
        held_out: Sequence[Prompt],
        seats: Sequence[Seat],
        ranks: Sequence[Any],
        display: Display,
        log: metrics.RunLog,
    ) -> None:
        t = config.train
        self.config, self.stream, self.held_out = config, stream, held_out
        self.seats, self.ranks, self.display, self.log = seats, ranks, display, log
        self.ledger = Ledger(
            num_batches=t.num_batches,
            prompts_per_batch=t.prompts_per_batch,
            max_staleness=t.max_staleness,
            refill_limit=config.refill_limit,
        )
        self.scheme = make_scheme(config.reward, config.rollout.max_response_tokens)
        self.weights: WeightVersion | None = None  # None: version 0, which every engine starts with
        self.settled: dict[int, Settled] = {}
        self.failures = 0
        self.update = 0
        self.exit_counts: list[metrics.ExitCounts] = []
        self.rollout_watch, self.eval_watch = metrics.TriggerWatch(window=20), metrics.TriggerWatch(window=1)
        self.row: dict[str, Any] = {}
        self.last_eval = ""
        self._grader_failed = False
        self._wake = asyncio.Event()
        self._closable = asyncio.Event()
        self._busy_since: float | None = None
        self._busy_seconds = 0.0
        self._pauses: list[float] = []
        self._sync_seconds = math.nan

    async def run(self) -> dict[str, Any]:
        """Train to the end; returns the evaluations before and after, with their answers."""
        c = self.config
        before = await self._evaluate_phase("before", "the starting model")
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            with self.display.phase("train", "training") as phase:
                feeder = tasks.create_task(self._feed())
                started = last = time.monotonic()
                for index in range(c.train.num_batches):
                    batch = await self._closed_batch()
                    waited = time.monotonic() - last
                    await self._train_batch(batch, waited, last)
                    self._show(phase, started, index + 1)
                    if self._eval_due(index + 1):
                        await self._start_evaluation()
                    last = time.monotonic()
                feeder.cancel()
                phase.result = f"{self.update} updates"
        assert self.ledger.in_flight == 0, "draws left over: neither trained on nor filtered"
        assert all(s.version == c.train.num_batches for s in self.seats), "an engine without the last weights"
        after = await self._evaluate_phase("after", "the trained model")
        return {"before": before, "after": after}

    # ---- rollouts

    async def _feed(self) -> None:
        """Start draws for as long as a worker has room and the draw may meet its batch in time."""
        while True:
            self._wake.clear()
            while True:
                free = [s for s in self.seats if s.in_flight < s.capacity]
                seat = max(free, key=lambda s: (s.version, -s.in_flight), default=None)
                if seat is None or not self.ledger.may_admit(seat.version):
                    break
                self._enter(seat)
                self._tasks.create_task(self._rollout(self.ledger.admit(), seat))
            await self._wake.wait()

    async def _rollout(self, draw: int, seat: Seat) -> None:
        """Sample and grade one draw. A failed group is sampled again from the same seeds; too many failures in a row
        stop the run."""
        prompt = self.stream[draw]
        while True:
            try:
                try:
                    done, group = seat.actor.roll.remote(prompt)
                    await done
                finally:
                    self._leave(seat)  # grading does not keep an engine from the next draw
                graded: GradedGroup = await self.ranks[draw % len(self.ranks)].ingest.remote([group])
                break
            except Exception as e:  # whatever the remote side raised: the draw must not get lost
                self.failures += 1
                if self.failures >= self.config.train.max_failures:
                    raise TrainError(
                        f"{self.failures} rollouts failed in a row (train.max_failures); the last, "
                        f"draw {draw} ({prompt.key}): {one_line(e)}"
                    ) from e
                self.display.warn(f"draw {draw} ({prompt.key}) failed and is sampled again: {one_line(e)}")
                self._enter(seat)
        self.failures = 0
        self.settled[draw] = Settled(graded, group)
        self.ledger.settle(draw, keep=not self.config.train.refill or has_signal(self.scheme([graded])[0]))
        self._wake.set()
        self._closable.set()

    def _enter(self, seat: Seat) -> None:
        seat.in_flight += 1
        self._mark_busy()

    def _leave(self, seat: Seat) -> None:
        seat.in_flight -= 1
        self._mark_busy()
        self._wake.set()

    def _mark_busy(self) -> None:
        """Account the seconds in which anything is being generated."""
        now = time.monotonic()
        busy = any(s.in_flight for s in self.seats)
        if self._busy_since is not None:
            self._busy_seconds += now - self._busy_since
        self._busy_since = now if busy else None

    # ---- learning

    async def _closed_batch(self) -> ClosedBatch:
        while (batch := self.ledger.close()) is None:
            self._closable.clear()
            await self._closable.wait()
        self._wake.set()  # the next batch's draws have come one version closer
        return batch

    async def _train_batch(self, batch: ClosedBatch, waited: float, last: float) -> None:
        c = self.config
        used = {d: self.settled.pop(d) for d in (*batch.kept, *batch.filtered)}
        kept = [used[d] for d in batch.kept]
        groups = [s.graded for s in kept]
        rewards = self.scheme(groups)
        credit = advantages(rewards, c.reward.normalization)
        plan = make_plan(
            groups,
            credit,
            version=batch.index,
            num_updates=math.ceil(len(groups) / c.train.prompts_per_update),
            num_ranks=len(self.ranks),
            budget_tokens=c.learner.micro_batch_tokens,
            packed=c.model.packed,
        )
        if len(groups) < c.train.prompts_per_batch:
            self.display.warn(
                f"batch {batch.index} trains on {len(groups)} of {c.train.prompts_per_batch} groups: "
                f"{len(batch.filtered)} had no signal (train.refill_limit)"
            )
        stale = max((batch.index - f.oldest_version for g in groups for f in g.facts), default=0)
        assert stale <= c.train.max_staleness, f"a group {stale} versions old reached batch {batch.index}"

        refs = {d: used[d].ref for d in batch.kept}
        start = time.monotonic()
        results = await together(r.update.remote(plan, refs) for r in self.ranks)
        trained = time.monotonic()
        size = await self._publish(batch.index + 1)
        published = time.monotonic()

        self._mark_busy()
        if c.train.sample_every and batch.index % c.train.sample_every == 0 and kept:
            shown = next((i for i, r in enumerate(rewards) if has_signal(r)), 0)
            self._tasks.create_task(self._keep_sample(batch.index, kept[shown], rewards[shown], credit[shown]))
        of_batch = {
            "time/batch": published - last,
            "time/wait": waited,
            "time/generate": self._busy_seconds,
            "time/grade": sum(s.graded.grade_seconds for s in used.values()),
            "time/train": trained - start,
            "time/publish": published - trained,
            "time/sync": self._sync_seconds,
            "time/paused": max(self._pauses, default=math.nan),
            "rate/tokens": sum(f.num_tokens for s in used.values() for f in s.graded.facts) / (published - last),
            "weights/bytes": size,
            "reward/filtered": len(batch.filtered),
            "reward/missing": c.train.prompts_per_batch - len(batch.kept),
        }
        self._busy_seconds, self._pauses = 0.0, []
        self._log_batch(batch, plan, groups, rewards, results[0], of_batch)

    async def _keep_sample(self, batch: int, sample: Settled, rewards: Any, credit: Any) -> None:
        """A group with its texts, for people."""
        seat = self.seats[batch % len(self.seats)]
        line = await seat.actor.describe.remote([sample.ref], sample.graded)
        for t, reward, advantage in zip(line["trajectories"], rewards, credit, strict=True):
            t |= {"reward": round(float(reward), 4), "advantage": round(float(advantage), 4)}
        append_json(self.config.run_dir / "samples.jsonl", {"batch": batch, **line})

    def _log_batch(
        self,
        batch: ClosedBatch,
        plan: Plan,
        groups: Sequence[GradedGroup],
        rewards: Sequence[Any],
        results: Sequence[dict[str, float]],
        of_batch: dict[str, float],
    ) -> None:
        c = self.config
        # What a reward other than the step-aware one makes of accuracy is no step factor.
        alpha = c.reward.alpha if c.reward.scheme == "step_aware" else math.nan
        by_draw = {g.draw: (g, r) for g, r in zip(groups, rewards, strict=True)}
        for i, (update, result) in enumerate(zip(plan.updates, results, strict=True)):
            draws = sorted({draw for rank in update.micro_batches for rows in rank for draw, _ in rows})
            of_update = [by_draw[d] for d in draws]
            self.update += 1
            self.row = {
                "update": self.update,
                "batch": batch.index,
                "epoch": (max(batch.kept) + 1) / len(self.stream),
                **metrics.of_groups([g for g, _ in of_update], [r for _, r in of_update], batch.index, alpha),
                **result,
                **(of_batch if i == len(plan.updates) - 1 else {}),
            }
            self.log.write(self.row)
            # Held-out answers are the better witness: what rollouts take is also the gate's doing.
            if not (c.eval.every and self.held_out):
                self._watch(self.rollout_watch.see(self.row["rollout/steps"], self.row["rollout/tokens"]), "rollouts")
        error = next((f.error for g in groups for f in g.facts if f.error), None)
        if error and not self._grader_failed:
            self._grader_failed = True
            self.display.warn(
                f"a response could not be graded and counts as wrong ({error}); reward/grader_failures counts them"
            )
        append_json(
            c.run_dir / "draws.jsonl", {"batch": batch.index, "trained": batch.kept, "filtered": batch.filtered}
        )
        append_json(c.run_dir / "probes.jsonl", {"batch": batch.index, **metrics.probes_of(groups)})
        self.exit_counts.append(metrics.exit_counts(groups))

    def _watch(self, finding: str | None, where: str) -> None:
        if finding:
            self.display.warn(f"{where}: {finding}")

    async def _publish(self, version: int) -> int:
        """The learner's weights into the object store; workers fetch them while they go on decoding. Their bytes."""
        parts = await together(r.publish.remote(version) for r in self.ranks)
        self.weights = WeightVersion(version, tuple(m for m, _ in parts), tuple(tuple(b) for _, b in parts))
        self._tasks.create_task(self._spread())
        return self.weights.num_bytes

    async def _spread(self) -> None:
        start = time.monotonic()
        await together(self._load(s) for s in self.seats)
        self._sync_seconds = time.monotonic() - start

    async def _load(self, seat: Seat) -> None:
        async with seat.loading:
            await self._load_locked(seat)

    async def _load_locked(self, seat: Seat) -> None:
        """Bring a worker to the newest version. A worker that fell behind skips the versions in between."""
        weights = self.weights
        if weights is None or seat.version == weights.version:
            return
        self._pauses.append(await seat.actor.load.remote(weights))
        seat.version = weights.version
        self._wake.set()

    # ---- evaluation

    def _eval_due(self, batches_done: int) -> bool:
        c = self.config
        return bool(c.eval.every and batches_done % c.eval.every == 0 and batches_done < c.train.num_batches)

    @asynccontextmanager
    async def _frozen(self) -> AsyncIterator[int]:
        """All workers on the newest version, and none loads another until the block ends. Yields the version."""
        held: list[Seat] = []
        try:
            for s in self.seats:
                await s.loading.acquire()
                held.append(s)
            await together(self._load_locked(s) for s in self.seats)
            yield self.seats[0].version
        finally:
            for s in held:
                s.loading.release()

    async def _start_evaluation(self) -> None:
        """Evaluate in the background. Workers are held before this returns, so no later version slips in."""
        prompts = self.held_out[: self.config.eval.num_prompts_during]
        if not prompts:
            return
        entered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def background() -> None:
            async with self._frozen() as version:
                entered.set_result(None)
                result, _ = await self._evaluate(prompts, version, None)
            self.last_eval = f"held-out {result.accuracy.mean:.0%}, {result.tokens.mean:.0f} tokens"

        self._tasks.create_task(background())
        await entered

    async def _evaluate_phase(self, name: str, title: str) -> tuple[Evaluation, Answers] | None:
        prompts = self.held_out[: self.config.eval.num_prompts]
        if not prompts:
            return None
        with self.display.phase(name, f"measuring {title} on {len(prompts)} held-out problems") as phase:
            result, groups = await self._evaluate(prompts, self.seats[0].version, phase)
            phase.result = shown(result)
        return result, Answers.of(groups)

    async def _evaluate(
        self, prompts: Sequence[Prompt], version: int, phase: Phase | None
    ) -> tuple[Evaluation, list[GradedGroup]]:
        start, update = time.monotonic(), self.update  # training goes on meanwhile
        groups = await decode([s.actor for s in self.seats], prompts, phase.problems if phase else None)
        met = {v for g in groups for f in g.facts for v in (f.oldest_version, f.newest_version)}
        assert met == {version}, f"an evaluation of version {version} met {met}"
        result = evaluation(groups, version=version, seconds=time.monotonic() - start)
        append_json(self.config.run_dir / "evaluations.jsonl", {"update": update, **result.as_dict()})
        self._watch(self.eval_watch.see(result.steps.mean, result.tokens.mean), "held-out problems")
        # At the update of now, not of its start: Weights & Biases drops what goes back.
        self.log.evaluation(
            {"accuracy": result.accuracy.mean, "tokens": result.tokens.mean, "steps": result.steps.mean}, self.update
        )
        return result, groups

    def _show(self, phase: Phase, started: float, batches_done: int) -> None:
        c, r = self.config, self.row
        if not r:  # no batch has taught anything yet
            return
        left = (time.monotonic() - started) / batches_done * (c.train.num_batches - batches_done)
        parts = [
            f"update {self.update} of {c.train.num_batches * c.updates_per_batch}",
            f"accuracy {r['reward/accuracy']:.0%}",
            f"{r['rollout/tokens']:.0f} tokens",
            f"{r['rollout/steps']:.1f} steps",
            f"{r['exit/confident']:.0%} confident",
            f"{r['staleness/mean']:.1f} stale",
            f"{r['rate/tokens']:,.0f} tok/s",
            self.last_eval,
            f"{clock(left)} left",
        ]
        phase.show(" · ".join(p for p in parts if p), batches_done, c.train.num_batches)


def root_cause(error: BaseException) -> BaseException:
    """The first cause, out of whatever Ray and task groups wrapped around it."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif isinstance(inner := getattr(error, "cause", None), BaseException):
            error = inner
        else:
            return error


def one_line(error: BaseException) -> str:
    """Kind of the first cause, and as much of its message as says why."""
    first = root_cause(error)
    lines = [line.strip() for line in str(first).splitlines() if line.strip()] or ["no message"]
    # Ray names the dead actor and the reason in the lines below its headline.
    return f"{type(first).__name__}: {' '.join(lines[:6] if isinstance(first, RayError) else lines[:1])}"

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
`settle`); a worker's `load` for an evaluation's end and, without `rollout.in_flight_updates`, for that of its
trajectories; an evaluation for the newest weights.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stepgrpo import checkpoint, launch, metrics, placement, rundir
from stepgrpo.admission import ClosedBatch, Ledger
from stepgrpo.config import Config
from stepgrpo.console import Display, Phase, progress_line
from stepgrpo.data import PromptStream
from stepgrpo.evaluate import Answers, Evaluation, decode, evaluation, shown
from stepgrpo.launch import together
from stepgrpo.learner.batch import Plan, joined, make_plan
from stepgrpo.pool import DEAD, Pool, Seat, TrainError, WorkersGone, is_lost, one_line, root_cause
from stepgrpo.recovery import Start
from stepgrpo.reward.credit import advantages, has_signal
from stepgrpo.reward.schemes import make_scheme
from stepgrpo.spans import Spans
from stepgrpo.telemetry import TELL_SECONDS, Telemetry
from stepgrpo.types import GradedGroup, Prompt, WeightVersion
from stepgrpo.watchdog import Stuck, Whereabouts, dump_actors, waiting, whereabouts

RANKS_SECONDS = 5.0
"""Between two looks whether all ranks are alive."""
SPANS_SECONDS = 5.0
"""Between two times that what the actors did is written down, and for it."""
LAST_SPANS_SECONDS = 2.0
"""The same, of a run that ends."""
SPILL_SECONDS = 10.0
"""Between two looks at how much was spilled, which asks the head of the cluster."""


@dataclass(frozen=True, slots=True)
class Settled:
    graded: GradedGroup
    ref: Any


@dataclass(frozen=True, slots=True, eq=False)
class _Again:
    """A draw that waits for a worker to sample it again."""

    draw: int
    version: int
    """The oldest weights that may."""
    seat: asyncio.Future[Seat]


class Loop:
    """One training run over actors that are up."""

    def __init__(
        self,
        config: Config,
        stream: PromptStream,
        held_out: Sequence[Prompt],
        pool: Pool,
        ranks: Sequence[Any],
        display: Display,
        log: metrics.RunLog,
        start: Start,
        inputs: dict[str, str],
    ) -> None:
        """
        Args:
            inputs: digests of model and data, for its checkpoints.
        """
        t = config.train
        self.start, self.inputs = start, inputs
        self.config, self.stream, self.held_out = config, stream, held_out
        self.pool, self.ranks, self.display, self.log = pool, ranks, display, log
        self.ledger = Ledger(
            num_batches=t.num_batches,
            prompts_per_batch=t.prompts_per_batch,
            max_staleness=t.max_staleness,
            refill_limit=config.refill_limit,
        )
        self.scheme = make_scheme(config.reward, config.rollout.max_response_tokens)
        self.weights: WeightVersion | None = None  # None: version 0, which every engine starts with
        self.settled: dict[int, Settled] = {}
        self._again: list[_Again] = []
        self.update = 0
        self.update_of = {0: 0}
        """By version of the weights."""
        self.exit_counts: list[metrics.ExitCounts] = []
        self.rollout_watch, self.eval_watch = metrics.TriggerWatch(window=20), metrics.TriggerWatch(window=1)
        self.row: dict[str, Any] = {}
        self.last_eval: tuple[float, float] | None = None
        self.accuracy: dict[int, float] = {}
        """Held-out accuracy by version of the weights."""
        self._saving: asyncio.Task[None] | None = None
        self._saving_batch = -1
        self._trains, self._stopping, self._rests = False, asyncio.Event(), asyncio.Event()
        self._evaluating: set[asyncio.Task[None]] = set()
        self._saved = {"time/checkpoint": math.nan, "checkpoint/bytes": math.nan, "checkpoint/failed": 0.0}
        self._waits: set[Callable[[], None]] = set()
        self._places: dict[str, Whereabouts] = {}
        self._spans = Spans()
        self._had: dict[Any, int] = {}
        """Number of each one's spans that are written down."""
        self._keeping = asyncio.Lock()
        self._telemetry = Telemetry(config.name)
        self._learns = False
        self._grader_failed = False
        self._spilled = math.nan
        self._wake = asyncio.Event()
        self._closable = asyncio.Event()
        self._busy_since: float | None = None
        self._busy_seconds = 0.0
        self._streamed_seconds = 0.0
        self._pauses: list[float] = []
        self._sync_seconds = math.nan

    async def run(self) -> None:
        """Train to the end. Leaves held-out answers before and after in ``heldout.json``, if there are any."""
        heldout: dict[str, Any] = {}
        path = self.config.run_dir / "heldout.json"
        places = await self._on_ranks("a sign of life", lambda r: r.whereabouts.remote())
        self._places |= {f"learner rank {rank}": place for rank, place in enumerate(places)}
        serving = self.pool.serving(join=self._catch_up, leave=self._keep_spans, on_change=self._wake.set)
        async with serving, self._watching():
            for seat in list(self.pool.seats):
                with suppress(Exception):  # lost already, which the pool finds out
                    await self._note_place(seat)
            self._show_places()
            if self.start.name:
                heldout = json.loads(path.read_text()) if path.is_file() else {}
            elif before := await self._evaluate_phase("before", "the starting model"):
                heldout["before"] = before.as_dict()
                rundir.save_json(path, heldout, indent=None)
            await self._learn()
            if after := await self._evaluate_phase("after", "the trained model"):
                rundir.save_json(path, heldout | {"after": after.as_dict()}, indent=None)

    async def last_checkpoint(self) -> None:
        """Finish the update that is being made, begin no other, and write a checkpoint, as far as there is time; for a
        run that is cancelled then. Does nothing before and after training."""
        seconds = self.config.checkpoint.stop_seconds if self.config.checkpoint.every else 0.0
        if not (self._trains and seconds):
            return
        self.display.warn(
            f"asked to end: it finishes its update and writes a checkpoint, for {seconds:g} s at most "
            "(checkpoint.stop_seconds); a second Ctrl-C ends it at once"
        )
        self._stopping.set()
        self._closable.set()
        try:
            async with asyncio.timeout(seconds):
                await self._rests.wait()
        except TimeoutError:
            self.display.warn("there was no time for a checkpoint: --resume goes on from the one before")

    async def _unless_stopping(self, end: Coroutine[Any, Any, object]) -> None:
        """Wait for it, or until the run is to end."""
        tasks = [asyncio.create_task(end), asyncio.create_task(self._stopping.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _rest(self) -> None:
        """Between two batches, for good."""
        if self._saving_batch != self.ledger.batch:
            async with self.learners_turn():
                # An evaluation that is under way is not waited for: there may be no time.
                await self._checkpoint(set())
        if self._saving:
            await self._saving
        self._rests.set()
        await asyncio.Event().wait()

    async def _learn(self) -> None:
        c = self.config
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            if self.start.name:
                await self._restore()
            done = self.ledger.batch
            with self.display.phase("train", "training") as phase:
                self._trains = True
                feeder = tasks.create_task(self._feed())
                started = last = time.monotonic()
                for index in range(done, c.train.num_batches):
                    with self._spans.span("batch", batch=index):
                        began = time.monotonic()
                        with self._spans.span("wait", batch=index):
                            parts = await self._streamed() if c.learner.stream else []
                            batch = await self._closed_batch()
                        waited = time.monotonic() - began - self._streamed_seconds
                        self._learns = True
                        last = await self._train_batch(batch, parts, waited, last)
                        self._learns = False
                        self._show(phase, started, done, index + 1)
                        if self._eval_due(index + 1) and not self._stopping.is_set():
                            await self._start_evaluation()
                if self._saving:  # which a run that is asked to end now would cancel
                    await self._saving
                self._trains = False
                self._rests.set()
                feeder.cancel()
                phase.result = f"{self.update} updates"
        assert self.ledger.in_flight == 0, "draws left over: neither trained on nor filtered"
        assert all(s.version == c.train.num_batches for s in self.pool.seats), "an engine without the last weights"

    # ---- rollouts

    async def _feed(self) -> None:
        """Start draws for as long as a worker has room and the draw may meet its batch in time."""
        while True:
            self._wake.clear()
            self._start()
            await self._wake.wait()

    def _start(self) -> None:
        """Give workers draws for as long as one has room and a draw may start there: one that begins at once before one
        where it waits for places, then one with newer weights, then one with fewer draws."""
        newest = self.weights.version if self.weights else 0
        if not self._again and not self.ledger.may_admit(newest):
            return  # before all workers are looked at
        seats = self.pool.seats
        draws = sum(len(s.draws) for s in seats) + len(self._again) + self.ledger.room(newest)
        # Workers load new weights one after the other, and the first would take a whole batch.
        share = math.ceil(draws / max(1, len(seats)))

        def takes_more(seat: Seat) -> bool:
            return seat.has_room and len(seat.draws) < share

        def rank(i: int) -> tuple[bool, int, int, int]:
            return not seats[i].has_places, -seats[i].version, len(seats[i].draws), i

        free = [rank(i) for i, s in enumerate(seats) if takes_more(s)]
        heapq.heapify(free)
        while free:
            seat = seats[i := free[0][-1]]
            if self._start_on(seat) and takes_more(seat):
                heapq.heapreplace(free, rank(i))
            else:
                heapq.heappop(free)

    def _start_on(self, seat: Seat) -> bool:
        """Give a worker a draw: one that must be sampled again, or else the next of the stream, if either may start on
        its weights."""
        again = next((a for a in self._again if a.version <= seat.version), None)
        if again:
            self._again.remove(again)
            self._enter(again.draw, seat)
            again.seat.set_result(seat)
        elif self.ledger.may_admit(seat.version):
            draw = self.ledger.admit()
            self._enter(draw, seat)
            self._tasks.create_task(self._rollout(draw, seat.version, seat))
        else:
            return False
        return True

    async def _rollout(self, draw: int, version: int, seat: Seat | None = None) -> None:
        """Sample and grade one draw, and settle it; arguments as of ``_sampled``."""
        settled = await self._sampled(draw, version, seat)
        self.settled[draw] = settled
        signal = has_signal(self.scheme([settled.graded])[0])
        self.ledger.settle(draw, keep=not self.config.train.refill or signal)
        self._wake.set()
        self._closable.set()

    async def _sampled(self, draw: int, version: int, seat: Seat | None = None) -> Settled:
        """A group of one draw. One that failed, or was lost with its worker or node, is sampled again from the same
        seeds, by any worker whose weights are not older than ``version``; too many failures in a row stop the run."""
        prompt = self.stream[draw]
        what = f"draw {draw} ({prompt.key})"
        while True:
            seat = seat or await self._seat_for(draw, version)
            try:
                group = await self._roll(prompt, seat)
                if group is not None:
                    graded = await self._ingest(draw, group)
                    self.pool.failures.reset()
                    return Settled(graded, group)
            except (TrainError, *DEAD):
                raise  # the rank that grades is dead: a worker's death is none of these (`blame`)
            except Exception as e:  # whatever the remote side raised: the draw must not get lost
                if is_lost(e):
                    self.display.warn(f"{what} was lost with its node and is sampled again")
                else:
                    self.pool.failures.add(f"{what}: {one_line(e)}", e)
                    self.display.warn(f"{what} failed and is sampled again: {one_line(e)}")
            seat = None

    async def _ingest(self, draw: int, group: Any) -> GradedGroup:
        graded: GradedGroup = await self.ranks[draw % len(self.ranks)].ingest.remote([group])
        return graded

    async def _roll(self, prompt: Prompt, seat: Seat) -> Any:
        """Reference to a new group; None where the worker failed, and not the rollout."""
        try:
            done, group = seat.actor.roll.remote(prompt)
            tokens = await done
            with suppress(Exception):  # who only watches stops nothing
                self._telemetry.count(seat.index, tokens=tokens, trajectories=self.config.rollout.group_size)
            seat.strikes = 0
            return group
        except Exception as e:
            if not self.pool.blame(seat, e):
                raise
            return None
        finally:
            self._leave(prompt.draw, seat)  # grading does not keep an engine from the next draw

    async def _seat_for(self, draw: int, version: int) -> Seat:
        """A worker with room for one more, and with weights that are not older than ``version``."""
        again = _Again(draw, version, asyncio.get_running_loop().create_future())
        self._again.append(again)
        self._wake.set()
        return await again.seat

    def _enter(self, draw: int, seat: Seat) -> None:
        seat.draws.add(draw)
        self._mark_busy()

    def _leave(self, draw: int, seat: Seat) -> None:
        seat.draws.discard(draw)
        self._mark_busy()
        self._wake.set()

    def _mark_busy(self) -> None:
        """Account the seconds in which anything is being generated."""
        now = time.monotonic()
        busy = any(s.draws for s in self.pool.seats)
        if self._busy_since is not None:
            self._busy_seconds += now - self._busy_since
        self._busy_since = now if busy else None

    # ---- learning

    async def _closed_batch(self) -> ClosedBatch:
        while self._stopping.is_set() or (batch := self.ledger.close()) is None:
            if self._stopping.is_set():
                await self._rest()
            await self._another_group()
        self._wake.set()  # the next batch's draws have come one version closer
        return batch

    async def _another_group(self) -> None:
        """Wait until a draw settles, or the run is to end."""
        self._closable.clear()
        async with self._waiting(lambda: f"batch {self.ledger.batch} ({self.ledger.in_flight} draws in flight)"):
            await self._closable.wait()

    async def _streamed(self) -> list[Plan]:
        """Have the learner back-propagate the batch's groups as they come, until it has all; what it did, by parts.

        A part is what has settled while the part before it was worked on, but not less than a micro-batch for each
        rank. Groups stay in ``settled`` until the batch closes: a checkpoint taken meanwhile has them.
        """
        enough = len(self.ranks) * self.config.learner.micro_batch_tokens
        left, parts = set(self.ledger.due()), []
        while left and not self._stopping.is_set():
            here = [self.settled[d] for d in sorted(left & self.settled.keys())]
            if len(here) < len(left) and sum(f.total_len for s in here for f in s.graded.facts) < enough:
                await self._another_group()
            elif part := await self._accumulated(here):
                parts.append(part)
                left -= part.advantages.keys()
        return parts

    async def _accumulated(self, some: Sequence[Settled]) -> Plan | None:
        """Add the gradients of some of the batch's groups; None where some were lost, which are there anew by now."""
        start, batch = time.monotonic(), self.ledger.batch
        self._learns = True
        credit = advantages(self.scheme([s.graded for s in some]), self.config.reward.normalization)
        plan = self._plan(batch, some, credit, num_updates=1)
        refs = {s.graded.draw: s.ref for s in some}
        lost = await self._fetched(batch, plan, refs)
        if lost:
            self.settled |= await self._sampled_again(batch, sorted(lost))
        else:
            await self._on_ranks(f"a part of batch {batch}", lambda r: r.accumulate.remote(plan, refs))
            self._streamed_seconds += time.monotonic() - start
        self._learns = False
        return None if lost else plan

    async def _train_batch(self, batch: ClosedBatch, parts: Sequence[Plan], waited: float, last: float) -> float:
        """
        Args:
            parts: what the learner has done of it already; all of it, or nothing.
            last: when the batch before was published.

        Returns:
            When this one was; what follows on it is of the next one's time.
        """
        c = self.config
        used = {d: self.settled.pop(d) for d in (*batch.kept, *batch.filtered)}
        while True:
            kept = [used[d] for d in batch.kept]
            rewards = self.scheme([s.graded for s in kept])
            credit = advantages(rewards, c.reward.normalization)
            if parts:
                plan = joined(parts)
                assert plan.advantages.keys() == set(batch.kept), "the learner worked on other groups than the batch's"
                break
            plan = self._plan(batch.index, kept, credit, math.ceil(len(kept) / c.train.prompts_per_update))
            refs = {s.graded.draw: s.ref for s in kept}
            lost = await self._fetched(batch.index, plan, refs)
            if not lost:
                break
            used |= await self._sampled_again(batch.index, sorted(lost))
        groups = [s.graded for s in kept]
        if len(groups) < c.train.prompts_per_batch:
            self.display.warn(
                f"batch {batch.index} trains on {len(groups)} of {c.train.prompts_per_batch} groups: "
                f"{len(batch.filtered)} had no signal (train.refill_limit)"
            )
        stale = max((batch.index - f.oldest_version for g in groups for f in g.facts), default=0)
        assert stale <= c.train.max_staleness, f"a group {stale} versions old reached batch {batch.index}"

        async with self.learners_turn():
            start = time.monotonic()
            what = f"the update on batch {batch.index}"
            if parts:
                num_tokens = plan.updates[0].num_loss_tokens
                results = await self._on_ranks(what, lambda r: r.step.remote(batch.index, num_tokens))
            else:
                results = await self._on_ranks(what, lambda r: r.update.remote(plan, refs))
            trained = time.monotonic()
            weights = await self._publish(batch.index + 1)
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
                "time/train": trained - start + self._streamed_seconds,
                "time/publish": published - trained,
                "time/sync": self._sync_seconds,
                "time/paused": max(self._pauses, default=math.nan),
                "rate/tokens": sum(f.num_tokens for s in used.values() for f in s.graded.facts) / (published - last),
                "weights/bytes": weights.num_bytes,
                "weights/sent": weights.whole_bytes + weights.difference_bytes,
                "weights/delta": 1 - weights.whole_bytes / weights.num_bytes,
                "store/spilled": self._spilled,
                **self._saved,
                "workers/up": len(self.pool.seats),
                "workers/deaths": self.pool.deaths,
                "reward/filtered": len(batch.filtered),
                "reward/missing": c.train.prompts_per_batch - len(batch.kept),
            }
            self._busy_seconds, self._streamed_seconds, self._pauses = 0.0, 0.0, []
            self._log_batch(batch, plan, groups, rewards, results[0], of_batch)
            if self._checkpoint_due(batch.index + 1):
                await self._checkpoint(set(self._evaluating))
        return published

    @asynccontextmanager
    async def learners_turn(self, *, for_good: bool = False) -> AsyncIterator[None]:
        """During the block the learner has the GPUs that it shares with engines (`cluster.colocate`).

        Args:
            for_good: nobody needs them afterwards.
        """
        async with AsyncExitStack() as stack:
            if self.config.cluster.colocate:
                async with self._waiting("the engines to leave their GPUs"):
                    await stack.enter_async_context(self.pool.asleep(for_good=for_good))
                await self._on_ranks("its turn", lambda r: r.wake.remote())
            yield
            if self.config.cluster.colocate and not for_good:
                await self._on_ranks("the end of its turn", lambda r: r.sleep.remote())

    async def _look_at_spilling(self) -> None:
        """Slow disks in the place of memory are said once, and counted in the metrics."""
        with suppress(Exception):  # a cluster that does not tell is no reason to stop
            spilled = float(await asyncio.to_thread(launch.spilled_bytes))
            if spilled and not self._spilled > 0:
                self.display.warn(
                    "an object store is full and writes to disk, which is slow (store/spilled counts the bytes): "
                    "raise cluster.object_store_mb, or lower train.max_staleness or train.prompts_per_batch"
                )
            self._spilled = spilled

    async def _fetched(self, batch: int, plan: Plan, refs: dict[int, Any]) -> set[int]:
        """Have the batch on its ranks; returns the draws that were lost. Not within the update: a rank without a group
        would leave the others waiting in a collective."""
        parts = await self._on_ranks(f"groups of batch {batch}", lambda r: r.fetch.remote(plan, refs))
        return {draw for part in parts for draw in part}

    def _plan(self, batch: int, kept: Sequence[Settled], credit: Any, num_updates: int) -> Plan:
        c = self.config
        return make_plan(
            [s.graded for s in kept],
            credit,
            version=batch,
            num_updates=num_updates,
            num_ranks=len(self.ranks),
            budget_tokens=c.learner.micro_batch_tokens,
            packed=c.model.packed_on(c.cluster.device),
        )

    async def _sampled_again(self, batch: int, lost: Sequence[int]) -> dict[int, Settled]:
        """Groups anew that were finished, and went away with their node before they were trained on."""
        self.display.warn(f"batch {batch}: {len(lost)} groups were lost with their node and are sampled again")
        oldest = max(0, batch - self.config.train.max_staleness)
        async with self._waiting(f"{len(lost)} lost groups of batch {batch}"):
            return dict(zip(lost, await together(self._sampled(d, oldest) for d in lost), strict=True))

    async def _keep_sample(self, batch: int, sample: Settled, rewards: Any, credit: Any) -> None:
        """A group with its texts, for people."""
        try:
            line = await self.pool.ask(lambda w: w.describe.remote([sample.ref], sample.graded))
        except Exception as e:
            if not is_lost(e):
                raise
            self.display.warn(f"batch {batch} leaves no sample: its group was lost with its node")
            return
        for t, reward, advantage in zip(line["trajectories"], rewards, credit, strict=True):
            t |= {"reward": round(float(reward), 4), "advantage": round(float(advantage), 4)}
        line = {"batch": batch, **line}
        rundir.append_json(self.config.run_dir / "samples.jsonl", line)
        self.log.sample(line, self.update)

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
                "restart": self.start.restart,
                "epoch": (max(batch.kept) + 1) / len(self.stream),
                **metrics.of_groups([g for g, _ in of_update], [r for _, r in of_update], batch.index, alpha),
                **result,
                **(of_batch if i == len(plan.updates) - 1 else {}),
            }
            self.log.write(self.row)
            self._telemetry.note(self.row)
            if self.row["policy/skipped"]:
                self.display.warn(f"update {self.update} was skipped: its loss or gradient was not finite")
            # Held-out answers are the better witness: what rollouts take is also the gate's doing.
            if not (c.eval.every and self.held_out):
                self._watch(self.rollout_watch.see(self.row["rollout/steps"], self.row["rollout/tokens"]), "rollouts")
        error = next((f.error for g in groups for f in g.facts if f.error), None)
        if error and not self._grader_failed:
            self._grader_failed = True
            self.display.warn(
                f"a response could not be graded and counts as wrong ({error}); reward/grader_failures counts them"
            )
        audit = {"batch": batch.index, "restart": self.start.restart}
        rundir.append_json(c.run_dir / "draws.jsonl", audit | {"trained": batch.kept, "filtered": batch.filtered})
        rundir.append_json(c.run_dir / "probes.jsonl", {"batch": batch.index, **metrics.probes_of(groups)})
        self.exit_counts.append(metrics.exit_counts(groups))
        self.update_of[batch.index + 1] = self.update

    def _watch(self, finding: str | None, where: str) -> None:
        if finding:
            self.display.warn(f"{where}: {finding}")

    async def _publish(self, version: int) -> WeightVersion:
        """The learner's weights into the object store; workers fetch them while they go on decoding."""
        parts = await self._on_ranks(f"weights {version}", lambda r: r.publish.remote(version))
        self.weights = WeightVersion(version, tuple(m for m, _ in parts), tuple(tuple(b) for _, b in parts))
        self._tasks.create_task(self._spread())
        return self.weights

    async def _spread(self) -> None:
        start = time.monotonic()
        await together(self._load(s) for s in self.pool.seats)
        self._sync_seconds = time.monotonic() - start

    async def _load(self, seat: Seat) -> None:
        """Bring a worker to the newest version; one that cannot load it is lost."""
        async with seat.loading:
            await self._load_locked(seat)

    async def _load_locked(self, seat: Seat) -> None:
        try:
            await self._pull(seat)
        except Exception as e:
            if is_lost(e):
                raise  # the weights went away with a learner's rank: no fault of the worker
            self.pool.lost(seat, f"loading weights failed: {one_line(e)}")

    async def _pull(self, seat: Seat) -> None:
        """A worker that fell behind skips the versions in between."""
        weights = self.weights
        if weights is None or seat.version == weights.version or seat.lost:
            return
        paused = await seat.actor.load.remote(weights)
        self._pauses.append(paused)  # not one line: that would be the list of the time before it
        seat.version = weights.version
        self._wake.set()

    async def _catch_up(self, seat: Seat) -> None:
        """Bring a worker that is new to the newest version, also if that changes meanwhile."""
        await self._note_place(seat)
        while self.weights is not None and seat.version != self.weights.version:
            await self._pull(seat)

    # ---- what is waited for

    @asynccontextmanager
    async def _waiting(self, what: str | Callable[[], str]) -> AsyncIterator[Callable[[], None]]:
        """As ``waiting``, but progress counts for all that is waited for: a batch, or the learner's turn, may wait for
        the end of an evaluation."""
        t = self.config.train
        async with waiting(
            what, say=self.display.warn, warn=t.wait_warning, limit=t.wait_limit, stacks=self._stacks
        ) as seen:
            self._waits.add(seen)
            try:
                yield self._progress
            finally:
                self._waits.discard(seen)

    def _progress(self) -> None:
        for seen in self._waits:
            seen()

    async def _stacks(self) -> Path:
        return await dump_actors(self.config.run_dir, self._places)

    @asynccontextmanager
    async def _watching(self) -> AsyncIterator[None]:
        """What goes on beside the block, which fails when a rank dies, also while nothing is asked of it."""

        async def every(seconds: float, look: Callable[[], Awaitable[None]]) -> None:
            while True:
                await look()
                await asyncio.sleep(seconds)

        try:
            async with asyncio.TaskGroup() as tasks:
                looks = [
                    tasks.create_task(every(RANKS_SECONDS, self._raise_dead_rank)),
                    tasks.create_task(every(SPILL_SECONDS, self._look_at_spilling)),
                    tasks.create_task(every(SPANS_SECONDS, self._keep_spans)),
                    tasks.create_task(every(TELL_SECONDS, self._tell)),
                ]
                yield
                for look in looks:
                    look.cancel()
        finally:
            await self._keep_spans(LAST_SPANS_SECONDS)

    async def _tell(self) -> None:
        """What can be watched of this moment."""
        now = {
            "restart": self.start.restart,
            "workers/up": len(self.pool.seats),
            "workers/deaths": self.pool.deaths,
            "store/spilled": self._spilled,
            **self._saved,
            "queue/finished": len(self.settled),
            "queue/again": len(self._again),
            "learner/busy": self._learns,
            "failures/in_a_row": self.pool.failures.count,
        }
        workers = {s.index: {"worker/draws": len(s.draws), "worker/version": s.version} for s in self.pool.seats}
        with suppress(Exception):  # who only watches stops nothing
            self._telemetry.tell(now, workers)

    async def _keep_spans(self, seconds: float = SPANS_SECONDS) -> None:
        """Write down what everybody did since the last time, as far as they tell within so many seconds."""

        def keep(actor: str, node: str, spans: Sequence[dict[str, Any]]) -> None:
            common = {"actor": actor, "node": node[:8], "restart": self.start.restart}
            rundir.append_json(self.config.run_dir / "spans.jsonl", *({**common, **s} for s in spans))

        async def ask(name: str, actor: Any, node: str) -> None:
            with suppress(Exception):  # who is dead is found out elsewhere
                async with asyncio.timeout(seconds):
                    self._had[actor], spans = await actor.spans.remote(self._had.get(actor, 0))
                await asyncio.to_thread(keep, name, node, spans)

        workers = ((f"rollout worker {s.index}", s.actor, s.node) for s in self.pool.up)
        ranks = ((name := f"learner rank {i}", r, self._places[name].node) for i, r in enumerate(self.ranks))
        async with self._keeping:
            await asyncio.gather(*(ask(*who) for who in (*workers, *ranks)))
            with suppress(Exception):
                self._had["driver"], spans = self._spans.fetch(self._had.get("driver", 0))
                keep("driver", whereabouts().node, spans)

    async def _raise_dead_rank(self, during: str = "rest") -> None:
        alive = await asyncio.gather(*(r.whereabouts.remote() for r in self.ranks), return_exceptions=True)
        for rank, answer in enumerate(alive):
            if isinstance(answer, DEAD):
                answer.add_note(f"learner rank {rank} died during {during}")
                raise answer

    async def _on_ranks(self, what: str, call: Callable[[Any], Awaitable[Any]]) -> list[Any]:
        """Ask all ranks.

        Raises:
            RayActorError, OutOfMemoryError: one is dead, whatever the others, which it left alone in a collective, say.
        """
        async with self._waiting(f"{what} on the learner's ranks"):
            try:
                return await together(call(r) for r in self.ranks)
            except Exception:
                await self._raise_dead_rank(what)
                raise

    # ---- checkpoints

    def _checkpoint_due(self, batches_done: int) -> bool:
        every = self.config.checkpoint.every
        return bool(every and (batches_done % every == 0 or batches_done == self.config.train.num_batches))

    async def _checkpoint(self, before: set[asyncio.Task[None]]) -> None:
        """Have the state of this moment copied, and written in the background.

        Args:
            before: evaluations that must be over before it counts.
        """
        if self._saving and not self._saving.done():
            self.display.warn(
                "the last checkpoint is still being written; the next one waits for it (checkpoint.every)"
            )
            await self._saving
        place, start = self.config.checkpoint_place, time.monotonic()
        # Awaited, because an actor may begin calls in another order than they were made.
        await self._on_ranks("a copy of the state", lambda r: r.snapshot.remote())
        # Restarts first: what a later attempt wrote is newer than all of an earlier one, also after a roll-back.
        name = f"r{self.start.restart:04d}-batch-{self.ledger.batch:06d}"
        refs = {draw: s.ref for draw, s in self.settled.items()}
        parts = [r.checkpoint.remote(place, name, {} if i else refs) for i, r in enumerate(self.ranks)]
        save = self._save(name, self._state(), parts, before, start)
        self._saving_batch = self.ledger.batch
        self._saving = self._tasks.create_task(save)

    def _state(self) -> dict[str, Any]:
        """All that the driver knows and cannot find out again."""
        c = self.config
        return {
            "restart": self.start.restart,
            "batch": self.ledger.batch,
            "update": self.update,
            "ledger": self.ledger.state(),
            "exits": list(self.exit_counts),
            "inputs": self.inputs,
            "settings": c.model_dump(mode="json"),
            "model": c.model.path,
            "dtype": c.model.dtype,
        }

    async def _save(
        self, name: str, state: dict[str, Any], parts: Sequence[Any], before: set[asyncio.Task[None]], start: float
    ) -> None:
        """Commit a checkpoint. One that cannot be written is told, and the run goes on."""
        c = self.config
        try:
            async with self._waiting(f"checkpoint {name}"):
                # All of them, also after a failure: what is still being written cannot be discarded.
                await asyncio.gather(*parts, return_exceptions=True)
                files = [f for part in parts for f in await part]
                if before:  # so that no evaluation of earlier weights is lost between two checkpoints
                    await self._unless_stopping(asyncio.wait(before))
                manifest = await asyncio.to_thread(checkpoint.commit, c.checkpoint_place, name, state, files)
        except Exception as e:
            if isinstance(root_cause(e), (*DEAD, Stuck)):
                raise
            self._saved["checkpoint/failed"] += 1
            self.display.warn(f"checkpoint {name} could not be written, and the run goes on: {one_line(e)}")
            with suppress(Exception):
                if name in await asyncio.to_thread(checkpoint.half_written, c.checkpoint_place):
                    await asyncio.to_thread(checkpoint.discard, c.checkpoint_place, name)
                rundir.append_event(c.run_dir, "checkpoint failed", name=name, reason=one_line(e))
            return
        seconds = time.monotonic() - start
        self._saved |= {"time/checkpoint": seconds, "checkpoint/bytes": float(manifest.size)}
        rundir.append_event(c.run_dir, "checkpoint", name=name, seconds=round(seconds, 3), bytes=manifest.size)
        try:
            await asyncio.to_thread(self._prune)
        except Exception as e:
            self.display.warn(f"old checkpoints could not be removed: {one_line(e)}")

    def _prune(self) -> None:
        c = self.config.checkpoint
        checkpoint.prune(
            self.config.checkpoint_place,
            keep_last=c.keep_last,
            keep_best=c.keep_best,
            accuracy=lambda m: self.accuracy.get(m.meta["batch"]),
        )

    async def _restore(self) -> None:
        """Go on from a checkpoint: what was finished is taken over, what was in flight is sampled again."""
        s, c = self.start, self.config
        assert s.name
        with self.display.phase("restore", f"going on from {s.name}") as phase:
            place, update = c.checkpoint_place, s.meta["update"]
            async with self.learners_turn():
                await self._on_ranks(s.name, lambda r: r.restore.remote(place, s.name, s.files, update))
            async with self._waiting(f"groups of {s.name}"):
                groups: dict[int, list[Any]] = await self.ranks[0].restore_groups.remote(place, s.name)
                graded = await together(self._ingest(draw, ref) for draw, [ref] in groups.items())
            self.settled = {g.draw: Settled(g, ref) for g, [ref] in zip(graded, groups.values(), strict=True)}
            again = self.ledger.restore(s.meta["ledger"], groups)
            self.update = self.update_of[self.ledger.batch] = update
            self.exit_counts = [metrics.ExitCounts(*counts) for counts in s.meta["exits"]]
            for line in rundir.read_json_lines(c.run_dir / "metrics.jsonl"):
                self.rollout_watch.see(line["rollout/steps"], line["rollout/tokens"])
            for line in rundir.read_json_lines(c.run_dir / "evaluations.jsonl"):
                self.eval_watch.see(line["steps"]["mean"], line["tokens"]["mean"])
                self.accuracy[line["version"]] = line["accuracy"]["mean"]
            await self._publish(self.ledger.batch)
            phase.result = f"batch {self.ledger.batch}, {len(groups)} groups taken over, {len(again)} sampled again"
        for draw in again:
            self._tasks.create_task(self._rollout(draw, self.ledger.batch))
        if self._eval_due(self.ledger.batch) and self.ledger.batch not in self.accuracy:
            await self._start_evaluation()

    def _show_places(self) -> None:
        """Where the actors came to lie, if there is a choice; ``events.jsonl`` has it in any case."""
        by_node: dict[str, list[str]] = {}
        for name, place in self._places.items():
            by_node.setdefault(place.node, []).append(name)
        rundir.append_event(self.config.run_dir, "placement", nodes=by_node)
        for node, names in by_node.items() if len(by_node) > 1 else ():
            self.display.print(f"  node {node[:8]}: {placement.shown(names)}")

    async def _note_place(self, seat: Seat) -> None:
        self._places[f"rollout worker {seat.index}"] = await seat.actor.whereabouts.remote()

    # ---- evaluation

    def _eval_due(self, batches_done: int) -> bool:
        c = self.config
        return bool(c.eval.every and batches_done % c.eval.every == 0 and batches_done < c.train.num_batches)

    @asynccontextmanager
    async def _frozen(self) -> AsyncIterator[list[Seat]]:
        """The workers that are up, on the newest version, and none loads another until the block ends."""
        while True:
            async with self.pool.held() as held:
                await together(self._load_locked(s) for s in held)
                newest = max(s.version for s in held)
                if seats := [s for s in held if s.version == newest and not s.lost]:
                    yield seats
                    return

    async def _start_evaluation(self) -> None:
        """Evaluate in the background. Workers are held before this returns, so no later version slips in."""
        prompts = self.held_out[: self.config.eval.num_prompts_during]
        if not prompts:
            return
        entered = asyncio.Event()

        async def background() -> None:
            result, _ = await self._evaluate(prompts, None, entered)
            self.last_eval = (result.accuracy.mean, result.tokens.mean)

        task = self._tasks.create_task(background())
        self._evaluating.add(task)
        task.add_done_callback(self._evaluating.discard)
        async with self._waiting("the workers to have the weights that are evaluated"):
            await self._unless_stopping(entered.wait())

    async def _evaluate_phase(self, name: str, title: str) -> Answers | None:
        prompts = self.held_out[: self.config.eval.num_prompts]
        if not prompts:
            return None
        with self.display.phase(name, f"measuring {title} on {len(prompts)} held-out problems") as phase:
            result, groups = await self._evaluate(prompts, phase)
            phase.result = shown(result)
        return Answers.of(groups)

    async def _evaluate(
        self, prompts: Sequence[Prompt], phase: Phase | None, entered: asyncio.Event | None = None
    ) -> tuple[Evaluation, list[GradedGroup]]:
        """``entered``: set once its workers are held."""
        start = time.monotonic()
        while True:
            async with self._frozen() as seats:
                if entered:
                    entered.set()
                try:
                    async with self._waiting(f"an evaluation of {len(prompts)} problems") as seen:

                        def progress(done: int, of: int) -> None:
                            seen()
                            if phase:
                                phase.problems(done, of)

                        groups = await decode(partial(self.pool.ask, among=seats), prompts, progress)
                    version = seats[0].version
                    break
                except Exception as e:
                    if not isinstance(root_cause(e), WorkersGone):
                        raise
                    self.display.warn(
                        f"the evaluation of weights {seats[0].version} lost all its workers and begins again, with the "
                        "newest weights"
                    )
        met = {v for g in groups for f in g.facts for v in (f.oldest_version, f.newest_version)}
        assert met == {version}, f"an evaluation of version {version} met {met}"
        result = evaluation(groups, version=version, seconds=time.monotonic() - start)
        line = {"update": self.update_of[version], "restart": self.start.restart, **result.as_dict()}
        if version not in self.accuracy:  # that of the end is made again where the end was cut off
            rundir.append_json(self.config.run_dir / "evaluations.jsonl", line)
        self.accuracy[version] = result.accuracy.mean
        self._watch(self.eval_watch.see(result.steps.mean, result.tokens.mean), "held-out problems")
        figures = {f"eval/{k}": getattr(result, k).mean for k in ("accuracy", "tokens", "steps")}
        # At the update of now, not of its start: Weights & Biases drops what goes back.
        self.log.evaluation(figures, self.update)
        self._telemetry.note(figures)
        return result, groups

    def _show(self, phase: Phase, started: float, restored: int, batches_done: int) -> None:
        c, r = self.config, self.row
        if not r:  # no batch has taught anything yet
            return
        per_batch = (time.monotonic() - started) / (batches_done - restored)
        left = per_batch * (c.train.num_batches - batches_done)
        num_updates = c.train.num_batches * c.updates_per_batch
        line = progress_line(r, num_updates=num_updates, held_out=self.last_eval, seconds_left=left)
        phase.show(line, batches_done, c.train.num_batches)

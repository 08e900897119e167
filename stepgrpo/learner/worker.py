"""The Ray actor of one learner rank: grading as groups arrive, updates when a batch closes, weights after it.

All calls into the engine run on one thread of their own. They are collectives, so they must come one at a time and in
the order the driver made them, on every rank; and grading goes on beside them, on the actor's event loop, which a
forward pass would block.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.exceptions import ObjectLostError

from stepgrpo import groups as groups_file
from stepgrpo.checkpoint import FileEntry, fetch, put
from stepgrpo.config import LearnerConfig, ModelConfig, RewardConfig, RolloutConfig
from stepgrpo.learner import state
from stepgrpo.learner.batch import MicroBatch, Plan, Row, collate, pair_sample, partition, sample_of
from stepgrpo.reward.graded import grade_group
from stepgrpo.reward.outcome import make_grader
from stepgrpo.reward.steps import make_step_rule
from stepgrpo.spans import Spans
from stepgrpo.types import GradedGroup, Group, IntArray
from stepgrpo.watchdog import Whereabouts, whereabouts
from stepgrpo.weights import Manifest, Publisher

if TYPE_CHECKING:
    from stepgrpo.learner.engine import LearnerEngine, Objective

LOOPBACK = "127.0.0.1"

T = TypeVar("T")
Pair = tuple[IntArray, IntArray]
"""(prompt ids, response ids)"""


class LearnerWorker:
    """One rank. Make it an actor with ``ray.remote(concurrency_groups={"ingest": n})``, call ``setup`` on all ranks.

    Object references arrive inside lists and dicts, which Ray passes on without fetching; they are awaited here.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        config: LearnerConfig,
        model: ModelConfig,
        *,
        device: str,
        total_updates: int,
        rollout: RolloutConfig | None = None,
        reward: RewardConfig | None = None,
    ) -> None:
        """
        Args:
            total_updates: of the whole run, for the learning rate's schedule.
            rollout, reward: None: supervised training, which neither grades nor has a reference.
        """
        self._rank, self._world_size = rank, world_size
        self._config, self._model, self._device = config, model, device
        self._temperature = 1.0 if rollout is None else rollout.temperature
        self._step_rule = None if rollout is None else make_step_rule(rollout)
        self._total_updates, self._num_updates = total_updates, 0
        self._packed = model.packed_on(device)
        self._grader = None if reward is None else make_grader(reward, model.think_close)
        self._with_reference = reward is not None and config.kl_coef > 0
        self._spans = Spans()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="learner")
        self._publisher = Publisher(
            rank=rank, bucket_bytes=config.bucket_mb << 20, put=ray.put, full_every=config.full_every
        )
        self._fetched: dict[int, Group] = {}
        self._turn = asyncio.Lock()  # first come, first served: calls reach the thread in the order in which they began
        self._engine: LearnerEngine
        self._copy: Any = None
        self._door: socket.socket | None = None

    async def listen(self, *, on_one_node: bool = True) -> tuple[str, int]:
        """(host, port) where this rank now waits for the others; asked of rank 0.

        Args:
            on_one_node: all ranks are, and no other machine needs to reach them.
        """
        self._door = socket.create_server((LOOPBACK if on_one_node else ray.util.get_node_ip_address(), 0))
        host, port = self._door.getsockname()
        return host, port

    async def spans(self, had: int) -> tuple[int, list[dict[str, Any]]]:
        """What was done, see ``Spans.fetch``."""
        return self._spans.fetch(had)

    async def whereabouts(self) -> Whereabouts:
        """Answered also while the engine works."""
        return whereabouts()

    async def setup(self, host: str, port: int) -> None:
        """Join the other ranks and build the engine. Returns when all have.

        Args:
            host, port: rank 0's ``listen``.
        """

        def build() -> LearnerEngine:
            os.environ["DS_ACCELERATOR"] = self._device  # read when deepspeed is imported
            from stepgrpo.learner.engine import LearnerEngine, join

            own_host = LOOPBACK if host == LOOPBACK else ray.util.get_node_ip_address()
            join(self._rank, self._world_size, host, port, self._device, own_host=own_host, door=self._door)
            return LearnerEngine(
                self._config,
                self._model,
                temperature=self._temperature,
                device=self._device,
                with_reference=self._with_reference,
            )

        with self._spans.span("start"):
            self._engine = await self._run(build)

    @ray.method(concurrency_group="ingest")
    async def ingest(self, group: Sequence[Awaitable[Group]]) -> GradedGroup:
        """Fetch one group, grade it and count its steps: processor work only, beside an update if need be.

        Args:
            group: a list of one reference.
        """
        assert self._grader is not None and self._step_rule is not None, "supervised training does not grade"
        fetched = await group[0]
        with self._spans.span("grade", draw=fetched.prompt.draw):
            return await grade_group(
                fetched,
                self._grader,
                self._step_rule,
                self._model.think_close,
                train_exit_tokens=self._config.train_exit_tokens,
            )

    async def fetch(self, plan: Plan, groups: Mapping[int, Awaitable[Group]]) -> list[int]:
        """Have the groups here that this rank trains on, before any rank waits for another in a collective.

        Args:
            plan, groups: as for the ``update`` that follows.

        Returns:
            Draws whose group was lost with its node.
        """
        draws = sorted(plan.draws(self._rank))
        with self._spans.span("fetch", batch=plan.version):
            self._fetched, lost = await _found({d: groups[d] for d in draws})
        return lost

    async def update(self, plan: Plan, groups: Mapping[int, Awaitable[Group]]) -> list[dict[str, float]]:
        """Train on one rollout batch.

        Reference log-probabilities, and old ones for all updates but the first, are computed before the first update.

        Args:
            plan: the same on all ranks.
            groups: draw -> reference, for all of the plan's draws; this rank fetches those it trains on.

        Returns:
            Metrics of each update, the same on all ranks.
        """
        async with self._turn:
            fetched = await self._here(plan, groups)
            with self._spans.span("update", batch=plan.version, version=plan.version + 1):
                return await self._in_thread(self._update, plan, fetched)

    def _update(self, plan: Plan, groups: Mapping[int, Group]) -> list[dict[str, float]]:
        engine = self._engine
        work = [[self._collate(rows, plan, groups) for rows in u.micro_batches[self._rank]] for u in plan.updates]
        if self._with_reference:
            with self._spans.span("reference"):
                work = [[dataclasses.replace(b, reference=engine.reference_logprobs(b)) for b in bs] for bs in work]
        if len(work) > 1:
            with self._spans.span("old"):  # before the first update, whose old policy is the current one
                work[1:] = [[dataclasses.replace(b, old=engine.logprobs(b)[0]) for b in bs] for bs in work[1:]]
        metrics = []
        for update, batches in zip(plan.updates, work, strict=True):
            objective = self._objective(scale=1 / update.num_loss_tokens)
            with self._spans.span("optimize", tokens=update.num_loss_tokens):
                metrics.append(engine.update(batches, objective, lr=self._next_lr(), own_version=plan.version))
            assert metrics[-1]["policy/loss_tokens"] == update.num_loss_tokens, "driver and ranks count differently"
        return metrics

    async def accumulate(self, plan: Plan, groups: Mapping[int, Awaitable[Group]]) -> None:
        """Add the gradients of a part of a rollout batch to those of the ``step`` that follows its last part.

        Args:
            plan, groups: as for ``update``; a part's is one update.
        """
        async with self._turn:
            fetched = await self._here(plan, groups)
            with self._spans.span("update", batch=plan.version, version=plan.version + 1):
                await self._in_thread(self._accumulate, plan, fetched)

    def _accumulate(self, plan: Plan, groups: Mapping[int, Group]) -> None:
        [part] = plan.updates
        batches = [self._collate(rows, plan, groups) for rows in part.micro_batches[self._rank]]
        if self._with_reference:
            with self._spans.span("reference"):
                batches = [dataclasses.replace(b, reference=self._engine.reference_logprobs(b)) for b in batches]
        with self._spans.span("optimize", tokens=part.num_loss_tokens):
            # How many tokens the batch has in all is not known yet: `step` divides by them.
            self._engine.accumulate(batches, self._objective(scale=1.0), own_version=plan.version)

    async def step(self, version: int, num_loss_tokens: int) -> list[dict[str, float]]:
        """End a rollout batch whose parts were accumulated, with its one update.

        Args:
            version: the learner's weights before it.
            num_loss_tokens: of all parts and ranks.

        Returns:
            As ``update``.
        """

        def step() -> list[dict[str, float]]:
            with self._spans.span("optimize", tokens=num_loss_tokens):
                metrics = self._engine.step(lr=self._next_lr(), divisor=num_loss_tokens)
            assert metrics["policy/loss_tokens"] == num_loss_tokens, "driver and ranks count differently"
            return [metrics]

        async with self._turn:
            with self._spans.span("update", batch=version, version=version + 1):
                return await self._in_thread(step)

    async def _here(self, plan: Plan, groups: Mapping[int, Awaitable[Group]]) -> dict[int, Group]:
        """The groups this rank trains on. Within the turn: before it, a later call could overtake on some ranks."""
        assert plan.advantages.keys() == groups.keys(), "the plan's draws and the groups' differ"
        here, self._fetched = self._fetched, {}
        return {d: here[d] if d in here else await groups[d] for d in sorted(plan.draws(self._rank))}

    def _objective(self, scale: float) -> Objective:
        from stepgrpo.learner.loss import policy_loss

        c = self._config
        return partial(
            policy_loss,
            clip_low=c.clip_low,
            clip_high=c.clip_high,
            dual_clip=c.dual_clip,
            importance_cap=c.importance_cap,
            kl_coef=c.kl_coef,
            scale=scale,
        )

    def _collate(self, rows: Sequence[Row], plan: Plan, groups: Mapping[int, Group]) -> MicroBatch:
        samples = [
            sample_of(groups[draw].trajectories[i], plan.advantages[draw][i], self._config.train_exit_tokens)
            for draw, i in rows
        ]
        return collate(samples, self._packed, self._engine.pad_id)

    async def train_pairs(self, pairs: Sequence[Awaitable[Sequence[Pair]]]) -> dict[str, float]:
        """One supervised update; every rank gets all pairs and takes its share.

        Args:
            pairs: a list of one reference.

        Returns:
            Metrics, the same on all ranks.
        """
        async with self._turn:
            return await self._in_thread(self._train_pairs, await pairs[0])

    def _train_pairs(self, pairs: Sequence[Pair]) -> dict[str, float]:
        from stepgrpo.learner.loss import nll_loss

        samples = [pair_sample(prompt, response) for prompt, response in pairs]
        shares = partition(
            [len(s.token_ids) for s in samples],
            num_ranks=self._world_size,
            budget_tokens=self._config.micro_batch_tokens,
            packed=self._packed,
        )
        batches = [collate([samples[i] for i in mb], self._packed, self._engine.pad_id) for mb in shares[self._rank]]
        num_tokens = sum(int(s.loss_mask.sum()) for s in samples)
        return self._engine.update(batches, partial(nll_loss, scale=1 / num_tokens), lr=self._next_lr())

    async def publish(self, version: int) -> tuple[Manifest, list[Any]]:
        """Put this rank's pieces of the weights, or what has changed in them, into the object store; copied by the time
        it returns."""

        def publish() -> tuple[Manifest, list[Any]]:
            with self._spans.span("publish", version=version) as span:
                manifest, refs = self._publisher.publish(version, self._engine.shards())
                span["bytes"] = manifest.whole_bytes + manifest.difference_bytes
            return manifest, refs

        return await self._run(publish)

    async def sleep(self) -> None:
        """Leave the GPU to the engine."""
        with self._spans.span("sleep"):
            await self._run(self._engine.sleep)

    async def wake(self) -> None:
        """Take the GPU again; a rank that is awake stays so."""
        with self._spans.span("wake"):
            await self._run(self._engine.wake)

    async def save(self, directory: str) -> None:
        """Write the policy as a Hugging Face directory; a collective, rank 0 writes."""
        await self._run(self._engine.save_pretrained, directory)

    async def snapshot(self) -> None:
        """Copy the training state for the ``checkpoint`` that follows; only this keeps the learner."""
        with self._spans.span("snapshot"):
            self._copy = await self._run(self._engine.snapshot)

    async def checkpoint(self, place: str, name: str, groups: Mapping[int, Awaitable[Group]]) -> list[FileEntry]:
        """Put this rank's files, with the state of the last ``snapshot``, into a checkpoint; the driver commits it.

        Args:
            groups: draw -> reference, for the groups that are finished but not yet trained on: rank 0 writes them, but
                for those that went away with their node; the others need none.

        Raises:
            OSError: as ``checkpoint.put`` does, on a full disk for example.
        """
        with self._spans.span("checkpoint", checkpoint=name):
            (tensors, metadata), self._copy = self._copy, None
            own = state.file_name(self._rank, self._world_size)
            entries = [await asyncio.to_thread(put, place, name, own, state.serialized(tensors, metadata))]
            del tensors  # three times the weights, which what follows need not hold
            if self._rank == 0:
                there, _ = await _found({d: groups[d] for d in sorted(groups)})
                dumped = await asyncio.to_thread(groups_file.dump, list(there.values()))
                entries.append(await asyncio.to_thread(put, place, name, groups_file.FILE, dumped))
            return entries

    async def restore(self, place: str, name: str, files: Sequence[str], num_updates: int) -> None:
        """Take weights, optimizer and random numbers from a checkpoint of however many ranks.

        Args:
            files: names of all the checkpoint's files.
            num_updates: updates made until then, for the learning rate's schedule.

        Raises:
            ValueError: it is of another model, or incomplete.
            CheckpointError: as ``checkpoint.fetch`` does.
        """

        def load() -> None:
            needed = state.files_for(self._rank, self._world_size, files)
            self._engine.restore([fetch(place, name, f) for f in needed])
            self._num_updates = num_updates

        with self._spans.span("restore", checkpoint=name):
            await self._run(load)

    async def restore_groups(self, place: str, name: str) -> dict[int, list[Any]]:
        """Put a checkpoint's groups into the object store: draw -> list of one reference. Asked of rank 0."""

        def load() -> dict[int, list[Any]]:
            return {g.draw: [ray.put(g)] for g in groups_file.load(fetch(place, name, groups_file.FILE))}

        return await asyncio.to_thread(load)

    async def close(self) -> None:
        """Stop the grading processes and release the engine."""
        if self._grader is not None:
            self._grader.close()
        if hasattr(self, "_engine"):
            await self._run(self._engine.close)
        self._thread.shutdown()

    def _next_lr(self) -> float:
        from stepgrpo.learner.engine import learning_rate

        self._num_updates += 1
        return learning_rate(self._config, self._num_updates - 1, self._total_updates)

    async def _run(self, call: Callable[..., T], *args: Any) -> T:
        async with self._turn:
            return await self._in_thread(call, *args)

    async def _in_thread(self, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)


async def _found(groups: Mapping[int, Awaitable[Group]]) -> tuple[dict[int, Group], list[int]]:
    """Groups by draw, from their references, and the draws of those that were lost with their node."""
    answers = await asyncio.gather(*groups.values(), return_exceptions=True)
    there, lost = {}, []
    for draw, answer in zip(groups, answers, strict=True):
        if isinstance(answer, ObjectLostError):
            lost.append(draw)
        elif isinstance(answer, BaseException):
            raise answer
        else:
            there[draw] = answer
    return there, lost

"""The Ray actor of one rollout worker: a vLLM engine, the rollout loop, and the receiving end of weights."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Awaitable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import ray

from stepgrpo.actors.describe import describe
from stepgrpo.actors.engine import CPU_ENV, VllmEngine
from stepgrpo.actors.rollout import Places, Rollout, first_cause
from stepgrpo.actors.stats import EngineStats
from stepgrpo.config import Config
from stepgrpo.hub import checkpoint_files, eos_ids
from stepgrpo.launch import together
from stepgrpo.reward.graded import grade_group
from stepgrpo.reward.outcome import make_grader
from stepgrpo.spans import Spans
from stepgrpo.tokens import Codec
from stepgrpo.types import GradedGroup, Group, Prompt, WeightVersion
from stepgrpo.watchdog import Whereabouts, whereabouts
from stepgrpo.weights import SharedWeights, WeightsError


class RolloutWorker:
    """One engine, on one event loop; weights are fetched in a thread beside it.

    No concurrency groups: Ray gives each a loop of its own, and the engine's client belongs to the loop it started on.
    """

    def __init__(self, config: Config, run_token: str, index: int) -> None:
        self._config, self._index = config, index
        self._spans = Spans()
        self._shared = SharedWeights(Path("/dev/shm") / f"stepgrpo-{os.getuid()}-{run_token}")

    async def start(self) -> str:
        """Build the engine; returns the node's id.

        Raises:
            ConfigError: the checkpoint lacks a tokenizer, an EOS or the thinking marker.
        """
        with self._spans.span("start"):
            self._build()
        # What is here now stays: a full collection would walk all of vllm and torch, for half a second in which every
        # trajectory decodes on past its cut.
        gc.collect()
        gc.freeze()
        return str(ray.get_runtime_context().get_node_id())

    def _build(self) -> None:
        c = self._config
        directory = checkpoint_files(c.model.path)
        codec = Codec.from_dir(directory)
        eos = eos_ids(directory)
        self._engine = VllmEngine(
            c.model.path,
            c.model,
            c.engine,
            device=c.cluster.device,
            max_model_len=c.max_model_len,
            seed=c.seed,
            sleeps=c.cluster.colocate,
            record=EngineStats(c.name, self._index, c.model.path).record,
        )
        self._places = Places(c.engine.max_num_seqs)
        self._rollout = Rollout(
            self._engine,
            codec,
            c.rollout,
            c.model.think_close,
            eos,
            run_seed=c.seed,
            spans=self._spans,
            places=self._places,
        )
        self._grader = make_grader(c.reward, c.model.think_close)

    @ray.method(num_returns=2)
    async def roll(self, prompt: Prompt) -> tuple[int, Group]:
        """Sample one group. The driver takes its number of response tokens, and passes on the reference to the group,
        which stays in this node's object store."""
        with self._spans.span("generate", draw=prompt.draw) as span:
            group = await self._rollout.group(prompt, self._config.rollout.group_size)
            num_tokens = sum(t.num_tokens for t in group.trajectories)
            versions = [s.version for t in group.trajectories for s in t.spans]
            span |= {"tokens": num_tokens, "oldest": min(versions), "newest": max(versions)}
        return num_tokens, group

    async def evaluate(self, prompts: list[Prompt], keep: bool) -> list[tuple[GradedGroup, dict[str, Any] | None]]:
        """Decode as `eval` says and grade. The caller sees to it that no weights are loaded meanwhile.

        Returns:
            For each prompt its graded responses and, where ``keep`` asks for it, their description.
        """
        rollout, close = self._rollout, self._config.model.think_close

        async def one(prompt: Prompt) -> tuple[GradedGroup, dict[str, Any] | None]:
            group = await rollout.group(prompt, self._config.eval.samples, plain=self._config.eval)
            graded = await grade_group(group, self._grader, rollout.step_rule, close, train_exit_tokens=False)
            return graded, describe(group, graded, rollout.codec, rollout.step_rule, close) if keep else None

        # After a failure nothing decodes on: the caller asks anew, or loads other weights.
        with self._spans.span("evaluate", problems=len(prompts)), first_cause():
            return await together(one(p) for p in prompts)

    async def describe(self, group: Sequence[Awaitable[Group]], graded: GradedGroup) -> dict[str, Any]:
        """A graded group for people. ``group``: a list of one reference, which Ray passes on without fetching."""
        rollout = self._rollout
        return describe(await group[0], graded, rollout.codec, rollout.step_rule, self._config.model.think_close)

    async def load(self, weights: WeightVersion) -> float:
        """Fetch a version once per node while decoding goes on, then change to it between two tokens, or without
        `rollout.in_flight_updates` between two trajectories.

        Returns:
            Seconds during which nothing was decoded.
        """
        with self._spans.span("load", version=weights.version) as span:
            paused = await self._load(weights)
            span["paused"] = round(paused, 6)
        return paused

    async def _load(self, weights: WeightVersion) -> float:
        # Nodes begin with different ranks, so that they do not all pull from the same one first.
        store = partial(
            self._shared.store, weights.version, weights.manifests, partial(_fetch, weights), first=self._index
        )
        await asyncio.to_thread(store)
        async with nullcontext() if self._config.rollout.in_flight_updates else self._places.empty():
            while True:
                try:
                    with self._shared.reading(weights.version) as (path, table):
                        return await self._engine.load(weights.version, path, table)
                except WeightsError:  # other workers of the node have stored two newer versions since
                    await asyncio.to_thread(store)

    async def sleep(self) -> None:
        """Leave the GPU to the learner. Nothing may be in flight."""
        with self._spans.span("sleep"):
            await self._engine.sleep()

    async def wake(self) -> None:
        with self._spans.span("wake"):
            await self._engine.wake()

    async def spans(self, had: int) -> tuple[int, list[dict[str, Any]]]:
        """What was done, see ``Spans.fetch``."""
        return self._spans.fetch(had)

    async def whereabouts(self) -> Whereabouts:
        return whereabouts()

    async def ping(self) -> None:
        """Return once the engine has answered.

        Raises:
            EngineDied: if the engine died.
        """
        await self._engine.ping()

    async def close(self) -> None:
        """Give the shared memory back and stop the engine process; also after a start that failed."""
        # The engine last: it may be slow, and its driver impatient. Unlinking what it maps is harmless.
        self._shared.close()
        for part in ("_grader", "_engine"):
            if hasattr(self, part):
                getattr(self, part).close()


def _fetch(weights: WeightVersion, rank: int, bucket: int) -> Any:
    return ray.get(weights.buckets[rank][bucket])


def env_vars(device: str) -> dict[str, str]:
    """Environment of the actor's process."""
    return CPU_ENV if device == "cpu" else {"VLLM_NO_USAGE_STATS": "1"}

"""The actors of a run: what they take of a cluster, started together, stopped together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError

from stepgrpo import launch
from stepgrpo.config import Config, RunConfig, SftConfig
from stepgrpo.console import Display
from stepgrpo.launch import Bundle, together
from stepgrpo.pool import Pool, root_cause
from stepgrpo.watchdog import Stuck, waiting

# An interrupted run is over within ten seconds: this, the closing and Ray's own end.
SAVE_SECONDS_WHEN_INTERRUPTED = 4.0
SAVE_SECONDS_AFTER_A_FAILURE = 120.0
# Supervised learning has no such settings, and RL's are about a batch.
SAVE_WARNING_SECONDS, SAVE_LIMIT_SECONDS = 300.0, 3600.0
CLOSE_SECONDS = 2.0


def rollout_bundles(config: Config) -> list[Bundle]:
    """Of the fewest workers that will do."""
    gpus = config.engine.tensor_parallel if config.cluster.device == "cuda" else 0
    return [Bundle("rollout.workers", config.cluster.cpus_per_worker, gpus)] * config.rollout.workers.min


def learner_bundles(config: RunConfig) -> list[Bundle]:
    gpus = 1 if config.cluster.device == "cuda" else 0
    return [Bundle("learner.num_ranks", config.cluster.cpus_per_rank, gpus)] * config.learner.num_ranks


@asynccontextmanager
async def rollout_crew(config: Config, display: Display, *, learner: bool) -> AsyncIterator[tuple[Pool, list[Any]]]:
    """Rollout workers and, where ``learner`` asks for them, its ranks."""
    seconds = config.cluster.start_timeout
    pool = Pool(
        partial(_start_worker, config, launch.run_token()),
        rollout_bundles(config)[0],
        config.rollout.workers,
        capacity=config.engine.max_num_seqs // config.rollout.group_size,
        health_seconds=config.rollout.health_seconds,
        start_timeout=seconds,
        max_failures=config.train.max_failures,
        display=display,
        run_dir=config.run_dir if learner else None,
    )
    ranks: list[Any] = []
    try:
        with display.phase("start", "starting vLLM and DeepSpeed" if learner else "starting vLLM"):
            if learner:
                ranks = _start_ranks(
                    config,
                    await _places(learner_bundles(config), seconds),
                    config.train.num_batches * config.updates_per_batch,
                    rollout=config.rollout,
                    reward=config.reward,
                )
            setups = [pool.start()]
            if learner:
                setups.append(launch.within(_set_up(ranks), seconds, "the learner's ranks"))
            await together(setups)
        yield pool, ranks
    finally:
        await together([pool.close(), _close(ranks)])


@asynccontextmanager
async def learner_crew(config: SftConfig, display: Display, total_updates: int) -> AsyncIterator[list[Any]]:
    """Learner ranks alone, which neither grade nor have a reference."""
    ranks: list[Any] = []
    try:
        with display.phase("start", "starting DeepSpeed"):
            seconds = config.cluster.start_timeout
            ranks = _start_ranks(config, await _places(learner_bundles(config), seconds), total_updates)
            await launch.within(_set_up(ranks), seconds, "the learner's ranks")
        yield ranks
    finally:
        await _close(ranks)


async def _places(bundles: Sequence[Bundle], seconds: float) -> list[dict[str, Any]]:
    """Actor options for places in one placement group."""
    group = await launch.reserve(bundles, seconds)
    return [launch.place(group, i, b) for i, b in enumerate(bundles)]


@asynccontextmanager
async def saved(
    ranks: Sequence[Any], directory: Path, display: Display, has_learnt: Callable[[], bool]
) -> AsyncIterator[None]:
    """Save the model at the end of the block, also at an early end, as far as the learner still answers.

    A learner in the middle of an update answers after it, which may be too late for an interrupted run.

    Args:
        directory: absolute, because actors have another working directory.
    """
    try:
        yield
    except BaseException as e:
        interrupted = isinstance(e, asyncio.CancelledError)
        # Ranks that are dead or stuck save nothing; the run is started again from its checkpoint.
        if has_learnt() and not isinstance(root_cause(e), RayActorError | Stuck):
            with contextlib.suppress(Exception):
                async with asyncio.timeout(
                    SAVE_SECONDS_WHEN_INTERRUPTED if interrupted else SAVE_SECONDS_AFTER_A_FAILURE
                ):
                    await _save(ranks, directory)
        raise
    with display.phase("save", "saving the model"):
        async with waiting(
            f"{directory} to be saved", say=display.warn, warn=SAVE_WARNING_SECONDS, limit=SAVE_LIMIT_SECONDS
        ):
            await _save(ranks, directory)


async def _save(ranks: Sequence[Any], directory: Path) -> None:
    await together(r.save.remote(str(directory)) for r in ranks)


async def _set_up(ranks: Sequence[Any]) -> None:
    """Let learner ranks find each other: rank 0 names the address, all join at once."""
    host, port = await ranks[0].address.remote()
    await together(r.setup.remote(host, port) for r in ranks)


async def _close(ranks: Sequence[Any]) -> None:
    with contextlib.suppress(Exception):
        async with asyncio.timeout(CLOSE_SECONDS):
            await together(r.close.remote() for r in ranks)


def _start_worker(config: Config, run_token: str, index: int, options: dict[str, Any]) -> Any:
    import ray

    from stepgrpo.actors.worker import RolloutWorker, env_vars

    actor = ray.remote(RolloutWorker).options(
        max_concurrency=10_000, runtime_env={"env_vars": env_vars(config.cluster.device)}, **options
    )
    return actor.remote(config, run_token, index)


def _start_ranks(config: RunConfig, places: Sequence[dict[str, Any]], total_updates: int, **rollouts: Any) -> list[Any]:
    """``rollouts``: what only RL needs, ``rollout`` and ``reward``."""
    import ray

    from stepgrpo.learner.worker import LearnerWorker

    actor = ray.remote(concurrency_groups={"ingest": 64})(LearnerWorker)
    return [
        actor.options(**place).remote(
            rank,
            len(places),
            config.learner,
            config.model,
            device=config.cluster.device,
            total_updates=total_updates,
            **rollouts,
        )
        for rank, place in enumerate(places)
    ]

"""The actors of a run: what they take of a cluster, started together, stopped together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from stepgrpo import launch
from stepgrpo.config import Config, RunConfig, SftConfig
from stepgrpo.console import Display
from stepgrpo.launch import together
from stepgrpo.placement import half, learner_bundles, rollout_bundles, shared_bundles
from stepgrpo.pool import DEAD, Pool, root_cause
from stepgrpo.watchdog import Stuck, waiting

# An interrupted run is over within ten seconds: this, the closing and Ray's own end.
SAVE_SECONDS_WHEN_INTERRUPTED = 4.0
SAVE_SECONDS_AFTER_A_FAILURE = 120.0
# Supervised learning has no such settings, and RL's are about a batch.
SAVE_WARNING_SECONDS, SAVE_LIMIT_SECONDS = 300.0, 3600.0
CLOSE_SECONDS = 2.0


@asynccontextmanager
async def rollout_crew(config: Config, display: Display, *, learner: bool) -> AsyncIterator[tuple[Pool, list[Any]]]:
    """Rollout workers and, where ``learner`` asks for them, its ranks, which sleep where they share GPUs."""
    seconds = config.cluster.start_timeout
    async with contextlib.AsyncExitStack() as stack:
        with display.phase("start", "starting vLLM and DeepSpeed" if learner else "starting vLLM"):
            # Ranks first: they are to lie together, workers take what is left.
            colocated = learner and config.cluster.colocate
            bundles = [] if not learner else shared_bundles(config) if colocated else learner_bundles(config)
            group = await launch.reserve(bundles, seconds) if bundles else None
            worker = rollout_bundles(config)[0]
            pool = Pool(
                partial(_start_worker, config, launch.run_token()),
                launch.beside(group, half(worker)) if colocated else launch.on_their_own(worker),
                config.rollout.workers,
                capacity=config.engine.max_num_seqs // config.rollout.group_size,
                health_seconds=config.rollout.health_seconds,
                start_timeout=seconds,
                max_failures=config.train.max_failures,
                display=display,
                run_dir=config.run_dir if learner else None,
            )
            ranks: list[Any] = []
            stack.push_async_callback(lambda: together([pool.close(), _close(ranks)]))
            setups = []
            if learner:
                updates = config.train.num_batches * config.updates_per_batch
                ranks += _start_ranks(config, group, updates, rollout=config.rollout, reward=config.reward)
                setups.append(launch.within(_set_up(ranks), seconds, "the learner's ranks"))
            if colocated:  # an engine looks how much memory is free when it starts
                await setups.pop()
                await together(r.sleep.remote() for r in ranks)
            await together([pool.start(), *setups])
        yield pool, ranks


@asynccontextmanager
async def learner_crew(config: SftConfig, display: Display, total_updates: int) -> AsyncIterator[list[Any]]:
    """Learner ranks alone, which neither grade nor have a reference."""
    ranks: list[Any] = []
    try:
        with display.phase("start", "starting DeepSpeed"):
            seconds = config.cluster.start_timeout
            ranks = _start_ranks(config, await launch.reserve(learner_bundles(config), seconds), total_updates)
            await launch.within(_set_up(ranks), seconds, "the learner's ranks")
        yield ranks
    finally:
        await _close(ranks)


@asynccontextmanager
async def saved(
    ranks: Sequence[Any],
    directory: Path,
    display: Display,
    has_learnt: Callable[[], bool],
    turn: Callable[[], contextlib.AbstractAsyncContextManager[None]] = contextlib.nullcontext,
) -> AsyncIterator[None]:
    """Save the model at the end of the block, also at an early end, as far as the learner still answers.

    A learner in the middle of an update answers after it, which may be too late for an interrupted run.

    Args:
        directory: absolute, because actors have another working directory.
        turn: held while the ranks save.
    """
    try:
        yield
    except BaseException as e:
        interrupted = isinstance(e, asyncio.CancelledError)
        # Ranks that are dead or stuck save nothing; the run is started again from its checkpoint.
        if has_learnt() and not isinstance(root_cause(e), (*DEAD, Stuck)):
            with contextlib.suppress(Exception):
                async with asyncio.timeout(
                    SAVE_SECONDS_WHEN_INTERRUPTED if interrupted else SAVE_SECONDS_AFTER_A_FAILURE
                ):
                    async with turn():
                        await _save(ranks, directory)
        raise
    with display.phase("save", "saving the model"):
        what = f"{directory} to be saved"
        async with waiting(what, say=display.warn, warn=SAVE_WARNING_SECONDS, limit=SAVE_LIMIT_SECONDS), turn():
            await _save(ranks, directory)


async def _save(ranks: Sequence[Any], directory: Path) -> None:
    await together(r.save.remote(str(directory)) for r in ranks)


async def _set_up(ranks: Sequence[Any]) -> None:
    """Let learner ranks find each other: rank 0 listens, all join at once."""
    places = await together(r.whereabouts.remote() for r in ranks)
    host, port = await ranks[0].listen.remote(on_one_node=len({p.node for p in places}) == 1)
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


def _start_ranks(config: RunConfig, group: Any, total_updates: int, **rollouts: Any) -> list[Any]:
    """
    Args:
        group: placement group with a bundle for each.
        rollouts: what only RL needs, ``rollout`` and ``reward``.
    """
    import ray

    from stepgrpo.learner.worker import LearnerWorker

    actor = ray.remote(concurrency_groups={"ingest": 64})(LearnerWorker)
    bundles = learner_bundles(config)
    if config.cluster.colocate and rollouts:
        bundles = [half(b) for b in bundles]
    return [
        actor.options(**launch.place(group, rank, bundle)).remote(
            rank,
            len(bundles),
            config.learner,
            config.model,
            device=config.cluster.device,
            total_updates=total_updates,
            **rollouts,
        )
        for rank, bundle in enumerate(bundles)
    ]

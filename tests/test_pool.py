"""Rollout workers that die, hang, come and go: the pool over tiny actors, and a whole run under fire."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from stepgrpo import run
from stepgrpo.actors.rollout import Chunk, GarbageError
from stepgrpo.config import Config, ConfigError, WorkersConfig, load
from stepgrpo.console import Display
from stepgrpo.launch import on_their_own
from stepgrpo.placement import Bundle
from stepgrpo.pool import LOOK_SECONDS, Pool, Seat, TrainError, WorkersGone, is_lost, root_cause
from tests.nodes import cluster_of
from tests.runs import INPUTS, QUICKSTART, descendants, titled

MEMORY = 100 << 20
SECONDS = 60.0


class Worker:
    """As much of a rollout worker as the pool needs to know."""

    def __init__(self, index: int, directory: Path) -> None:
        self.index, self.directory = index, directory

    async def start(self) -> str:
        if self.directory.joinpath("meet").exists():
            self.log("begins to start")
            await asyncio.to_thread(self.meet)
        if self.directory.joinpath("broken").exists():
            raise ValueError("no engine today")
        self.log("starts")
        return str(ray.get_runtime_context().get_node_id())

    def meet(self) -> None:
        while self.directory.joinpath("turns").read_text().count("begins") < 2:
            time.sleep(0.05)

    async def ping(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def pid(self) -> int:
        return os.getpid()

    async def sleep(self) -> None:
        self.log("sleeps")

    async def wake(self) -> None:
        self.log("wakes")

    def log(self, what: str) -> None:
        with self.directory.joinpath("turns").open("a") as f:
            f.write(f"{self.index} {what}\n")

    async def garbage(self) -> None:
        raise GarbageError("a log-probability of nan")

    async def slow(self) -> int:
        await asyncio.sleep(SECONDS)
        return 1

    async def large(self) -> Any:
        return np.zeros(1 << 20)

    async def read(self, refs: list[Any]) -> float:
        return float((await refs[0]).sum())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One node for the head, which holds no worker; tests add those that do."""
    with cluster_of(num_cpus=0, object_store_memory=MEMORY) as nodes:
        here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}
        ray.init(address=nodes.address, runtime_env=here, log_to_driver=False, logging_level="ERROR")
        yield nodes
        ray.shutdown()


@pytest.fixture
def add_node(cluster: Cluster) -> Iterator[Callable[[], Any]]:
    """Adds a node with room for two workers; what a test added goes with it."""
    added: list[Any] = []

    def add() -> Any:
        added.append(cluster.add_node(num_cpus=2, object_store_memory=MEMORY))
        cluster.wait_for_nodes()
        return added[-1]

    yield add
    for node in added:
        with suppress(Exception):
            cluster.remove_node(node)  # in good order: a killed one would be given work until it is missed


@asynccontextmanager
async def pool_of(directory: Path, least: int, most: int, **settings: Any) -> AsyncIterator[Pool]:
    actor = ray.remote(Worker)
    keywords: dict[str, Any] = {"health_seconds": 15.0, "start_timeout": SECONDS, "max_failures": 3} | settings
    pool = Pool(
        lambda index, options: actor.options(**options).remote(index, directory),
        on_their_own(Bundle("rollout.workers", 1.0, 0)),
        WorkersConfig(min=least, max=most),
        capacity=4,
        display=Display(Console(file=io.StringIO())),
        run_dir=directory,
        **keywords,
    )
    try:
        await pool.start()
        yield pool
    finally:
        await pool.close()


async def until(pool: Pool, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await pool.changed()


async def kill(seat: Seat, number: int = signal.SIGKILL) -> None:
    os.kill(await seat.actor.pid.remote(), number)


def events(directory: Path) -> list[dict[str, Any]]:
    path = directory / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


async def test_a_killed_worker_is_replaced_in_its_place_and_the_event_names_its_draws(tmp_path: Path, add_node) -> None:
    add_node()
    async with pool_of(tmp_path, 2, 2) as pool, pool.serving():
        seat = pool.seats[0]
        seat.draws |= {7, 4}
        await kill(seat)
        await until(pool, lambda: seat.lost and len(pool.seats) == 2)
        assert pool.deaths == 1 and {s.index for s in pool.seats} == {0, 1}
    death, joined = events(tmp_path)
    assert (death["kind"], death["worker"], death["node"]) == ("death", seat.index, seat.node)
    assert death["reissued"] == [4, 7] and "ActorDied" in death["reason"]
    assert (joined["kind"], joined["worker"]) == ("joined", seat.index)


async def test_a_hung_worker_is_noticed_in_time_killed_and_replaced(tmp_path: Path, add_node) -> None:
    add_node()
    async with pool_of(tmp_path, 1, 1, health_seconds=4.0) as pool, pool.serving():
        seat = pool.seats[0]
        pid = await seat.actor.pid.remote()
        started = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        await until(pool, lambda: seat.lost)
        assert time.monotonic() - started < 2 * 4.0
        await until(pool, lambda: bool(pool.seats))
        psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=SECONDS)
        assert not psutil.pid_exists(pid)
    assert "no answer within 4 s (rollout.health_seconds)" in events(tmp_path)[0]["reason"]


async def test_a_new_worker_takes_no_work_before_it_has_the_weights(tmp_path: Path, add_node) -> None:
    add_node()
    loaded = asyncio.Event()
    joining: list[Seat] = []

    async def join(seat: Seat) -> None:
        joining.append(seat)
        pool._changed.set()
        await loaded.wait()
        seat.version = 3

    async with pool_of(tmp_path, 1, 1) as pool, pool.serving(join=join):
        await kill(pool.seats[0])
        await until(pool, lambda: bool(joining))
        assert pool.seats == []
        loaded.set()
        await until(pool, lambda: bool(pool.seats))
        assert [s.version for s in pool.seats] == [3]


async def test_a_worker_that_cannot_start_at_all_is_the_error_itself(tmp_path: Path, add_node) -> None:
    add_node()
    (tmp_path / "broken").touch()
    with pytest.raises(Exception, match="no engine today") as error:
        async with pool_of(tmp_path, 1, 1):
            pass
    assert isinstance(root_cause(error.value), ValueError)


async def test_failures_in_a_row_end_the_run_with_the_first_cause(tmp_path: Path, add_node) -> None:
    add_node()

    async def serve() -> None:
        async with pool_of(tmp_path, 1, 1) as pool, pool.serving():
            (tmp_path / "broken").touch()
            await kill(pool.seats[0])
            await asyncio.sleep(SECONDS)

    with pytest.raises(ExceptionGroup) as error:
        await serve()
    cause = root_cause(error.value)
    assert isinstance(cause, TrainError)
    assert str(cause).startswith("3 failures in a row (train.max_failures); the first: rollout worker 0 (node ")
    assert "ActorDiedError" in str(cause)


async def test_a_finished_group_ends_a_row_of_failures(tmp_path: Path, add_node) -> None:
    add_node()
    async with pool_of(tmp_path, 1, 1, max_failures=2) as pool, pool.serving():
        for _ in range(3):
            seat = pool.seats[0]
            await kill(seat)
            await until(pool, lambda seat=seat: seat.lost and bool(pool.seats))
            pool.failures.reset()
        assert pool.deaths == 3


async def test_waiting_for_a_replacement_ends_with_the_first_cause(tmp_path: Path, cluster: Cluster, add_node) -> None:
    node = add_node()

    async def serve() -> None:
        async with pool_of(tmp_path, 1, 1, start_timeout=15.0) as pool, pool.serving():
            cluster.remove_node(node, allow_graceful=False)
            await asyncio.sleep(SECONDS)

    with pytest.raises(ExceptionGroup) as error:
        await serve()
    cause = root_cause(error.value)
    assert isinstance(cause, TrainError)
    assert "fewer than 1 rollout workers (rollout.workers) for 15 s" in str(cause)
    assert "the first cause: rollout worker 0 (node " in str(cause)


async def test_a_new_node_is_used_and_a_lost_one_is_one_failure(tmp_path: Path, cluster: Cluster, add_node) -> None:
    first = add_node()
    async with pool_of(tmp_path, 2, 4, max_failures=2) as pool, pool.serving():
        old = {s.node for s in pool.seats}
        add_node()
        await until(pool, lambda: len(pool.seats) == 4)
        assert len({s.node for s in pool.seats}) == 2
        cluster.remove_node(first, allow_graceful=False)
        await until(pool, lambda: pool.deaths == 2)
        assert {e["node"] for e in events(tmp_path) if e["kind"] == "death"} == old
        assert not old & {s.node for s in pool.seats} and len(pool.seats) == 2


async def test_engines_that_share_gpus_sleep_while_others_have_them_and_none_starts_meanwhile(
    tmp_path: Path, add_node
) -> None:
    add_node()
    turns = tmp_path / "turns"

    async def learn() -> None:
        async with pool.asleep():
            turns.open("a").write("learner begins\n")
            await kill(first)
            await until(pool, lambda: pool.deaths == 1)
            await asyncio.sleep(2 * LOOK_SECONDS)  # in which another would start
            turns.open("a").write("learner ends\n")

    async with pool_of(tmp_path, 2, 2) as pool, pool.serving():
        first, second = sorted(pool.seats, key=lambda s: s.index)
        evaluation = second.loading
        await evaluation.acquire()
        turn = asyncio.create_task(learn())
        await asyncio.sleep(0.5)
        assert "sleeps" not in turns.read_text()
        evaluation.release()
        await turn
        await until(pool, lambda: len(pool.seats) == 2)
    lines = turns.read_text().splitlines()
    assert [*sorted(lines[:2]), *sorted(lines[2:4]), *lines[4:6], *sorted(lines[6:])] == [
        *("0 starts", "1 starts", "0 sleeps", "1 sleeps"),
        *("learner begins", "learner ends", "0 starts", "1 wakes"),
    ]


async def test_engines_start_side_by_side_and_after_the_last_turn_none_wakes(tmp_path: Path, add_node) -> None:
    add_node()
    (tmp_path / "meet").touch()  # neither starts before the other has begun to
    async with pool_of(tmp_path, 2, 2) as pool, pool.serving(), pool.asleep(for_good=True):
        pass
    turns = (tmp_path / "turns").read_text()
    assert turns.count("sleeps") == 2 and "wakes" not in turns


async def test_a_drained_node_is_left_when_its_work_is_done(tmp_path: Path, add_node) -> None:
    add_node()
    left: list[Seat] = []

    async def leave() -> None:
        left.extend(pool.up)

    async with pool_of(tmp_path, 1, 1) as pool, pool.serving(leave=leave):
        seat = pool.seats[0]
        seat.draws.add(1)
        add_node()
        gcs = ray._private.worker.global_worker.gcs_client
        accepted, why = gcs.drain_node(seat.node, 2, "spot", int((time.time() + SECONDS) * 1000))  # 2: preemption
        assert accepted, why
        await until(pool, lambda: bool(pool.seats) and pool.seats[0] is not seat)
        assert not seat.lost, events(tmp_path)
        seat.draws.clear()
        await until(pool, lambda: seat.lost)
        assert pool.deaths == 0 and seat in left and seat not in pool.up
    assert [e["kind"] for e in events(tmp_path)] == ["joined", "left"]


async def test_a_call_goes_to_another_worker_when_its_own_dies(tmp_path: Path, add_node) -> None:
    add_node()
    async with pool_of(tmp_path, 2, 2) as pool, pool.serving():
        first, second = pool.seats
        asked: list[Any] = []

        async def call(actor: Any) -> Any:
            asked.append(actor)
            if actor is first.actor:
                await kill(first)
                await actor.slow.remote()
            return await actor.pid.remote()

        assert await pool.ask(call) == await second.actor.pid.remote()
        assert asked == [first.actor, second.actor]
        with pytest.raises(WorkersGone):
            await pool.ask(call, among=[first])


async def test_a_worker_that_rays_memory_monitor_killed_is_lost_and_its_draws_go_to_others(
    tmp_path: Path, add_node
) -> None:
    add_node()
    async with pool_of(tmp_path, 1, 1) as pool, pool.serving():
        seat = pool.seats[0]
        assert pool.blame(seat, ray.exceptions.OutOfMemoryError("the node was running low on memory"))
        assert seat.lost and pool.failures.count == 1


async def test_three_answers_of_garbage_in_a_row_replace_the_worker(tmp_path: Path, add_node) -> None:
    add_node()
    async with pool_of(tmp_path, 1, 1) as pool, pool.serving():
        seat = pool.seats[0]
        for number in (1, 2, 3):
            with pytest.raises(GarbageError) as error:
                await seat.actor.garbage.remote()
            assert pool.blame(seat, error.value)
            assert seat.lost == (number == 3)
        assert pool.deaths == 1


@pytest.mark.parametrize("logprob", [float("nan"), float("inf"), float("-inf"), 0.5])
def test_a_log_probability_that_is_none_is_garbage(logprob: float) -> None:
    with pytest.raises(GarbageError, match="garbage"):
        Chunk([1, 2], [-0.5, logprob], [0, 0], None)


async def test_a_group_that_went_away_with_its_node_is_known_as_lost(
    tmp_path: Path, cluster: Cluster, add_node
) -> None:
    node = add_node()
    async with pool_of(tmp_path, 1, 2) as pool, pool.serving():
        seat = pool.seats[0]
        ref = seat.actor.large.remote()
        ray.wait([ref], fetch_local=False)
        add_node()
        cluster.remove_node(node, allow_graceful=False)
        await until(pool, lambda: any(s.node != seat.node for s in pool.seats))
        reader = next(s for s in pool.seats if s.node != seat.node)
        with pytest.raises(ray.exceptions.RayError) as error:
            await reader.actor.read.remote([ref])
        assert is_lost(error.value)


# ---- settings


@pytest.mark.parametrize(
    ("override", "least", "most"),
    [("rollout.workers=3", 3, 3), ("rollout.workers={min: 1, max: 4}", 1, 4), ("rollout.workers.max=2", 1, 2)],
)
def test_workers_are_a_number_or_a_range(override: str, least: int, most: int) -> None:
    workers = load(Config, QUICKSTART, [override]).rollout.workers
    assert (workers.min, workers.max) == (least, most)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.workers=0", "rollout.workers.min: got 0, takes greater than 0"),
        ("rollout.workers=two", "rollout.workers.min: got 'two'"),
        ("rollout.workers={min: 3, max: 2}", "rollout.workers.max: got 2, takes rollout.workers.min (3) or more"),
        ("rollout.workers.maxi=2", "rollout.workers.maxi: unknown key; did you mean rollout.workers.max?"),
    ],
)
def test_what_is_no_number_of_workers_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(Config, QUICKSTART, [override])
    assert message in str(error.value)


# ---- a whole run


def engines_and_workers(title: str) -> list[psutil.Process]:
    """This process's descendants with that title, oldest first."""
    return sorted(titled(descendants(), title), key=lambda p: p.create_time())


def test_a_run_survives_a_dead_engine_a_hung_engine_and_a_dead_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.shutdown()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    config = load(
        Config,
        QUICKSTART,
        [
            "name=fire",
            f"runs_dir={tmp_path}",
            *INPUTS,
            "rollout.workers=2",
            "rollout.health_seconds=8",
            "rollout.group_size=4",
            "engine.kv_cache_mb=64",
            "engine.max_num_seqs=16",
            "train.num_batches=12",
            "train.prompts_per_batch=4",
            "train.prompts_per_update=4",
            "eval.num_prompts=60",
            "cluster.cpus_per_worker=0.5",
            "cluster.cpus_per_rank=0.5",
        ],
    )
    draws = config.run_dir / "draws.jsonl"
    blows = {
        2: ("VLLM::EngineCore", signal.SIGKILL),
        5: ("VLLM::EngineCore", signal.SIGSTOP),
        8: ("ray::RolloutWorker", signal.SIGKILL),
    }
    over = threading.Event()

    def strike() -> None:
        for batches, (title, number) in blows.items():
            while not (draws.exists() and len(draws.read_text().splitlines()) >= batches):
                if over.wait(0.05):
                    return
            engines_and_workers(title)[0].send_signal(number)  # the oldest: it is at work

    striker = threading.Thread(target=strike)
    striker.start()
    screen = io.StringIO()
    try:
        run.train(config, Display(Console(file=screen, width=200)))
    finally:
        over.set()
        striker.join()
    trained = [d for line in draws.read_text().splitlines() for d in json.loads(line)["trained"]]
    assert sorted(trained) == list(range(12 * 4)), "every draw once"
    happened = events(config.run_dir)
    reasons = [e["reason"] for e in happened if e["kind"] == "death"]
    assert len(reasons) == 3, happened
    assert any("no answer within 8 s" in r for r in reasons), reasons
    metrics = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["workers/deaths"] == 3
    assert screen.getvalue().count("is lost: ") == 3
    assert not titled(descendants(), "VLLM::EngineCore"), "an engine survived"

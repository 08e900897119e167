"""The watchdog, over coroutines that really hang and processes that py-spy really reads."""

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from stepgrpo.config import Config, load
from stepgrpo.console import Display
from stepgrpo.data import PromptStream
from stepgrpo.recovery import Start
from stepgrpo.train import Loop
from stepgrpo.watchdog import Stuck, Whereabouts, dump_actors, dump_stacks, waiting, whereabouts
from tests.nodes import cluster_of

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
HANGS = """
import subprocess, sys, time
def the_child_hangs_here(): print("ready", flush=True); time.sleep(100)
def the_parent_hangs_here(): subprocess.run([sys.executable, __file__, "child"])
the_child_hangs_here() if sys.argv[1:] else the_parent_hangs_here()
"""


async def never() -> None:
    await asyncio.get_running_loop().create_future()


async def test_a_wait_says_what_for_at_doubling_intervals_and_ends_at_its_limit():
    said, groups = [], iter(range(3, 100))
    with pytest.raises(Stuck, match=r"^waited 0\.05 s for batch 12: 6 of 16 groups$"):
        async with waiting(lambda: f"batch 12: {next(groups)} of 16 groups", say=said.append, warn=0.01, limit=0.05):
            await never()
    assert said == [f"waited {s} s for batch 12: {n} of 16 groups" for s, n in ((0.01, 3), (0.02, 4), (0.04, 5))]


async def test_a_wait_that_ends_says_nothing_and_leaves_nothing_running():
    said = []
    async with waiting("nothing", say=said.append, warn=0.001, limit=0.01):
        pass
    await asyncio.sleep(0)
    assert said == [] and asyncio.all_tasks() == {asyncio.current_task()}


async def test_progress_has_the_seconds_counted_anew():
    async with waiting("an evaluation", say=print, warn=100, limit=0.2) as seen:
        for _ in range(6):
            await asyncio.sleep(0.1)
            seen()
    with pytest.raises(Stuck, match="waited"):
        async with waiting("an evaluation", say=print, warn=100, limit=0.1):
            await asyncio.sleep(10)


async def test_stacks_are_written_while_the_wait_still_hangs(tmp_path):
    events = []

    async def stacks():
        events.append("written")
        return tmp_path / "stacks.txt"

    async def hangs():
        async with waiting("weights", say=print, limit=0.01, stacks=stacks):
            try:
                await never()
            finally:
                events.append("cancelled")

    with pytest.raises(Stuck, match=r"for weights; the stacks of all processes: .*stacks\.txt$"):
        await hangs()
    assert events == ["written", "cancelled"]


async def test_stacks_that_cannot_be_written_do_not_prolong_the_wait():
    async def stacks():
        raise OSError(28, "No space left on device")

    with pytest.raises(Stuck, match=r"for weights; no stacks could be written \(OSError: .*No space left"):
        async with waiting("weights", say=print, limit=0.01, stacks=stacks):
            await never()


async def test_whoever_waits_for_an_evaluation_is_not_stuck_while_it_makes_progress():
    config = load(Config, QUICKSTART, ["train.wait_limit=0.5"])
    nobody = None
    loop = Loop(config, PromptStream((), 0), (), nobody, (), Display(), nobody, Start(), {})
    loop._stacks = None  # for which Ray would be needed
    over = asyncio.Event()

    async def evaluation():
        async with loop._waiting("an evaluation") as seen:
            for _ in range(100):
                await asyncio.sleep(0.01)
                seen()
        over.set()

    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        tasks.create_task(evaluation())
        async with loop._waiting("the engines to leave their GPUs"):
            await over.wait()


async def test_a_timeout_of_the_blocks_own_passes_through():
    with pytest.raises(TimeoutError) as e:
        async with waiting("weights", say=print, limit=100), asyncio.timeout(0.01):
            await never()
    assert not isinstance(e.value, Stuck)


@pytest.mark.parametrize(("inner", "outer", "stuck"), [(0.01, 100, "a shard"), (100, 0.01, "weights")])
async def test_of_nested_waits_the_one_at_its_limit_is_named(inner, outer, stuck):
    with pytest.raises(Stuck, match=f"^waited 0.01 s for {stuck}$"):
        async with waiting("weights", say=print, limit=outer), waiting("a shard", say=print, limit=inner):
            await never()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_cancelled_wait_is_cancelled_and_not_stuck():
    async def wait():
        async with waiting("weights", say=print, limit=100):
            await never()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_watchdog_that_fails_ends_the_wait_with_its_error():
    with pytest.raises(ZeroDivisionError):
        async with waiting(lambda: f"{1 / 0}", say=print, warn=0.01, limit=100):
            await never()


def test_stacks_show_the_function_in_which_a_process_and_its_child_hang(tmp_path):
    program = tmp_path / "hangs.py"
    program.write_text(HANGS)
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            text = dump_stacks(tmp_path, {"rollout 0": process.pid}).read_text()
        finally:
            os.killpg(process.pid, 9)
    parent, child = text.split("====")[1:]
    assert parent.startswith(f" rollout 0, process {process.pid}") and "the_parent_hangs_here (hangs.py:4)" in parent
    assert child.startswith(" rollout 0's child python") and "the_child_hangs_here (hangs.py:3)" in child


def test_a_process_that_is_gone_is_named_with_the_reason(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    text = dump_stacks(tmp_path, {"rank 1": process.pid}).read_text()
    assert text.startswith(f"==== rank 1, process {process.pid}\nno stack: Error: ")
    assert "Stack backtrace" not in text


@pytest.mark.skipif(os.getuid() != 0, reason="only root has a capability to give away")
def test_without_the_right_to_trace_the_file_says_what_is_missing(tmp_path):
    code = f"from stepgrpo.watchdog import stacks_of_node; print(stacks_of_node({{'rank 0': {os.getpid()}}}))"
    command = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace", sys.executable, "-c", code]
    text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert text.startswith(f"==== rank 0, process {os.getpid()}\nno stack: ") and "capability SYS_PTRACE" in text


async def test_stacks_of_actors_on_all_nodes_and_of_the_drivers_tasks_are_in_one_file(tmp_path, monkeypatch):
    import ray

    class Actor:
        def __init__(self) -> None:
            self.hangs, self.end = threading.Event(), threading.Event()

        def the_actor_hangs_here(self) -> None:
            self.hangs.set()
            self.end.wait()

        def whereabouts(self) -> Whereabouts:
            self.hangs.wait()
            return whereabouts()

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    with cluster_of(**node) as cluster:
        try:
            cluster.add_node(**node)
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            cluster.wait_for_nodes()
            actors = [ray.remote(num_cpus=1, max_concurrency=2)(Actor).remote() for _ in range(2)]
            hanging = [a.the_actor_hangs_here.remote() for a in actors]
            places = await asyncio.gather(*(a.whereabouts.remote() for a in actors))
            assert len({p.node for p in places}) == 2
            task = asyncio.create_task(never(), name="the feeder")
            await asyncio.sleep(0)
            gone = Whereabouts("a" * 56, 1)
            path = await dump_actors(tmp_path, {"rank 0": places[0], "rank 1": places[1], "rank 2": gone})
            task.cancel()
            del hanging
        finally:
            ray.shutdown()
    text = path.read_text()
    assert "the feeder\n    never (test_watchdog.py" in text
    for name, place in zip(("rank 0", "rank 1"), places, strict=True):
        stack = text.split(f"==== {name}, process {place.pid}\n")[1].split("====")[0]
        assert "the_actor_hangs_here (test_watchdog.py" in stack
    assert f"==== rank 2, process 1\nno stack: node {gone.node}: " in text

"""Whatever waits says after a while what it waits for, and fails after its limit, with everybody's stacks on disk."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

DUMP_SECONDS = 20.0
"""For the stacks of one process and its children."""
NODE_SECONDS = 60.0
"""For the stacks of one node."""

_PR_SET_PTRACER = 0x59616D61


class Stuck(TimeoutError):
    """Waited to the limit; the message says for what, how long, and where the stacks lie."""


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where a process of the run is to be found."""

    node: str
    """Ray's id."""
    pid: int


@asynccontextmanager
async def waiting(
    what: str | Callable[[], str],
    *,
    say: Callable[[str], object],
    warn: float = 60.0,
    limit: float | None = None,
    stacks: Callable[[], Awaitable[Path]] | None = None,
) -> AsyncIterator[Callable[[], None]]:
    """Watch over what the block waits for. The event loop must keep running meanwhile.

        async with waiting(lambda: f"batch {n}: {done} of 16 groups", say=display.warn, limit=1800, stacks=dump):
            await closable.wait()

    Args:
        what: asked again whenever it is said.
        say: is told after ``warn`` seconds, and then whenever the time has doubled.
        limit: seconds after which the block is cancelled; None: never.
        stacks: writes them, before the block is cancelled; returns where they lie.

    Yields:
        Called where there is progress, it has the seconds counted anew.

    Raises:
        Stuck: the block did not end within the limit.
    """
    loop = asyncio.get_running_loop()
    verdict: Exception

    async def watch() -> None:
        nonlocal verdict
        try:
            verdict = Stuck(await _patience(what, say, warn, limit, stacks))
        except Exception as e:  # from `what` or `say`: without them nobody would watch
            verdict = e
        deadline.reschedule(loop.time())

    try:
        async with asyncio.timeout(None) as deadline:
            watcher = loop.create_task(watch())

            def seen() -> None:
                nonlocal watcher
                watcher.cancel()
                watcher = loop.create_task(watch())

            try:
                yield seen
            finally:
                watcher.cancel()
    except TimeoutError:
        if not deadline.expired():
            raise  # one of the block's own
        raise verdict from None


async def _patience(
    what: str | Callable[[], str],
    say: Callable[[str], object],
    warn: float,
    limit: float | None,
    stacks: Callable[[], Awaitable[Path]] | None,
) -> str:
    """Wait to the limit, and speak meanwhile; returns the last word."""
    start, after = time.monotonic(), warn

    def waited(seconds: float) -> str:
        return f"waited {seconds:g} s for {what() if callable(what) else what}"

    while limit is None or after < limit:
        await asyncio.sleep(start + after - time.monotonic())
        say(waited(after))
        after *= 2
    await asyncio.sleep(start + limit - time.monotonic())
    message = waited(limit)
    if stacks is None:
        return message
    try:
        return f"{message}; the stacks of all processes: {await stacks()}"
    except Exception as e:  # such as a full disk: the wait ends all the same
        return f"{message}; no stacks could be written ({type(e).__name__}: {e})"


def whereabouts() -> Whereabouts:
    """Of this actor, from now on open to a look at its stack by processes of the same user."""
    import ray

    allow_dumps()
    return Whereabouts(ray.get_runtime_context().get_node_id(), os.getpid())


def allow_dumps() -> None:
    """Let this user's other processes read this one's stack, where the kernel (Yama) allows it to ancestors only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)


async def dump_actors(directory: Path, actors: Mapping[str, Whereabouts]) -> Path:
    """Write the stacks of this driver, of its tasks, and of its actors on all nodes; returns the file.

    An actor or node that gives none is named in the file, with the reason.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    nodes: dict[str, dict[str, int]] = {here: {"driver": os.getpid()}}
    for name, place in actors.items():
        nodes.setdefault(place.node, {})[name] = place.pid
    tasks = tasks_of_loop()
    remote = [_stacks_elsewhere(node, pids) for node, pids in nodes.items() if node != here]
    parts = await asyncio.gather(asyncio.to_thread(stacks_of_node, nodes[here]), *remote)
    return _write(directory, "\n".join([f"==== tasks of the driver\n{tasks}", *parts]))


async def _stacks_elsewhere(node: str, pids: Mapping[str, int]) -> str:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(stacks_of_node).options(scheduling_strategy=there)
    try:
        async with asyncio.timeout(NODE_SECONDS):
            return str(await task.remote(dict(pids)))
    except Exception as e:
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        return "\n".join(f"==== {name}, process {pid}\nno stack: node {node}: {reason}\n" for name, pid in pids.items())


def dump_stacks(directory: Path, pids_by_name: Mapping[str, int]) -> Path:
    """Write the stacks of processes of this node, and of their children; returns the file."""
    return _write(directory, stacks_of_node(pids_by_name))


def stacks_of_node(pids_by_name: Mapping[str, int]) -> str:
    """Stacks of processes of this node, and of their children, as py-spy sees them; or why it sees none."""
    jobs = [*pids_by_name.items()]
    for name, pid in pids_by_name.items():
        # Children of this process are Ray's, and the actors: two looks at one process at a time would see nothing.
        if pid != os.getpid():
            with contextlib.suppress(psutil.Error):
                jobs += [(f"{name}'s child {p.name()}", p.pid) for p in psutil.Process(pid).children(recursive=True)]
    with ThreadPoolExecutor(8) as pool:
        return "\n".join(pool.map(lambda job: _stacks(*job), jobs))


def _stacks(name: str, pid: int) -> str:
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    command = [shutil.which("py-spy", path=path) or "py-spy", "dump", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DUMP_SECONDS)
        text = done.stdout or "no stack: " + done.stderr.partition("Stack backtrace")[0].strip() + "\n"
    except (OSError, subprocess.TimeoutExpired) as e:
        text = f"no stack: {e}\n"
    if re.search("permission denied|not permitted", text, re.IGNORECASE):
        text += "(ptrace: the same user may, in a container with the capability SYS_PTRACE)\n"
    return f"==== {name}, process {pid}\n{text}"


def tasks_of_loop() -> str:
    """What each task of the running event loop awaits, outermost first. A stack shows only the one that runs."""
    lines = []
    for task in asyncio.all_tasks():
        lines.append(task.get_name())
        awaited: Any = task.get_coro()
        while frame := getattr(awaited, "cr_frame", None):
            code = frame.f_code
            lines.append(f"    {code.co_qualname} ({Path(code.co_filename).name}:{frame.f_lineno})")
            awaited = getattr(awaited, "cr_await", None)
    return "\n".join([*lines, ""])


def _write(directory: Path, text: str) -> Path:
    path = directory / time.strftime("stacks-%Y%m%d-%H%M%S.txt")
    with path.open("a", encoding="utf-8") as f:  # another one of the same second is no reason to lose either
        f.write(text)
    return path

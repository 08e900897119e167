"""Start or join Ray, see that it has what the config asks for, and reserve places for the actors.

Everything that can be missing is looked for here, before anything waits for it: an endless wait has no message.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from stepgrpo.config import ClusterConfig, ConfigError, brief, masked
from stepgrpo.placement import Bundle

# A unix socket's path has at most 107 bytes, and Ray appends about 65 of its own to its directory.
MAX_TEMP_DIR = 42

SCRATCH = "STEPGRPO_SCRATCH"
"""Environment variable with the directory in which a supervised driver makes its temporary ones; its path has 15
bytes."""
BEAT = "beat"
"""File there that the driver touches for as long as its event loop runs."""
BEAT_SECONDS = 5.0

QUIETER = {
    "METRICS_RECORD_INTERVAL_S": "60",  # the dashboard's own memory, which takes reading every page of its processes
    "REPORTER_UPDATE_INTERVAL_MS": "10000",  # a node's processes and load: Ray passes them on every 10 s
    "SCAN_EVENT_DIR_INTERVAL_SECONDS": "10",  # Ray's own events, looked for twice: on the node and in the dashboard
}
"""Environment of a Ray of our own, where the user has not set it: how often it looks at itself, 5, 5 and 2 s else."""
DASHBOARD = (
    "NodeHead",
    "ReportHead",
    "JobHead",
    "StateHead",
    "EventHead",
    "MetricsHead",
    "UsageStatsHead",
    "PlatformEventsHead",
    "TaskEventsHead",
)
"""Parts of Ray's dashboard that are of use here: all but `DataHead`, `ServeHead` and `TrainHead`. Each is a process
that is asked every second whether it lives, but for `UsageStatsHead` and `PlatformEventsHead`, which are in the
dashboard's own; the last two of these are off in Ray by default."""
DASHBOARD_NICENESS = 19
"""Ray has its workers at 15: at 0, as Ray starts it, the dashboard would always go before them."""

T = TypeVar("T")


@contextmanager
def session(cluster: ClusterConfig, bundles: Sequence[Bundle], patience: float = 0.0) -> Iterator[None]:
    """A connection to a Ray cluster that can hold ``bundles``; a local Ray of our own ends with it.

    A local Ray's private directory is removed, unless something failed: then the error's notes say where the logs are.

    Args:
        patience: seconds to wait for a cluster that is too small to grow.

    Raises:
        ConfigError: a directory, port or address cannot be used, or the cluster is too small.
    """
    import ray

    address = cluster.address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Silences a warning about how a later Ray will hide GPUs from actors that ask for none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A failed rollout's group is never fetched, for which Ray would print its traceback; the loop handles the error.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    private: str | None = None
    if address:
        try:
            with _on_loopback() if _is_on_loopback(address) else contextlib.nullcontext():
                ray.init(address=address, **quiet)
        except (OSError, ValueError, RuntimeError) as e:
            raise ConfigError(
                f"cluster.address: got {masked(address)}, no Ray cluster answers there ({brief(e, 120)}); "
                "start one with `ray start --head`, or unset cluster.address and RAY_ADDRESS"
            ) from None
    else:
        _check_port(cluster.dashboard_port)
        if cluster.temp_dir is None:
            private = tempfile.mkdtemp(prefix="sg", dir=os.environ.get(SCRATCH, "/tmp"))
        _check_temp_dir(private or str(cluster.temp_dir))
        for name, value in QUIETER.items():
            os.environ.setdefault(name, value)
    try:
        if not address:
            store = cluster.object_store_mb
            with _on_loopback(), _light_dashboard(), _deaf_to_hangups():
                ray.init(
                    _temp_dir=private or cluster.temp_dir,
                    include_dashboard=cluster.dashboard_port is not None,
                    dashboard_port=cluster.dashboard_port,
                    object_store_memory=None if store is None else store << 20,
                    **quiet,
                )
        _await_resources(bundles, patience if address else 0.0)
        yield
    except ConfigError:
        raise
    except Exception as e:
        if private:
            e.add_note(f"the logs of all processes: {private}/session_latest/logs")
            private = None
        raise
    finally:
        ray.shutdown()
        if private:
            shutil.rmtree(private, ignore_errors=True)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray opens its ports on loopback, and looks for others there, as by itself on macOS. On Linux no argument of
    `ray.init` asks for that: it takes 127.0.0.1 for this machine's address in the network."""
    from ray._private import ray_constants

    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _deaf_to_hangups() -> Iterator[None]:
    """A terminal that goes away says so to all that was started from it, to Ray as well, with which a run must still
    write its checkpoint. What is started meanwhile, and its children, do not hear it; they end with this process."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where no signal can be set
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@contextmanager
def _light_dashboard() -> Iterator[None]:
    """Ray's dashboard starts with the parts in ``DASHBOARD`` alone, and gives way to the run where both want one core.
    Its own program takes a list of parts, but nothing that is public passes one on."""
    from ray._private import ray_constants, services

    start = services.start_ray_process

    def lightly(command: list[str], process_type: str, *args: Any, **more: Any) -> Any:
        if process_type != ray_constants.PROCESS_TYPE_DASHBOARD:
            return start(command, process_type, *args, **more)
        if not any(word.startswith("--modules-to-load") for word in command):  # else the dashboard is off
            command = [*command, f"--modules-to-load={','.join(DASHBOARD)}"]
        started = start(command, process_type, *args, **more)
        with contextlib.suppress(OSError):  # it ended at once, which Ray is about to say
            os.setpriority(os.PRIO_PROCESS, started.process.pid, DASHBOARD_NICENESS)
        return started

    services.start_ray_process = lightly
    try:
        yield
    finally:
        services.start_ray_process = start


def spilled_bytes() -> int:
    """What object stores, for want of memory, have written to disks so far, on all nodes."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address  # no public call says so

    reply = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address))
    return int(reply.store_stats.spilled_bytes_total)


def _await_resources(bundles: Sequence[Bundle], patience: float) -> None:
    import ray

    end = time.monotonic() + patience
    while True:
        try:
            nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
            return check_resources(ray.cluster_resources(), nodes, bundles)
        except ConfigError:
            if time.monotonic() >= end:
                raise
        time.sleep(min(5.0, patience))


def check_resources(total: dict[str, float], nodes: Sequence[dict[str, float]], bundles: Sequence[Bundle]) -> None:
    """Refuse a config that the cluster cannot hold, instead of waiting for a node that never comes.

    Raises:
        ConfigError: not enough CPUs or GPUs in all, or on any one node.
    """
    for kind, noun in (("GPU", "GPUs"), ("CPU", "CPUs")):
        wanted = sum(b.resources.get(kind, 0) for b in bundles)
        have = total.get(kind, 0)
        if wanted > have:
            parts: dict[str, float] = {}
            for b in bundles:
                parts[b.role] = parts.get(b.role, 0) + b.resources.get(kind, 0)
            detail = ", ".join(f"{role} takes {amount:g}" for role, amount in parts.items() if amount)
            raise ConfigError(
                f"{noun}: the config asks for {wanted:g} ({detail}) but the Ray cluster has {have:g}; "
                "lower them, or add a node"
            )
        largest = max((n.get(kind, 0) for n in nodes), default=0)
        for b in bundles:
            if b.resources.get(kind, 0) > largest:
                raise ConfigError(
                    f"{b.role}: one actor asks for {b.resources[kind]:g} {noun} but the largest node has {largest:g}"
                )


def _is_on_loopback(address: str) -> bool:
    """Whether the Ray there is reached on loopback only, as one that ``session`` started.

    Knocks first: Ray itself tries for five minutes before it gives up.

    Raises:
        OSError, ValueError: nobody answers, or it is no such address.
    """
    import ray

    if "://" in address:
        raise ValueError("takes host:port or auto; from outside a cluster use `ray job submit`")
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        return False
    socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    if host not in ("127.0.0.1", "localhost"):
        return False
    try:
        socket.create_connection((ray.util.get_node_ip_address(), int(port)), timeout=5).close()
    except OSError:
        return True
    return False


def _check_temp_dir(path: str) -> None:
    if not os.path.isabs(path) or len(path.encode()) > MAX_TEMP_DIR:
        raise ConfigError(
            f"cluster.temp_dir: got {path!r}, takes an absolute path of at most {MAX_TEMP_DIR} bytes (unix sockets)"
        )
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as e:
        raise ConfigError(f"cluster.temp_dir: got {path}, cannot be written ({e.strerror})") from None


def _check_port(port: int | None) -> None:
    if port is None:
        return
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError as e:
            raise ConfigError(
                f"cluster.dashboard_port: got {port}, cannot be used ({e.strerror}); name another, or null"
            ) from None


async def reserve(bundles: Sequence[Bundle], seconds: float | None) -> Any:
    """A placement group that holds all actors, or a message. ``seconds``: None waits as long as need be.

    Raises:
        ConfigError: the resources are there but somebody else holds them for that many seconds.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([b.resources for b in bundles], strategy="PACK")
    try:
        async with asyncio.timeout(seconds):
            await group.ready()
    except BaseException as e:
        remove_placement_group(group)
        if not isinstance(e, TimeoutError):
            raise
        free = ray.available_resources()
        raise ConfigError(
            f"cluster: waited {seconds:g} s for the places of {len(bundles)} actors; free now are "
            f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs: another job holds the rest"
        ) from None
    return group


def place(group: Any, index: int, bundle: Bundle) -> dict[str, Any]:
    """Actor options that put it into a placement group. ``bundle``: what it takes, all of that place or a part."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return {
        "num_cpus": bundle.cpus,
        "num_gpus": bundle.gpus,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
    }


Reserve = Callable[[int, float | None], Awaitable[tuple[Any, dict[str, Any]]]]
"""(number of an actor, seconds to wait; None: as long as need be) -> placement group of its own, and actor options."""


def on_their_own(bundle: Bundle) -> Reserve:
    """Each actor has a placement group of its own, so that it can come or go without the others."""

    async def its_own(_: int, seconds: float | None) -> tuple[Any, dict[str, Any]]:
        group = await reserve([bundle], seconds)
        return group, place(group, 0, bundle)

    return its_own


def beside(group: Any, bundle: Bundle) -> Reserve:
    """Actor n takes a part of bundle n of a placement group that is there."""

    async def shared(index: int, _: float | None) -> tuple[Any, dict[str, Any]]:
        return None, place(group, index, bundle)

    return shared


async def heartbeat() -> None:
    """Show the supervisor, if there is one, that the event loop runs."""
    if scratch := os.environ.get(SCRATCH):
        while True:
            with contextlib.suppress(OSError):
                (Path(scratch) / BEAT).touch()
            await asyncio.sleep(BEAT_SECONDS)


async def together(awaitables: Iterable[Awaitable[Any]]) -> list[Any]:
    """Await all, in any order; the first failure is raised at once and cancels the rest."""

    async def one(a: Awaitable[Any]) -> Any:
        return await a

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one(a)) for a in awaitables]
    return [t.result() for t in running]


async def within(awaitable: Awaitable[T], seconds: float, what: str) -> T:
    """Await with a limit.

    Raises:
        TimeoutError: names ``what`` did not come.
    """
    try:
        async with asyncio.timeout(seconds) as limit:
            return await awaitable
    except TimeoutError:
        if not limit.expired():
            raise  # one of its own
        raise TimeoutError(f"{what} did not come within {seconds:g} s (cluster.start_timeout)") from None


def run_token() -> str:
    """A name no other run on the same node uses, for shared memory."""
    return secrets.token_hex(4)

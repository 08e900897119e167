"""The rollout workers of a run: started, watched, replaced where they die or hang, more of them where there is room.

    place 0   reserve - start - load the newest weights - serve ... lost: killed, recorded - reserve - start - ...
    place 1   reserve (waits for a node, as long as need be) ...

There are ``max`` places, and each is one such circle. A worker on a node that is being drained gets nothing new, and is
dismissed when it is idle; its place starts the next one elsewhere meanwhile.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayError

from stepgrpo import launch
from stepgrpo.actors.engine import EngineDied
from stepgrpo.actors.rollout import GarbageError
from stepgrpo.config import WorkersConfig
from stepgrpo.launch import Reserve
from stepgrpo.rundir import append_event

LOOK_SECONDS = 2.0
"""Between two looks at what is missing and what is drained."""
SAME_DEATH_SECONDS = 10.0
"""Within which workers of one node die of one cause; no replacement is up again as soon as that."""
LOAD = 3
"""Times as many groups as fit whole that a worker works on: the longest trajectory of a group takes 1.4 to 2.4 times
the average, and what the others leave is for the next groups. More would only wait there while another is free."""
MAX_STRIKES = 3
"""Answers of garbage in a row after which a worker is replaced."""
MAX_PAUSE_SECONDS = 60.0
"""Between two failed starts in one place."""
CLOSE_SECONDS = 2.0

DEAD = (RayActorError, OutOfMemoryError)
"""What a call to a dead actor raises: the second where Ray's memory monitor killed it."""

T = TypeVar("T")


class TrainError(RuntimeError):
    """The run cannot go on; the message holds the first cause."""


class WorkersGone(RuntimeError):
    """All the workers that could have answered are lost: ask anew."""


class Warn(Protocol):
    def warn(self, text: str) -> None: ...


@dataclass(slots=True, eq=False)
class Seat:
    """A rollout worker that is up."""

    actor: Any
    index: int
    """Its place in the pool, from 0; the next worker there has the same."""
    node: str
    """Ray's id of its node."""
    capacity: int
    """Groups that fit whole into its engine."""
    group: Any = None
    """Its placement group; None: it shares one with others."""
    version: int = 0
    draws: set[int] = field(default_factory=set)
    """In flight here."""
    asked: int = 0
    """Other calls in flight here, see ``Pool.ask``."""
    strikes: int = 0
    """Answers of garbage in a row."""
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while its weights change, and by an evaluation while they may not."""
    vacated: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when its place is free for another: it is lost, or leaves."""
    lost: bool = False

    @property
    def has_room(self) -> bool:
        return len(self.draws) < LOAD * self.capacity

    @property
    def has_places(self) -> bool:
        """Whether a group would begin at once, all of it."""
        return len(self.draws) < self.capacity

    @property
    def idle(self) -> bool:
        return not self.draws and not self.asked and not self.loading.locked()


class Failures:
    """Failures in a row, of rollouts and of workers alike."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.reset()

    def reset(self) -> None:
        """Something worked."""
        self.count, self._first = 0, ""

    def add(self, what: str, cause: BaseException | None = None) -> None:
        """
        Raises:
            TrainError: it was one too many; names the first of the row.
        """
        self.count += 1
        self._first = self._first or what
        if self.count >= self._limit:
            row = f"{self.count} failures in a row" if self.count > 1 else "a failure"
            raise TrainError(f"{row} (train.max_failures); the first: {self._first}") from cause


class Pool:
    """Keeps rollout workers up.

    Args:
        make: (place, actor options) -> handle of an actor with the methods ``start() -> node id``, ``ping`` and
            ``close`` of ``actors.worker.RolloutWorker``.
        reserve: a place on a node for one worker.
        capacity: groups that fit whole into a worker's engine.
        health_seconds: without an answer to ``ping``, after which a worker counts as hung.
        start_timeout: seconds a worker may take to start, and ``limits.min`` workers may be missing.
        max_failures: in a row, after which the pool gives up.
        run_dir: gets an event for each worker that joins, leaves or is lost; None: none is written.
    """

    def __init__(
        self,
        make: Callable[[int, dict[str, Any]], Any],
        reserve: Reserve,
        limits: WorkersConfig,
        *,
        capacity: int,
        health_seconds: float,
        start_timeout: float,
        max_failures: int,
        display: Warn,
        run_dir: Path | None = None,
    ) -> None:
        self._make, self._reserve, self._limits, self._capacity = make, reserve, limits, capacity
        self._starting = [asyncio.Lock() for _ in range(limits.max)]  # of each place; `asleep` holds them all
        self._health_seconds, self._start_timeout = health_seconds, start_timeout
        self._display, self._run_dir = display, run_dir
        self.failures = Failures(max_failures)
        self.seats: list[Seat] = []
        """Workers that take work, each with the newest weights or on the way to them."""
        self.deaths = 0
        """Workers lost so far."""
        self._leaving: list[Seat] = []
        self._death_on: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._begun = self._asleep = False
        self._missing_since: float | None = None
        self._missing_because = ""
        self._join: Callable[[Seat], Awaitable[None]] | None = None
        self._leave: Callable[[], Awaitable[None]] | None = None
        self._on_change: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Returns when the fewest workers that will do are up. What fails until then is raised as it is."""
        for i in range(self._limits.min):
            self._task(self._place(i))
        while len(self.seats) < self._limits.min:
            self._changed.clear()
            changed = asyncio.create_task(self._changed.wait())
            done, _ = await asyncio.wait({changed, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            _raise_failed(done)
            self._tasks -= done
        self._begun = True
        for i in range(self._limits.min, self._limits.max):
            self._task(self._place(i))

    @asynccontextmanager
    async def serving(
        self,
        join: Callable[[Seat], Awaitable[None]] | None = None,
        leave: Callable[[], Awaitable[None]] | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> AsyncIterator[None]:
        """Watch the workers during the block, which fails when the pool gives up.

        Args:
            join: brings a worker that is new to the newest weights before it may take work.
            leave: awaited before a worker is dismissed, which is still ``up`` then; must not raise.
            on_change: called when a worker came or went.

        Raises:
            TrainError: too many failures in a row, or too few workers for too long.
        """
        self._join, self._leave, self._on_change = join, leave, on_change
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(self._watch())
            try:
                yield
            finally:
                watch.cancel()

    async def ask(self, call: Callable[[Any], Awaitable[T]], among: Sequence[Seat] | None = None) -> T:
        """Let the least busy worker answer, and where that one is lost meanwhile, another.

        Args:
            call: given the actor.
            among: the only ones that may answer; None: all, also those to come.

        Raises:
            WorkersGone: all of ``among`` are lost.
        """
        while True:
            seat = await self._free_for(among)
            seat.asked += 1
            try:
                return await call(seat.actor)
            except Exception as e:
                if not self.blame(seat, e):
                    raise
            finally:
                seat.asked -= 1

    async def _free_for(self, among: Sequence[Seat] | None) -> Seat:
        while True:
            able = self.seats if among is None else [s for s in among if not s.lost]
            if able:
                return min(able, key=lambda s: s.asked)
            if among is not None:
                raise WorkersGone("all the workers that could have answered are lost")
            await self.changed()

    @asynccontextmanager
    async def held(self, least: int = 1) -> AsyncIterator[list[Seat]]:
        """The workers that are up, ``least`` of them or more, whose weights nobody changes during the block."""
        held: list[Seat] = []
        try:
            while True:
                for seat in list(self.seats):
                    if seat not in held:
                        await seat.loading.acquire()
                        held.append(seat)
                up = [seat for seat in held if not seat.lost]
                if len(up) >= least:
                    break
                await self.changed()
            yield up
        finally:
            for seat in held:
                seat.loading.release()

    @asynccontextmanager
    async def asleep(self, *, for_good: bool = False) -> AsyncIterator[None]:
        """During the block no engine uses its GPU, and none starts. Nothing may be in flight but evaluations, whose end
        is waited for. ``for_good``: nor after it."""

        async def tell(seat: Seat, call: Callable[[Any], Any]) -> None:
            try:
                if not seat.lost:
                    await call(seat.actor).remote()
            except Exception as e:
                self.lost(seat, one_line(e))

        # None, where the only worker is lost: the next one cannot start before the block's end.
        async with AsyncExitStack() as stack:
            for place in self._starting:
                await stack.enter_async_context(place)
            seats = await stack.enter_async_context(self.held(least=0))
            self._asleep = True
            try:
                await launch.together(tell(s, lambda actor: actor.sleep) for s in seats)
                yield
                if not for_good:
                    await launch.together(tell(s, lambda actor: actor.wake) for s in seats)
            finally:
                self._asleep = False

    @property
    def up(self) -> list[Seat]:
        """All workers that answer, also those that take no new work because they leave."""
        return [*self.seats, *self._leaving]

    async def changed(self) -> None:
        """Wait until a worker comes or goes."""
        self._changed.clear()
        await self._changed.wait()

    def blame(self, seat: Seat, error: Exception) -> bool:
        """Whether a call failed because of its worker, and not of what was asked: then the call belongs to another.

        Raises:
            TrainError: too many failures in a row.
        """
        cause = root_cause(error)
        if isinstance(cause, GarbageError):
            seat.strikes += 1
            if seat.strikes < MAX_STRIKES:
                self._display.warn(f"rollout worker {seat.index} failed, and its work is done again: {one_line(error)}")
            else:
                self.lost(seat, f"{one_line(error)}, {seat.strikes} times in a row")
            return True
        if isinstance(cause, (*DEAD, EngineDied)):
            self.lost(seat, one_line(error))
        return seat.lost

    def lost(self, seat: Seat, reason: str) -> None:
        """Give a worker up: kill it, say so, and let its place start another. Calls in flight there fail at once.

        Raises:
            TrainError: too many failures in a row.
        """
        if seat.lost:
            return
        draws = sorted(seat.draws)
        self._remove(seat)
        self.deaths += 1
        self._record("death", seat.index, seat.node, reason, draws)
        again = f"; {len(draws)} draws are sampled again" if draws else ""
        what = f"rollout worker {seat.index} (node {seat.node[:8]}) is lost: {reason}"
        self._died(what, seat.node, again)

    def _died(self, what: str, node: str = "", cost: str = "") -> None:
        self._missing_because = self._missing_because or what
        self._display.warn(f"{what}{cost}; {len(self.seats)} of {self._limits} are up")
        # A node takes all its workers along: one failure. That it is dead is known a while later.
        now = time.monotonic()
        if not node or now - self._death_on.get(node, -math.inf) > SAME_DEATH_SECONDS:
            self.failures.add(what)
        self._death_on[node] = now

    def _remove(self, seat: Seat) -> None:
        """Kill a worker with all its processes."""
        seat.lost = True
        (self._leaving if seat in self._leaving else self.seats).remove(seat)
        _kill(seat.actor)
        _release(seat.group)
        self._vacate(seat)

    def _vacate(self, seat: Seat) -> None:
        seat.vacated.set()
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._on_change()

    async def close(self) -> None:
        """Stop all workers; what is still starting is given up."""
        for task in self._tasks:
            task.cancel()
        up = self.up
        with suppress(Exception):
            async with asyncio.timeout(CLOSE_SECONDS):
                await asyncio.gather(*self._tasks, return_exceptions=True)
                await launch.together(s.actor.close.remote() for s in up)
        for seat in up:
            _release(seat.group)

    # ---- one place

    async def _place(self, index: int) -> None:
        """Have a worker in this place, for ever."""
        pause = 1.0
        while True:
            try:
                seat = await self._open(index)
            except Exception as e:
                if not self._begun:
                    raise
                reason = one_line(e)
                self._record("failed start", index, None, reason, [])
                self._died(f"rollout worker {index} did not start: {reason}")
                await asyncio.sleep(pause)
                pause = min(2 * pause, MAX_PAUSE_SECONDS)
                continue
            pause = 1.0
            self._task(self._look_after(seat))
            await seat.vacated.wait()

    async def _open(self, index: int) -> Seat:
        """Start a worker and bring it up to date."""
        group, options = await self._reserve(index, None if self._begun else self._start_timeout)
        actor = None
        try:
            async with self._starting[index]:
                actor = self._make(index, options)
                what = f"rollout worker {index}"
                node = await launch.within(actor.start.remote(), self._start_timeout, what)
                seat = Seat(actor, index, node, self._capacity, group)
                if self._join:
                    await launch.within(self._join(seat), self._start_timeout, f"weights of {what}")
        except BaseException:
            _kill(actor)
            _release(group)
            raise
        self.seats.append(seat)
        if self._begun:
            self._record("joined", index, node, None, [])
        self._notify()
        return seat

    async def _look_after(self, seat: Seat) -> None:
        """Ask a worker for a sign of life until it is lost or dismissed."""
        limit = 0.8 * self._health_seconds
        while not seat.lost:
            try:
                async with asyncio.timeout(limit):
                    await seat.actor.ping.remote()
            except TimeoutError:
                self.lost(seat, f"no answer within {self._health_seconds:g} s (rollout.health_seconds)")
            except Exception as e:
                self.lost(seat, one_line(e))
            else:
                leaves = seat in self._leaving and seat.idle
                if leaves and self._leave:
                    await self._leave()
                if leaves and not seat.lost:
                    self._record("left", seat.index, seat.node, "its node is drained", [])
                    self._remove(seat)
                else:
                    await asyncio.sleep(self._health_seconds - limit)

    # ---- all of them

    async def _watch(self) -> None:
        while True:
            done, _ = await asyncio.wait(self._tasks, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
            _raise_failed(done)
            self._tasks -= done
            draining = _draining()
            for seat in [s for s in self.seats if s.node in draining]:
                self.seats.remove(seat)
                self._leaving.append(seat)
                self._display.warn(f"rollout worker {seat.index} leaves node {seat.node[:8]}, which is drained")
                self._vacate(seat)
            self._check_enough()

    def _check_enough(self) -> None:
        now, limits = time.monotonic(), self._limits
        if len(self.seats) >= limits.min or self._asleep:
            self._missing_since, self._missing_because = None, ""
        elif self._missing_since is None:
            self._missing_since = now
            self._display.warn(
                f"{len(self.seats)} rollout workers are up, of at least {limits.min} (rollout.workers): "
                f"waiting up to {self._start_timeout:g} s for replacements"
            )
        elif now - self._missing_since > self._start_timeout:
            raise TrainError(
                f"fewer than {limits.min} rollout workers (rollout.workers) for {self._start_timeout:g} s "
                f"(cluster.start_timeout); the first cause: {self._missing_because or 'a node was drained'}"
            )

    def _task(self, work: Any) -> None:
        self._tasks.add(asyncio.create_task(work))

    def _record(self, kind: str, worker: int, node: str | None, reason: str | None, reissued: list[int]) -> None:
        if self._run_dir:
            append_event(self._run_dir, kind, worker=worker, node=node, reason=reason, reissued=reissued)


def _raise_failed(tasks: set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        if not task.cancelled():
            task.result()


def _kill(actor: Any) -> None:
    import ray

    with suppress(Exception):
        ray.kill(actor)


def _release(group: Any) -> None:
    from ray.util.placement_group import remove_placement_group

    if group is not None:
        with suppress(Exception):
            remove_placement_group(group)


def _draining() -> set[str]:
    """Ids of the nodes that Ray is about to give back."""
    from ray._private.state import state  # no public call says so

    return set(state.get_draining_nodes())


def is_lost(error: BaseException) -> bool:
    """Whether an object went away with its node, wherever that was noticed."""
    return isinstance(root_cause(error), ObjectLostError)


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

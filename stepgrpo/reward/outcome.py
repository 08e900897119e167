"""Whether a response is right: the last box after thinking, compared with the truth.

Symbolic comparison runs model output through a parser and a computer algebra system, which may take forever, eat all
memory or crash. So it runs in processes of its own, each with a memory limit and an alarm that the kernel enforces. A
wrong or unreadable answer is an ordinary verdict; a comparison that could not be finished is a grader failure and says
so in ``Outcome.error``.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import re
import resource
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from pebble import ProcessExpired, ProcessPool

from stepgrpo.config import brief, is_own
from stepgrpo.plugin import load_own

if TYPE_CHECKING:
    from stepgrpo.config import RewardConfig

MAX_ANSWER_CHARS = 1000
"""A longer answer is wrong without asking: true answers stay far below, and parsing time grows fast with length."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The verdict on one response."""

    correct: bool
    formatted: bool
    """Whether there is a boxed answer after thinking."""
    answer: str | None
    """What the box holds; None where there is none."""
    error: str | None = None
    """Why the grader could give no verdict (``correct`` is then False): "timeout", "memory", "crash", "truth" where the
    true answer cannot be read, or what a user's own grader raised. None where it could."""


class Grader(Protocol):
    """Judges responses to one problem."""

    async def grade(self, responses: Sequence[str], truth: str) -> list[Outcome]:
        """One outcome per response, in order. Never raises for what a response or a truth holds."""

    def close(self) -> None:
        """Ends its processes. Gradings still open raise RuntimeError."""


def extract_answer(response: str, think_close: str = "</think>") -> str | None:
    r"""What the last complete ``\boxed{...}`` or ``\fbox{...}`` after the first ``think_close`` holds, stripped.

    Braces must balance, escaped ones aside; blanks may stand before the opening one. None where thinking was not
    closed, or where no box follows, closes or holds anything. Takes time linear in the response's length.
    """
    _, closed, text = response.partition(think_close)
    if not closed:
        return None
    opened: list[int | None] = []  # for each brace still open: where its box's content begins, None for other braces
    last = (-1, -1)
    for token in _LATEX_TOKEN.finditer(text):
        match token.lastgroup:
            case "box":
                opened.append(token.end())
            case "open":
                opened.append(None)
            case "close" if opened and (begin := opened.pop()) is not None:
                last = max(last, (begin, token.start()))
    return text[slice(*last)].strip() or None


# An escape hides one brace, or the backslash before it. `\\boxed{`, which JSON-minded models write, still is a box.
_LATEX_TOKEN = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\(?!\\(?:boxed|fbox)).|(?P<open>\{)|(?P<close>\})", re.DOTALL
)


class ExactGrader:
    """Right is what has the truth's words, whatever the blanks between them."""

    def __init__(self, think_close: str = "</think>") -> None:
        self._think_close = think_close

    async def grade(self, responses: Sequence[str], truth: str) -> list[Outcome]:
        answers = [extract_answer(r, self._think_close) for r in responses]
        return [Outcome(a is not None and a.split() == truth.split(), a is not None, a) for a in answers]

    def close(self) -> None:
        pass


class _PooledGrader:
    """Asks a judge in separate processes, which start with the first question to them.

    May be used from any thread or event loop. The processes do not outlive their owner, even one that was killed: idle
    ones end when its pipe breaks, busy ones at the latest when their alarm rings.
    """

    def __init__(self, judge: str, processes: int, timeout: float, memory_mb: int, think_close: str) -> None:
        """``judge``: `package.module:name` of a function of two texts, imported in each process."""
        self._judge_name = judge
        self._processes, self._timeout, self._memory_mb, self._think_close = processes, timeout, memory_mb, think_close
        self._lock = threading.Lock()
        self._pool = self._make_pool()
        self._closed = False

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._pool.stop()
        self._pool.join()

    async def _judged(self, text: str, truth: str) -> Any:
        """What the judge says, or a ``_Failure``."""
        try:
            return await self._ask(text, truth)
        except ProcessExpired as e:
            return _Failure({-signal.SIGALRM: "timeout", _OUT_OF_MEMORY: "memory"}.get(e.exitcode, "crash"))
        except TimeoutError:
            return _Failure("timeout")
        except Exception:
            if self._closed:
                raise
            return _Failure("crash")

    async def _ask(self, text: str, truth: str) -> Any:
        try:
            return await self._schedule(text, truth)
        except RuntimeError:
            # A process that dies while idle breaks the whole pool, and with it every open question: ask a new one.
            return await self._schedule(text, truth)

    async def _schedule(self, text: str, truth: str) -> Any:
        pool = self._working_pool()
        # The alarm inside the process rings first. Pebble's own limit sends SIGTERM, which a process deep in C never
        # sees, and its pool stands still for the seconds it waits before it kills.
        task = pool.schedule(_ask_judge, args=(text, truth, self._timeout), timeout=self._timeout + 2)
        future: asyncio.Future[Any] = asyncio.wrap_future(task)
        try:
            while not (await asyncio.wait([future], timeout=1))[0]:
                if not pool.active:  # a task that came while the pool broke or closed is never answered
                    raise RuntimeError("the pool of grading processes ended")
            return future.result()
        finally:
            future.cancel()

    def _working_pool(self) -> ProcessPool:
        with self._lock:
            if self._closed:
                raise RuntimeError("this grader is closed")
            if not self._pool.active:
                threading.Thread(target=self._pool.join, daemon=True).start()
                self._pool = self._make_pool()
            return self._pool

    def _make_pool(self) -> ProcessPool:
        return ProcessPool(
            max_workers=self._processes,
            initializer=_start_process,
            initargs=(self._memory_mb, self._judge_name),
            context=multiprocessing.get_context("spawn"),
        )


class MathGrader(_PooledGrader):
    """Equality of the last box and the truth, as ``reward.equality`` sees it.

    Args:
        processes: How many.
        timeout: Seconds after which one comparison is given up.
        memory_mb: Address space of one process.
        think_close: The marker that ends thinking.
    """

    def __init__(
        self, processes: int = 2, timeout: float = 10.0, memory_mb: int = 2048, think_close: str = "</think>"
    ) -> None:
        super().__init__(_EQUAL, processes, timeout, memory_mb, think_close)

    async def grade(self, responses: Sequence[str], truth: str) -> list[Outcome]:
        answers = [extract_answer(r, self._think_close) for r in responses]
        distinct = [a for a in dict.fromkeys(answers) if a is not None]
        outcomes = await asyncio.gather(*(self._compare(a, truth.strip()) for a in distinct))
        verdicts: dict[str | None, Outcome] = dict(zip(distinct, outcomes, strict=True))
        return [verdicts.get(a, Outcome(False, False, None)) for a in answers]

    async def _compare(self, answer: str, truth: str) -> Outcome:
        if answer == truth:
            return Outcome(True, True, answer)
        if len(answer) > MAX_ANSWER_CHARS:
            return Outcome(False, True, answer)
        equal = await self._judged(answer, truth)
        if isinstance(equal, _Failure):
            return Outcome(False, True, answer, equal.reason)
        return Outcome(bool(equal), True, answer, "truth" if equal is None else None)


class OwnGrader(_PooledGrader):
    """A user's function ``(response, truth) -> bool | Outcome`` as the judge; arguments as of ``MathGrader``."""

    def __init__(self, name: str, processes: int, timeout: float, memory_mb: int, think_close: str) -> None:
        load_own(name, "reward.grader")  # here, where an error can be told
        super().__init__(name, processes, timeout, memory_mb, think_close)

    async def grade(self, responses: Sequence[str], truth: str) -> list[Outcome]:
        distinct = list(dict.fromkeys(responses))
        outcomes = await asyncio.gather(*(self._ask_own(r, truth) for r in distinct))
        verdicts = dict(zip(distinct, outcomes, strict=True))
        return [verdicts[r] for r in responses]

    async def _ask_own(self, response: str, truth: str) -> Outcome:
        verdict = await self._judged(response, truth)
        if isinstance(verdict, Outcome):
            return verdict
        answer = extract_answer(response, self._think_close)
        reason = verdict.reason if isinstance(verdict, _Failure) else None
        return Outcome(reason is None and bool(verdict), answer is not None, answer, reason)


def make_grader(config: RewardConfig, think_close: str) -> Grader:
    """The grader that ``config.grader`` names, with its limits.

    Raises:
        ConfigError: the user's own cannot be imported.
    """
    if config.grader == "exact":
        return ExactGrader(think_close)
    limits = (config.grade_processes, config.grade_timeout, config.grade_memory_mb, think_close)
    return OwnGrader(config.grader, *limits) if is_own(config.grader) else MathGrader(*limits)


def grade(response: str, truth: str) -> Outcome:
    """Judge one response by mathematical equality, with a grader of default limits that is made on first use.

    A script that calls this needs the usual ``if __name__ == "__main__":``, because processes are spawned.
    """
    with ThreadPoolExecutor(1) as thread:  # of its own, because this one may be running an event loop
        return thread.submit(asyncio.run, _default_grader().grade([response], truth)).result()[0]


@cache
def _default_grader() -> MathGrader:
    return MathGrader()


# What follows runs in the grading processes.

_OUT_OF_MEMORY = 77
"""Exit code of a process that met its memory limit."""


_EQUAL = "stepgrpo.reward.equality:equal"


@dataclass(frozen=True, slots=True)
class _Failure:
    reason: str


def _start_process(memory_mb: int, judge: str) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # warns that its own timeouts are off
    global _judge, _close_to_the_limit
    _judge = load_own(judge, "reward.grader")  # here, before the first alarm is set
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    _close_to_the_limit = (_peak_memory() + (memory_mb << 20)) // 2


_judge: Callable[[str, str], Any]
_close_to_the_limit = 0
"""Bytes: half way from what a process takes idle to its limit."""


def _peak_memory() -> int:
    """Most address space this process has had, in bytes. (Its ru_maxrss would begin with that of its parent.)"""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmPeak:"))


def _ask_judge(text: str, truth: str, timeout: float) -> Any:
    """What the judge says; a ``_Failure`` if it raises. May end the process instead."""
    signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        verdict = _judge(text, truth)
        # math-verify takes any exception for "not equal", a MemoryError too: a "no" close to the limit is none.
        if not verdict and _peak_memory() > _close_to_the_limit:
            raise MemoryError
        return verdict
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)  # rather than go on: what ate the memory may live on in sympy's caches
    except Exception as e:
        return _Failure(f"{type(e).__name__}: {brief(e)}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)

"""Runs the driver as a child process and starts it again where that may help.

Nothing of a dead driver survives: its orphans (Ray's processes, engines, graders) become children of the supervisor,
which ends them before the next start, and removes what lies in its scratch directory and in shared memory. Of a cluster
that the driver only joined, there is nothing here to end: Ray ends the actors of a driver that died.

Linux only, as is all that it runs.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import math
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

import psutil

from stepgrpo.console import Display, clock
from stepgrpo.launch import BEAT, SCRATCH
from stepgrpo.watchdog import dump_stacks
from stepgrpo.weights import SharedWeights

RECOVERABLE = os.EX_TEMPFAIL
"""Exit status of a driver that asks to be started again from its last checkpoint."""
RESUME = ("--resume", "auto")

FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 1.0, 30.0
# Of the end of descendants: asked first, then killed, then given up on.
GRACE_SECONDS = 2.0
PATIENCE_SECONDS = 30.0

LOOK_SECONDS = 5.0
"""Between two looks for a sign of life."""

_ENDED = "ended"
_WISHES = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM}
_SI_KERNEL = 0x80  # si_code of a key pressed at the terminal, which every process of the foreground group gets
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


def run(
    command: Sequence[str],
    *,
    max_restarts: int,
    display: Display,
    progress: Callable[[], object] = lambda: None,
    hung_seconds: float = math.inf,
    keep: Path | None = None,
) -> int:
    """Run ``command`` on this terminal until it ends for good; call it from the main thread.

    Started again is a driver that ended with ``RECOVERABLE``, or did not end by itself (``mark_end``): with ``--resume
    auto``, or as it was told to resume until there is another newest checkpoint. All else is final: success, a setting
    to be changed, an error of the program's, and an end that somebody wished by SIGINT, SIGTERM or SIGHUP, which are
    passed on to the driver. A third Ctrl-C kills it.

    Args:
        max_restarts: in a row without progress.
        progress: its value changes with every new checkpoint; must not raise.
        hung_seconds: without a ``heartbeat``, after which a driver that once gave one is killed.
        keep: directory for what is left of one that is started again: Ray's logs, and its stack if it hung.

    Returns:
        The exit status of the last driver, 128 + n where signal n ended it.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    causes: list[str] = []
    reached, told = progress(), any(word.startswith("--resume") for word in command)
    with _blocked() as (wishes, mask):
        while True:
            scratch, start = tempfile.mkdtemp(prefix="sg", dir="/tmp"), time.monotonic()
            driver = subprocess.Popen(
                command,
                # vLLM's sockets, which it would leave in /tmp
                env={**os.environ, SCRATCH: scratch, "VLLM_RPC_BASE_PATH": scratch},
                preexec_fn=partial(_born, mask, os.getpid()),
            )
            beat = Path(scratch) / BEAT

            def hangs(pid: int = driver.pid, beat: Path = beat) -> bool:
                if not beat.exists() or (silent := time.time() - beat.stat().st_mtime) < hung_seconds:
                    return False
                display.warn(f"the driver gave no sign of life for {clock(silent)} and is killed")
                if keep is not None:
                    with contextlib.suppress(OSError):
                        display.warn(f"its stack: {dump_stacks(keep, {'driver': pid})}")
                return True

            status, wished = _until_end(driver, wishes, hangs)
            beat.unlink(missing_ok=True)
            cause = f"the driver {_end(status)} after {clock(time.monotonic() - start)}"
            if left := _end_descendants():
                display.warn(f"could not be killed: processes {', '.join(map(str, left))}")
            if (now := progress()) != reached:
                reached, told = now, False
                causes.clear()
            causes.append(cause)
            mark = Path(scratch) / _ENDED
            # Ray's core ends a driver that lost its cluster with status 1.
            own_end = mark.exists() and status != RECOVERABLE
            mark.unlink(missing_ok=True)
            recoverable = not wished and not own_end and -status not in _WISHES
            restart = recoverable and len(causes) <= max_restarts
            logs = _saved_logs(Path(scratch), keep) if recoverable and keep else ""
            _remove(scratch, keep_logs=status >= 0 and not recoverable)
            if not restart:
                if recoverable:
                    first = f"; the first time, {causes[0]}" if len(causes) > 1 else ""
                    display.warn(
                        f"{cause}: given up after {max_restarts} restart(s) without a new checkpoint{first}{logs}"
                    )
                return status if status >= 0 else 128 - status
            pause = min(FIRST_BACKOFF_SECONDS * 2.0 ** (len(causes) - 1), MAX_BACKOFF_SECONDS)
            display.warn(f"{cause}: restart {len(causes)} of {max_restarts} in {pause:g} s{logs}")
            if wish := signal.sigtimedwait(wishes, pause):
                return 128 + wish.si_signo
            if not told and tuple(command[-2:]) != RESUME:
                command = [*command, *RESUME]


def mark_end() -> None:
    """In the driver: leave a mark for the supervisor when Python ends, however it ends; not where it is killed."""
    if scratch := os.environ.get(SCRATCH):
        atexit.register(_touch, Path(scratch) / _ENDED)


def _touch(mark: Path) -> None:
    with contextlib.suppress(OSError):
        mark.touch()


@contextlib.contextmanager
def _blocked() -> Iterator[tuple[set[signal.Signals], set[signal.Signals]]]:
    """Signals wait until they are asked for. Yields those that express a wish, and the mask as it was."""
    wishes = {s for s in _WISHES if signal.getsignal(s) is not signal.SIG_IGN}  # as SIGHUP is under nohup
    mask = {signal.Signals(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, wishes | {signal.SIGCHLD})}
    try:
        yield wishes, mask
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _born(mask: Collection[int], supervisor: int) -> None:
    """In the child, before it runs the command: a driver that lost its supervisor ends too."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != supervisor:
        os.kill(os.getpid(), signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _until_end(driver: subprocess.Popen[bytes], wishes: Collection[int], hangs: Callable[[], bool]) -> tuple[int, bool]:
    """The driver's exit status, negative for a signal, and whether somebody wished it to end."""
    wished, keys = False, 0
    while (status := _reap(driver.pid)) is None:
        sent = signal.sigtimedwait([*wishes, signal.SIGCHLD], LOOK_SECONDS)
        if sent is None:
            if hangs():
                os.kill(driver.pid, signal.SIGKILL)
            continue
        if sent.si_signo == signal.SIGCHLD:
            continue
        keys += sent.si_signo == signal.SIGINT
        if keys > 2:
            os.kill(driver.pid, signal.SIGKILL)
        elif sent.si_code != _SI_KERNEL or sent.si_signo == signal.SIGHUP:  # of a hang-up the kernel tells one of them
            os.kill(driver.pid, sent.si_signo)
        wished = True
    driver.returncode = status  # taken from under Popen, which would warn
    return status, wished


def _reap(driver: int | None = None) -> int | None:
    """Take leave of children that ended, orphans among them; the driver's exit status, if it is one of them."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == driver:
                return os.waitstatus_to_exitcode(ended[1])
    return None


def _end(status: int) -> str:
    return f"ended with status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"


def _end_descendants() -> list[int]:
    """End them all, also those that are born meanwhile; returns those that withstand."""
    start, asked = time.monotonic(), set()
    while True:
        _reap()
        left = psutil.Process().children(recursive=True)
        waited = time.monotonic() - start
        if not left or waited > PATIENCE_SECONDS:
            return [p.pid for p in left]
        for p in left:
            with contextlib.suppress(psutil.Error):
                # Python's resource trackers end by themselves, after they removed the shared memory of the others.
                if waited > GRACE_SECONDS * (1 + any("resource_tracker" in word for word in p.cmdline())):
                    p.kill()
                elif p not in asked:
                    asked.add(p)
                    p.terminate()
        signal.sigtimedwait({signal.SIGCHLD}, 0.1)


def _remove(scratch: str, *, keep_logs: bool) -> None:
    """Remove the scratch directory.

    Args:
        keep_logs: what a driver left there that ended by itself are logs, of which its error message speaks.
    """
    if keep_logs:
        with contextlib.suppress(OSError):
            os.rmdir(scratch)
    else:
        shutil.rmtree(scratch, ignore_errors=True)
    # Whoever joins removes what dead owners left beside it.
    SharedWeights(Path("/dev/shm") / f"stepgrpo-{os.getuid()}-{Path(scratch).name}").close()


def _saved_logs(scratch: Path, directory: Path) -> str:
    """Take Ray's logs along; says where they are."""
    target = directory / time.strftime("ray-logs-%Y%m%d-%H%M%S")
    for logs in scratch.glob("*/session_*/logs"):
        if not logs.parent.is_symlink():
            with contextlib.suppress(OSError):
                shutil.copytree(logs, target, symlinks=True, dirs_exist_ok=True)
    return f"; Ray's logs: {target}" if target.is_dir() else ""


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0):
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")

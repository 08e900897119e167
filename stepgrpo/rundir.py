"""The directory of a run: claimed once, written whole, and telling how the run ended."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from stepgrpo.config import ConfigError
from stepgrpo.metrics import finite

TOUCH_SECONDS = 5.0
"""Between two times that whoever is ``alone`` touches the lock, which other machines see."""
FRESH_SECONDS = 90.0
"""After which a lock that nobody touched is nobody's, for other machines. A file server shows a touch a minute late."""


def claim(directory: Path) -> None:
    """Refuse a directory that holds another run, or cannot be written.

    Raises:
        ConfigError: says which other name to take.
    """
    if not is_free(directory):
        raise ConfigError(
            f"name: {directory} already holds a run; go on with it (--resume), choose another with "
            f"name={_free_name(directory)}, or remove it"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise _unwritable(directory, e) from None


def is_free(directory: Path) -> bool:
    """Whether no run lies there; what is left of one that died before it began is none."""
    return not directory.exists() or all(
        p.name == _LOCK or p.name.startswith(("ray-logs-", "stacks-")) for p in directory.iterdir()
    )


@contextmanager
def alone(directory: Path, what: str) -> Iterator[None]:
    """Hold a directory's lock, which ends with the process however that ends.

    Raises:
        ConfigError: another process has it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / _LOCK).open("a+")  # who does not get it leaves the holder's name there
    except OSError as e:
        raise _unwritable(directory, e) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            who = lock.read().strip() or "which does not say where"
            raise ConfigError(f"{directory}: another {what} works here ({who}); wait for it, or stop it") from None
        except OSError as e:
            raise ConfigError(
                f"runs_dir: got {directory.parent}, whose file system has no locks ({e.strerror}); mount it with them "
                "(Lustre: -o flock), or take another"
            ) from None
        try:
            lock.truncate(0)
            lock.write(f"{socket.gethostname()}, process {os.getpid()}\n")
            lock.flush()
        except OSError as e:
            raise _unwritable(directory, e) from None
        over = threading.Event()
        toucher = threading.Thread(target=_touch, args=(lock.fileno(), over), daemon=True)
        toucher.start()
        try:
            yield
        finally:
            over.set()
            toucher.join()  # before its file is closed
            with suppress(OSError):
                lock.truncate(0)
            if is_free(directory):
                (directory / _LOCK).unlink(missing_ok=True)


def _unwritable(directory: Path, error: OSError) -> ConfigError:
    return ConfigError(f"runs_dir: got {directory.parent}, cannot be written ({error.strerror})")


def _touch(file: int, over: threading.Event) -> None:
    while not over.wait(TOUCH_SECONDS):
        with suppress(OSError):  # a file server that is away for a while
            os.utime(file)


def is_held(directory: Path) -> bool:
    """Whether a process is ``alone`` there. Who tries the lock instead has it for a moment, in which a run could not
    begin.

    Of this machine, the kernel knows. Of another one, or of another container, the holder's name stands in the lock,
    and was touched within ``FRESH_SECONDS`` of this machine's clock.
    """
    with suppress(OSError):
        s = (directory / _LOCK).stat()
        if s.st_size and time.time() - s.st_mtime < FRESH_SECONDS:
            return True
        place = f" {os.major(s.st_dev):02x}:{os.minor(s.st_dev):02x}:{s.st_ino} "
        locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
        return any("FLOCK" in line and " WRITE " in line and place in line for line in locks)
    return False


def _free_name(directory: Path) -> str:
    n = 2
    while (directory.parent / f"{directory.name}-{n}").exists():
        n += 1
    return f"{directory.name}-{n}"


@contextmanager
def recorded(directory: Path, seconds: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Write ``summary.json`` however the run ends, and ``error.txt`` with the traceback if it failed.

    Args:
        seconds: by phase, as they stand at the end.

    Yields:
        The summary, to be filled in.
    """
    summary: dict[str, Any] = {"status": "failed", "name": directory.name}
    try:
        yield summary
        summary["status"] = "finished"
    except (asyncio.CancelledError, KeyboardInterrupt):
        summary["status"] = "interrupted"
        raise
    except Exception:
        with suppress(OSError):  # a full disk, perhaps the very reason, which must not be hidden
            (directory / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        raise
    finally:
        summary["seconds"] = {k: round(v, 2) for k, v in seconds.items()}
        with nullcontext() if summary["status"] == "finished" else suppress(OSError):
            save_json(directory / "summary.json", summary)


def save_json(path: Path, record: Any, *, indent: int | None = 2) -> None:
    """Write a JSON file whole or not at all."""
    _replace(path, json.dumps(record, indent=indent) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def writable(file: Path) -> None:
    """Begin an output file, before the work that fills it.

    Raises:
        ConfigError: it exists with something in it, or cannot be written.
    """
    if file.exists() and file.stat().st_size:
        raise ConfigError(f"{file}: exists; name another file, or remove it")
    try:
        file.touch()
    except OSError as e:
        raise ConfigError(f"{file}: cannot be written ({e.strerror})") from None


def append_event(directory: Path, kind: str, **event: Any) -> None:
    """Add to ``events.jsonl``: what happened to the run, and not in it."""
    append_json(directory / "events.jsonl", {"time": round(time.time(), 3), "kind": kind, **event})


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a file that may not be there; what was not written to its end is left out."""
    if path.is_file():
        with path.open("rb") as f:
            yield from whole_lines(f)


def whole_lines(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """JSON lines; one that was cut off, at the end or with others after it (a full disk, a kill), is left out."""
    for line in lines:
        with suppress(ValueError):
            if line.endswith(b"\n"):
                yield json.loads(line)


def roll_back(directory: Path, batch: int) -> int:
    """Void the lines about batches from ``batch`` on, and evaluations of what came out of them; returns how many.

    Each file is replaced whole, so that this may be cut off and done again.
    """
    voided = 0
    for name, field in _OF_BATCHES.items():
        path = directory / name
        if not path.is_file():
            continue
        raw = path.read_text(encoding="utf-8")
        # A version is what its number of batches made.
        kept = [line for line in read_json_lines(path) if field is None or line[field] < batch + (field == "version")]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if text != raw:
            voided += len(raw.splitlines()) - len(kept)
            _replace(path, text)
    return voided


_OF_BATCHES = {
    "metrics.jsonl": "batch",
    "draws.jsonl": "batch",
    "probes.jsonl": "batch",
    "samples.jsonl": "batch",
    "evaluations.jsonl": "version",
    "events.jsonl": None,
}
"""File of JSON lines -> the field that says which batch, or which weights, a line is about; None: about no batch."""
_LOCK = ".lock"
_appending = threading.Lock()
"""Threads that add to one file: half of another's line looks as if it had been cut off."""


def append_json(path: Path, *records: dict[str, Any]) -> None:
    """Add a line each to a file of JSON lines, all or none, behind what another attempt did not write to its end. A
    figure that is not finite, which JSON cannot say, is null."""
    text = "".join(json.dumps(finite(record)) + "\n" for record in records).encode()
    with _appending, path.open("a+b", buffering=0) as f:
        size = f.seek(0, os.SEEK_END)
        if size and os.pread(f.fileno(), 1, size - 1) != b"\n":
            text = b"\n" + text
        try:
            if f.write(text) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            with suppress(OSError):
                f.truncate(size)
            raise

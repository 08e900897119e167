"""The directory of a run: claimed once, written whole, and telling how the run ended."""

from __future__ import annotations

import asyncio
import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stepgrpo.config import ConfigError


def claim(directory: Path) -> None:
    """Refuse a directory that holds another run, or cannot be written.

    Raises:
        ConfigError: says which other name to take.
    """
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(
            f"name: {directory} already holds a run; choose another with name={_free_name(directory)}, or remove it"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise ConfigError(f"runs_dir: got {directory.parent}, cannot be written ({e.strerror})") from None


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
        (directory / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        raise
    finally:
        summary["seconds"] = {k: round(v, 2) for k, v in seconds.items()}
        save_json(directory / "summary.json", summary)


def save_json(path: Path, record: Any, *, indent: int | None = 2) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(record, indent=indent) + "\n", encoding="utf-8")
    temporary.replace(path)


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


def append_json(path: Path, record: Any) -> None:
    """Add one line to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(record) + "\n")

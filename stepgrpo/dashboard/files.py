"""Reads what a run appends to its files: only what is new, and anew where a file was replaced.

It opens nothing for writing and takes no lock, so a run does not notice; any file system that fsspec knows will do.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from stepgrpo.config import ConfigError, brief, masked

CHUNK = 8 << 20
"""Most bytes of one read: a long file arrives in several, and no request takes long."""
REMEMBERED = 256
"""Bytes before the place read to: where they are others than they were, the file is another one."""


class Part(NamedTuple):
    """What one look at a file of JSON lines brought."""

    anew: bool
    """All that came before is void: the file was cut or replaced, as a roll-back does."""
    lines: list[tuple[int, dict[str, Any]]]
    """(where the line begins, in bytes; its record)"""
    more: bool
    """The file goes on."""


def opened(source: str) -> tuple[AbstractFileSystem, str]:
    """A directory or URL.

    Raises:
        ConfigError: nothing is there, or fsspec cannot open it.
    """
    name = masked(source)
    if source.startswith(("http:", "https:")):
        raise ConfigError(f"{name}: takes a run directory or its URL (s3://...); open a dashboard's URL in a browser")
    try:
        # The run writes there: a listing from memory would be old.
        fs, root = url_to_fs(source, use_listings_cache=False)
        if not fs.isdir(root):
            raise ConfigError(f"{name}: is no directory; takes a run directory, or one that holds some (runs)")
    except (ImportError, ValueError, OSError) as e:
        raise ConfigError(f"{name}: takes a directory or a URL that fsspec can open ({brief(e)})") from None
    return fs, root.rstrip("/")


class Tail:
    """A file of JSON lines that grows."""

    def __init__(self, fs: AbstractFileSystem, path: str) -> None:
        self._fs, self.path = fs, path
        self._begin()
        self._stamp: object = None
        self.size = 0
        """In bytes, as of the last look."""

    def _begin(self) -> None:
        self.offset = 0
        """Bytes read."""
        self.faults: list[str] = []
        """Lines that are none."""
        self._before = b""

    def read(self) -> Part:
        """What was appended, of at most ``CHUNK`` bytes. A last line that is not written to its end waits.

        Raises:
            OSError: the file cannot be read.
        """
        stamp, self.size = stat(self._fs, self.path)
        if stamp == self._stamp and self.size == self.offset:
            return Part(False, [], more=False)
        anew = False
        if (data := self._chunk()) is None:
            anew = True
            self._begin()
            data = self._chunk() or b""
        whole = data[: data.rfind(b"\n") + 1]
        self._stamp = stamp
        lines, at = [], self.offset
        for line in whole.splitlines(keepends=True):
            try:
                lines.append((at, record(line)))
            except ValueError as e:
                self.faults.append(f"{name_of(self.path)}, byte {at}: is no record ({brief(e, 80)}); left out")
            at += len(line)
        self.offset = at
        self._before = (self._before + whole)[-REMEMBERED:]
        return Part(anew, lines, more=bool(whole) and self.offset < self.size)

    def _chunk(self) -> bytes | None:
        """From the offset on; None: what lies before it is not what was read."""
        if self.size < self.offset:
            return None
        start = self.offset - len(self._before)
        end = min(self.size, self.offset + CHUNK)
        while end > start:
            data: bytes = self._fs.cat_file(self.path, start=start, end=end)
            if not data.startswith(self._before):
                return None
            data = data[len(self._before) :]
            if b"\n" in data or end == self.size:
                return data
            end = min(self.size, end + CHUNK)  # a line longer than a chunk
        return b""


class Whole:
    """A JSON file that is replaced whole."""

    def __init__(self, fs: AbstractFileSystem, path: str) -> None:
        self._fs, self._path = fs, path
        self._stamp: object = None
        self.value: dict[str, Any] = {}
        """Empty where there is no file."""
        self.faults: list[str] = []

    def read(self) -> bool:
        """Look again; returns whether it is another one now.

        Raises:
            OSError: the file cannot be read.
        """
        stamp, size = stat(self._fs, self._path)
        if stamp == self._stamp:
            return False
        self.value, self.faults = {}, []
        if size:
            try:
                self.value = record(self._fs.cat_file(self._path))
            except ValueError as e:
                self.faults = [f"{name_of(self._path)}: is no record ({brief(e, 80)})"]
        self._stamp = stamp
        return True


def stat(fs: AbstractFileSystem, path: str) -> tuple[object, int]:
    """What changes with a file, and its size in bytes; of none: None and 0."""
    try:
        info = fs.info(path)
    except FileNotFoundError:
        return None, 0
    size = info.get("size") or 0
    return (size, *(str(info.get(key)) for key in ("ino", "mtime", "LastModified", "ETag", "etag"))), size


def record(text: bytes) -> dict[str, Any]:
    """
    Raises:
        ValueError: it is no JSON object.
    """
    value = json.loads(text, parse_constant=lambda _: None)  # NaN is no JSON, and no browser reads it
    if not isinstance(value, dict):
        raise ValueError(f"got {type(value).__name__}, takes an object")
    return value


def text_of(fs: AbstractFileSystem, path: str, most: int = 200_000) -> str:
    """A file's last ``most`` bytes; empty where there is none."""
    _, size = stat(fs, path)
    data: bytes = fs.cat_file(path, start=max(0, size - most), end=size) if size else b""
    return data.decode(errors="replace")


def line_at(fs: AbstractFileSystem, path: str, offset: int, most: int = 64 << 20) -> dict[str, Any] | None:
    """The record of the line that begins there; None where the file is another one by now."""
    length = 1 << 14
    while length <= most:
        try:
            data: bytes = fs.cat_file(path, start=offset, end=offset + length)
        except (FileNotFoundError, ValueError):
            return None
        if b"\n" in data:
            try:
                return record(data[: data.index(b"\n")])
            except ValueError:
                return None
        if len(data) < length:
            return None
        length *= 8
    return None


def name_of(path: str) -> str:
    return path.rsplit("/", 1)[-1]

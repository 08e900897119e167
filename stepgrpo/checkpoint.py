"""Checkpoints: named files and one JSON record, all or nothing, on a local disk or an object store.

    <place>/<name>/ learner-0-of-2.safetensors   put, each by whoever has its bytes, on any node
                    learner-1-of-2.safetensors   put
                    manifest.json                commit, last: what lacks it is no checkpoint

A place is a directory that all nodes see, or a URL that fsspec knows (`s3://`, `gs://`, `memory://`). Names sort by
age. A committed checkpoint is never written to again. What the files hold is their writers' business.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any
from uuid import uuid4

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from stepgrpo.config import ConfigError, brief, masked

FORMAT = 1
"""Of the manifest and of what lies beside it; a program reads its own format only."""
MANIFEST = "manifest.json"
MARKER = ".stepgrpo"
"""Makes a directory ours: no other one is ever removed."""
CHUNK_BYTES = 16 * 2**20
VERIFY_THREADS = 8

# One component that cannot leave its directory: no slash, no leading dot.
_COMPONENT = r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,199}$"
Component = Annotated[str, Field(pattern=_COMPONENT)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Source = Path | bytes | memoryview | Iterable[bytes | memoryview]
"""A local file, or bytes: whole, or in parts that are written one after the other."""


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, incomplete, not there or not this program's. The message names it and says why."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    name: Component
    size: Annotated[int, Field(ge=0)]
    """Bytes."""
    sha256: Digest


@dataclass(frozen=True)
class Manifest:
    """What a committed checkpoint consists of."""

    name: Component
    program: str
    """Name and version of the program that wrote it."""
    created: datetime
    meta: dict[str, Any]
    """Its writer's own record."""
    files: tuple[FileEntry, ...]
    sha256: Digest
    """Of the manifest's other contents: tells two checkpoints of one name apart."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files)


_MANIFEST = TypeAdapter(Manifest)


def put(place: str | Path, name: str, filename: str, source: Source) -> FileEntry:
    """Write one file of a checkpoint that is not committed yet. It appears whole or not at all, and replaces what a
    lost attempt left behind under its name.

    Raises:
        CheckpointError: the checkpoint is committed already.
        OSError: it cannot be written, such as on a full disk; nothing of it is left.
        ConfigError: fsspec cannot open the place.
    """
    store = _Store(place)
    store.begin(name)
    assert re.fullmatch(_COMPONENT, filename) and filename != MANIFEST, filename
    if isinstance(source, Path):
        with source.open("rb") as f:
            return store.write(name, filename, _chunks(f))
    return store.write(name, filename, [source] if isinstance(source, bytes | memoryview) else source)


def commit(place: str | Path, name: str, meta: dict[str, Any], files: Sequence[FileEntry]) -> Manifest:
    """Make a checkpoint of the files that were put, durably: from here on it is one.

    Args:
        meta: JSON.
        files: all of its files, as ``put`` returned them.

    Raises:
        CheckpointError: a file is not there as it was put, or the checkpoint is committed already.
        OSError: the manifest cannot be written; the checkpoint stays uncommitted.
    """
    store = _Store(place)
    store.begin(name)
    assert len({f.name for f in files}) == len(files), "a file twice"
    if faults := [fault for f in files if (fault := store.fault(name, f, checksum=False))]:
        raise CheckpointError(f"{name}: {'; '.join(faults)}; does every node see {place}?")
    entries = [{"name": f.name, "size": f.size, "sha256": f.sha256} for f in files]
    program, created = f"stepgrpo {version('stepgrpo')}", datetime.now(UTC).isoformat(timespec="seconds")
    body = {"format": FORMAT, "program": program, "created": created, "meta": meta, "files": entries}
    body = json.loads(json.dumps(body))  # as it will be read: keys are text, tuples are lists
    sealed = body | {"sha256": _seal(body)}
    store.write(name, MANIFEST, [json.dumps(sealed, indent=2).encode() + b"\n"])
    return _parsed(name, sealed)


def names(place: str | Path) -> list[str]:
    """Names of the committed checkpoints, oldest first; whether they are intact is not looked at."""
    store = _Store(place)
    return [n for n in store.directories() if store.has(n, MANIFEST)]


def half_written(place: str | Path) -> list[str]:
    """Names of those that were begun, or whose removal was, and are not committed; oldest first."""
    store = _Store(place)
    return [n for n in store.directories() if store.has(n, MARKER) and not store.has(n, MANIFEST)]


def read(place: str | Path, name: str) -> Manifest:
    """A checkpoint's manifest, itself intact; its files are not looked at.

    Raises:
        CheckpointError: says why there is none.
    """
    store = _Store(place)
    try:
        raw = store.fs.cat_file(store.path(name, MANIFEST))
    except FileNotFoundError:
        reason = f"no {MANIFEST}: half written" if store.fs.exists(store.path(name)) else f"not in {place}"
        raise CheckpointError(f"{name}: {reason}") from None
    except OSError as e:
        raise CheckpointError(f"{name}: {MANIFEST}: cannot be read ({brief(e)})") from e
    try:
        record = json.loads(raw)
        if (found := record["format"]) != FORMAT:
            raise CheckpointError(
                f"{name}: {MANIFEST}: has format {found} (written by {record.get('program')}); "
                f"this program reads format {FORMAT}"
            )
        if record["sha256"] != _seal({k: v for k, v in record.items() if k != "sha256"}):
            raise CheckpointError(f"{name}: {MANIFEST}: checksum differs")
    except (ValueError, TypeError, LookupError, AttributeError):
        raise CheckpointError(f"{name}: {MANIFEST}: damaged, or not a manifest") from None
    return _parsed(name, record)


def verify(place: str | Path, name: str, *, checksums: bool = True) -> Manifest:
    """Check sizes and, by reading everything, checksums of a checkpoint's files.

    Raises:
        CheckpointError: names every file at fault, and its fault.
    """
    store, manifest = _Store(place), read(place, name)
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        faults = [f for f in pool.map(lambda entry: store.fault(name, entry, checksums), manifest.files) if f]
    if faults:
        raise CheckpointError(f"{name}: {'; '.join(faults)}")
    return manifest


def newest(place: str | Path) -> tuple[Manifest, list[str]]:
    """The newest checkpoint that verifies, and why each newer one was refused, newest first.

    Raises:
        CheckpointError: none is left; holds all reasons.
    """
    refusals: list[str] = []
    for name in sorted([*names(place), *half_written(place)], reverse=True):
        try:
            return verify(place, name), refusals
        except CheckpointError as e:
            refusals.append(str(e))
    raise CheckpointError(f"{place}: no usable checkpoint" + "".join(f"\n  {r}" for r in refusals))


def fetch(place: str | Path, name: str, filename: str, cache: Path | None = None) -> Path:
    """A checkpoint's file on this machine: where it lies, or a download, checked while it comes in.

    Args:
        cache: directory for downloads, which processes of one machine share. A place's downloads of other checkpoints
            are removed from it. None: under the directory of temporary files.

    Raises:
        CheckpointError: there is no such file, or what arrived is not what was put.
    """
    store, manifest = _Store(place), read(place, name)
    entry = next((f for f in manifest.files if f.name == filename), None)
    if entry is None:
        raise CheckpointError(f"{name}: has no file {filename}")
    if store.is_local:
        return Path(store.path(name, filename))
    root = (cache or _own_cache()) / hashlib.sha256(str(place).encode()).hexdigest()[:16]
    local = _Store(root)
    folder = manifest.sha256  # not the name: one of that name may have been removed and written again
    target = Path(local.path(folder, filename))
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / "lock"):
        for other in (d for d in root.iterdir() if d.is_dir() and d.name != folder):
            shutil.rmtree(other, ignore_errors=True)
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            with store.fs.open(store.path(name, filename), "rb", block_size=CHUNK_BYTES) as f:
                arrived = local.write(folder, filename, _chunks(f))
            if arrived != entry:
                target.unlink()
                raise CheckpointError(
                    f"{name}: {filename}: checksum differs ({arrived.size:,} of {entry.size:,} bytes came)"
                )
    return target


def prune(
    place: str | Path,
    *,
    keep_last: int,
    keep_best: int = 0,
    accuracy: Callable[[Manifest], float | None] = lambda _: None,
) -> list[str]:
    """Remove what need not be kept, and half-written ones older than the newest commit.

    Kept are the last ``keep_last``, the ``keep_best`` with the highest ``accuracy``, those this program cannot
    read, and always the newest one that verifies, with what is newer. Checksums are looked at where that costs no
    download.

    Args:
        accuracy: which are best; None: not known of this one.

    Returns:
        Names of the removed.
    """
    assert keep_last >= 1 and keep_best >= 0
    store = _Store(place)
    readable: list[Manifest] = []
    for name in names(place):
        with suppress(CheckpointError):
            readable.append(read(place, name))
    known = {m.name: value for m in readable if (value := accuracy(m)) is not None and math.isfinite(value)}
    best = sorted(known, key=lambda name: (known[name], name), reverse=True)
    keep = {*(m.name for m in readable[-keep_last:]), *best[:keep_best]}
    if any(m.name not in keep for m in readable):
        for m in reversed(readable):
            keep.add(m.name)
            with suppress(CheckpointError):
                verify(place, m.name, checksums=store.is_local)
                break
    removed = [m.name for m in readable if m.name not in keep]
    removed += [n for n in half_written(place) if readable and n < readable[-1].name]
    for name in removed:
        store.remove(name)
    return removed


def discard(place: str | Path, name: str) -> None:
    """Remove one checkpoint, committed or not. Half a removal leaves a half-written one, never a damaged one.

    Raises:
        CheckpointError: it is not there.
    """
    _Store(place).remove(name)


class _Store:
    """A place, through fsspec; what it cannot do on a local disk, which is to write durably, is done here."""

    def __init__(self, place: str | Path) -> None:
        try:
            # Other processes write to the place: a listing from memory would be old.
            self.fs, root = url_to_fs(str(place), use_listings_cache=False)
        except (ImportError, ValueError) as e:
            raise ConfigError(
                f"checkpoint.place: got {place}, takes a directory or a URL that fsspec can open ({brief(e)})"
            ) from None
        self.root = root.rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def path(self, name: str, filename: str = "") -> str:
        if not re.fullmatch(_COMPONENT, name):
            raise CheckpointError(f"{name!r} is no name of a checkpoint: takes letters, digits and . _ + -")
        return f"{self.root}/{name}/{filename}".rstrip("/")

    def directories(self) -> list[str]:
        try:
            entries = self.fs.ls(self.root, detail=True)
        except FileNotFoundError:
            return []
        except Exception as e:  # also of a store's own kind, such as for want of credentials
            raise CheckpointError(f"{masked(self.root)}: cannot be read ({brief(e)})") from e
        found = (PurePosixPath(e["name"]).name for e in entries if e["type"] == "directory")
        return sorted(n for n in found if re.fullmatch(_COMPONENT, n))

    def has(self, name: str, filename: str) -> bool:
        try:  # `exists` takes any error for a no, for which a good checkpoint would be removed
            self.fs.info(self.path(name, filename))
        except FileNotFoundError:
            return False
        except Exception as e:
            raise CheckpointError(f"{name}: {filename}: cannot be looked at ({brief(e)})") from e
        return True

    def begin(self, name: str) -> None:
        if self.has(name, MANIFEST):
            raise CheckpointError(f"{name}: is committed already, and never written to again")
        self.fs.makedirs(self.path(name), exist_ok=True)
        self.fs.pipe_file(self.path(name, MARKER), b"")
        if self.is_local:
            _sync_directory(self.root)

    def write(self, name: str, filename: str, chunks: Iterable[bytes | memoryview]) -> FileEntry:
        """Whole or not at all: renamed into place on a local disk, an upload elsewhere."""
        path = self.path(name, filename)
        aside = self.path(name, f".{filename}.{uuid4().hex}") if self.is_local else path
        digest, size = hashlib.sha256(), 0
        try:
            with open(aside, "xb") if self.is_local else self.fs.open(path, "wb") as f:
                for chunk in chunks:
                    f.write(chunk)
                    digest.update(chunk)
                    size += memoryview(chunk).nbytes
                if self.is_local:
                    f.flush()
                    os.fsync(f.fileno())
            if self.is_local:
                os.replace(aside, path)
                _sync_directory(self.path(name))
        except BaseException:
            # An upload that breaks off is closed like one that ends well, and would look whole.
            with suppress(Exception):
                self.fs.rm_file(aside)
            raise
        return FileEntry(filename, size, digest.hexdigest())

    def fault(self, name: str, entry: FileEntry, checksum: bool) -> str:
        """What is wrong with a file; empty: nothing."""
        path = self.path(name, entry.name)
        try:
            size = self.fs.info(path)["size"]
            if size != entry.size:
                kind = "truncated" if size < entry.size else "too long"
                return f"{entry.name}: {kind}: {size:,} bytes of {entry.size:,}"
            if checksum:
                digest = hashlib.sha256()
                with self.fs.open(path, "rb", block_size=CHUNK_BYTES) as f:
                    for chunk in _chunks(f):
                        digest.update(chunk)
                if digest.hexdigest() != entry.sha256:
                    return f"{entry.name}: checksum differs"
        except FileNotFoundError:
            return f"{entry.name}: missing"
        except OSError as e:
            return f"{entry.name}: cannot be read ({brief(e)})"
        return ""

    def remove(self, name: str) -> None:
        """The manifest first and the marker last: a removal that breaks off is found, and can be made again."""
        if not self.fs.exists(self.path(name)):
            raise CheckpointError(f"{name}: not in {self.root}")
        self.fs.pipe_file(self.path(name, MARKER), b"")
        if self.has(name, MANIFEST):
            self.fs.rm_file(self.path(name, MANIFEST))
            if self.is_local:
                _sync_directory(self.path(name))
        files = {PurePosixPath(f).name for f in self.fs.ls(self.path(name), detail=False)}
        for filename in [*sorted(files - {MARKER}), MARKER]:
            self.fs.rm_file(self.path(name, filename))
        with suppress(OSError):  # object stores have no directories
            self.fs.rmdir(self.path(name))


def _parsed(name: str, record: dict[str, Any]) -> Manifest:
    try:
        return _MANIFEST.validate_python({k: v for k, v in record.items() if k != "format"} | {"name": name})
    except ValidationError as e:
        first = e.errors()[0]
        where, got = ".".join(map(str, first["loc"])), str(first["input"])[:80]
        raise CheckpointError(f"{name}: {MANIFEST}: {where}: got {got!r}; {first['msg']}") from None


def _seal(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _chunks(f: IO[bytes]) -> Iterator[bytes]:
    while chunk := f.read(CHUNK_BYTES):
        yield chunk


def _sync_directory(path: str) -> None:
    """A rename is durable only when its directory is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own_cache() -> Path:
    path = Path(tempfile.gettempdir()) / f"stepgrpo-checkpoints-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise CheckpointError(f"{path}: belongs to another user; set TMPDIR to a directory of your own")
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield

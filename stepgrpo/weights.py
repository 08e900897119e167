"""Published weights, both ends: bytes with a manifest, no torch.

    learner rank r       object store                  one node's shared memory        vLLM
    pieces ----pack----> buckets(r) + Manifest(r) ---> one file, all ranks' pieces --> mapped, loaded
                                        fetch, verify, assemble (once per node)

ZeRO-3 keeps every parameter cut into one flat piece per rank. Each rank publishes its own pieces, so nothing is
gathered and no process group spans learner and engines. A parameter's bytes are never interpreted here: numpy has no
bfloat16.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import TypedDict, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

R = TypeVar("R")
Bytes = NDArray[np.uint8]
Fetch = Callable[[int, int], Bytes]
"""(rank, bucket index) -> the bucket's bytes."""

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
ALIGNMENT = 64
"""Bytes; every parameter starts on a cache line."""


class WeightsError(RuntimeError):
    """Published weights that are damaged, incomplete or no longer there. They must not be loaded."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A rank's contiguous part of one flattened parameter."""

    name: str
    """The checkpoint's name of the parameter."""
    dtype: str
    """torch's name of it: `bfloat16`, `float16`, `float32` or `float64`."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """Elements of the flattened parameter before this piece."""
    data: Bytes
    """[elements * item size]"""


@dataclass(frozen=True, slots=True)
class Entry:
    """Bytes [start, start + size) of a parameter lie at [offset, offset + size) of a bucket."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    bucket: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What one rank published: small, travels by value."""

    version: int
    rank: int
    sizes: tuple[int, ...]
    """Bytes of each bucket."""
    checksums: tuple[int, ...]
    """xxh3 of each bucket: 7 GB/s on one core, where crc32 makes 1."""
    entries: tuple[Entry, ...]
    """In the order of the buckets."""


class Slot(TypedDict):
    """Where a whole parameter lies in an assembled file."""

    offset: int
    dtype: str
    shape: list[int]


Table = dict[str, Slot]
"""Parameter name -> place, in the learner's order. Survives JSON."""


def pack(
    pieces: Iterable[Piece], *, version: int, rank: int, bucket_bytes: int, put: Callable[[Bytes], R]
) -> tuple[Manifest, list[R]]:
    """Copy a rank's pieces into flat buckets and hand each to ``put`` as it fills.

    A piece that does not fit goes on in the next bucket, so all buckets but the last are full, and no more than one is
    held here. The copies are finished when this returns; the pieces may change afterwards.

    Returns:
        The manifest and what ``put`` returned for each bucket.
    """
    assert bucket_bytes > 0
    refs: list[R] = []
    sizes: list[int] = []
    checksums: list[int] = []
    entries: list[Entry] = []
    bucket, used = np.empty(bucket_bytes, np.uint8), 0

    def flush() -> None:
        nonlocal bucket, used
        full = bucket[:used]
        sizes.append(used)
        checksums.append(xxhash.xxh3_64_intdigest(full.data))
        refs.append(put(full))
        bucket, used = np.empty(bucket_bytes, np.uint8), 0  # `put` may have kept the old one

    for piece in pieces:
        start = piece.start * ITEM_BYTES[piece.dtype]
        assert piece.data.dtype == np.uint8 and piece.data.ndim == 1, piece.name
        assert start + len(piece.data) <= _num_bytes(piece.dtype, piece.shape), f"{piece.name}: the piece ends outside"
        done = 0
        while done < len(piece.data):
            size = min(len(piece.data) - done, bucket_bytes - used)
            bucket[used : used + size] = piece.data[done : done + size]
            entries.append(Entry(piece.name, piece.dtype, piece.shape, start + done, len(sizes), used, size))
            used += size
            done += size
            if used == bucket_bytes:
                flush()
    if used:
        flush()
    return Manifest(version, rank, tuple(sizes), tuple(checksums), tuple(entries)), refs


def layout(manifests: Sequence[Manifest]) -> tuple[Table, int]:
    """Plan the file that holds every parameter in one piece.

    Returns:
        The table and the file's size in bytes.

    Raises:
        WeightsError: unless the ranks publish one version and their pieces cover every parameter exactly once.
    """
    if len({m.version for m in manifests}) != 1:
        raise WeightsError(f"weights of versions {sorted(m.version for m in manifests)} were mixed; all must be one")
    spans: dict[str, list[tuple[int, int]]] = {}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for manifest in sorted(manifests, key=lambda m: m.rank):
        for e in manifest.entries:
            kind = kinds.setdefault(e.name, (e.dtype, e.shape))
            if kind != (e.dtype, e.shape):
                raise WeightsError(f"{e.name}: ranks disagree, {kind} and {(e.dtype, e.shape)}")
            spans.setdefault(e.name, []).append((e.start, e.start + e.size))

    table: Table = {}
    size = 0
    for name, (dtype, shape) in kinds.items():
        covered = 0
        for start, end in sorted(spans[name]):
            if start != covered:
                what = "missing" if start > covered else "published twice"
                raise WeightsError(f"{name}: bytes {min(start, covered)} to {max(start, covered)} are {what}")
            covered = end
        if covered != _num_bytes(dtype, shape):
            raise WeightsError(f"{name}: bytes {covered} to {_num_bytes(dtype, shape)} are missing")
        table[name] = Slot(offset=size, dtype=dtype, shape=list(shape))
        size += -(-covered // ALIGNMENT) * ALIGNMENT
    return table, size


def assemble(manifests: Sequence[Manifest], fetch: Fetch, out: Bytes, *, first: int = 0) -> Table:
    """Fetch every bucket, verify it, and put the pieces of each parameter together in ``out``.

    One bucket is held at a time. ``first`` is the position of the rank to begin with: nodes that begin with different
    ranks do not all pull from the same source.

    Raises:
        WeightsError: for a bucket that is not what its rank published, and as ``layout`` does.
    """
    table, size = layout(manifests)
    assert len(out) >= size
    ordered = sorted(manifests, key=lambda m: m.rank)
    first %= len(ordered)
    for manifest in ordered[first:] + ordered[:first]:
        for bucket, entries in groupby(manifest.entries, key=lambda e: e.bucket):
            data = fetch(manifest.rank, bucket)
            if len(data) != manifest.sizes[bucket] or xxhash.xxh3_64_intdigest(data.data) != manifest.checksums[bucket]:
                raise WeightsError(
                    f"bucket {bucket} of rank {manifest.rank}, version {manifest.version}, arrived damaged "
                    f"({len(data)} bytes, {manifest.sizes[bucket]} published): fetch it again or publish anew"
                )
            for e in entries:
                at = table[e.name]["offset"] + e.start
                out[at : at + e.size] = data[e.offset : e.offset + e.size]
            del data  # before the next one comes
    return table


class SharedWeights:
    """A double-buffered pair of files that all engines of a node share, in a directory on /dev/shm.

    Every instance, in whatever process, holds a shared lock on a file of the directory while it is open; the kernel
    drops it when the process dies. So the last one to close removes the directory, and whoever starts removes the
    directories beside it whose owners all died.

    A slot is a data file and a header. The header is renamed into place after the data, and removed before the data is
    touched again: a slot with a header is whole, whenever its writer died.
    """

    ALIVE = ".stepgrpo-alive"
    SLOTS = ("a", "b")

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        _sweep(self.directory.parent)
        self._alive = _join(self.directory)

    def store(self, version: int, manifests: Sequence[Manifest], fetch: Fetch, *, first: int = 0) -> bool:
        """Have the version in shared memory: assemble it, unless this node already holds these very weights.

        Blocks while another worker of the node stores, and while the older slot is being read.

        Returns:
            Whether it was assembled here.

        Raises:
            WeightsError: as ``assemble`` does, or for want of shared memory. The slot then holds no version.
        """
        # A learner that went back to a checkpoint publishes a version's number again, with other weights.
        sums = [[m.rank, *m.checksums] for m in sorted(manifests, key=lambda m: m.rank)]
        table, size = layout(manifests)
        with _locked(self.directory / "writer", fcntl.LOCK_EX):
            headers = {slot: self._header(slot) for slot in self.SLOTS}
            ages = {slot: header["serial"] if header else 0 for slot, header in headers.items()}
            slot = min(ages, key=lambda s: ages[s])
            for s, header in headers.items():
                if header and header["version"] == version:
                    if header["checksums"] == sums:
                        return False
                    slot = s
            with _locked(self._path(slot), fcntl.LOCK_EX) as fd:
                self._header_path(slot).unlink(missing_ok=True)
                _reserve(fd, size, self.directory)
                assemble(manifests, fetch, np.frombuffer(mmap.mmap(fd, size), np.uint8), first=first)
                header = _Header(version=version, serial=max(ages.values()) + 1, checksums=sums, table=table)
                unnamed = self._header_path(slot).with_suffix(".tmp")
                unnamed.write_text(json.dumps(header))
                unnamed.replace(self._header_path(slot))
        return True

    @contextmanager
    def reading(self, version: int) -> Iterator[tuple[Path, Table]]:
        """The file of a version and its table. The file does not change until the context ends.

        Raises:
            WeightsError: if the node does not hold the version, or no longer.
        """
        for slot in self.SLOTS:
            header = self._header(slot)
            if header is None or header["version"] != version:
                continue
            with _locked(self._path(slot), fcntl.LOCK_SH):
                if self._header(slot) == header:
                    yield self._path(slot), header["table"]
                    return
        held = [header["version"] for slot in self.SLOTS if (header := self._header(slot))]
        raise WeightsError(f"weights version {version} is not in {self.directory}, which holds {held}: store it first")

    def close(self) -> None:
        """Leave; the last one to leave removes the directory."""
        if self._alive >= 0:
            if _try_exclusive(self._alive):
                shutil.rmtree(self.directory, ignore_errors=True)
            os.close(self._alive)
            self._alive = -1

    def _path(self, slot: str) -> Path:
        return self.directory / f"{slot}.bin"

    def _header_path(self, slot: str) -> Path:
        return self.directory / f"{slot}.json"

    def _header(self, slot: str) -> _Header | None:
        try:
            header: _Header = json.loads(self._header_path(slot).read_text())
        except FileNotFoundError:
            return None
        return header


class _Header(TypedDict):
    version: int
    serial: int
    """Grows with every store of the node, unlike the version, which may go back."""
    checksums: list[list[int]]
    table: Table


def _num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * ITEM_BYTES[dtype]


def _reserve(fd: int, size: int, directory: Path) -> None:
    """Make a file exactly ``size`` bytes that exist: writing to a mapped hole of a full tmpfs is a fatal signal."""
    os.ftruncate(fd, size)
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as e:
        os.ftruncate(fd, 0)
        free = shutil.disk_usage(directory).free
        raise WeightsError(
            f"{directory}: no room for {size:,} bytes of weights, {free:,} are free ({e.strerror}): enlarge /dev/shm"
        ) from None


@contextmanager
def _locked(path: Path, kind: int) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, kind)
        yield fd
    finally:
        os.close(fd)


def _try_exclusive(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _join(directory: Path) -> int:
    """Hold the directory's liveness lock, in a directory that the lock's file is really in."""
    while True:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = directory / SharedWeights.ALIVE
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # its last owner removed the directory between the two lines
        fcntl.flock(fd, fcntl.LOCK_SH)
        if _is_at(fd, path):
            return fd
        os.close(fd)


def _sweep(parent: Path) -> None:
    """Remove the directories in ``parent`` whose owners all died."""
    for path in parent.glob(f"*/{SharedWeights.ALIVE}"):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # gone by now, or another user's
        if _try_exclusive(fd) and _is_at(fd, path):
            shutil.rmtree(path.parent, ignore_errors=True)
        os.close(fd)

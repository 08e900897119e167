"""Published weights, both ends: bytes with a manifest, no torch.

    learner rank r       object store                  one node's shared memory        vLLM
    pieces ----pack----> buckets(r) + Manifest(r) ---> one file, all ranks' pieces --> mapped, loaded
                                        fetch, assemble, verify (once per node)

ZeRO-3 keeps every parameter cut into one flat piece per rank. Each rank publishes its own pieces, so nothing is
gathered and no process group spans learner and engines. A parameter's bytes are never interpreted here: numpy has no
bfloat16.

A bucket is published as a chain of objects: once whole, then what has changed since the version before.

    version      1     2        3           4        with full_every 3
    chain        W1    W1 D2    W1 D2 D3    W4

Each link names the checksum of the bucket it leads to. Whoever holds the bucket in any state of the chain goes on from
there, in place; whoever does not (a newcomer, one that fell behind, all after a roll-back) begins with the whole. So no
one keeps book of who holds what. At the end it is the checksum of the assembled bytes that counts: where it is wrong,
the bucket is assembled anew from the whole.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, islice
from math import gcd, prod
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

R = TypeVar("R")
Bytes = NDArray[np.uint8]
Fetch = Callable[[int, int], Bytes]
"""(rank, number of the object) -> its bytes."""

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
ALIGNMENT = 64
"""Bytes; every parameter starts on a cache line."""
BLOCK = 1 << 18
"""Bytes that are copied, changed and hashed before the next: all but the first time they are found in the cache."""


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
    chains: tuple[tuple[int, ...], ...]
    """Of each bucket: what each object of its chain leads to, as the bucket's xxh3 (10 GB/s and more on one core, where
    crc32 makes 1). The first object is the bucket, the others are differences; all are numbered in this order, from 0.
    """
    entries: tuple[Entry, ...]
    """In the order of the buckets."""
    whole_bytes: int
    """Of the buckets that were put whole for this version."""
    difference_bytes: int
    """Of the differences that were put for this version in the place of the other buckets."""

    @property
    def checksums(self) -> tuple[int, ...]:
        """Of each bucket."""
        return tuple(chain[-1] for chain in self.chains)


class Slot(TypedDict):
    """Where a whole parameter lies in an assembled file."""

    offset: int
    dtype: str
    shape: list[int]


Table = dict[str, Slot]
"""Parameter name -> place, in the learner's order. Survives JSON."""


@dataclass(frozen=True, slots=True)
class _Sent(Generic[R]):
    """A bucket as it was last published."""

    buffer: Bytes
    size: int
    """Bytes of the buffer that are the bucket."""
    chain: tuple[int, ...]
    refs: tuple[R, ...]
    put: int
    """Bytes that were put for the last version."""
    differences: int = 0
    """Bytes of all the chain's differences."""
    age: int = 0
    """Versions since it was put whole."""


class Publisher(Generic[R]):
    """A learner rank's end: copies its pieces into flat buckets and puts each, or what has changed in it.

    Args:
        put: must be done with the bytes when it returns.
        full_every: a bucket is put whole at least every so many versions, and as soon as the differences since would
            together be as large. So a newcomer fetches less than two buckets for one, and the store holds less than
            two, or three while some still fetch the last of one chain and others the first of the next. Above 1, the
            last version is kept here.
    """

    def __init__(self, *, rank: int, bucket_bytes: int, put: Callable[[Bytes], R], full_every: int = 1) -> None:
        assert bucket_bytes > 0 and full_every > 0
        self._rank, self._bucket_bytes, self._put, self._full_every = rank, bucket_bytes, put, full_every
        self._last: list[_Sent[R]] = []
        self._buffer = np.empty(bucket_bytes, np.uint8)

    def publish(self, version: int, pieces: Iterable[Piece]) -> tuple[Manifest, list[R]]:
        """Publish a version; the pieces are those of every version, with other bytes.

        A piece that does not fit goes on in the next bucket, so all buckets but the last are full. The copies are
        finished when this returns; the pieces may change afterwards.

        Returns:
            The manifest and what ``put`` returned for each object, chain after chain.
        """
        last, self._last = self._last, []  # after an error half way there is nothing to differ from
        sent: list[_Sent[R]] = []
        entries: list[Entry] = []
        own: list[Entry] = []  # of the bucket being filled
        used, hasher = 0, xxhash.xxh3_64()

        def flush() -> None:
            nonlocal own, used, hasher
            before = last[len(sent)] if len(sent) < len(last) else None
            sent.append(self._send(before, used, hasher.intdigest(), _word(own)))
            if self._full_every > 1:  # else the same again: memory that is new takes as long as the copy
                self._buffer = before.buffer if before else np.empty(self._bucket_bytes, np.uint8)
            entries.extend(own)
            own, used, hasher = [], 0, xxhash.xxh3_64()

        for piece in pieces:
            start = piece.start * ITEM_BYTES[piece.dtype]
            assert piece.data.dtype == np.uint8 and piece.data.ndim == 1, piece.name
            end = start + len(piece.data)
            assert end <= _num_bytes(piece.dtype, piece.shape), f"{piece.name}: the piece ends outside"
            done = 0
            while done < len(piece.data):
                size = min(len(piece.data) - done, self._bucket_bytes - used)
                _copy(piece.data[done : done + size], self._buffer[used : used + size], hasher)
                own.append(Entry(piece.name, piece.dtype, piece.shape, start + done, len(sent), used, size))
                used += size
                done += size
                if used == self._bucket_bytes:
                    flush()
        if used:
            flush()
        if self._full_every > 1:
            self._last = sent
        manifest = Manifest(
            version,
            self._rank,
            sizes=tuple(s.size for s in sent),
            chains=tuple(s.chain for s in sent),
            entries=tuple(entries),
            whole_bytes=sum(s.put for s in sent if s.age == 0),
            difference_bytes=sum(s.put for s in sent if s.age > 0),
        )
        return manifest, [ref for s in sent for ref in s.refs]

    def _send(self, last: _Sent[R] | None, size: int, checksum: int, word: int) -> _Sent[R]:
        """The bucket that is the first ``size`` bytes of the buffer."""
        bucket = self._buffer[:size]
        if last and last.size == size and last.age + 1 < self._full_every:
            if last.chain[-1] == checksum:
                return replace(last, buffer=self._buffer, put=0, age=last.age + 1)
            made = difference(last.buffer[:size], bucket, word, limit=size - last.differences)
            if made is not None:
                return _Sent(
                    self._buffer,
                    size,
                    (*last.chain, checksum),
                    (*last.refs, self._put(made)),
                    put=len(made),
                    differences=last.differences + len(made),
                    age=last.age + 1,
                )
        return _Sent(self._buffer, size, (checksum,), (self._put(bucket),), put=size)


def pack(
    pieces: Iterable[Piece], *, version: int, rank: int, bucket_bytes: int, put: Callable[[Bytes], R]
) -> tuple[Manifest, list[R]]:
    """Publish once, as a ``Publisher`` does that never did before."""
    return Publisher(rank=rank, bucket_bytes=bucket_bytes, put=put).publish(version, pieces)


def difference(old: Bytes, new: Bytes, word: int, *, limit: int) -> Bytes | None:
    """What turns ``old`` into ``new``: the words that changed; of each stretch of 256 words how many did; the positions
    of those in their stretch. So a bfloat16 that changed takes 3 bytes. A bitmap would be shorter where more than one
    in eight changed, positions of 32 bits only where next to none did.

    Args:
        word: bytes of one; a divisor of both lengths.

    Returns:
        None: it would not be shorter than ``limit``.
    """
    words, counts, positions = [], [], []
    size = 0
    for block in _blocks(len(new)):
        was, now = old[block].view(f"u{word}"), new[block].view(f"u{word}")
        changed = np.flatnonzero(was != now)
        words.append(now[changed])
        counts.append(np.bincount(changed >> 8, minlength=_stretches(len(now))).astype(np.uint16))
        positions.append(changed.astype(np.uint8))  # the low bits
        size += words[-1].nbytes + counts[-1].nbytes + positions[-1].nbytes
        if size >= limit:
            return None
    return np.concatenate([array.view(np.uint8) for array in (*words, *counts, *positions)])


def _changes(made: Bytes, word: int, size: int) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """(positions, words) in each block of a bucket of so many bytes, out of a difference; ends early if it is none."""
    stretches = _stretches(size // word)
    num = (len(made) - 2 * stretches) // (word + 1)
    if num < 0:
        return
    words = made[: num * word].view(f"u{word}")
    counts = made[num * word : num * word + 2 * stretches].view(np.uint16)
    positions = made[num * word + 2 * stretches :]
    if not counts.sum() == num == len(positions):
        return
    done = 0
    for block in _blocks(size):
        start, stop = block.start // word, block.stop // word
        of_stretch = counts[start >> 8 : _stretches(stop)]
        here = slice(done, done + int(of_stretch.sum()))
        begins = np.arange(start, stop, 256, np.int64)
        yield np.repeat(begins, of_stretch) + positions[here], words[here]
        done = here.stop


def _blocks(size: int) -> Iterator[slice]:
    """So many bytes, a block at a time; all but the last are whole stretches, whatever the word."""
    return (slice(at, min(at + BLOCK, size)) for at in range(0, size, BLOCK))


def _stretches(num_words: int) -> int:
    return -(-num_words // 256)


def _word(entries: Sequence[Entry]) -> int:
    """Bytes of a bucket that belong together: an element, or less where types are mixed."""
    return gcd(*(n for e in entries for n in (ITEM_BYTES[e.dtype], e.offset, e.size)))


def _copy(source: Bytes, target: Bytes, hasher: xxhash.xxh3_64) -> None:
    """Copy and hash."""
    for block in _blocks(len(target)):
        target[block] = source[block]
        hasher.update(target[block].data)


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


@dataclass(frozen=True, slots=True)
class Base:
    """Weights that a node holds already, laid out as those that it assembles."""

    checksums: Mapping[tuple[int, int], int]
    """(rank, bucket) -> checksum"""
    data: Bytes | None
    """None: they are what is overwritten."""


def assemble(
    manifests: Sequence[Manifest], fetch: Fetch, out: Bytes, *, first: int = 0, bases: Sequence[Base] = ()
) -> Table:
    """Fetch every bucket, put the pieces of each parameter together in ``out``, and verify them there.

    One bucket's objects are held at a time. ``first`` is the rank to begin with: nodes that begin with different
    ranks do not all pull from the same source. A bucket goes on from the first of ``bases`` that is in its chain.

    Raises:
        WeightsError: for a bucket that is not what its rank published, and as ``layout`` does.
    """
    table, size = layout(manifests)
    assert len(out) >= size
    ordered = sorted(manifests, key=lambda m: m.rank)
    first %= len(ordered)
    for manifest in ordered[first:] + ordered[:first]:
        number = 0
        for index, entries in groupby(manifest.entries, key=lambda e: e.bucket):
            bucket = _Bucket(manifest, index, number, list(entries), table, out)
            if not any(bucket.assemble(fetch, base) for base in (*bases, None)):
                raise WeightsError(
                    f"bucket {index} of rank {manifest.rank}, version {manifest.version}, arrived damaged: "
                    "fetch it again or publish anew"
                )
            number += len(manifest.chains[index])
    return table


class _Bucket:
    """A bucket that is being assembled."""

    def __init__(
        self, manifest: Manifest, index: int, number: int, entries: Sequence[Entry], table: Table, out: Bytes
    ) -> None:
        """
        Args:
            number: of its first object.
        """
        self._rank, self._index, self._number = manifest.rank, index, number
        self._size, self._chain = manifest.sizes[index], manifest.chains[index]
        self._entries, self._table, self._out = entries, table, out

    def assemble(self, fetch: Fetch, base: Base | None) -> bool:
        """Begin with what the node holds, or with the whole object. Whether that led to what was published."""
        begin, whole = 0, None
        if base is None:
            whole = fetch(self._rank, self._number)
            if len(whole) != self._size:
                return False
        else:
            held = base.checksums.get((self._rank, self._index))
            if held not in self._chain:
                return False
            begin = self._chain.index(held)
        word = _word(self._entries)
        differences = [
            _changes(fetch(self._rank, self._number + n), word, self._size) for n in range(begin + 1, len(self._chain))
        ]
        hasher = xxhash.xxh3_64()
        for block in _blocks(self._size):
            changes = [next(d, None) for d in differences]
            for start, end, place in self._places(block):
                target = self._out[place]
                if whole is not None:
                    target[:] = whole[start:end]
                elif base and base.data is not None:
                    target[:] = base.data[place]
                for change in changes:
                    if change is None:
                        return False
                    positions, words = change
                    i, j = np.searchsorted(positions, (start // word, end // word))
                    try:
                        target.view(words.dtype)[positions[i:j] - start // word] = words[i:j]
                    except IndexError:  # a damaged difference
                        return False
                hasher.update(target.data)
        return hasher.intdigest() == self._chain[-1]

    def _places(self, block: slice) -> Iterator[tuple[int, int, slice]]:
        """For the bytes of a block of the bucket: from, to, where they go."""
        first = bisect_right(self._entries, block.start, key=lambda e: e.offset) - 1
        for e in islice(self._entries, first, None):
            start, end = max(block.start, e.offset), min(block.stop, e.offset + e.size)
            if start >= end:
                return
            at = self._table[e.name]["offset"] + e.start - e.offset
            yield start, end, slice(at + start, at + end)


class SharedWeights:
    """A double-buffered pair of files that all engines of a node share, in a directory on /dev/shm.

    The older one is brought up to date in place, as far as it, or else the newer one, is a base of what was published.

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
        self._mapped: dict[str, Bytes] = {}

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
                bases = [
                    Base(_checksums(header), None if s == slot else self._map(s, size))
                    for s, header in sorted(headers.items(), key=lambda item: item[0] != slot)
                    if header and header["table"] == table
                ]
                assemble(manifests, fetch, self._map(slot, size), first=first, bases=bases)
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
        self._mapped.clear()
        if self._alive >= 0:
            if _try_exclusive(self._alive):
                shutil.rmtree(self.directory, ignore_errors=True)
            os.close(self._alive)
            self._alive = -1

    def _path(self, slot: str) -> Path:
        return self.directory / f"{slot}.bin"

    def _map(self, slot: str, size: int) -> Bytes:
        """A slot's bytes, mapped once: writing to pages that are new to a process takes several times as long."""
        if len(self._mapped.get(slot, ())) != size:
            with open(self._path(slot), "r+b") as file:
                self._mapped[slot] = np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8)
        return self._mapped[slot]

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


def _checksums(header: _Header) -> dict[tuple[int, int], int]:
    return {(rank, i): c for rank, *of_rank in header["checksums"] for i, c in enumerate(of_rank)}


def _num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * ITEM_BYTES[dtype]


def _reserve(fd: int, size: int, directory: Path) -> None:
    """Make a file exactly ``size`` bytes that exist: writing to a mapped hole of a full tmpfs is a fatal signal."""
    status = os.fstat(fd)
    if status.st_size == size <= 512 * status.st_blocks:
        return
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

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from stepgrpo.weights import Fetch, Manifest, Piece, SharedWeights, Table, WeightsError, assemble, layout, pack

Bytes = NDArray[np.uint8]
SHAPES = {
    "embed": ("bfloat16", (31, 7)),
    "norm": ("float32", (5,)),
    "scale": ("float32", ()),
    "up": ("float16", (33, 3)),
}
ITEM = {"bfloat16": 2, "float16": 2, "float32": 4}


def parameters(seed: int) -> dict[str, Bytes]:
    """Bytes of a small model's parameters, of several types and odd sizes."""
    rng = np.random.default_rng(seed)
    return {n: rng.integers(0, 256, int(np.prod(s)) * ITEM[d], np.uint8) for n, (d, s) in SHAPES.items()}


def pieces(model: dict[str, Bytes], rank: int, ranks: int) -> list[Piece]:
    """A rank's pieces, cut as ZeRO-3 cuts: equal parts rounded up, the last one shorter or empty."""
    out = []
    for name, (dtype, shape) in SHAPES.items():
        numel = int(np.prod(shape))
        part = -(-numel // ranks)
        start, end = min(rank * part, numel), min((rank + 1) * part, numel)
        out.append(Piece(name, dtype, shape, start, model[name][start * ITEM[dtype] : end * ITEM[dtype]]))
    return out


def publish(
    model: dict[str, Bytes], version: int = 1, ranks: int = 2, bucket_bytes: int = 100
) -> tuple[list[Manifest], list[list[Bytes]]]:
    packed = [
        pack(pieces(model, r, ranks), version=version, rank=r, bucket_bytes=bucket_bytes, put=np.copy)
        for r in range(ranks)
    ]
    return [m for m, _ in packed], [b for _, b in packed]


def fetcher(buckets: list[list[Bytes]]) -> Fetch:
    return lambda rank, bucket: buckets[rank][bucket]


def contents(data: Bytes, table: Table) -> dict[str, Bytes]:
    out = {}
    for name, slot in table.items():
        size = int(np.prod(slot["shape"])) * ITEM[slot["dtype"]]
        out[name] = data[slot["offset"] : slot["offset"] + size]
    return out


def same(a: dict[str, Bytes], b: dict[str, Bytes]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="stepgrpo-test-", dir="/dev/shm") as parent:
        yield Path(parent) / "weights"


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("bucket_bytes", [7, 100, 10_000])
def test_the_ranks_pieces_assemble_to_the_exact_parameters(ranks: int, bucket_bytes: int) -> None:
    model = parameters(0)
    manifests, buckets = publish(model, ranks=ranks, bucket_bytes=bucket_bytes)
    table, size = layout(manifests)
    out = np.zeros(size, np.uint8)
    assert assemble(manifests[::-1], fetcher(buckets), out, first=ranks - 1) == table
    assert same(contents(out, table), model)
    assert list(table) == list(SHAPES)
    assert {n: (s["dtype"], tuple(s["shape"])) for n, s in table.items()} == SHAPES
    assert all(s["offset"] % 64 == 0 for s in table.values())


def test_all_buckets_but_the_last_are_full_and_are_put_as_they_fill() -> None:
    model = parameters(0)
    seen: list[int] = []
    given = 0

    def counted() -> Iterator[Piece]:
        nonlocal given
        for piece in pieces(model, 0, 1):
            given += len(piece.data)
            yield piece

    def put(bucket: Bytes) -> int:
        seen.append(len(bucket))
        assert given - sum(seen) <= max(len(d) for d in model.values())  # only a part of one piece is still to come
        return len(seen)

    manifest, refs = pack(counted(), version=3, rank=0, bucket_bytes=128, put=put)
    assert set(seen[:-1]) == {128} and 0 < seen[-1] <= 128
    assert sum(seen) == sum(len(d) for d in model.values())
    assert (manifest.version, manifest.rank, manifest.sizes) == (3, 0, tuple(seen))
    assert refs == list(range(1, len(seen) + 1))


def test_nodes_that_begin_with_different_ranks_fetch_in_rotated_order() -> None:
    manifests, buckets = publish(parameters(0), ranks=3, bucket_bytes=10_000)
    orders = []
    for first in range(3):
        order: list[int] = []

        def fetch(rank: int, bucket: int, order: list[int] = order) -> Bytes:
            order.append(rank)
            return buckets[rank][bucket]

        assemble(manifests, fetch, np.zeros(layout(manifests)[1], np.uint8), first=first)
        orders.append(order)
    assert orders == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]


@pytest.mark.parametrize("damage", ["flipped", "short"])
def test_a_damaged_bucket_is_an_error(damage: str) -> None:
    manifests, buckets = publish(parameters(0))
    bad = buckets[1][0].copy()
    bad[3] ^= 1
    buckets[1][0] = bad if damage == "flipped" else bad[:-1]
    with pytest.raises(WeightsError, match="bucket 0 of rank 1, version 1, arrived damaged"):
        assemble(manifests, fetcher(buckets), np.zeros(layout(manifests)[1], np.uint8))


def test_pieces_that_do_not_cover_every_parameter_exactly_once_are_an_error() -> None:
    (a, b), _ = publish(parameters(0))
    with pytest.raises(WeightsError, match="embed: bytes 218 to 434 are missing"):
        layout([a])
    with pytest.raises(WeightsError, match="embed: bytes 0 to 218 are missing"):
        layout([b])
    with pytest.raises(WeightsError, match="published twice"):
        layout([a, a, b])
    with pytest.raises(WeightsError, match=r"versions \[1, 2\] were mixed"):
        layout([a, replace(b, version=2)])
    wrong = replace(b.entries[0], shape=(31, 8))
    with pytest.raises(WeightsError, match="embed: ranks disagree"):
        layout([a, replace(b, entries=(wrong, *b.entries[1:]))])


def test_what_is_stored_can_be_read_until_two_newer_versions_came(directory: Path) -> None:
    shared = SharedWeights(directory)
    models = {v: parameters(v) for v in range(1, 4)}
    for version, model in models.items():
        manifests, buckets = publish(model, version)
        assert shared.store(version, manifests, fetcher(buckets))
        with shared.reading(version) as (path, table):
            assert same(contents(np.fromfile(path, np.uint8), table), model)
    with shared.reading(2) as (path, table):
        assert same(contents(np.fromfile(path, np.uint8), table), models[2])
    with (
        pytest.raises(WeightsError, match=r"version 1 is not in .*, which holds \[3, 2\]: store it first"),
        shared.reading(1),
    ):
        pass
    shared.close()
    assert not directory.exists()


def test_a_version_published_again_with_other_weights_replaces_the_old_one(directory: Path) -> None:
    shared = SharedWeights(directory)
    for version, seed in ((5, 5), (6, 6), (5, 50), (6, 60)):  # a learner that went back to a checkpoint
        manifests, buckets = publish(parameters(seed), version)
        assert shared.store(version, manifests, fetcher(buckets))
        assert not shared.store(version, manifests, fetcher(buckets))
        with shared.reading(version) as (path, table):
            assert same(contents(np.fromfile(path, np.uint8), table), parameters(seed))
    shared.close()


def test_a_damaged_bucket_leaves_no_version_behind_and_spoils_no_other(directory: Path) -> None:
    shared = SharedWeights(directory)
    manifests, buckets = publish(parameters(1), 1)
    shared.store(1, manifests, fetcher(buckets))
    manifests, buckets = publish(parameters(2), 2)
    good, buckets[0][0] = buckets[0][0], np.zeros_like(buckets[0][0])
    with pytest.raises(WeightsError, match="damaged"):
        shared.store(2, manifests, fetcher(buckets))
    with pytest.raises(WeightsError, match="store it first"), shared.reading(2):
        pass
    with shared.reading(1) as (path, table):
        assert same(contents(np.fromfile(path, np.uint8), table), parameters(1))
    buckets[0][0] = good
    assert shared.store(2, manifests, fetcher(buckets))
    shared.close()


def test_shared_memory_does_not_grow_over_50_versions(directory: Path) -> None:
    shared = SharedWeights(directory)
    used = []
    for version in range(50):
        manifests, buckets = publish(parameters(version), version)
        shared.store(version, manifests, fetcher(buckets))
        used.append(sum(f.stat().st_blocks for f in directory.iterdir()))
    assert used[2:] == [used[2]] * 48
    shared.close()


def _store(
    directory: Path, ready: "multiprocessing.synchronize.Barrier", results: "multiprocessing.Queue[bool]"
) -> None:
    shared = SharedWeights(directory)
    manifests, buckets = publish(parameters(1))
    ready.wait()
    results.put(shared.store(1, manifests, fetcher(buckets)))
    ready.wait()  # nobody leaves before both have stored
    shared.close()


def test_of_several_processes_that_store_a_version_one_assembles_it(directory: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    ready, results = spawn.Barrier(3), spawn.Queue()
    processes = [spawn.Process(target=_store, args=(directory, ready, results)) for _ in range(3)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    assert sorted(results.get() for _ in processes) == [False, False, True]
    assert not directory.exists()


def _die_in_the_middle(directory: Path) -> None:
    shared = SharedWeights(directory)
    manifests, buckets = publish(parameters(1), 1)
    shared.store(1, manifests, fetcher(buckets))
    manifests, buckets = publish(parameters(2), 2)

    def fetch(rank: int, bucket: int) -> Bytes:
        if (rank, bucket) == (1, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return buckets[rank][bucket]

    shared.store(2, manifests, fetch)


def test_a_writer_killed_in_the_middle_leaves_no_slot_that_looks_whole(directory: Path) -> None:
    shared = SharedWeights(directory)  # another worker of the node, so the directory lives on
    process = multiprocessing.get_context("spawn").Process(target=_die_in_the_middle, args=(directory,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(WeightsError, match=r"holds \[1\]"), shared.reading(2):
        pass
    manifests, buckets = publish(parameters(2), 2)
    assert shared.store(2, manifests, fetcher(buckets))  # the dead writer's locks are gone
    for version in (1, 2):
        with shared.reading(version) as (path, table):
            assert same(contents(np.fromfile(path, np.uint8), table), parameters(version))
    shared.close()


def test_whoever_starts_removes_what_dead_owners_left_and_nothing_else(directory: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_die_in_the_middle, args=(directory,))
    process.start()
    process.join()
    living = SharedWeights(directory.with_name("living"))
    foreign = directory.with_name("foreign")
    foreign.mkdir()
    assert not directory.exists()
    newcomer = SharedWeights(directory)
    with pytest.raises(WeightsError, match=r"holds \[\]"), newcomer.reading(1):
        pass
    assert living.directory.exists() and foreign.exists()
    newcomer.close()
    assert not directory.exists() and living.directory.exists()
    living.close()


def test_the_last_to_close_removes_the_directory(directory: Path) -> None:
    first, second = SharedWeights(directory), SharedWeights(directory)
    first.close()
    assert directory.exists()
    second.close()
    second.close()
    assert not directory.exists()


def test_weights_larger_than_the_free_shared_memory_are_an_error_not_a_crash(directory: Path) -> None:
    shared = SharedWeights(directory)
    manifests, buckets = publish(parameters(0), ranks=1)
    huge = 2**50  # elements; no tmpfs has room for them
    entry = replace(manifests[0].entries[0], name="huge", dtype="bfloat16", shape=(huge,), start=0, size=2 * huge)
    with pytest.raises(WeightsError, match="no room for"):
        shared.store(1, [replace(manifests[0], entries=(entry,))], fetcher(buckets))
    with pytest.raises(WeightsError), shared.reading(1):
        pass
    shared.close()

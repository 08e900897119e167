import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from numpy.typing import NDArray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from ray.exceptions import RayTaskError

from stepgrpo.pool import is_lost
from stepgrpo.types import WeightVersion
from stepgrpo.weights import (
    Fetch,
    Manifest,
    Piece,
    Publisher,
    SharedWeights,
    Table,
    WeightsError,
    assemble,
    layout,
    pack,
)
from tests.nodes import cluster_of
from tests.publishing import Node, Rank

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


# ---- what has changed, in the place of the whole


class Learner:
    """The ranks of a learner that publishes what has changed, and an object store."""

    def __init__(self, model: dict[str, Bytes], ranks: int = 2, bucket_bytes: int = 100, full_every: int = 100) -> None:
        self.model = {name: data.copy() for name, data in model.items()}
        self.ranks, self.version = ranks, 0
        self.store: list[Bytes] = []
        self.fetched: list[int] = []
        self.publishers = [
            Publisher(rank=r, bucket_bytes=bucket_bytes, put=self.put, full_every=full_every) for r in range(ranks)
        ]

    def put(self, data: Bytes) -> int:
        self.store.append(data.copy())
        return len(self.store) - 1

    def update(self, share: float) -> None:
        """Change each byte with this chance."""
        rng = np.random.default_rng(self.version)
        for data in self.model.values():
            data[rng.random(len(data)) < share] ^= 1

    def publish(self, share: float = 0.02) -> tuple[int, list[Manifest], Fetch]:
        """An update, and the next version: what ``SharedWeights.store`` takes."""
        self.update(share)
        self.version += 1
        published = [p.publish(self.version, pieces(self.model, r, self.ranks)) for r, p in enumerate(self.publishers)]

        def fetch(rank: int, number: int) -> Bytes:
            self.fetched.append(published[rank][1][number])
            return self.store[self.fetched[-1]]

        return self.version, [m for m, _ in published], fetch

    def fetches(self) -> int:
        """Objects fetched since the last call."""
        n = len(self.fetched)
        self.fetched.clear()
        return n

    def is_held(self, shared: SharedWeights) -> bool:
        with shared.reading(self.version) as (path, table):
            return same(contents(np.fromfile(path, np.uint8), table), self.model)


def chains(manifests: list[Manifest]) -> list[int]:
    """Objects of each bucket."""
    return [len(chain) for m in manifests for chain in m.chains]


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("bucket_bytes", [7, 100, 10_000])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 1.0])
def test_what_changed_leads_to_the_exact_parameters(
    directory: Path, ranks: int, bucket_bytes: int, share: float
) -> None:
    shared = SharedWeights(directory)
    learner = Learner(parameters(0), ranks, bucket_bytes)
    for _ in range(8):
        assert shared.store(*learner.publish(share))
        assert learner.is_held(shared)
    shared.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("changed", [[0], [1 << 19], [0, 255, 511, 768], [3, 3 + (1 << 16), 3 + (3 << 16), 1 << 19]])
def test_changes_far_apart_are_told_exactly(directory: Path, dtype: str, changed: list[int]) -> None:
    item = {"bfloat16": 2, "float32": 4, "float64": 8}[dtype]
    data = np.random.default_rng(0).integers(0, 256, item * ((1 << 19) + 1), np.uint8)
    put: list[Bytes] = []
    publisher = Publisher(rank=0, bucket_bytes=len(data), put=lambda d: put.append(d.copy()), full_every=9)
    shared = SharedWeights(directory)
    for version in range(1, 5):
        if version > 2:
            data.view(f"u{item}")[changed] += 1
        manifest, _ = publisher.publish(version, [Piece("w", dtype, (len(data) // item,), 0, data)])
        shared.store(version, [manifest], lambda _, number: put[number])
        with shared.reading(version) as (path, _):
            assert np.array_equal(np.fromfile(path, np.uint8, len(data)), data)
    assert [manifest.whole_bytes, len(manifest.chains[0])] == [0, 3], "version 2 changed nothing, and put nothing"
    assert manifest.difference_bytes == (item + 1) * len(changed) + 2 * ((1 << 19 >> 8) + 1)
    shared.close()


@pytest.mark.parametrize(("share", "most"), [(0.01, 0.02), (0.03, 0.05), (0.1, 0.155)])
def test_of_bfloat16_a_change_takes_three_bytes_and_little_more(share: float, most: float) -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, 1 << 21, np.uint8)
    publisher = Publisher(rank=0, bucket_bytes=1 << 20, put=np.copy, full_every=2)
    put = []
    for version in (1, 2, 3):
        manifest, _ = publisher.publish(version, [Piece("w", "bfloat16", (1 << 20,), 0, data)])
        put.append((manifest.whole_bytes, manifest.difference_bytes))
        data.view(np.uint16)[rng.random(1 << 20) < share] += 1
    assert put[0] == put[2] == (len(data), 0), "every second version is whole"
    assert put[1][0] == 0 < put[1][1] < most * len(data)


def test_where_most_has_changed_the_bucket_is_put_whole_and_the_others_are_not() -> None:
    learner = Learner(parameters(0), ranks=1, bucket_bytes=458)
    learner.publish()
    learner.model["up"] ^= 1
    learner.model["norm"][0] ^= 1
    _, [manifest], _ = learner.publish(0.0)
    assert manifest.sizes == (458, 198) and {e.name for e in manifest.entries if e.bucket} == {"up"}
    assert manifest.whole_bytes == 198 and 0 < manifest.difference_bytes < 20


def test_a_chain_is_begun_anew_every_n_versions_or_when_it_is_as_large_as_the_bucket() -> None:
    learner = Learner(parameters(0), full_every=4)
    lengths = [max(chains(learner.publish(0.002)[1])) for _ in range(9)]
    assert lengths[::4] == [1, 1, 1] and max(lengths) <= 4
    learner = Learner(parameters(0))
    longest = 0
    for _ in range(30):
        _, manifests, fetch = learner.publish(0.1)
        for m in manifests:
            objects = iter(range(sum(map(len, m.chains))))
            for size, chain in zip(m.sizes, m.chains, strict=True):
                whole, *differences = (len(fetch(m.rank, next(objects))) for _ in chain)
                assert whole == size and sum(differences) < size
                longest = max(longest, len(chain))
    assert 2 < longest < 30


def test_whoever_fell_behind_goes_on_from_what_it_has_and_a_newcomer_begins_with_the_whole(directory: Path) -> None:
    steady, behind, newcomer = (SharedWeights(directory.with_name(n)) for n in ("steady", "behind", "newcomer"))
    learner = Learner(parameters(0), bucket_bytes=10_000)
    for version in range(1, 8):
        published = learner.publish()
        assert chains(published[1]) == [version, version]
        steady.store(*published)
        # Its other file is two versions old, or, at the second version, a copy of the first.
        assert learner.fetches() == 2 * (1, 1, 2)[min(version, 3) - 1]
        if version in (1, 5):
            behind.store(*published)
        learner.fetches()
    behind.store(*published)
    assert learner.fetches() == 2 * 6 and learner.is_held(behind), "its older file holds version 1"
    newcomer.store(*published)
    assert learner.fetches() == 2 * 7 and learner.is_held(newcomer)
    for shared in (steady, behind, newcomer):
        shared.close()


def test_after_a_new_whole_the_other_file_copies_it_from_the_newer_one(directory: Path) -> None:
    shared = SharedWeights(directory)
    learner = Learner(parameters(0), bucket_bytes=10_000, full_every=4)
    counts = []
    for _ in range(9):
        shared.store(*learner.publish(0.05))
        assert learner.is_held(shared)
        counts.append(learner.fetches() // 2)
    assert counts == [1, 1, 2, 2, 1, 1, 2, 2, 1]
    shared.close()


def test_a_learner_that_begins_anew_publishes_the_whole_and_everyone_follows(directory: Path) -> None:
    """After a crash or with --resume, version numbers may come again, and the ranks may be others."""
    shared = SharedWeights(directory)
    first = Learner(parameters(0))
    for _ in range(5):
        shared.store(*first.publish())
    saved = {name: data.copy() for name, data in first.model.items()}
    shared.store(*first.publish())
    for ranks in (2, 3):
        again = Learner(saved, ranks)
        again.version = 5
        published = again.publish(0.05)
        assert set(chains(published[1])) == {1}
        for _ in range(3):
            assert shared.store(*published) and not shared.store(*published)
            assert again.is_held(shared)
            published = again.publish()
    shared.close()


def test_whoever_applied_to_another_base_refuses_and_fetches_everything(directory: Path) -> None:
    shared = SharedWeights(directory)
    learner = Learner(parameters(0), ranks=1, bucket_bytes=10_000)
    for _ in range(2):
        shared.store(*learner.publish())
    learner.fetches()
    for file in directory.glob("*.bin"):
        data = np.memmap(file, np.uint8)
        data[1] ^= 1
    assert shared.store(*learner.publish())
    assert learner.fetches() == 2 + 1 + 3, "in the older file, on a copy of the newer one, anew"
    assert learner.is_held(shared)
    shared.close()


@pytest.mark.parametrize("damage", ["position", "value", "short", "empty", "long"])
def test_a_damaged_difference_leaves_no_version_behind_and_spoils_no_other(directory: Path, damage: str) -> None:
    shared = SharedWeights(directory)
    learner = Learner(parameters(0), ranks=1, bucket_bytes=10_000)
    shared.store(*learner.publish())
    shared.store(*learner.publish())
    version_2 = {name: data.copy() for name, data in learner.model.items()}
    published = learner.publish()
    good = learner.store[-1]
    bad = {"short": good[:-1], "empty": good[:0], "long": np.resize(good, 10_000)}.get(damage, good.copy())
    if damage in ("position", "value"):
        bad[-1 if damage == "position" else 0] ^= 0x80
    learner.store[-1] = bad
    with pytest.raises(WeightsError, match="bucket 0 of rank 0, version 3, arrived damaged"):
        shared.store(*published)
    with pytest.raises(WeightsError, match=r"holds \[2\]"), shared.reading(3):
        pass
    with shared.reading(2) as (path, table):
        assert same(contents(np.fromfile(path, np.uint8), table), version_2)
    learner.store[-1] = good
    assert shared.store(*published) and learner.is_held(shared)
    shared.close()


def test_after_a_failed_put_the_next_version_does_not_build_on_what_nobody_got(directory: Path) -> None:
    shared = SharedWeights(directory)
    learner = Learner(parameters(0))
    shared.store(*learner.publish())
    room = 3

    def put(data: Bytes) -> int:
        nonlocal room
        if room == 0:
            raise MemoryError
        room -= 1
        return learner.put(data)

    for publisher in learner.publishers:
        publisher._put = put
    with pytest.raises(MemoryError):
        learner.publish(0.1)
    room = 1_000
    assert shared.store(*learner.publish(0.1)) and learner.is_held(shared)
    shared.close()


def test_versions_through_ray_reach_all_workers_exactly_and_leave_the_store(directory: Path) -> None:
    """Two workers of one node, one of which is replaced, and one that falls behind; at last the ranks' node is lost."""
    with cluster_of(num_cpus=1, resources={"rollout": 1}, object_store_memory=100 << 20) as nodes:
        learner = nodes.add_node(num_cpus=1, resources={"learner": 1}, object_store_memory=100 << 20)
        ray.init(address=nodes.address, log_to_driver=False)
        try:
            _versions_through_ray(directory, lambda: nodes.remove_node(learner, allow_graceful=False))
        finally:
            ray.shutdown()


def _versions_through_ray(directory: Path, lose_ranks: Callable[[], None]) -> None:
    node_actor = ray.remote(num_cpus=0, resources={"rollout": 0.2})(Node)
    one, two, other = (node_actor.remote(directory.with_name(n)) for n in ("node", "node", "other"))

    def learner(**where: Any) -> list[Any]:
        return [ray.remote(num_cpus=0, **where)(Rank).remote(r, full_every=100) for r in range(2)]

    def publish(version: int) -> tuple[WeightVersion, list[str]]:
        parts = ray.get([r.publish.remote(version) for r in ranks])
        weights = WeightVersion(version, tuple(m for m, _ in parts), tuple(tuple(refs) for _, refs in parts))
        return weights, ray.get([r.digest.remote() for r in ranks])

    def load(weights: WeightVersion, expected: list[str], *workers: Any) -> list[bool]:
        """Which of them assembled it."""
        loaded = ray.get([w.load.remote(weights) for w in workers])
        assert all(digests == expected for _, digests in loaded)
        return [stored for stored, _ in loaded]

    ranks = learner(resources={"learner": 0.5})
    used = []
    for version in range(1, 31):
        weights, expected = publish(version)
        assert sorted(load(weights, expected, one, two)) == [False, True]
        if version % 7 == 1:
            assert load(weights, expected, other) == [True]
        if version == 12:
            ray.kill(one)
            one = node_actor.remote(directory.with_name("node"))
        state = get_state_from_address(ray.get_runtime_context().gcs_address)
        store = get_memory_info_reply(state).store_stats.object_store_bytes_used
        used.append(store / weights.num_bytes / 2)  # on two nodes
    assert weights.whole_bytes == 0 < weights.difference_bytes < 0.1 * weights.num_bytes
    assert max(used) < 3 and max(used[20:]) < max(used[:20]) + 0.3, used

    weights, _ = publish(31)
    lose_ranks()
    for worker in (two, other):
        with pytest.raises(RayTaskError) as error:
            load(weights, [], worker)
        assert is_lost(error.value)
    assert ray.get(one.held.remote(30)) == expected, "nobody ends up with half a version"

    ranks = learner()
    weights, expected = publish(31)  # other weights under the same number
    assert weights.whole_bytes == weights.num_bytes
    assert sorted(load(weights, expected, one, two)) == [False, True] and load(weights, expected, other) == [True]
    ray.get([w.close.remote() for w in (one, two, other)])
    assert list(directory.parent.iterdir()) == []


def _die_while_changing(directory: Path) -> None:
    shared = SharedWeights(directory)
    learner = Learner(parameters(0))
    shared.store(*learner.publish())
    shared.store(*learner.publish())
    version, manifests, fetch = learner.publish(0.1)

    def fetch_or_die(rank: int, number: int) -> Bytes:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return fetch(rank, number)

    shared.store(version, manifests, fetch_or_die)


def test_a_worker_killed_while_it_changes_a_file_leaves_none_that_looks_whole(directory: Path) -> None:
    shared = SharedWeights(directory)
    process = multiprocessing.get_context("spawn").Process(target=_die_while_changing, args=(directory,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(WeightsError, match=r"holds \[2\]"), shared.reading(3):
        pass
    learner = Learner(parameters(0))
    for share in (0.02, 0.02, 0.1):
        published = learner.publish(share)
    learner.fetches()
    assert shared.store(*published) and learner.is_held(shared)
    assert learner.fetches() < sum(chains(published[1])), "version 2 is still there to go on from"
    shared.close()

"""From a learner's new weights to a decoding engine: in shards through the object store, against the usual ways.

    python bench/weights.py [--quick] [--repetitions 4] [--out bench/results/weights.json]

    shards     ours: every rank packs its ZeRO-3 pieces into flat buckets, with checksums, in Ray's object store; a node
               fetches and verifies them and puts whole parameters together in shared memory
    gathered   the ranks gather whole parameters (gloo, one collective each); rank 0 writes them as a safetensors file
               into shared memory
    one by one the loop of OpenRLHF, written anew: rank 0 takes part in gathering a parameter, puts it into the object
               store, calls every worker with it, which copies it, waits, and takes the next

**Publishing** has no engine in it: it ends with whole parameters in memory from which an engine of the node can load.
Workers share a node; of ours and of `gathered` one puts the file there for all, one by one each gets its own.
`memcpy` is one thread's `numpy.copyto` of 256 MB between pages that exist, measured beside each repetition. The share
counts the three copies that ours makes: piece to bucket, bucket to object store, object store to file.

**What has changed** compares ours with itself: all of it, or differences, for a share of changed bfloat16 elements.
Within one machine nothing is won by sending less; from the seconds follows the network at which it begins to pay.

**With an engine** requests decode all the while; `paused` is the time in which nothing is decoded, `gap` the longest
that one of them waited for a token. That both ways loaded the same weights is checked in float32 (in bfloat16 another
batch rounds otherwise).

Not in the figures: a file in shared memory reaches one node only and nothing guards it, and ranks that gather cannot
train meanwhile. Ways take turns within each repetition; of the largest model, for want of memory, one comes after the
other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from itertools import pairwise
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray
from figures import machine, markdown, spread
from models import save_qwen3

from stepgrpo.actors.engine import CPU_ENV, VllmEngine
from stepgrpo.actors.rollout import Sampling
from stepgrpo.config import ClusterConfig, EngineConfig, LearnerConfig, ModelConfig
from stepgrpo.launch import session
from stepgrpo.weights import Manifest, Piece, Publisher, SharedWeights

ROOT = Path(__file__).parents[1]
MINIATURE = ROOT / "examples" / "miniature" / "model"
BUCKET = LearnerConfig().bucket_mb << 20
RANKS = (1, 2, 4)
WORKERS = (1, 2, 4)
CHANGED = (0.01, 0.03, 0.1)
COPY = 256 << 20
ENDLESS = 1_000
"""`full_every` of a chain that only its size ends."""
NUM_RANKS = 2
NUM_REQUESTS = 8
MAX_LEN = 512
PROMPT = [1, *range(3, 23)]
WARM_UP = 2
"""Repetitions that fill both slots of shared memory for the first time."""

Shapes = dict[str, tuple[int, ...]]


class Rank:
    """What a learner rank holds of the weights under ZeRO-3: one flat piece of every parameter, the last one padded."""

    def __init__(self, rank: int, num_ranks: int, port: int) -> None:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks)
        self.rank = rank
        self.groups = {n: dist.new_group(list(range(n))) for n in range(1, num_ranks + 1)}
        self.whole: dict[str, torch.Tensor] = {}

    def make(self, shapes: Shapes, num_ranks: int) -> None:
        """Hold a part of a model of bfloat16 numbers, among ``num_ranks``."""
        import torch

        self._begin(shapes, num_ranks, tied=False)
        noise = np.random.default_rng(self.rank)
        for name, shape in shapes.items() if self.rank < num_ranks else ():
            bits = noise.integers(0, 1 << 14, -(-prod(shape) // num_ranks), np.uint16)  # no NaN among them
            self.pieces[name] = torch.from_numpy(bits).view(torch.bfloat16)

    def load(self, model: str, num_ranks: int) -> None:
        """Hold a part of a checkpoint, among ``num_ranks``."""
        import torch
        from safetensors.torch import load_file

        tensors = load_file(f"{model}/model.safetensors")
        tied = json.loads(Path(model, "config.json").read_text())["tie_word_embeddings"]
        self._begin({name: tuple(t.shape) for name, t in tensors.items()}, num_ranks, tied)
        for name, tensor in tensors.items() if self.rank < num_ranks else ():
            size = -(-tensor.numel() // num_ranks)
            padded = torch.zeros(size * num_ranks, dtype=tensor.dtype)
            padded[: tensor.numel()] = tensor.flatten()
            self.pieces[name] = padded[self.rank * size : (self.rank + 1) * size].clone()

    def _begin(self, shapes: Shapes, num_ranks: int, tied: bool) -> None:
        import torch

        self.shapes, self.num_ranks, self.tied = shapes, num_ranks, tied
        self.pieces: dict[str, torch.Tensor] = {}
        self.publishers = {
            full_every: Publisher(rank=self.rank, bucket_bytes=BUCKET, put=ray.put, full_every=full_every)
            for full_every in (1, ENDLESS)
        }
        self.noise, self.torch_noise = np.random.default_rng(self.rank), torch.Generator().manual_seed(self.rank)

    def change(self) -> None:
        """Other weights, as after an update."""
        import torch

        for piece in self.pieces.values():
            piece.mul_(1 + 0.1 * torch.randn(piece.shape, generator=self.torch_noise, dtype=piece.dtype))

    def change_some(self, share: float) -> None:
        """Change so many of the bfloat16 numbers by the least they can."""
        import torch

        for piece in self.pieces.values():
            bits = piece.view(torch.uint16).numpy()
            chosen = self.noise.random(len(bits), np.float32) < share
            bits[chosen] ^= 1

    def publish(self, version: int, full_every: int = 1) -> tuple[Manifest, list[Any]]:
        return self.publishers[full_every].publish(version, self._own())

    def _own(self) -> Iterator[Piece]:
        import torch

        for name, piece in self.pieces.items():
            shape, start = self.shapes[name], self.rank * len(piece)
            own = piece[: max(0, prod(shape) - start)]
            yield Piece(name, str(own.dtype).removeprefix("torch."), shape, start, own.view(torch.uint8).numpy())

    def gather(self) -> None:
        for name, full in self._gathered():
            self.whole[name] = full

    def _gathered(self) -> Iterator[tuple[str, Any]]:
        """Whole parameters, on rank 0 alone."""
        import torch
        import torch.distributed as dist

        for name, piece in self.pieces.items():
            full = torch.empty(len(piece) * self.num_ranks, dtype=piece.dtype)
            dist.all_gather_into_tensor(  # gloo knows no bfloat16
                full.view(torch.uint8), piece.view(torch.uint8), group=self.groups[self.num_ranks]
            )
            if self.rank == 0:
                yield name, full[: prod(self.shapes[name])].view(self.shapes[name])

    def write(self, path: str) -> None:
        from safetensors.torch import save_file

        if self.tied:  # on CPU vLLM keeps a packed copy of a tied head, which only its own name renews
            self.whole["lm_head.weight"] = self.whole["model.embed_tokens.weight"].clone()
        save_file(self.whole, path)
        self.whole = {}

    def one_by_one(self, workers: Sequence[Any]) -> None:
        import torch

        for name, full in self._gathered():
            ref = ray.put(full.flatten().view(torch.uint8).numpy())
            ray.get([worker.receive.remote(name, ref) for worker in workers])


class Worker:
    """The receiving end of a rollout worker, without its engine."""

    def __init__(self) -> None:
        self.shared: dict[int, SharedWeights] = {}
        self.received: dict[str, Any] = {}
        self.copied = [np.ones(COPY, np.uint8) for _ in range(2)]

    def join(self, directories: dict[int, Path]) -> None:
        self.shared = {full_every: SharedWeights(path) for full_every, path in directories.items()}

    def store(self, full_every: int, version: int, manifests: Sequence[Manifest], refs: Sequence[Sequence[Any]]) -> int:
        """Returns the bytes of the file, mapped."""
        shared = self.shared[full_every]
        shared.store(version, manifests, lambda rank, number: ray.get(refs[rank][number]))
        with shared.reading(version) as (path, _):
            return self.map(path)

    def map(self, path: Path) -> int:
        with open(path, "rb") as file:
            return len(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def hold(self, shapes: Shapes) -> None:
        """Memory for what ``receive`` gets, as an engine has it."""
        self.received = {name: np.ones(2 * prod(shape), np.uint8) for name, shape in shapes.items()}

    def receive(self, name: str, data: Any) -> None:
        np.copyto(self.received[name], data)

    def memcpy(self) -> float:
        """Bytes per second, of the median of three."""
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            np.copyto(*self.copied)
            seconds.append(time.perf_counter() - start)
        return COPY / median(seconds)

    def leave(self) -> None:
        for shared in self.shared.values():
            shared.close()
        self.shared, self.received = {}, {}


# ---- publishing


@dataclass(frozen=True, slots=True)
class Case:
    mb: int
    ranks: int = 2
    workers: int = 1

    def __str__(self) -> str:
        return f"a model of {self.mb:,} MB, ranks: {self.ranks}, workers: {self.workers}"


@dataclass(frozen=True, slots=True)
class Cast:
    """The actors that take part."""

    ranks: Sequence[Any]
    workers: Sequence[Any]
    directory: Path


@dataclass(frozen=True, slots=True)
class Taken:
    """Seconds of one update."""

    publish: float
    store: float
    sent: int = 0
    """Bytes that were put into the object store."""

    @property
    def total(self) -> float:
        return self.publish + self.store


Way = Callable[[Cast, int], Taken]


def shards(cast: Cast, version: int, full_every: int = 1) -> Taken:
    start = time.perf_counter()
    published = ray.get([r.publish.remote(version, full_every) for r in cast.ranks])
    middle = time.perf_counter()
    manifests, refs = [m for m, _ in published], [r for _, r in published]
    ray.get([w.store.remote(full_every, version, manifests, refs) for w in cast.workers])
    end = time.perf_counter()
    return Taken(middle - start, end - middle, sum(m.whole_bytes + m.difference_bytes for m in manifests))


def gathered(cast: Cast, version: int) -> Taken:
    # A new file each time: one that is overwritten takes longer, and would change under a reader.
    path = cast.directory / f"gathered-{version}"
    start = time.perf_counter()
    ray.get([r.gather.remote() for r in cast.ranks])
    middle = time.perf_counter()
    ray.get(cast.ranks[0].write.remote(str(path)))
    ray.get([w.map.remote(path) for w in cast.workers])
    end = time.perf_counter()
    path.unlink()
    return Taken(middle - start, end - middle)


def one_by_one(cast: Cast, version: int) -> Taken:
    start = time.perf_counter()
    ray.get([r.one_by_one.remote(cast.workers) for r in cast.ranks])
    return Taken(time.perf_counter() - start, 0.0)


WAYS: dict[str, Way] = {"shards": shards, "gathered": gathered, "one by one": one_by_one}


def shapes_of(mb: int) -> Shapes:
    """Parameters of a Qwen3-like model of so many megabytes in bfloat16."""
    layers, vocabulary = (8, 8_000) if mb < 200 else (28, 32_000)
    # 12 h^2 in a layer, and the embedding.
    hidden = next(h for h in range(64, 1 << 14, 16) if 2 * (12 * layers * h * h + vocabulary * h) >= 1e6 * mb)
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        of_layer = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden // 2, hidden),
            "self_attn.v_proj": (hidden // 2, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (3 * hidden, hidden),
            "mlp.up_proj": (3 * hidden, hidden),
            "mlp.down_proj": (hidden, 3 * hidden),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_norm": (64,),
            "self_attn.k_norm": (64,),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in of_layer.items()}
    return shapes


def size_of(shapes: Shapes) -> int:
    return 2 * sum(map(prod, shapes.values()))


@contextmanager
def joined(cast: Cast, shapes: Shapes, full_everys: Sequence[int]) -> Iterator[None]:
    ray.get([r.make.remote(shapes, len(cast.ranks)) for r in cast.ranks])
    directories = {f: cast.directory / f"every-{f}" for f in full_everys}
    ray.get([w.join.remote(directories) for w in cast.workers])
    yield
    ray.get([w.leave.remote() for w in cast.workers])
    ray.get([r.make.remote({}, 1) for r in cast.ranks])


def publishing(case: Case, cast: Cast, repetitions: int, in_turns: bool) -> dict[str, Any]:
    """Every way of one case. ``in_turns``: within each repetition, else one way after the other."""
    shapes = shapes_of(case.mb)
    done: dict[str, list[Taken]] = {name: [] for name in WAYS}
    memcpy: dict[str, list[float]] = {name: [] for name in WAYS}
    version = 0
    for names in [list(WAYS)] if in_turns else [[name] for name in WAYS]:
        with joined(cast, shapes, [1]):
            if "one by one" in names:
                ray.get([w.hold.remote(shapes) for w in cast.workers])
            warm_up = WARM_UP if "shards" in names else 1
            for r in range(warm_up + repetitions):
                version += 1
                ray.get([rank.change_some.remote(0.01) for rank in cast.ranks])
                for name in names[:: 1 if r % 2 else -1]:
                    speed = ray.get(cast.workers[0].memcpy.remote())
                    taken = WAYS[name](cast, version)
                    if r >= warm_up:
                        done[name].append(taken)
                        memcpy[name].append(speed)
    size = size_of(shapes)
    return {
        **asdict(case),
        "bytes": size,
        "parameters": len(shapes),
        "in_turns": in_turns,
        "memcpy": memcpy,
        "seconds": {n: [asdict(t) for t in ts] for n, ts in done.items()},
        "share_of_memcpy": [3 * size / t.total / m for t, m in zip(done["shards"], memcpy["shards"], strict=True)],
        "ratio": {n: ratios([t.total for t in done[n]], [t.total for t in done["shards"]]) for n in WAYS},
    }


def ratios(slower: Sequence[float], faster: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(slower, faster, strict=True)]


def show_publishing(results: Sequence[dict[str, Any]]) -> None:
    rows = []
    for r in results:
        seconds = {n: [t["publish"] + t["store"] for t in ts] for n, ts in r["seconds"].items()}
        ours = r["seconds"]["shards"]
        rows.append(
            [
                f"{r['bytes'] / 1e6:,.0f} MB",
                f"{r['ranks']}",
                f"{r['workers']}",
                f"{median(t['publish'] for t in ours):.2f} + {median(t['store'] for t in ours):.2f}",
                spread(seconds["shards"]),
                spread(r["share_of_memcpy"]),
                *(f"{median(seconds[n]):.2f}" for n in ("gathered", "one by one")),
                *(spread(r["ratio"][n], 1) for n in ("gathered", "one by one")),
            ]
        )
    header = ["", "ranks", "workers", "publish + store", "shards, s", "of memcpy", "gathered, s", "one by one, s"]
    print(markdown([*header, "gathered / shards", "one by one / shards"], rows), flush=True)


# ---- what has changed


def changes(share: float, case: Case, cast: Cast, repetitions: int) -> dict[str, Any]:
    """All of it against what has changed, of which the first version is whole."""
    shapes = shapes_of(case.mb)
    done: dict[int, list[Taken]] = {1: [], ENDLESS: []}
    with joined(cast, shapes, list(done)):
        for version in range(1, 2 + WARM_UP + repetitions):
            ray.get([rank.change_some.remote(share) for rank in cast.ranks])
            for full_every in list(done)[:: 1 if version % 2 else -1]:
                taken = shards(cast, version, full_every)
                if version > 1 + WARM_UP:
                    done[full_every].append(taken)
    size = size_of(shapes)
    return {
        "share": share,
        **asdict(case),
        "bytes": size,
        "seconds": {"whole": [asdict(t) for t in done[1]], "differences": [asdict(t) for t in done[ENDLESS]]},
        "sent": [t.sent / size for t in done[ENDLESS]],
        "ratio": ratios([t.total for t in done[1]], [t.total for t in done[ENDLESS]]),
    }


def show_changes(results: Sequence[dict[str, Any]]) -> None:
    rows = []
    for r in results:
        of: dict[str, list[Taken]] = {n: [Taken(**t) for t in ts] for n, ts in r["seconds"].items()}
        rows.append(
            [
                f"{r['share']:.0%}",
                f"{median(t.sent for t in of['differences']) / 1e6:,.1f} MB",
                f"{median(r['sent']):.1%}",
                *(
                    f"{median(t.publish for t in ts):.2f} + {median(t.store for t in ts):.2f} = "
                    + spread([t.total for t in ts])
                    for ts in of.values()
                ),
                spread(r["ratio"]),
                f"{even(r):,.0f}",
            ]
        )
    header = ["changed", "sent", "of all", "whole: publish + store, s", "differences: publish + store, s"]
    print(markdown([*header, "whole / differences", "even at, Gbit/s"], rows), flush=True)


def even(result: dict[str, Any]) -> float:
    """Bandwidth between learner and node at which the bytes that are not sent take as long as finding them."""
    whole, differences = (median(t["publish"] + t["store"] for t in ts) for ts in result["seconds"].values())
    spared = result["bytes"] * (1 - median(result["sent"]))
    return 8e-9 * spared / (differences - whole) if differences > whole else float("inf")


# ---- with an engine


@dataclass(frozen=True, slots=True)
class Seconds:
    publish: float
    store: float
    paused: float
    gap: float = 0.0
    """Longest wait of a request for a token, from the beginning until all have one after the pause."""

    @property
    def total(self) -> float:
        return self.publish + self.store + self.paused

    @classmethod
    def between(cls, *times: float) -> Seconds:
        return cls(*(b - a for a, b in pairwise(times)))


class Shards:
    def __init__(self, ranks: Sequence[Any], engine: VllmEngine, directory: Path) -> None:
        self._ranks, self._engine = ranks, engine
        self._shared = SharedWeights(directory / "weights")
        self._version = 0

    async def update(self) -> Seconds:
        self._version += 1
        start = time.perf_counter()
        published = await asyncio.gather(*(rank.publish.remote(self._version) for rank in self._ranks))
        packed = time.perf_counter()
        manifests, refs = [m for m, _ in published], [r for _, r in published]
        await asyncio.to_thread(
            self._shared.store, self._version, manifests, lambda rank, number: ray.get(refs[rank][number])
        )
        stored = time.perf_counter()
        with self._shared.reading(self._version) as (path, places):
            paused = await self._engine.load(self._version, path, places)
        return Seconds(packed - start, stored - packed, paused)

    def close(self) -> None:
        self._shared.close()


class Gathered:
    def __init__(self, ranks: Sequence[Any], engine: VllmEngine, directory: Path) -> None:
        self._ranks, self._engine = ranks, engine
        self._parent = directory

    async def update(self) -> Seconds:
        llm: Any = self._engine._llm
        # A new file each time: one that is overwritten takes longer, and would change under a reader.
        with tempfile.TemporaryDirectory(dir=self._parent) as directory:
            start = time.perf_counter()
            await asyncio.gather(*(rank.gather.remote() for rank in self._ranks))
            gathered = time.perf_counter()
            await self._ranks[0].write.remote(f"{directory}/model.safetensors")
            written = time.perf_counter()
            await llm.pause_generation(mode="keep", clear_cache=True)
            await llm.collective_rpc("reload_weights", kwargs={"weights_path": directory})
            await llm.resume_generation()
            return Seconds.between(start, gathered, written, time.perf_counter())


class Traffic:
    """Requests that decode without end."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine
        self._last = [0.0] * NUM_REQUESTS
        self._longest = 0.0
        self._token = asyncio.Event()

    async def request(self, index: int) -> None:
        seed = index
        while True:
            async with aclosing(self._engine.generate(PROMPT, sampling(MAX_LEN - len(PROMPT), seed))) as chunks:
                async for _ in chunks:
                    now = time.perf_counter()
                    self._longest = max(self._longest, now - (self._last[index] or now))
                    self._last[index] = now
                    self._token.set()
            seed += NUM_REQUESTS

    async def gap(self) -> float:
        """Wait until every request has got another token; the longest wait for one since the last call."""
        start = time.perf_counter()
        while min(self._last) < start:
            self._token.clear()
            await self._token.wait()
        longest, self._longest = self._longest, 0.0
        return longest


@asynccontextmanager
async def traffic(engine: VllmEngine) -> AsyncIterator[Traffic]:
    running = Traffic(engine)
    tasks = [asyncio.create_task(running.request(i)) for i in range(NUM_REQUESTS)]
    try:
        yield running
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def sampling(max_tokens: int, seed: int | None = None) -> Sampling:
    """Greedy without a seed."""
    temperature = 0.0 if seed is None else 1.0
    return Sampling(max_tokens, temperature, top_p=1.0, seed=seed, stop_token_ids=(), priority=0)


async def greedy(engine: VllmEngine) -> list[int]:
    async with aclosing(engine.generate(PROMPT, sampling(16))) as chunks:
        return [i async for chunk in chunks for i in chunk.token_ids]


def make_model(directory: Path) -> Path:
    """A random Qwen3 of about 100 million parameters, in bfloat16."""
    return save_qwen3(
        directory / "model",
        dtype="bfloat16",
        vocab_size=16384,
        hidden_size=768,
        num_hidden_layers=14,
        num_attention_heads=12,
        intermediate_size=2048,
        max_position_embeddings=MAX_LEN,
    )


async def compare(
    path: Path, dtype: Any, repetitions: int, ranks: Sequence[Any], directory: Path
) -> dict[str, list[Seconds]]:
    await asyncio.gather(*(rank.load.remote(str(path), len(ranks)) for rank in ranks))
    engine = VllmEngine(
        path,
        ModelConfig(path=str(path), dtype=dtype),
        EngineConfig(kv_cache_mb=256, max_num_seqs=16, stream_interval=1),
        device="cpu",
        max_model_len=MAX_LEN,
    )
    async with AsyncExitStack() as stack:
        stack.callback(engine.close)
        ours = Shards(ranks, engine, directory)
        stack.callback(ours.close)
        ways: dict[str, Callable[[], Awaitable[Seconds]]] = {
            "shards": ours.update,
            "gathered": Gathered(ranks, engine, directory).update,
        }
        done: dict[str, list[Seconds]] = {name: [] for name in ways}
        running = await stack.enter_async_context(traffic(engine))
        for r in range(WARM_UP + repetitions):
            await asyncio.gather(*(rank.change.remote() for rank in ranks))
            outputs = []
            for name in list(ways)[:: 1 if r % 2 else -1]:
                await running.gap()
                parts = await ways[name]()
                seconds = Seconds(parts.publish, parts.store, parts.paused, await running.gap())
                outputs.append(await greedy(engine))
                if r >= WARM_UP:
                    done[name].append(seconds)
            if dtype == "float32":
                assert outputs[0] == outputs[1], "the two ways loaded different weights"
    await asyncio.gather(*(rank.make.remote({}, 1) for rank in ranks))
    return done


def show_engine(results: Sequence[dict[str, Any]]) -> None:
    rows = []
    for r in results:
        done = {name: [Seconds(**s) for s in ss] for name, ss in r["seconds"].items()}
        for name, seconds in done.items():
            rows.append([r["what"], name, *(spread([1000 * f(s) for s in seconds], 0) for f in PARTS.values())])
        pairs = list(zip(done["gathered"], done["shards"], strict=True))
        rows.append(["", "gathered / shards", *(spread([f(a) / f(b) for a, b in pairs], 1) for f in PARTS.values())])
    print(markdown(["", "milliseconds", *PARTS], rows), flush=True)


PARTS: dict[str, Callable[[Seconds], float]] = {
    "publish": lambda s: s.publish,
    "store": lambda s: s.store,
    "paused": lambda s: s.paused,
    "total": lambda s: s.total,
    "gap": lambda s: s.gap,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest model of each kind")
    parser.add_argument("--repetitions", type=int, default=4)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "weights.json")
    args = parser.parse_args()
    os.environ.update(CPU_ENV)
    os.environ |= {
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",  # by default Ray's workers yield to the engine, which is none of them here
        "DS_ACCELERATOR": "cpu",  # transformers imports deepspeed, which says aloud what it found
    }
    record: dict[str, Any] = {"machine": machine(), "date": date.today().isoformat()}
    print(record["machine"])
    big, largest = (50, 50) if args.quick else (500, 2_000)
    cases = [Case(50), *(Case(big, ranks=n) for n in RANKS), *(Case(big, workers=n) for n in WORKERS[1:])]
    with (
        session(ClusterConfig(device="cpu", object_store_mb=768 if args.quick else 3_000), []),
        tempfile.TemporaryDirectory(prefix="stepgrpo-bench-", dir="/dev/shm") as scratch,
    ):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        ranks = [ray.remote(num_cpus=0)(Rank).remote(i, max(RANKS), port) for i in range(max(RANKS))]
        workers = [ray.remote(num_cpus=0)(Worker).remote() for _ in range(max(WORKERS))]

        def cast(case: Case) -> Cast:
            return Cast(ranks[: case.ranks], workers[: case.workers], Path(scratch))

        print(f"\n## Publishing: {args.repetitions} repetitions, median (lowest to highest)\n")
        record["publishing"] = [publishing(case, cast(case), args.repetitions, True) for case in cases]
        if not args.quick:
            case = Case(largest)
            record["publishing"].append(publishing(case, cast(case), min(args.repetitions, 3), False))
        show_publishing(record["publishing"])

        case = Case(big)
        print(f"\n## What has changed: {case}\n")
        record["changes"] = [changes(share, case, cast(case), min(args.repetitions, 4)) for share in CHANGED]
        show_changes(record["changes"])

        print(f"\n## With an engine: {NUM_RANKS} ranks, {NUM_REQUESTS} requests in flight\n")
        record["engine"] = []
        models: list[tuple[str, Path, str]] = [("1.3 MB, float32", MINIATURE, "float32")]
        if not args.quick:
            models.append(("201 MB, bfloat16", make_model(Path(scratch)), "bfloat16"))
        for what, path, dtype in models:
            with tempfile.TemporaryDirectory(dir=scratch) as directory:
                done = asyncio.run(compare(path, dtype, args.repetitions, ranks[:NUM_RANKS], Path(directory)))
            record["engine"].append({"what": what, "seconds": {n: [asdict(s) for s in ss] for n, ss in done.items()}})
        show_engine(record["engine"])
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

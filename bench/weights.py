"""New weights into a decoding engine: through the object store, against a checkpoint file in shared memory.

    python bench/weights.py [--repetitions 7]

    ours        publish  two ranks pack their ZeRO-3 pieces into flat buckets, with checksums, in Ray's object store
                store    the worker fetches and verifies them and assembles the parameters in shared memory
                paused   the engine pauses, loads that file, and goes on with its requests
    checkpoint  publish  two ranks gather whole parameters (gloo, one collective each)
                store    rank 0 writes them as a safetensors file into /dev/shm
                paused   the engine pauses, vLLM's `reload_weights` reads that file, it goes on

Both end with the same weights and forget the KV cache of the old ones; that the weights are the same is checked in
float32 (in bfloat16 another batch rounds otherwise). Requests decode all the while; `gap` is the longest time one of
them waited for a token. Not in the figures: a file in shared memory reaches one node only and nothing guards it, and
ranks that gather cannot train meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
from figures import machine, spread, table

from stepgrpo.actors.engine import CPU_ENV, VllmEngine
from stepgrpo.actors.rollout import Sampling
from stepgrpo.config import ClusterConfig, EngineConfig, LearnerConfig, ModelConfig
from stepgrpo.launch import session
from stepgrpo.weights import Manifest, Piece, SharedWeights, pack

ROOT = Path(__file__).parents[1]
MINIATURE = ROOT / "examples" / "miniature" / "model"
NUM_RANKS = 2
NUM_REQUESTS = 8
MAX_LEN = 512
PROMPT = [1, *range(3, 23)]
WARM_UP = 2
"""Repetitions that fill both slots of shared memory for the first time."""


class Rank:
    """What a learner rank holds of the weights under ZeRO-3: one flat piece of every parameter, the last one padded."""

    def __init__(self, rank: int, model: str, port: int) -> None:
        import torch
        import torch.distributed as dist
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=NUM_RANKS)
        self.rank = rank
        self.noise = torch.Generator().manual_seed(rank)
        self.whole: dict[str, torch.Tensor] = {}
        self.pieces: dict[str, torch.Tensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        policy = AutoModelForCausalLM.from_pretrained(model)
        self.tied = policy.config.tie_word_embeddings
        for name, param in policy.named_parameters():
            size = -(-param.numel() // NUM_RANKS)
            padded = torch.zeros(size * NUM_RANKS, dtype=param.dtype)
            padded[: param.numel()] = param.detach().flatten()
            self.pieces[name] = padded[rank * size : (rank + 1) * size].clone()
            self.shapes[name] = tuple(param.shape)

    def change(self) -> None:
        """Other weights, as after an update."""
        import torch

        for piece in self.pieces.values():
            piece.mul_(1 + 0.1 * torch.randn(piece.shape, generator=self.noise, dtype=piece.dtype))

    def publish(self, version: int) -> tuple[Manifest, list[Any]]:
        size = LearnerConfig().bucket_mb << 20
        return pack(self._own(), version=version, rank=self.rank, bucket_bytes=size, put=ray.put)

    def _own(self) -> Iterator[Piece]:
        import torch

        for name, piece in self.pieces.items():
            shape, start = self.shapes[name], self.rank * len(piece)
            own = piece[: max(0, torch.Size(shape).numel() - start)]
            yield Piece(name, str(own.dtype).removeprefix("torch."), shape, start, own.view(torch.uint8).numpy())

    def gather(self) -> None:
        import torch
        import torch.distributed as dist

        for name, piece in self.pieces.items():
            full = torch.empty(len(piece) * NUM_RANKS, dtype=piece.dtype)
            dist.all_gather_into_tensor(full.view(torch.uint8), piece.view(torch.uint8))  # gloo knows no bfloat16
            if self.rank == 0:
                shape = torch.Size(self.shapes[name])
                self.whole[name] = full[: shape.numel()].view(shape)

    def write(self, path: str) -> None:
        from safetensors.torch import save_file

        if self.tied:  # on CPU vLLM keeps a packed copy of a tied head, which only its own name renews
            self.whole["lm_head.weight"] = self.whole["model.embed_tokens.weight"].clone()
        save_file(self.whole, path)
        self.whole = {}


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


class ObjectStore:
    def __init__(self, ranks: Sequence[Any], engine: VllmEngine, directory: Path) -> None:
        self._ranks, self._engine = ranks, engine
        self._shared = SharedWeights(directory / "weights")
        self._version = 0

    async def update(self) -> Seconds:
        self._version += 1
        start = time.perf_counter()
        published = await asyncio.gather(*(rank.publish.remote(self._version) for rank in self._ranks))
        packed = time.perf_counter()
        manifests = [manifest for manifest, _ in published]
        buckets = [refs for _, refs in published]
        await asyncio.to_thread(
            self._shared.store, self._version, manifests, lambda rank, bucket: ray.get(buckets[rank][bucket])
        )
        stored = time.perf_counter()
        with self._shared.reading(self._version) as (path, places):
            paused = await self._engine.load(self._version, path, places)
        return Seconds(packed - start, stored - packed, paused)

    def close(self) -> None:
        self._shared.close()


class Checkpoint:
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
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=16384,
        hidden_size=768,
        num_hidden_layers=14,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=2048,
        max_position_embeddings=MAX_LEN,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory / "model")
    return directory / "model"


async def compare(path: Path, dtype: Any, repetitions: int, directory: Path) -> dict[str, list[Seconds]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    actor = ray.remote(num_cpus=1)(Rank)
    ranks = [actor.remote(rank, str(path), port) for rank in range(NUM_RANKS)]
    engine = VllmEngine(
        path,
        ModelConfig(path=str(path), dtype=dtype),
        EngineConfig(kv_cache_mb=256, max_num_seqs=16, stream_interval=1),
        device="cpu",
        max_model_len=MAX_LEN,
    )
    async with AsyncExitStack() as stack:
        stack.callback(engine.close)
        ours = ObjectStore(ranks, engine, directory)
        stack.callback(ours.close)
        ways: dict[str, Callable[[], Awaitable[Seconds]]] = {
            "ours": ours.update,
            "checkpoint": Checkpoint(ranks, engine, directory).update,
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
    for rank in ranks:
        ray.kill(rank)
    return done


def report(done: dict[str, list[Seconds]]) -> None:
    parts: dict[str, Callable[[Seconds], float]] = {
        "publish": lambda s: s.publish,
        "store": lambda s: s.store,
        "paused": lambda s: s.paused,
        "total": lambda s: s.total,
        "gap": lambda s: s.gap,
    }
    rows = [
        [name, *(spread([1000 * part(s) for s in seconds], 0) for part in parts.values())]
        for name, seconds in done.items()
    ]
    pairs = list(zip(done["checkpoint"], done["ours"], strict=True))
    ratios = [spread([part(a) / part(b) for a, b in pairs]) for part in parts.values()]
    print(table(["", *parts], [*rows, ["checkpoint / ours", *ratios]]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="How long it takes to change a decoding engine's weights.")
    parser.add_argument("--repetitions", type=int, default=7)
    args = parser.parse_args()
    os.environ.update(CPU_ENV)
    os.environ |= {
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",  # by default Ray's workers yield to the engine, which is none of them here
        "DS_ACCELERATOR": "cpu",  # transformers imports deepspeed, which says aloud what it found
    }
    print(machine())
    with (
        session(ClusterConfig(device="cpu", object_store_mb=768), []),
        tempfile.TemporaryDirectory(prefix="stepgrpo-bench-", dir="/dev/shm") as scratch,
    ):
        for what, path, dtype in (
            ("323,584 parameters, float32, 1.3 MB", MINIATURE, "float32"),
            ("100,687,360 parameters, bfloat16, 201 MB", make_model(Path(scratch)), "bfloat16"),
        ):
            with tempfile.TemporaryDirectory(dir=scratch) as directory:
                done = asyncio.run(compare(path, dtype, args.repetitions, Path(directory)))
            print(f"\n{what}; {NUM_REQUESTS} requests in flight, {args.repetitions} repetitions:")
            print("milliseconds, median (lowest to highest)")
            report(done)


if __name__ == "__main__":
    main()

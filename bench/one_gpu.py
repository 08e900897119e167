"""On one GPU: from the learner's new weights to a decoding engine, and how long both take to make room for each other.

    PYTHONPATH=. python bench/one_gpu.py [--shape 1.7B] [--repetitions 4]     # bench/results/one_gpu.json

    publish   the learner's shards leave the GPU for flat buckets, with checksums, in Ray's object store
    store     they are fetched, verified and put together in shared memory
    paused    the engine takes them, requests in flight frozen; nothing is decoded meanwhile
    sleep     weights, gradients and optimizer of the learner, or weights and KV cache of the engine, leave the GPU
    wake      they come back

The model has random weights and the shape of a Qwen3; learner and engine hold it both, in bfloat16, the learner with
float32 master weights and AdamW.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from figures import machine, markdown, spread
from models import QWEN3, save_qwen3

from stepgrpo.actors.engine import VllmEngine
from stepgrpo.actors.rollout import Sampling
from stepgrpo.config import EngineConfig, LearnerConfig, ModelConfig
from stepgrpo.learner.batch import collate, pair_sample
from stepgrpo.weights import Publisher, SharedWeights

RESULTS = Path(__file__).parent / "results" / "one_gpu.json"
NUM_REQUESTS = 32


def learner(model: ModelConfig) -> Any:
    from stepgrpo.learner.engine import LearnerEngine, join

    door = socket.create_server(("127.0.0.1", 0))
    join(0, 1, "127.0.0.1", door.getsockname()[1], "cuda", own_host="127.0.0.1", door=door)
    config = LearnerConfig(gradient_checkpointing=True, kl_coef=0.0)
    return LearnerEngine(config, model, temperature=1.0, device="cuda", with_reference=False)


def train(engine: Any, vocabulary: int) -> None:
    from stepgrpo.learner.loss import nll_loss

    rng = np.random.default_rng(0)
    batch = collate([pair_sample([1], rng.integers(3, vocabulary, 2000).tolist())], True, engine.pad_id)
    engine.update([batch], partial(nll_loss, scale=1 / len(batch.targets)), lr=1e-6)


async def run(model: ModelConfig, vocabulary: int, repetitions: int, directory: Path) -> dict[str, list[float]]:
    engine = VllmEngine(
        model.path,
        model,
        EngineConfig(kv_cache_mb=8192, max_num_seqs=NUM_REQUESTS, enforce_eager=True),
        device="cuda",
        max_model_len=8192,
        sleeps=True,
    )
    trained = learner(model)
    train(trained, vocabulary)
    publisher = Publisher(rank=0, bucket_bytes=LearnerConfig().bucket_mb << 20, put=ray.put)
    shared = SharedWeights(directory)
    seconds: dict[str, list[float]] = {}

    async def timed(what: str, call: Callable[[], Awaitable[Any]]) -> Any:
        start = time.perf_counter()
        result = await call()
        seconds.setdefault(what, []).append(time.perf_counter() - start)
        return result

    async def decode(seed: int) -> None:
        sampling = Sampling(max_tokens=8000, temperature=1.0, top_p=1.0, seed=seed, stop_token_ids=(), priority=0)
        async for _ in engine.generate([1, seed], sampling):
            pass

    try:
        for version in range(1, 1 + repetitions):
            requests = [asyncio.ensure_future(decode(i)) for i in range(NUM_REQUESTS)]
            await asyncio.sleep(1.0)
            manifest, buckets = await timed(
                "publish", lambda v=version: asyncio.to_thread(publisher.publish, v, trained.shards())
            )
            fetch = lambda _, number, refs=buckets: ray.get(refs[number])  # noqa: E731
            await timed("store", lambda v=version, m=manifest, f=fetch: asyncio.to_thread(shared.store, v, [m], f))
            with shared.reading(version) as (path, table):
                seconds.setdefault("paused", []).append(await engine.load(version, path, table))
            for request in requests:
                request.cancel()
            await asyncio.wait(requests)
            await timed("engine: sleep", engine.sleep)
            await timed("engine: wake", engine.wake)
            await timed("learner: sleep", partial(asyncio.to_thread, trained.sleep))
            await timed("learner: wake", partial(asyncio.to_thread, trained.wake))
            train(trained, vocabulary)
            print({what: round(s[-1], 3) for what, s in seconds.items()}, file=sys.stderr, flush=True)
    finally:
        engine.close()
        shared.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="The weights' way and taking turns, on one GPU.")
    parser.add_argument("--shape", choices=QWEN3, default="1.7B")
    parser.add_argument("--repetitions", type=int, default=4)
    args = parser.parse_args()
    on = machine()
    print(on)
    with tempfile.TemporaryDirectory(prefix="sgb-", dir="/dev/shm") as scratch, tempfile.TemporaryDirectory() as temp:
        path = save_qwen3(Path(scratch) / "model", dtype="bfloat16", device="cuda", **QWEN3[args.shape])
        ray.init(num_cpus=2, num_gpus=0, object_store_memory=16 << 30, include_dashboard=False, _temp_dir=temp)
        try:
            model = ModelConfig(path=str(path))
            taken = run(model, QWEN3[args.shape]["vocab_size"], args.repetitions, Path(scratch) / "weights")
            seconds = asyncio.run(taken)
            gb = sum(f.stat().st_size for f in path.glob("*.safetensors")) / 1e9
        finally:
            ray.shutdown()
    print(f"\nQwen3-{args.shape}'s shape, {gb:.2f} GB of weights, {args.repetitions} repetitions\n")
    rows = [[what, spread(s), f"{gb / sorted(s)[len(s) // 2]:.1f}"] for what, s in seconds.items()]
    print(markdown(["", "seconds", "GB of weights per second"], rows))
    RESULTS.write_text(json.dumps({"machine": on, "shape": args.shape, "gb": gb, "seconds": seconds}) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    main()

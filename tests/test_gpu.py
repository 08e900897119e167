"""What only a GPU can show: run these on a machine that has one, with `pytest tests/test_gpu.py`."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stepgrpo.actors.engine import VllmEngine
from stepgrpo.actors.rollout import Sampling
from stepgrpo.config import EngineConfig, LearnerConfig, ModelConfig
from stepgrpo.learner.batch import Sample, collate, pair_sample
from stepgrpo.weights import Piece, SharedWeights, pack
from tests.learner.tiny import make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROOT = Path(__file__).parents[1]
VOCAB = 512
Fresh = Callable[..., Any]


@pytest.fixture(scope="module")
def fresh() -> Iterator[Fresh]:
    """Call a function of this module in a process that has not touched a GPU yet, nor told DeepSpeed to use none."""

    def in_a_process_of_its_own(call: Callable[..., Any], *args: Any) -> Any:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            return process.submit(call, *args).result(timeout=300)

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DS_ACCELERATOR", raising=False)
        yield in_a_process_of_its_own


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two checkpoints of one shape, with heads as large as flash attention wants them."""
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 512,
        "initializer_range": 0.08,
    }
    paths = [tmp_path_factory.mktemp("model") for _ in range(2)]
    for seed, path in enumerate(paths, 1):
        make_model(path, tied=True, seed=seed, dtype=torch.bfloat16, **shape)
    return [str(path) for path in paths]


def samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        pair_sample(rng.integers(3, VOCAB, 20).tolist(), rng.integers(3, VOCAB, n).tolist())
        for n in (300, 40, 7, 513, 128)
    ]


# ---- learner


def learner(path: str, *, reference: bool = False, config: dict[str, Any] | None = None, **model: Any) -> Any:
    from stepgrpo.learner.engine import LearnerEngine, join

    door = socket.create_server(("127.0.0.1", 0))
    join(0, 1, "127.0.0.1", door.getsockname()[1], "cuda", own_host="127.0.0.1", door=door)
    return LearnerEngine(
        LearnerConfig.model_validate(config or {}),
        ModelConfig(path=path, **model),
        temperature=1.0,
        device="cuda",
        with_reference=reference,
    )


def scores_and_norm(path: str, model: dict[str, Any], config: dict[str, Any]) -> tuple[np.ndarray, float]:
    from stepgrpo.learner.loss import nll_loss

    engine = learner(path, config=config, **model)
    packed = ModelConfig(path=path, **model).packed_on("cuda")
    batch = collate(samples(), packed, engine.pad_id)
    assert batch.input_ids.shape[0] == (1 if packed else 5)
    logprobs, _ = engine.logprobs(batch)
    objective = partial(nll_loss, scale=1 / len(batch.targets))
    empty = collate([], packed, engine.pad_id)
    return logprobs, engine.update([batch, empty], objective, lr=1e-5)["policy/grad_norm"]


@pytest.fixture(scope="module")
def exact(fresh: Fresh, models: list[str]) -> tuple[np.ndarray, float]:
    return fresh(scores_and_norm, models[0], {"dtype": "float32", "attention": "sdpa"}, {})


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ({}, {}),
        ({}, {"gradient_checkpointing": True}),
        ({}, {"offload_optimizer": True}),
        ({"attention": "sdpa"}, {}),
        ({"attention": "packed_sdpa"}, {}),
        ({"dtype": "float32"}, {}),
        ({"liger": True}, {}),
    ],
    ids=str,
)
def test_the_learner_scores_and_learns_as_in_float32(
    fresh: Fresh,
    models: list[str],
    exact: tuple[np.ndarray, float],
    model: dict[str, Any],
    config: dict[str, Any],
):
    if model.get("liger"):
        pytest.importorskip("liger_kernel")
    want, want_norm = exact
    got, norm = fresh(scores_and_norm, models[0], model, config)
    # bfloat16 has 8 bits: logits of a few units are off by some hundredths.
    assert np.abs(got - want).mean() < 0.03 and np.abs(got - want).max() < 0.5
    assert norm == pytest.approx(want_norm, rel=0.03)


def naps(path: str, config: dict[str, Any]) -> tuple[list[int], list[np.ndarray], list[float]]:
    from stepgrpo.learner.loss import nll_loss

    engine = learner(path, reference=True, config=config)
    batch = collate(samples(), True, engine.pad_id)
    objective = partial(nll_loss, scale=1 / len(batch.targets))
    engine.update([batch], objective, lr=1e-4)
    used, scores = [torch.cuda.memory_allocated()], [engine.logprobs(batch)[0], engine.reference_logprobs(batch)]
    engine.sleep()
    used.append(torch.cuda.memory_allocated())
    engine.wake()
    used.append(torch.cuda.memory_allocated())
    scores += [engine.logprobs(batch)[0], engine.reference_logprobs(batch)]
    return used, scores, [engine.update([batch], objective, lr=1e-4)["policy/loss"] for _ in range(3)]


@pytest.mark.parametrize("config", [{}, {"offload_optimizer": True}], ids=str)
def test_a_sleeping_learner_leaves_the_gpu_and_goes_on_where_it_was(
    fresh: Fresh, models: list[str], config: dict[str, Any]
):
    used, scores, losses = fresh(naps, models[0], config)
    assert used[1] < 0.2 * used[0], f"{used[1]} of {used[0]} bytes are still there"
    np.testing.assert_array_equal(scores[2], scores[0])
    np.testing.assert_array_equal(scores[3], scores[1])
    assert losses == sorted(losses, reverse=True)


def shards(path: str) -> list[Piece]:
    return list(learner(path).shards())


# ---- engine


async def greedy(engine: VllmEngine, prompt: list[int]) -> tuple[list[int], list[float]]:
    ids: list[int] = []
    logprobs: list[float] = []
    sampling = Sampling(max_tokens=40, temperature=0.0, top_p=1.0, seed=0, stop_token_ids=(), priority=0)
    async for chunk in engine.generate(prompt, sampling):
        ids += chunk.token_ids
        logprobs += chunk.logprobs
    return ids, logprobs


def scores(path: str, prompt: list[int], ids: list[int]) -> list[float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(ids)[:, None]).squeeze(-1).tolist()


def free_gb() -> float:
    return torch.cuda.mem_get_info()[0] / 2**30


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_an_engine_loads_a_learners_weights_while_it_generates_sleeps_and_wakes(
    fresh: Fresh, models: list[str], eager: bool
):
    pieces = fresh(shards, models[1])
    prompt = list(range(3, 23))

    async def live() -> None:
        config = EngineConfig(max_num_seqs=16, kv_cache_mb=2048, enforce_eager=eager)
        engine = VllmEngine(
            models[0], ModelConfig(path=models[0]), config, device="cuda", max_model_len=256, sleeps=True
        )
        shared = SharedWeights(Path(f"/dev/shm/stepgrpo-test-{os.getpid()}-{eager}"))
        try:
            first = await greedy(engine, prompt)
            np.testing.assert_allclose(first[1], scores(models[0], prompt, first[0]), atol=0.2)

            manifest, buckets = pack(pieces, version=1, rank=0, bucket_bytes=1 << 20, put=lambda b: b.copy())
            shared.store(1, [manifest], lambda rank, bucket: buckets[bucket])
            under_way = [asyncio.ensure_future(greedy(engine, [*prompt, i])) for i in range(8)]
            await asyncio.sleep(0.02)
            with shared.reading(1) as (path, table):
                assert await engine.load(1, path, table) > 0
            assert all(len(ids) == 40 for ids, _ in await asyncio.gather(*under_way))
            second = await greedy(engine, prompt)
            np.testing.assert_allclose(second[1], scores(models[1], prompt, second[0]), atol=0.2)

            free = free_gb()
            await engine.sleep()
            assert free_gb() > free + 1.8, "the KV cache of 2 GB is still there"
            await engine.wake()
            third = await greedy(engine, prompt)
            assert third[0] == second[0]
            np.testing.assert_allclose(third[1], second[1], atol=0.05)
        finally:
            engine.close()
            shared.close()

    asyncio.run(live())


# ---- both


def test_learner_and_engine_take_turns_on_one_gpu(tmp_path: Path):
    command = [
        *(sys.executable, "-c", "from stepgrpo.cli import main; main()", "train", "configs/quickstart.yaml"),
        *("name=one-gpu", f"runs_dir={tmp_path}", "cluster.device=cuda", "cluster.colocate=true"),
        *("train.max_staleness=0", "model.dtype=bfloat16", "train.num_batches=4", "engine.kv_cache_mb=1024"),
        *("engine.block_size=null", "eval.every=0", "data.eval=null", "checkpoint.every=2"),
    ]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    metrics = [json.loads(line) for line in (tmp_path / "one-gpu" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 8  # two updates of each batch
    assert all(np.isfinite(m["policy/loss"]) and not m["policy/skipped"] for m in metrics)

"""Real vLLM on CPU, in float32, against transformers' model of the very same weights."""

import asyncio
import multiprocessing
import os
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from stepgrpo.actors.engine import CPU_ENV, EngineDied, VllmEngine, _forked, engine_args
from stepgrpo.actors.rollout import Chunk, Sampling
from stepgrpo.config import EngineConfig, ModelConfig
from stepgrpo.weights import Piece, SharedWeights, pack

pytestmark = pytest.mark.asyncio(loop_scope="module")

EOS = 2
MAX_LEN = 1024
TOLERANCE = 1e-4
PROMPT = [1, *(7 + 5 * i % 50 for i in range(70))]


def random_model(seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=96,
        max_position_embeddings=MAX_LEN,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).to(torch.float32).eval()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.15)  # far from uniform, so that a wrong weight or position shows
    return model


class Served:
    """An engine, the shared memory of its node, and transformers' model of every version it had."""

    def __init__(self, engine: VllmEngine, shared: SharedWeights, initial: Qwen3ForCausalLM) -> None:
        self.engine = engine
        self.shared = shared
        self.models = {0: initial}

    @property
    def model(self) -> Qwen3ForCausalLM:
        return self.models[self.engine.version]

    async def load_new_weights(self) -> int:
        """Publish other weights as two ranks of a learner would, and load them."""
        version = self.engine.version + 1
        model = random_model(100 + version)
        packed = []
        for rank in range(2):
            pieces = []
            for name, p in model.named_parameters():
                flat, half = p.detach().flatten(), -(-p.numel() // 2)
                data = flat[rank * half : (rank + 1) * half].numpy().view("uint8")
                pieces.append(Piece(name, "float32", tuple(p.shape), rank * half, data))
            packed.append(pack(pieces, version=version, rank=rank, bucket_bytes=50_000, put=lambda b: b.copy()))
        self.shared.store(version, [m for m, _ in packed], lambda rank, bucket: packed[rank][1][bucket])
        self.models[version] = model
        with self.shared.reading(version) as (path, table):
            assert await self.engine.load(version, path, table) > 0
        return version


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[Served]:
    environment = dict(os.environ)
    os.environ.update(CPU_ENV)
    with tempfile.TemporaryDirectory(prefix="stepgrpo-test-", dir="/dev/shm") as directory:
        os.environ["VLLM_CACHE_ROOT"] = directory  # as on a machine on which vLLM never ran
        path = Path(directory, "model")
        initial = random_model(0)
        initial.save_pretrained(path)
        engine = VllmEngine(
            path,
            ModelConfig(path=str(path), dtype="float32"),
            EngineConfig(kv_cache_mb=32, max_num_seqs=32, stream_interval=8),
            device="cpu",
            max_model_len=MAX_LEN,
        )
        shared = SharedWeights(Path(directory, "weights"))
        yield Served(engine, shared, initial)
        engine.close()
        shared.close()
        assert not multiprocessing.active_children()
    os.environ.clear()
    os.environ.update(environment)


def sampling(max_tokens: int, **changes: Any) -> Sampling:
    fields: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "seed": 1, "stop_token_ids": (), "priority": 0}
    return Sampling(max_tokens=max_tokens, **(fields | changes))


async def response(engine: VllmEngine, prompt: Sequence[int], wanted: Sampling) -> Chunk:
    """A whole response as one chunk."""
    ids: list[int] = []
    logprobs: list[float] = []
    versions: list[int] = []
    finish = None
    async for chunk in engine.generate(prompt, wanted):
        assert len(chunk.token_ids) == len(chunk.logprobs) == len(chunk.versions)
        assert finish is None
        ids += chunk.token_ids
        logprobs += chunk.logprobs
        versions += chunk.versions
        finish = chunk.finish
    return Chunk(ids, logprobs, versions, finish)


@torch.no_grad()
def logits(model: Qwen3ForCausalLM, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """[T, vocabulary] logits that each token of a response is sampled from."""
    out: torch.Tensor = model(torch.tensor([[*prompt, *ids]]), use_cache=False).logits
    return out[0, len(prompt) - 1 : -1]


def log_probabilities(
    model: Qwen3ForCausalLM, prompt: Sequence[int], ids: Sequence[int], temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """[T] of the tempered distribution, cut to the smallest set that holds top_p and normalised again."""
    p = (logits(model, prompt, ids) / temperature).softmax(-1)
    ordered, order = p.sort(-1, descending=True)
    outside = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, ordered.cumsum(-1) - ordered >= top_p)
    p = p.masked_fill(outside, 0)
    return (p / p.sum(-1, keepdim=True)).log().gather(-1, torch.tensor(ids)[:, None])[:, 0]


def greedy(model: Qwen3ForCausalLM, prompt: Sequence[int], num: int) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=num, min_new_tokens=num, do_sample=False, eos_token_id=None
    )
    ids: list[int] = out[0, len(prompt) :].tolist()
    return ids


def assert_close(found: Sequence[float], expected: torch.Tensor) -> None:
    assert (torch.tensor(found) - expected).abs().max() < TOLERANCE


async def test_a_tensor_parallel_engine_keeps_its_workers_to_itself_instead_of_asking_ray_for_gpus() -> None:
    args = engine_args(
        "checkpoint",
        ModelConfig(path="checkpoint"),
        EngineConfig(tensor_parallel=2),
        device="cuda",
        max_model_len=1024,
        seed=0,
    )
    assert args.distributed_executor_backend == "mp"


async def test_a_class_new_to_vllms_cache_is_looked_at_by_a_process_that_has_imported_vllm(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry, "_SUBPROCESS_COMMAND", ["false"])  # which vLLM would run, to import all over again
    model = registry.ModelRegistry.models["Qwen3ForCausalLM"]
    monkeypatch.setattr(type(model), "_load_modelinfo_from_cache", lambda self, module_hash: None)
    with _forked():
        assert model.inspect_model_cls().architecture == "Qwen3ForCausalLM"


async def test_greedy_output_is_that_of_the_hf_model(served: Served) -> None:
    r = await response(served.engine, PROMPT, sampling(64, temperature=0.0))
    assert r.token_ids == greedy(served.model, PROMPT, 64)
    assert r.finish == "length" and set(r.versions) == {served.engine.version}
    assert_close(r.logprobs, log_probabilities(served.model, PROMPT, r.token_ids))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (1.0, 0.5)])
async def test_log_probabilities_are_those_of_the_distribution_that_was_sampled_from(
    served: Served, temperature: float, top_p: float
) -> None:
    wanted = [sampling(100, temperature=temperature, top_p=top_p, seed=s) for s in range(8)]
    responses = await asyncio.gather(*(response(served.engine, PROMPT, w) for w in wanted))
    assert len({tuple(r.token_ids) for r in responses}) == 8
    for r in responses:
        assert_close(r.logprobs, log_probabilities(served.model, PROMPT, r.token_ids, temperature, top_p))


async def test_a_seed_gives_the_same_response_alone_and_in_a_batch_too_large_for_one_prefill(served: Served) -> None:
    prompts = [[*PROMPT, *([5 + i] * 700)] for i in range(12)]
    wanted = [sampling(20, seed=i) for i in range(12)]
    together = await asyncio.gather(*(response(served.engine, p, w) for p, w in zip(prompts, wanted, strict=True)))
    alone = [await response(served.engine, p, w) for p, w in zip(prompts, wanted, strict=True)]
    assert [(r.token_ids, r.logprobs) for r in together] == [(r.token_ids, r.logprobs) for r in alone]


async def test_only_a_stop_token_ends_a_response_and_it_belongs_to_it(served: Served) -> None:
    free = await response(served.engine, PROMPT, sampling(200))
    stops = (0, 13)
    end = 1 + next(i for i, t in enumerate(free.token_ids) if t in stops)
    assert EOS in free.token_ids[:end] and free.finish == "length"
    stopped = await response(served.engine, PROMPT, sampling(200, stop_token_ids=stops))
    assert (stopped.token_ids, stopped.logprobs) == (free.token_ids[:end], free.logprobs[:end])
    assert stopped.finish == "stop"


async def test_long_requests_come_in_larger_chunks_than_short_ones(served: Served) -> None:
    long = [len(c.token_ids) async for c in served.engine.generate(PROMPT, sampling(200))]
    short = [len(c.token_ids) async for c in served.engine.generate(PROMPT, sampling(20))]
    assert sum(long) == 200 and len(long) <= 200 // 8 + 2
    assert sum(short) == 20 and len(short) > 10


async def test_a_response_goes_on_from_what_was_sampled_and_a_forced_closing(served: Served) -> None:
    thought = await response(served.engine, PROMPT, sampling(120))
    context = [*PROMPT, *thought.token_ids[:77], 3, 4, 9]
    answer = await response(served.engine, context, sampling(40, temperature=0.0))
    assert answer.token_ids == greedy(served.model, context, 40)
    assert_close(answer.logprobs, log_probabilities(served.model, context, answer.token_ids))


async def test_closing_the_generator_aborts_the_request(served: Served) -> None:
    vllm = served.engine._llm
    generator = served.engine.generate(PROMPT, sampling(900))
    await anext(generator)
    assert not await vllm.reset_prefix_cache()  # refused while anything runs
    await generator.aclose()
    assert vllm.get_num_unfinished_requests() == 0
    assert await vllm.reset_prefix_cache()


async def test_a_request_longer_than_the_engine_takes_is_refused(served: Served) -> None:
    with pytest.raises(ValueError, match=r"a prompt of 71 and a response of up to 1000 tokens do not fit .* 1024"):
        await response(served.engine, PROMPT, sampling(1000))


async def test_after_a_load_greedy_output_is_that_of_the_new_weights_and_no_longer_of_the_old(served: Served) -> None:
    old = served.model
    before = await response(served.engine, PROMPT, sampling(64, temperature=0.0))
    version = await served.load_new_weights()
    # The same prompt again: blocks left in the prefix cache would carry the old weights' keys and values.
    after = await response(served.engine, PROMPT, sampling(64, temperature=0.0))
    assert before.token_ids == greedy(old, PROMPT, 64)
    assert after.token_ids == greedy(served.model, PROMPT, 64) != before.token_ids
    assert set(after.versions) == {version}
    assert_close(after.logprobs, log_probabilities(served.model, PROMPT, after.token_ids))


async def test_an_update_in_flight_leaves_every_token_to_the_weights_of_its_version(served: Served) -> None:
    old = served.engine.version
    parents = [served.engine.generate(PROMPT, sampling(600, seed=s)) for s in range(4)]
    chunks = [[await anext(p), await anext(p)] for p in parents]
    new = await served.load_new_weights()
    probe = await response(served.engine, [*PROMPT, *chunks[0][0].token_ids, 3], sampling(20, temperature=0.0))
    assert set(probe.versions) == {new}
    for parent, seen in zip(parents, chunks, strict=True):
        seen += [c async for c in parent]
        ids = [t for c in seen for t in c.token_ids]
        logprobs = [x for c in seen for x in c.logprobs]
        versions = [v for c in seen for v in c.versions]
        assert len(ids) == len(versions) == 600
        cut = versions.index(new)
        assert versions == [old] * cut + [new] * (600 - cut) and 0 < cut < 600
        assert_close(logprobs[:cut], log_probabilities(served.models[old], PROMPT, ids)[:cut])
        assert_close(logprobs[cut:], log_probabilities(served.models[new], PROMPT, ids)[cut:])


async def test_where_vllm_reports_no_versions_they_are_never_newer_than_the_truth(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.engine, "_reports_versions", False)
    old = served.engine.version
    generator = served.engine.generate(PROMPT, sampling(400))
    chunks = [await anext(generator), await anext(generator)]
    await asyncio.sleep(0.05)  # so that tokens of the old weights wait to be read, and others to be streamed
    new = await served.load_new_weights()
    chunks += [c async for c in generator]
    versions = [v for c in chunks for v in c.versions]
    assert versions == sorted(versions) and set(versions) == {old, new}
    floor = versions.index(new)
    ids, logprobs = [t for c in chunks for t in c.token_ids], [x for c in chunks for x in c.logprobs]
    assert_close(logprobs[floor:], log_probabilities(served.models[new], PROMPT, ids)[floor:])


async def test_after_a_failed_load_the_engine_is_dead_and_says_why(served: Served, tmp_path: Path) -> None:
    """The last test of the module: it ends the engine."""
    waiting = served.engine.generate(PROMPT, sampling(900))
    await anext(waiting)
    with pytest.raises(EngineDied, match=r"loading weights version 99 failed .*No such file"):
        await served.engine.load(99, tmp_path / "missing", {})
    for _ in range(2):
        with pytest.raises(EngineDied, match="version 99"):
            await response(served.engine, PROMPT, sampling(10))
    with pytest.raises(EngineDied, match="version 99"):
        _ = [c async for c in waiting]
    for child in multiprocessing.active_children():
        child.join(30)
        assert not child.is_alive()

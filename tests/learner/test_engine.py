import json
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepgrpo.config import LearnerConfig, ModelConfig
from stepgrpo.learner.attention import check_packs
from stepgrpo.learner.batch import MicroBatch, Sample, collate, pair_sample, partition
from stepgrpo.learner.engine import LearnerEngine, LogProbHead, join, learning_rate
from stepgrpo.learner.loss import nll_loss, policy_loss
from stepgrpo.weights import Piece
from tests.learner.tiny import VOCAB, make_model
from tests.nodes import free_port

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # DeepSpeed's calls of torch.distributed


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """Whether embeddings are tied -> checkpoint."""
    out = {}
    for tied in (True, False):
        directory = tmp_path_factory.mktemp("model")
        make_model(directory, tied)
        out[tied] = str(directory)
    return out


@pytest.fixture(scope="module", autouse=True)
def this_process_is_a_learner_of_one_rank() -> None:
    torch.set_num_threads(1)
    be_rank(0, 1, free_port())


def be_rank(rank: int, num_ranks: int, port: int) -> None:
    door = None if rank else socket.create_server(("127.0.0.1", port))
    join(rank, num_ranks, "127.0.0.1", port, "cpu", own_host="127.0.0.1", door=door)


Ranks = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def on_two_ranks() -> Iterator[Ranks]:
    """Call a function of this module in both processes of a learner of two ranks."""
    port = free_port()
    pools = [ProcessPoolExecutor(1, get_context("spawn"), initializer=be_rank, initargs=(r, 2, port)) for r in range(2)]

    def call(function: Callable[..., Any], *args: Any) -> list[Any]:
        return [f.result(timeout=300) for f in [p.submit(function, *args) for p in pools]]

    yield call
    for pool in pools:
        pool.shutdown()


def engine_of(
    path: str,
    *,
    dtype: str = "float32",
    attention: str = "auto",
    temperature: float = 1.0,
    with_reference: bool = False,
    **settings: Any,
) -> LearnerEngine:
    """An engine that keeps no parameter gathered and cuts logits in chunks of 3 tokens."""
    config = LearnerConfig(**({"lr": 1e-3, "logprob_chunk_tokens": 3} | settings))
    # Not validated: where there is no GPU, and in float32, flash attention is for a test alone.
    model = ModelConfig.model_validate({"path": path, "dtype": dtype}).model_copy(update={"attention": attention})
    return LearnerEngine(
        config, model, temperature=temperature, device="cpu", with_reference=with_reference, persistence_threshold=0
    )


def make_samples(num: int, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(num):
        s = pair_sample(rng.integers(0, VOCAB, 3), rng.integers(0, VOCAB, rng.integers(4, 20)))
        behaviour = np.where(s.loss_mask, -rng.uniform(1, 5, len(s.loss_mask)), 0).astype(np.float32)
        forced = s.loss_mask & (rng.random(len(s.loss_mask)) < 0.1)
        out.append(Sample(s.token_ids, s.loss_mask, forced, behaviour, s.versions, float(rng.normal())))
    return out


def num_tokens(samples: list[Sample]) -> int:
    return sum(int(s.loss_mask.sum()) for s in samples)


def grpo(samples: list[Sample]) -> Any:
    return partial(
        policy_loss,
        clip_low=0.2,
        clip_high=0.3,
        dual_clip=3.0,
        importance_cap=2.0,
        kl_coef=0.01,
        scale=1 / num_tokens(samples),
    )


def plain_logprobs(path: str, batch: MicroBatch, temperature: float = 1.0) -> torch.Tensor:
    """By transformers alone, one unpadded row at a time."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    out = []
    positions = batch.position_ids.ravel()
    for index, target in zip(batch.index, batch.targets, strict=True):
        ids = batch.input_ids.ravel()[index - positions[index] : index + 1]
        with torch.no_grad():
            logits = model(torch.from_numpy(ids)[None]).logits[0, -1]
        out.append((logits / temperature).log_softmax(-1)[target])
    return torch.stack(out)


def parameters(engine: LearnerEngine) -> dict[str, bytes]:
    """Whole parameters of a learner of one rank."""
    return {p.name: p.data.tobytes() for p in engine.shards()}


def floats(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.float32)


# ---- the head


@pytest.mark.parametrize("chunk_tokens", [1, 5, 100])
def test_the_heads_values_and_gradients_are_those_of_log_softmax(chunk_tokens: int):
    torch.manual_seed(0)
    hidden, weight = torch.randn(13, 8, requires_grad=True), torch.nn.Parameter(torch.randn(30, 8))
    targets, upstream = torch.randint(0, 30, (13,)), torch.randn(13)

    expected = (hidden @ weight.T / 0.7).log_softmax(-1)
    picked = expected.gather(-1, targets[:, None]).squeeze(-1)
    want = torch.autograd.grad((picked * upstream).sum(), (hidden, weight))

    logprobs, entropy = LogProbHead(weight, chunk_tokens, 0.7)(hidden, targets)
    got = torch.autograd.grad((logprobs * upstream).sum(), (hidden, weight))
    torch.testing.assert_close(logprobs, picked)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1).detach())
    assert not entropy.requires_grad
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_in_bfloat16_only_the_logits_are_rounded():
    torch.manual_seed(0)
    hidden = torch.randn(64, 16).bfloat16().requires_grad_()
    weight = torch.nn.Parameter(torch.randn(50, 16).bfloat16())
    targets = torch.randint(0, 50, (64,))

    picked = (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    want = torch.autograd.grad(picked.sum(), (hidden, weight))
    logprobs, _ = LogProbHead(weight, 8, 1.0)(hidden, targets)
    got = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    torch.testing.assert_close(logprobs, picked)  # float32 tolerance: the same rounded logits
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.bfloat16
        torch.testing.assert_close(g, w, atol=2e-2, rtol=2e-2)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor any operator makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_no_tensor_holds_the_logits_of_more_than_a_chunk():
    num, vocab, width, chunk = 64, 1000, 4, 8
    hidden, weight = torch.randn(num, width, requires_grad=True), torch.nn.Parameter(torch.randn(vocab, width))
    targets = torch.randint(0, vocab, (num,))
    with Largest() as chunked:
        logprobs, _ = LogProbHead(weight, chunk, 1.0)(hidden, targets)
        logprobs.sum().backward()
    with Largest() as plain:
        (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None]).sum().backward()
    assert chunked.elements == chunk * vocab
    assert plain.elements == num * vocab


# ---- one rank


@pytest.mark.parametrize("tied", [True, False])
def test_packed_and_padded_log_probabilities_are_those_of_transformers(model_dirs: dict[bool, str], tied: bool):
    engine = engine_of(model_dirs[tied], temperature=0.7)
    samples = make_samples(4)
    for packed in (False, True):
        batch = collate(samples, packed, engine.pad_id)
        got, entropy = engine.logprobs(batch)
        np.testing.assert_allclose(got, plain_logprobs(model_dirs[tied], batch, 0.7), atol=1e-5)
        assert (entropy > 0).all() and (entropy <= np.log(VOCAB) + 1e-6).all()
    engine.close()


def attention_of_each_sequence(q: Any, k: Any, v: Any, bounds: Any, *_: Any, scale: float, **more: Any) -> torch.Tensor:
    """What torch's kernel for a GPU computes. q: [L, heads, D]"""
    left, right = more["window_size"]
    assert right == 0 and more["enable_gqa"] == (k.shape[1] < q.shape[1])
    parts = []
    for a, b in pairwise(bounds.tolist()):
        at = torch.arange(b - a)
        back = at[:, None] - at
        mask = (back >= 0) & ((back <= left) if left >= 0 else True)
        heads = [states[a:b].transpose(0, 1) for states in (q, k, v)]
        seen = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale, enable_gqa=True)
        parts.append(seen.transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sequences_that_lie_end_to_end_learn_as_if_each_had_a_row_of_its_own(
    model_dirs: dict[bool, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    window: int | None,
    checkpointing: bool,
):
    monkeypatch.setattr("stepgrpo.learner.attention.varlen_attn", attention_of_each_sequence)
    path = model_dirs[True]
    if window:
        path = str(shutil.copytree(path, tmp_path / "windowed"))
        config = json.loads((tmp_path / "windowed" / "config.json").read_text())
        layers = ["sliding_attention"] * config["num_hidden_layers"]
        config |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0, "layer_types": layers}
        (tmp_path / "windowed" / "config.json").write_text(json.dumps(config))
    samples, found = make_samples(5), []
    for attention in ("sdpa", "varlen", "packed_sdpa"):
        engine = engine_of(path, attention=attention, gradient_checkpointing=checkpointing)
        packed = attention != "sdpa"
        batches = [collate(samples[:3], packed, 0), collate(samples[3:], packed, 0), collate([], packed, 0)]
        metrics = engine.update(batches, partial(nll_loss, scale=1 / num_tokens(samples)), lr=1e-3)
        found.append((metrics["policy/loss"], metrics["policy/grad_norm"], engine.logprobs(batches[0])[0]))
        engine.close()
    (loss, norm, scores), *others = found
    for packed_loss, packed_norm, packed_scores in others:
        assert packed_loss == pytest.approx(loss, rel=1e-5)
        assert packed_norm == pytest.approx(norm, rel=1e-4)
        np.testing.assert_allclose(packed_scores, scores, atol=1e-4)


def test_a_model_whose_layers_have_a_state_is_not_packed(model_dirs: dict[bool, str]):
    model = AutoModelForCausalLM.from_pretrained(model_dirs[True])
    check_packs(model)
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"^model\.attention: takes sdpa with Qwen3ForCausalLM"):
        check_packs(model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_is_the_one_plain_pytorch_makes(model_dirs: dict[bool, str], tied: bool, checkpointing: bool):
    samples = make_samples(5)
    batch = collate(samples, False, 0)
    model = AutoModelForCausalLM.from_pretrained(model_dirs[tied], dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.999), weight_decay=0.01)
    logits = model(torch.from_numpy(batch.input_ids)).logits.flatten(0, 1)[torch.from_numpy(batch.index)]
    logp = logits.log_softmax(-1).gather(-1, torch.from_numpy(batch.targets)[:, None]).squeeze(-1)
    loss = -(torch.from_numpy(batch.advantage) * logp).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()

    engine = engine_of(model_dirs[tied], grad_clip=0.1, gradient_checkpointing=checkpointing)
    parts = [collate(samples[:2], False, 0), collate(samples[2:], True, 0), collate([], False, 0)]
    metrics = engine.update(parts, partial(nll_loss, scale=1 / num_tokens(samples)), lr=2e-3)
    assert metrics["policy/loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert metrics["policy/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert metrics["policy/loss_tokens"] == num_tokens(samples)
    trained = parameters(engine)
    # Adam divides a first gradient by its own size: rounding of a tiny one, which differs from CPU to CPU, shows.
    for name, p in model.named_parameters():
        np.testing.assert_allclose(floats(trained[name]), p.detach().numpy().ravel(), atol=5e-5, err_msg=name)
    engine.close()


def test_the_reference_stays_what_the_policy_was(model_dirs: dict[bool, str]):
    engine = engine_of(model_dirs[True], with_reference=True)
    samples = make_samples(3)
    batch = collate(samples, False, engine.pad_id)
    before, _ = engine.logprobs(batch)
    engine.update([batch], partial(nll_loss, scale=1 / num_tokens(samples)), lr=1e-2)
    assert np.abs(engine.logprobs(batch)[0] - before).max() > 1e-2
    np.testing.assert_array_equal(engine.reference_logprobs(batch), before)
    engine.close()


def test_a_saved_policy_is_a_plain_checkpoint_and_replaces_the_one_before(model_dirs: dict[bool, str], tmp_path: Path):
    for tied, dtype in ((True, "float32"), (False, "float32"), (True, "bfloat16")):
        engine = engine_of(model_dirs[tied], dtype=dtype)
        samples = make_samples(3)
        batch = collate(samples, False, engine.pad_id)
        engine.update([batch], partial(nll_loss, scale=1 / num_tokens(samples)), lr=1e-2)
        engine.save_pretrained(tmp_path / "model")
        assert [p.name for p in tmp_path.iterdir()] == ["model"], "nothing half written stays behind"
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert str(model.dtype) == f"torch.{dtype}"
        stored = {n: p.detach().flatten().view(torch.uint8).numpy().tobytes() for n, p in model.named_parameters()}
        assert stored == parameters(engine)
        if dtype == "float32":
            got = plain_logprobs(str(tmp_path / "model"), batch)
            np.testing.assert_allclose(engine.logprobs(batch)[0], got, atol=1e-5)
        assert AutoTokenizer.from_pretrained(tmp_path / "model")("w3 w7")["input_ids"] == [3, 7]
        engine.close()


def test_a_save_that_was_cut_off_and_one_that_fails_leave_the_model_before(
    model_dirs: dict[bool, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target = tmp_path / "model"
    engine = engine_of(model_dirs[True])
    engine.save_pretrained(target)
    before = (target / "model.safetensors").read_bytes()
    target.rename(tmp_path / ".model.previous")  # the first of its two renames

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("stepgrpo.learner.engine.copy_tokenizer", full)
        with pytest.raises(OSError, match="no space left"):
            engine.save_pretrained(target)
    assert (target / "model.safetensors").read_bytes() == before
    engine.save_pretrained(target)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    engine.close()


def test_buffers_that_a_models_files_hold_are_published_and_saved(model_dirs: dict[bool, str], tmp_path: Path):
    engine = engine_of(model_dirs[True])
    known = parameters(engine).keys()
    layer = engine._policy.module.model.model.layers[0]
    layer.register_buffer("bias", torch.tensor([[1.0, 2.0, 3.0]]))
    layer.register_buffer("table", torch.ones(5), persistent=False)
    (piece,) = (p for p in engine.shards() if p.name not in known)
    assert (piece.name, piece.dtype, piece.shape, piece.start) == ("model.layers.0.bias", "float32", (1, 3), 0)
    assert floats(piece.data).tolist() == [1, 2, 3]
    engine.save_pretrained(tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as saved:
        assert saved.get_tensor("model.layers.0.bias").tolist() == [[1, 2, 3]]
    engine.close()


@pytest.mark.parametrize("attention", ["packed_sdpa", "sdpa"])
def test_nothing_is_dropped_out(model_dirs: dict[bool, str], tmp_path: Path, attention: str):
    path = shutil.copytree(model_dirs[True], tmp_path / "start")
    config = json.loads((path / "config.json").read_text()) | {"attention_dropout": 0.5}
    (path / "config.json").write_text(json.dumps(config))
    engine = engine_of(str(path), attention=attention)
    batch = collate(make_samples(3), attention != "sdpa", 0)
    np.testing.assert_allclose(engine.logprobs(batch)[0], plain_logprobs(str(path), batch), atol=1e-5)
    engine.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["attention_dropout"] == 0.5
    engine.close()


def test_a_gradient_that_is_not_finite_stops_the_run(model_dirs: dict[bool, str]):
    engine = engine_of(model_dirs[True], max_skips=1)
    samples = [
        Sample(s.token_ids, s.loss_mask, s.forced, s.behaviour, s.versions, float("inf")) for s in make_samples(2)
    ]
    with pytest.raises(FloatingPointError, match=r"not finite in 1 .*learner\.max_skips"):
        engine.update([collate(samples, False, 0)], partial(nll_loss, scale=1.0), lr=1e-3)
    engine.close()


def test_the_learning_rate_warms_up_and_ends_as_scheduled():
    def course(schedule: str) -> list[float]:
        config = LearnerConfig.model_validate({"lr": 1.0, "warmup_updates": 2, "schedule": schedule})
        return [learning_rate(config, u, 6) for u in range(7)]

    assert course("constant") == [0.5, 1, 1, 1, 1, 1, 1]
    assert course("linear") == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25, 0])
    assert course("cosine") == pytest.approx([0.5, 1, 1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)


def test_a_part_that_is_not_finite_skips_the_update_and_leaves_nothing_to_the_next(model_dirs: dict[bool, str]):
    samples = make_samples(4)
    batch, size = collate(samples, False, 0), num_tokens(samples)
    alone = engine_of(model_dirs[True])
    expected = alone.update([batch], partial(nll_loss, scale=1 / size), lr=1e-3)
    engine = engine_of(model_dirs[True])
    before = parameters(engine)
    engine.accumulate([batch], partial(nll_loss, scale=1.0))
    engine.accumulate([batch], partial(nll_loss, scale=math.nan))
    assert engine.step(lr=1e-3, divisor=2 * size)["policy/skipped"] == 1
    assert parameters(engine) == before
    engine.accumulate([batch], partial(nll_loss, scale=1.0))
    assert engine.step(lr=1e-3, divisor=size) == pytest.approx(expected, rel=1e-5)
    for name, data in parameters(alone).items():
        np.testing.assert_allclose(floats(parameters(engine)[name]), floats(data), atol=1e-6, err_msg=name)
    for e in (alone, engine):
        e.close()


# ---- two ranks


Outcome = tuple[list[dict[str, float]], list[Piece]]


def train(path: str, samples: list[Sample], dtype: str, num_updates: int, save_to: str | None = None) -> Outcome:
    """Updates on the same samples, dealt to however many ranks there are; metrics and this rank's pieces."""
    torch.set_num_threads(1)
    engine = engine_of(path, dtype=dtype, with_reference=True)
    shares = partition(
        [len(s.token_ids) for s in samples], num_ranks=dist.get_world_size(), budget_tokens=40, packed=True
    )
    batches = [collate([samples[i] for i in mb], True, engine.pad_id) for mb in shares[dist.get_rank()]]
    batches = [with_others(engine, b) for b in batches]
    metrics = [engine.update(batches, grpo(samples), lr=1e-3) for _ in range(num_updates)]
    if save_to:
        engine.save_pretrained(save_to)
    pieces = [Piece(p.name, p.dtype, p.shape, p.start, p.data.copy()) for p in engine.shards()]
    engine.close()
    return metrics, pieces


def with_others(engine: LearnerEngine, batch: MicroBatch) -> MicroBatch:
    return replace(batch, old=engine.logprobs(batch)[0], reference=engine.reference_logprobs(batch))


def whole(pieces: list[Piece]) -> dict[str, bytes]:
    out: dict[str, bytes] = {}
    for p in sorted(pieces, key=lambda p: p.start):
        assert len(out.get(p.name, b"")) == p.start * (4 if p.dtype == "float32" else 2), p.name
        out[p.name] = out.get(p.name, b"") + p.data.tobytes()
    return out


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_samples", [7, 1])
def test_one_and_two_ranks_report_the_same_and_reach_the_same_weights(
    model_dirs: dict[bool, str], on_two_ranks: Ranks, tied: bool, num_samples: int
):
    """With one sample the second rank trains on nothing at all."""
    samples = make_samples(num_samples)
    alone, pieces = train(model_dirs[tied], samples, "float32", 2)
    (first, first_pieces), (second, second_pieces) = on_two_ranks(train, model_dirs[tied], samples, "float32", 2)
    for one, rank0, rank1 in zip(alone, first, second, strict=True):
        assert rank0 == pytest.approx(rank1, rel=0, abs=0, nan_ok=True)
        assert rank0 == pytest.approx(one, rel=1e-4, abs=1e-5, nan_ok=True)
    expected, got = whole(pieces), whole(first_pieces + second_pieces)
    assert expected.keys() == got.keys()
    for name, data in expected.items():
        np.testing.assert_allclose(floats(got[name]), floats(data), atol=5e-6, err_msg=name)


def train_in_parts(
    path: str, samples: list[Sample], parts: list[int]
) -> tuple[dict[str, float], dict[str, tuple[int, torch.Tensor]]]:
    """An update from the gradients of one part of the samples after the other, whose sizes are ``parts``.

    Returns:
        Metrics, and this rank's pieces, with their starts, of Adam's first moments: a tenth of the clipped gradients.
    """
    torch.set_num_threads(1)
    engine = engine_of(path, with_reference=True, grad_clip=CLIP)
    for end, size in zip(np.cumsum(parts), parts, strict=True):
        part = samples[end - size : end]
        lengths = [len(s.token_ids) for s in part]
        shares = partition(lengths, num_ranks=dist.get_world_size(), budget_tokens=40, packed=True)
        batches = [collate([part[i] for i in mb], True, engine.pad_id) for mb in shares[dist.get_rank()]]
        batches = [replace(b, reference=engine.reference_logprobs(b)) for b in batches]
        engine.accumulate(batches, partial(grpo(samples), scale=1.0))
    metrics = engine.step(lr=1e-3, divisor=num_tokens(samples))
    tensors, metadata = engine.snapshot()
    starts = {name: place["start"] for name, place in json.loads(metadata["pieces"]).items()}
    engine.close()
    return metrics, {name: (start, tensors[f"exp_avg/{name}"]) for name, start in starts.items()}


CLIP = 0.05
"""Far below the gradients' norm: what clipping sees must be the gradient of the mean, not of the sum."""


def test_gradients_of_parts_make_the_update_of_the_whole_on_one_and_two_ranks(
    model_dirs: dict[bool, str], on_two_ranks: Ranks
):
    """Parts of one sample leave the second rank without any."""
    samples = make_samples(9)
    [plain], _ = train(model_dirs[True], samples, "float32", 1)
    assert plain["policy/grad_norm"] > 2 * CLIP
    expected, whole_moments = train_in_parts(model_dirs[True], samples, [9])
    assert expected["policy/grad_norm"] == pytest.approx(plain["policy/grad_norm"], rel=1e-5)
    for ranks in (
        [train_in_parts(model_dirs[True], samples, [4, 1, 4])],
        on_two_ranks(train_in_parts, model_dirs[True], samples, [3, 1, 5]),
    ):
        for metrics, _ in ranks:
            assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True)
        for name, (_, moments) in whole_moments.items():
            pieces = sorted((p[name] for _, p in ranks if name in p), key=lambda piece: piece[0])
            got = torch.cat([piece for _, piece in pieces])
            torch.testing.assert_close(got, moments, rtol=0, atol=1e-5 * float(moments.abs().max()), msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_pieces_of_two_ranks_are_the_gathered_parameters_bit_for_bit(
    model_dirs: dict[bool, str], on_two_ranks: Ranks, tmp_path: Path, dtype: str
):
    outcomes: list[Outcome] = on_two_ranks(train, model_dirs[True], make_samples(5), dtype, 1, str(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    gathered = {n: p.detach().flatten().view(torch.uint8).numpy().tobytes() for n, p in model.named_parameters()}
    assert whole([p for _, pieces in outcomes for p in pieces]) == gathered
    assert {p.dtype for _, pieces in outcomes for p in pieces} == {dtype}

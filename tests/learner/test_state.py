"""The learner's state: what is restored goes on as what was saved would have, and a bad update changes nothing."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported

import numpy as np
import pytest
import ray
import torch
import torch.distributed as dist
from ray.exceptions import ObjectLostError
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from stepgrpo import checkpoint
from stepgrpo.config import LearnerConfig, ModelConfig
from stepgrpo.learner import state
from stepgrpo.learner.batch import Sample, collate, partition
from stepgrpo.learner.engine import LearnerEngine
from stepgrpo.learner.loss import nll_loss
from stepgrpo.types import Group
from tests.learner import test_engine, test_worker
from tests.learner.test_engine import Ranks, floats, make_samples, num_tokens
from tests.learner.test_worker import config_of, grade, make_group, one_rank, plan_of, ready

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # DeepSpeed's calls of torch.distributed

model_dirs = test_engine.model_dirs
on_two_ranks = test_engine.on_two_ranks
this_process_is_a_learner_of_one_rank = test_engine.this_process_is_a_learner_of_one_rank
local_ray = test_worker.local_ray

ALL_SHARDED, SMALL_GATHERED = 0, 500
"""Persistence thresholds: the tiny model's norms have 16 and 32 elements, its matrices 512 at least."""
EVERY_KIND = [("float32", ALL_SHARDED), ("float32", SMALL_GATHERED), ("bfloat16", SMALL_GATHERED)]


def engine_of(path: str, dtype: str = "float32", threshold: int = ALL_SHARDED) -> LearnerEngine:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return LearnerEngine(
        LearnerConfig(lr=1e-3, logprob_chunk_tokens=3),
        ModelConfig.model_validate({"path": path, "dtype": dtype}),
        temperature=1.0,
        device="cpu",
        with_reference=False,
        persistence_threshold=threshold,
    )


def update(engine: LearnerEngine, samples: list[Sample], constant: float = 0.0) -> dict[str, float]:
    """One update on the samples, dealt to however many ranks there are; rank 0's loss has a constant added."""
    lengths = [len(s.token_ids) for s in samples]
    shares = partition(lengths, num_ranks=dist.get_world_size(), budget_tokens=40, packed=True)
    batches = [collate([samples[i] for i in mb], True, engine.pad_id) for mb in shares[dist.get_rank()]]

    def objective(*args: Any) -> Any:
        loss, sums = nll_loss(*args, scale=1 / num_tokens(samples))
        return loss + (constant if dist.get_rank() == 0 else 0.0), sums

    return engine.update(batches, objective, lr=1e-2)


def contents(engine: LearnerEngine) -> dict[str, bytes]:
    """State and the forward pass's weights of this rank."""
    tensors, metadata = engine.snapshot()
    held = {name: t.numpy().tobytes() for name, t in tensors.items()}
    held |= {f"forward/{p.name}": p.data.tobytes() for p in engine.shards()}
    return held | {"step": metadata["step"].encode()}


def differing(a: dict[str, bytes], b: dict[str, bytes]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if a[name] != b[name]]


def write(engine: LearnerEngine, directory: str) -> None:
    Path(directory).mkdir(exist_ok=True)
    file = Path(directory) / state.file_name(dist.get_rank(), dist.get_world_size())
    file.write_bytes(b"".join(state.serialized(*engine.snapshot())))


def files(directory: str | Path) -> list[Path]:
    return sorted(Path(directory).iterdir())


Course = tuple[dict[str, bytes], dict[str, float], dict[str, bytes]]
"""(what the engine holds at the checkpoint, metrics of the update after it, what it holds after that)"""


def go_on(engine: LearnerEngine) -> Course:
    before = contents(engine)
    torch.rand(3)  # as dropout would
    metrics = update(engine, make_samples(5, seed=9))
    after = contents(engine)
    engine.close()
    return before, metrics, after


def save_and_go_on(path: str, directory: str, dtype: str, threshold: int, num_updates: int = 2) -> Course:
    engine = engine_of(path, dtype, threshold)
    for i in range(num_updates):
        update(engine, make_samples(5, seed=i))
    write(engine, directory)
    return go_on(engine)


def restore_and_go_on(path: str, directory: str, dtype: str, threshold: int, again: str | None = None) -> Course:
    """In an engine that has gone another way before."""
    engine = engine_of(path, dtype, threshold)
    update(engine, make_samples(3, seed=77))
    engine.restore(files(directory))
    if again:
        write(engine, again)
    return go_on(engine)


def assert_same(got: Course, want: Course) -> None:
    assert differing(got[0], want[0]) == []
    assert got[1] == want[1]
    assert differing(got[2], want[2]) == []
    assert "step" in differing(want[0], want[2]) and "rng/cpu" in differing(want[0], want[2])


# ---- restoring


@pytest.mark.parametrize(("dtype", "threshold"), EVERY_KIND)
def test_one_rank_goes_on_bit_for_bit(model_dirs: dict[bool, str], tmp_path: Path, dtype: str, threshold: int):
    arguments = model_dirs[True], str(tmp_path), dtype, threshold
    want = save_and_go_on(*arguments)
    assert_same(restore_and_go_on(*arguments), want)


@pytest.mark.parametrize(("dtype", "threshold"), EVERY_KIND)
def test_two_ranks_go_on_bit_for_bit(
    model_dirs: dict[bool, str], on_two_ranks: Ranks, tmp_path: Path, dtype: str, threshold: int
):
    arguments = model_dirs[False], str(tmp_path), dtype, threshold
    want = on_two_ranks(save_and_go_on, *arguments)
    for g, w in zip(on_two_ranks(restore_and_go_on, *arguments), want, strict=True):
        assert_same(g, w)


def test_a_checkpoint_from_before_the_first_update_is_one_too(model_dirs: dict[bool, str], tmp_path: Path):
    arguments = model_dirs[True], str(tmp_path), "float32", ALL_SHARDED
    want = save_and_go_on(*arguments, 0)
    assert want[0]["step"] == b"0"
    assert_same(restore_and_go_on(*arguments), want)


def forward_weights(courses: list[Course]) -> dict[str, np.ndarray]:
    """The ranks' pieces after the last update, in rank order, put together."""
    names = dict.fromkeys(n for _, _, after in courses for n in after if n.startswith("forward/"))
    return {n: floats(b"".join(after.get(n, b"") for _, _, after in courses)) for n in names}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_another_number_of_ranks_restores_the_same_state(
    model_dirs: dict[bool, str], on_two_ranks: Ranks, tmp_path: Path, num_ranks: int
):
    on: dict[int, Callable[..., list[Course]]] = {1: lambda call, *args: [call(*args)], 2: on_two_ranks}
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    want = on[num_ranks](save_and_go_on, model_dirs[True], first, "float32", SMALL_GATHERED)
    got = on[3 - num_ranks](restore_and_go_on, model_dirs[True], first, "float32", SMALL_GATHERED, second)

    one, other = state.StateFiles(files(first)), state.StateFiles(files(second))
    assert one.step == other.step == 2
    assert one.shapes == other.shapes
    for name, shape in one.shapes.items():
        for kind in state.KINDS:
            a, b = (f.read(kind, name, 0, int(np.prod(shape))) for f in (one, other))
            np.testing.assert_array_equal(a, b, err_msg=f"{kind}/{name}")
    expected = forward_weights(want)
    for name, weights in forward_weights(got).items():
        np.testing.assert_allclose(weights, expected[name], atol=5e-5, err_msg=name)
    assert got[0][1] == pytest.approx(want[0][1], rel=1e-4, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("tied", [True, False])
def test_whole_parameters_are_those_of_the_saved_model(
    model_dirs: dict[bool, str], on_two_ranks: Ranks, tmp_path: Path, tied: bool
):
    on_two_ranks(save_and_go_on, model_dirs[tied], str(tmp_path), "float32", ALL_SHARDED, 0)
    got = state.read_parameters(files(tmp_path))
    want = dict(AutoModelForCausalLM.from_pretrained(model_dirs[tied]).named_parameters())
    assert got.keys() == want.keys()
    for name, parameter in want.items():
        np.testing.assert_array_equal(got[name], parameter.detach().numpy(), err_msg=name)


def test_another_model_is_refused_with_the_first_difference(model_dirs: dict[bool, str], tmp_path: Path):
    engine = engine_of(model_dirs[True])
    write(engine, str(tmp_path / "tied"))
    engine.close()
    engine = engine_of(model_dirs[False])
    with pytest.raises(ValueError, match=r"another model: it lacks lm_head\.weight, \(40, 32\) in the model"):
        engine.restore(files(tmp_path / "tied"))
    write(engine, str(tmp_path / "untied"))
    engine.close()

    engine = engine_of(model_dirs[True])
    with pytest.raises(ValueError, match=r"another model: it has lm_head\.weight, which the model has not"):
        engine.restore(files(tmp_path / "untied"))
    engine.close()

    config = Qwen3Config.from_pretrained(model_dirs[True])
    config.intermediate_size = 48
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "narrow")
    engine = engine_of(str(tmp_path / "narrow"))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_proj\.weight is \(64, 32\) there, \(48, 32\) in"):
        engine.restore(files(tmp_path / "tied"))
    engine.close()


def test_a_missing_ranks_file_is_noticed(model_dirs: dict[bool, str], on_two_ranks: Ranks, tmp_path: Path):
    on_two_ranks(save_and_go_on, model_dirs[True], str(tmp_path), "float32", ALL_SHARDED, 0)
    with pytest.raises(ValueError, match=r"640 of 1280 elements found; a rank's file is missing"):
        state.read_parameters(files(tmp_path)[:1])


def test_files_of_two_checkpoints_are_not_mixed(model_dirs: dict[bool, str], tmp_path: Path):
    for n in (0, 1):
        save_and_go_on(model_dirs[True], str(tmp_path / str(n)), "float32", ALL_SHARDED, n)
    with pytest.raises(ValueError, match=r"of updates \[0, 1\]"):
        state.StateFiles([*files(tmp_path / "0"), *files(tmp_path / "1")])


def test_a_rank_reads_its_own_file_where_there_is_one_and_otherwise_all():
    names = ["groups.safetensors", "learner-0-of-2.safetensors", "learner-1-of-2.safetensors"]
    assert state.files_for(1, 2, names) == names[2:]
    assert state.files_for(1, 3, names) == names[1:]
    with pytest.raises(ValueError, match=r"no learner-RANK-of-N\.safetensors among groups\.safetensors"):
        state.files_for(0, 1, names[:1])


def test_the_file_is_one_that_safetensors_reads(model_dirs: dict[bool, str], tmp_path: Path):
    engine = engine_of(model_dirs[True])
    write(engine, str(tmp_path))
    tensors, metadata = engine.snapshot()
    engine.close()
    with safe_open(tmp_path / "learner-0-of-1.safetensors", framework="pt") as file:
        assert file.metadata() == metadata
        assert set(file.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor), name


# ---- bad updates


INFINITE = [replace(s, advantage=float("inf") if i == 0 else s.advantage) for i, s in enumerate(make_samples(5))]


def skip_and_go_on(path: str, dtype: str, threshold: int, *bad: tuple[list[Sample], float]) -> Course:
    engine = engine_of(path, dtype, threshold)
    update(engine, make_samples(5))
    for samples, constant in bad:
        before = contents(engine)
        metrics = update(engine, samples, constant)
        assert metrics["policy/skipped"] == 1.0
        assert differing(contents(engine), before) == []
    return go_on(engine)


@pytest.mark.parametrize(("dtype", "threshold"), EVERY_KIND)
def test_a_bad_update_is_as_if_it_had_not_been(
    model_dirs: dict[bool, str], on_two_ranks: Ranks, dtype: str, threshold: int
):
    """Also one where the loss alone is not finite, and that on one rank."""
    arguments = model_dirs[True], dtype, threshold
    bad = (INFINITE, 0.0), (make_samples(5), float("nan"))
    for on in (lambda call, *args: [call(*args)], on_two_ranks):
        for got, want in zip(on(skip_and_go_on, *arguments, *bad), on(skip_and_go_on, *arguments), strict=True):
            assert_same(got, want)
            assert got[1]["policy/skipped"] == 0.0


def test_only_so_many_bad_updates_in_a_row_stop_the_run(model_dirs: dict[bool, str]):
    engine = engine_of(model_dirs[True])
    for samples in (INFINITE, INFINITE, make_samples(5), INFINITE, INFINITE):
        update(engine, samples)
    before = contents(engine)
    with pytest.raises(FloatingPointError, match=r"not finite in 3 updates in a row \(learner\.max_skips\)"):
        update(engine, INFINITE)
    assert differing(contents(engine), before) == []
    engine.close()


# ---- the worker


async def gone() -> Group:
    """A group that went away with its node."""
    raise ObjectLostError("00", None, "")


async def test_a_worker_goes_on_from_its_checkpoint(model_dirs: dict[bool, str], local_ray: None, tmp_path: Path):
    groups = [make_group(d) for d in range(3)]
    place, name = str(tmp_path), "batch-000001"
    config = config_of(warmup_updates=5)

    worker = await one_rank(model_dirs[True], config)
    plan, refs = plan_of(await grade(worker, groups)), {g.draw: ready(g) for g in groups}
    await worker.update(plan, refs)
    waiting = {5: ready(make_group(5)), 6: gone(), 4: ready(make_group(4))}
    await worker.snapshot()
    entries = await worker.checkpoint(place, name, waiting)
    assert [e.name for e in entries] == ["learner-0-of-1.safetensors", "groups.safetensors"]
    checkpoint.commit(place, name, {}, entries)
    want = await worker.update(plan, refs), contents(worker._engine)
    await worker.close()

    worker = await one_rank(model_dirs[True], config)
    await worker.restore(place, name, [e.name for e in entries], num_updates=1)
    got = await worker.update(plan, refs), contents(worker._engine)
    assert got[0] == [pytest.approx(want[0][0], rel=0, abs=0, nan_ok=True)]
    assert differing(got[1], want[1]) == []
    assert got[0][0]["policy/lr"] == pytest.approx(2 / 5 * config.lr)
    restored = await worker.restore_groups(place, name)
    assert sorted(restored) == [4, 5]
    for draw, [ref] in restored.items():
        group = ray.get(ref)
        assert [t.text for t in group.trajectories] == [t.text for t in make_group(draw).trajectories]
    await worker.close()

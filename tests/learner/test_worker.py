import asyncio
import os
import shutil
import tempfile
import threading
from collections.abc import Awaitable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported

import numpy as np
import pytest
import ray
from transformers import AutoModelForCausalLM

from stepgrpo.config import LearnerConfig, ModelConfig, RewardConfig, RolloutConfig
from stepgrpo.learner.batch import Plan, collate, joined, make_plan, sample_of
from stepgrpo.learner.loss import policy_loss
from stepgrpo.learner.worker import LearnerWorker
from stepgrpo.types import Exit, GradedGroup, Group, Prompt, Trajectory, VersionSpan
from stepgrpo.weights import Manifest, assemble, layout
from tests.learner.tiny import VOCAB, make_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # DeepSpeed's calls of torch.distributed
T = TypeVar("T")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, tied=True)
    return str(directory)


def make_trajectory(prompt: np.ndarray, rng: np.random.Generator, exit_: Exit) -> Trajectory:
    n = int(rng.integers(6, 20))
    token_ids = np.concatenate([prompt, rng.integers(0, VOCAB, n)]).astype(np.int32)
    sampled = np.arange(len(token_ids)) >= len(prompt)
    closing = None if exit_ in (Exit.NATURAL, Exit.EOS) else (len(prompt) + 2, len(prompt) + 4)
    if closing:
        sampled[slice(*closing)] = False
    return Trajectory(
        prompt_len=len(prompt),
        token_ids=token_ids,
        logprobs=np.where(sampled, -rng.uniform(2, 5, len(token_ids)), 0).astype(np.float32),
        sampled=sampled,
        text=rf"4 Wait 5 Wait 6 </think> \boxed {{ {rng.integers(2)} }}",
        exit=exit_,
        closing=closing,
        complete=True,
        control=False,
        spans=(VersionSpan(0, 0, n),),
    )


def make_group(draw: int, exits: tuple[Exit, ...] = (Exit.NATURAL, Exit.CONFIDENT, Exit.BUDGET)) -> Group:
    rng = np.random.default_rng(draw)
    prompt = Prompt(draw, f"p{draw}", rng.integers(0, VOCAB, 4).astype(np.int32), truth="1")
    return Group(prompt, tuple(make_trajectory(prompt.token_ids, rng, e) for e in exits))


def config_of(**changes: Any) -> LearnerConfig:
    return LearnerConfig(**({"lr": 1e-3, "micro_batch_tokens": 60, "kl_coef": 0.1, "bucket_mb": 1} | changes))


def arguments(model_dir: str, config: LearnerConfig) -> dict[str, Any]:
    return {
        "config": config,
        "model": ModelConfig(path=model_dir, dtype="float32"),
        "device": "cpu",
        "total_updates": 10,
        "rollout": RolloutConfig(triggers=["Wait"]),
        "reward": RewardConfig(grader="exact"),
    }


def ready(value: T) -> Awaitable[T]:
    """An object reference, as far as the worker can tell."""
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    future.set_result(value)
    return future


async def one_rank(model_dir: str, config: LearnerConfig) -> LearnerWorker:
    worker = LearnerWorker(0, 1, **arguments(model_dir, config))
    await worker.setup(*await worker.listen())
    return worker


async def grade(worker: LearnerWorker, groups: list[Group]) -> list[GradedGroup]:
    return [await worker.ingest([ready(g)]) for g in groups]


def plan_of(graded: list[GradedGroup], *, num_ranks: int = 1, num_updates: int = 1) -> Plan:
    rng = np.random.default_rng(0)
    return make_plan(
        graded,
        [rng.normal(size=len(g.facts)).astype(np.float32) for g in graded],
        version=0,
        num_updates=num_updates,
        num_ranks=num_ranks,
        budget_tokens=60,
        packed=True,
    )


def whole(parts: list[tuple[Manifest, list[np.ndarray]]]) -> dict[str, np.ndarray]:
    """Published float32 weights, put together."""
    manifests = [m for m, _ in parts]
    out = np.empty(layout(manifests)[1], np.uint8)
    table = assemble(manifests, lambda rank, bucket: parts[rank][1][bucket], out)
    return {
        name: out[slot["offset"] :][: 4 * int(np.prod(slot["shape"]))].view(np.float32) for name, slot in table.items()
    }


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    directory = tempfile.mkdtemp(prefix="r", dir="/tmp")
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
    ray.init(
        num_cpus=2,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
        _temp_dir=directory,
        object_store_memory=100 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


async def test_ingesting_a_group_yields_what_rewards_and_plans_read(model_dir: str):
    worker = LearnerWorker(0, 1, **arguments(model_dir, config_of()))
    group = make_group(7)
    graded = await worker.ingest([ready(group)])
    assert (graded.draw, graded.key) == (7, "p7")
    for fact, t in zip(graded.facts, group.trajectories, strict=True):
        assert fact.correct == (r"{ 1 }" in t.text)
        assert fact.formatted and fact.num_steps == 3
        assert fact.total_len == len(t.token_ids)
        assert fact.num_loss_tokens == t.sampled.sum() + (2 if t.exit is Exit.CONFIDENT else 0)
    await worker.close()


async def test_grading_goes_on_while_the_engine_is_busy(model_dir: str):
    worker = LearnerWorker(0, 1, **arguments(model_dir, config_of()))
    update_may_end = threading.Event()
    update = asyncio.create_task(worker._run(update_may_end.wait, 60))
    graded = await worker.ingest([ready(make_group(7))])
    assert graded.draw == 7 and not update.done()
    update_may_end.set()
    assert await update
    await worker.close()


async def test_old_log_probabilities_are_those_before_the_first_of_several_updates(model_dir: str):
    groups = [make_group(d) for d in range(4)]
    worker = await one_rank(model_dir, config_of())
    plan = plan_of(await grade(worker, groups), num_updates=2)
    metrics = await worker.update(plan, {g.draw: ready(g) for g in groups})
    trained = {p.name: p.data.copy() for p in worker._engine.shards()}
    await worker.close()

    by_hand = await one_rank(model_dir, config_of())
    engine = by_hand._engine
    work = []
    for update in plan.updates:
        for rows in update.micro_batches[0]:
            samples = [sample_of(groups[d].trajectories[i], plan.advantages[d][i], True) for d, i in rows]
            batch = collate(samples, True, engine.pad_id)
            old, _ = engine.logprobs(batch)
            work.append((update, replace(batch, old=old, reference=old)))
    for update, reported in zip(plan.updates, metrics, strict=True):
        objective = partial(
            policy_loss,
            clip_low=0.2,
            clip_high=0.3,
            dual_clip=3.0,
            importance_cap=2.0,
            kl_coef=0.1,
            scale=1 / update.num_loss_tokens,
        )
        expected = engine.update([b for u, b in work if u is update], objective, lr=1e-3, own_version=0)
        assert reported == pytest.approx(expected, rel=1e-5, nan_ok=True)
    for piece in engine.shards():
        np.testing.assert_array_equal(piece.data, trained[piece.name], err_msg=piece.name)
    assert metrics[0]["policy/kl"] == pytest.approx(0, abs=1e-9)
    assert metrics[1]["policy/kl"] > 1e-6, "the first update moved the policy away from the reference"
    await by_hand.close()


async def test_a_batch_in_parts_is_trained_as_the_whole(model_dir: str):
    groups = [make_group(d) for d in range(5)]
    at_once = await one_rank(model_dir, config_of())
    graded = await grade(at_once, groups)
    plan = plan_of(graded)
    expected = await at_once.update(plan, {g.draw: ready(g) for g in groups})

    worker = await one_rank(model_dir, config_of())
    parts = []
    for draws in ((0, 3), (1,), (2, 4)):
        some = [graded[d] for d in draws]
        advantages = [plan.advantages[d] for d in draws]
        parts.append(make_plan(some, advantages, version=0, num_updates=1, num_ranks=1, budget_tokens=60, packed=True))
        refs = {d: ready(groups[d]) for d in draws}
        assert await worker.fetch(parts[-1], refs) == []
        await worker.accumulate(parts[-1], refs)
    assert joined(parts).draws(0) == plan.draws(0)
    [update] = joined(parts).updates
    assert update.num_loss_tokens == plan.updates[0].num_loss_tokens
    assert await worker.step(0, update.num_loss_tokens) == [pytest.approx(expected[0], rel=1e-5, abs=1e-7, nan_ok=True)]
    # Adam divides a first gradient by its own size: rounding of a tiny one shows.
    for got, want in zip(worker._engine.shards(), at_once._engine.shards(), strict=True):
        np.testing.assert_allclose(got.data.view(np.float32), want.data.view(np.float32), atol=5e-5, err_msg=got.name)
    await worker.close()
    await at_once.close()


@pytest.mark.parametrize(
    ("exit_", "train_exit_tokens", "learns"),
    [(Exit.CONFIDENT, True, True), (Exit.CONFIDENT, False, False), (Exit.BUDGET, True, False)],
)
async def test_only_the_closing_of_a_confident_exit_has_a_gradient(
    model_dir: str, exit_: Exit, train_exit_tokens: bool, learns: bool
):
    group = make_group(3, (exit_, exit_))
    # A behaviour far more likely than the policy: importance weights of sampled tokens vanish, a closing's is 1.
    loud = tuple(replace(t, logprobs=np.where(t.sampled, 50, 0).astype(np.float32)) for t in group.trajectories)
    group = Group(group.prompt, loud)
    worker = await one_rank(model_dir, config_of(kl_coef=0.0, train_exit_tokens=train_exit_tokens))
    plan = plan_of(await grade(worker, [group]))
    [metrics] = await worker.update(plan, {3: ready(group)})
    assert (metrics["policy/grad_norm"] > 1e-2) if learns else (metrics["policy/grad_norm"] < 1e-6)
    assert np.isnan(metrics["closing/logprob"]) != learns
    await worker.close()


async def test_a_plan_without_its_groups_is_refused(model_dir: str):
    worker = LearnerWorker(0, 1, **arguments(model_dir, config_of()))
    plan = plan_of(await grade(worker, [make_group(1), make_group(2)]))
    with pytest.raises(AssertionError, match="draws"):
        await worker.update(plan, {1: ready(make_group(1))})
    await worker.close()


async def test_versions_published_as_what_changed_are_the_weights_of_each(model_dir: str, local_ray: None):
    """With steps so small that float32 does not change everywhere."""
    worker = await one_rank(model_dir, config_of(lr=3e-10, weight_decay=0.0, full_every=3))
    rng = np.random.default_rng(5)
    pairs = [(rng.integers(0, VOCAB, 3), rng.integers(0, VOCAB, 8))]
    put = []
    for version in range(1, 5):
        manifest, refs = await worker.publish(version)
        put.append((manifest.whole_bytes > 0, manifest.difference_bytes > 0))
        published = whole([(manifest, ray.get(list(refs)))])
        for piece in worker._engine.shards():
            assert np.array_equal(published[piece.name], piece.data.view(np.float32)), f"{piece.name} of {version}"
        await worker.train_pairs([ready(pairs)])
    assert put == [(True, False), (False, True), (False, True), (True, False)]
    await worker.close()


async def test_two_actors_train_publish_and_save_as_one_does(model_dir: str, local_ray: None, tmp_path: Path):
    groups = [make_group(d) for d in range(5)]
    rng = np.random.default_rng(5)
    pairs = [(rng.integers(0, VOCAB, 3), rng.integers(0, VOCAB, int(rng.integers(2, 9)))) for _ in range(5)]

    alone = await one_rank(model_dir, config_of())
    expected = await alone.update(
        plan_of(await grade(alone, groups), num_updates=2), {g.draw: ready(g) for g in groups}
    )
    expected.append(await alone.train_pairs([ready(pairs)]))
    expected_weights = {p.name: p.data.copy().view(np.float32) for p in alone._engine.shards()}
    await alone.close()

    actor = ray.remote(num_cpus=1, concurrency_groups={"ingest": 8})(LearnerWorker)
    actors = [actor.remote(r, 2, **arguments(model_dir, config_of())) for r in range(2)]
    try:
        host, port = await actors[0].listen.remote()
        await asyncio.gather(*(a.setup.remote(host, port) for a in actors))
        refs = {g.draw: ray.put(g) for g in groups}
        graded = await asyncio.gather(*(actors[d % 2].ingest.remote([ref]) for d, ref in refs.items()))
        plan = plan_of(graded, num_ranks=2, num_updates=2)
        results = await asyncio.gather(*(a.update.remote(plan, refs) for a in actors))
        pairs_ref = ray.put(pairs)
        for result, sft in zip(
            results, await asyncio.gather(*(a.train_pairs.remote([pairs_ref]) for a in actors)), strict=True
        ):
            for got, want in zip([*result, sft], expected, strict=True):
                assert got == pytest.approx(want, rel=1e-4, abs=1e-5, nan_ok=True)
        published = await asyncio.gather(*(a.publish.remote(1) for a in actors))
        got_weights = whole([(m, ray.get(list(buckets))) for m, buckets in published])
        assert got_weights.keys() == expected_weights.keys()
        for name, want in expected_weights.items():
            np.testing.assert_allclose(got_weights[name], want, atol=5e-6, err_msg=name)
        await asyncio.gather(*(a.save.remote(str(tmp_path / "model")) for a in actors))
        for name, p in AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_parameters():
            np.testing.assert_array_equal(p.detach().numpy().ravel(), got_weights[name])
    finally:
        for a in actors:
            ray.kill(a)

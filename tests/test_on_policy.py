"""Strictly on-policy runs: they repeat bit for bit, also where engine and learner take turns or groups are streamed."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.runs import Json, Run, train


@pytest.fixture(scope="module")
def twins(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """The same strictly on-policy run, twice; the second time with engine and learner taking turns, and beside somebody
    who fills the object store."""
    directory = tmp_path_factory.mktemp("twins")
    settings = ["train.num_batches=3", "train.max_staleness=0", "train.refill=true", "eval.every=1"]
    first = train(directory, "first", *settings)
    with full_store(cluster):
        return first, train(directory, "second", *settings, "cluster.colocate=true")


@contextmanager
def full_store(cluster: str) -> Iterator[None]:
    """Another job of the cluster keeps more than its object store holds."""
    fill = "import numpy, ray, sys; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR')\n"
    fill += "kept = [ray.put(numpy.ones(20 << 20, 'uint8')) for _ in range(12)]; print('full', flush=True); input()"
    command = [sys.executable, "-c", fill, cluster]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "full\n"
        yield


def test_a_full_object_store_slows_a_run_and_is_told(twins: tuple[Run, Run]) -> None:
    assert "an object store is full and writes to disk" in twins[1].screen
    assert all(x["store/spilled"] >= 90 << 20 for x in twins[1].lines("metrics") if "store/spilled" in x)
    assert "an object store is full" not in twins[0].screen


def without_the_clock(lines: list[Json]) -> list[Json]:
    timed = ("time/", "rate/", "discarded/", "seconds", "store/")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


@pytest.mark.parametrize("name", ["metrics", "draws", "evaluations"])
def test_two_on_policy_runs_with_one_seed_write_the_same_lines(twins: tuple[Run, Run], name: str) -> None:
    first, second = (without_the_clock(r.lines(name)) for r in twins)
    assert first == second


def test_two_on_policy_runs_with_one_seed_end_in_the_same_weights(twins: tuple[Run, Run]) -> None:
    first, second = ((r.model / "model.safetensors").read_bytes() for r in twins)
    assert first == second


def test_where_engine_and_learner_take_turns_one_sleeps_while_the_other_works(twins: tuple[Run, Run]) -> None:
    spans = twins[1].lines("spans")
    happened = Counter((s["actor"].split()[0], s["name"]) for s in spans)
    assert happened["rollout", "sleep"] == happened["rollout", "wake"] == happened["learner", "wake"] == 3
    assert happened["learner", "sleep"] == 4, "once more before the engine starts"
    sampling, learning = (
        sorted((s["start"], s["start"] + s["seconds"]) for s in spans if s["name"] in names)
        for names in (("generate", "evaluate", "load"), ("update", "publish", "snapshot"))
    )
    assert sampling and learning
    assert not [(a, b) for a in sampling for b in learning if a[0] < b[1] and b[0] < a[1]]
    # The hand-over after a batch is of the next one's time.
    handed_over = sorted(s["start"] for s in spans if s["name"] == "sleep" and s["actor"] == "learner rank 0")[1:]
    published = sorted(s["start"] + s["seconds"] for s in spans if s["name"] == "publish")
    times = [x["time/batch"] for x in twins[1].lines("metrics") if "time/batch" in x]
    for batch in (1, 2):
        assert times[batch] > published[batch] - handed_over[batch - 1] - 0.005


def test_an_on_policy_run_meets_only_tokens_of_its_own_version(twins: tuple[Run, Run]) -> None:
    lines = twins[0].lines("metrics")
    assert [x["staleness/max"] for x in lines] == [0] * len(lines)
    assert all(x["mismatch/max"] < 1e-4 for x in lines), "float32 on both sides"
    assert [x["importance/mean"] for x in lines] == pytest.approx([1] * len(lines), abs=1e-4), "old is behaviour"


def test_groups_without_signal_are_replaced(twins: tuple[Run, Run]) -> None:
    draws = twins[0].lines("draws")
    assert any(batch["filtered"] for batch in draws), "nothing to replace: this run shows nothing"
    assert all(len(batch["trained"]) == 4 or len(batch["filtered"]) == 4 for batch in draws)
    assert all(x["reward/signal"] == 1 for x in twins[0].lines("metrics"))


@pytest.fixture(scope="module")
def streamed(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """The same strictly on-policy run, learning from whole batches and from groups as they come."""
    directory = tmp_path_factory.mktemp("streamed")
    settings = ["train.num_batches=2", "train.max_staleness=0", "train.prompts_per_update=4"]
    settings += ["data.eval=null", "eval.every=0", "learner.micro_batch_tokens=244"]
    return train(directory, "whole", *settings), train(directory, "parts", *settings, "learner.stream=true")


def test_learning_from_groups_as_they_come_makes_the_updates_of_whole_batches(streamed: tuple[Run, Run]) -> None:
    whole, parts = (without_the_clock(r.lines("metrics")) for r in streamed)
    for expected, got in zip(whole, parts, strict=True):
        figures = {k for k, v in expected.items() if v is not None}
        assert figures == {k for k, v in got.items() if v is not None}
        assert {k: got[k] for k in figures} == pytest.approx({k: expected[k] for k in figures}, rel=1e-3, abs=1e-5)
    fetched = [s for s in streamed[1].lines("spans") if s["name"] == "fetch"]
    assert len(fetched) > len(parts), "no batch came in parts"
    assert streamed[0].lines("draws") == streamed[1].lines("draws")

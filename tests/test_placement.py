import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from stepgrpo.config import Config, ConfigError, load
from stepgrpo.placement import all_bundles, plan, shown
from stepgrpo.rundir import read_json_lines
from tests.nodes import cluster_of

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
MINIATURE = ROOT / "examples" / "miniature"
STEPGRPO = Path(sys.executable).with_name("stepgrpo")
MEMORY = 100 << 20
SECONDS = 240.0


def config(*overrides: str, file: str = "qwen3_8b") -> Config:
    return load(Config, CONFIGS / f"{file}.yaml", list(overrides))


def test_ranks_lie_together_and_workers_where_most_is_free() -> None:
    c = config("learner.num_ranks=6", "rollout.workers=4")
    four = plan(c, [{"GPU": 4, "CPU": 64}] * 4)
    assert four is not None
    assert [shown(names) for names in four] == [
        "learner ranks 0-3",
        "learner ranks 4-5",
        "rollout workers 0, 2",
        "rollout workers 1, 3",
    ]


def test_an_engine_of_several_gpus_lies_on_one_node() -> None:
    c = config("learner.num_ranks=2", "rollout.workers=3", "engine.tensor_parallel=2")
    lies = plan(c, [{"GPU": 4, "CPU": 64}] * 2)
    assert lies == [["learner rank 0", "learner rank 1", "rollout worker 1"], ["rollout worker 0", "rollout worker 2"]]
    assert plan(c, [{"GPU": 1, "CPU": 64}] * 8) is None


def test_a_rank_and_a_worker_share_a_gpu_where_they_take_turns() -> None:
    c = config("cluster.colocate=true", "train.max_staleness=0", "learner.num_ranks=2", "rollout.workers=2")
    assert [b.gpus for b in all_bundles(c)] == [1, 1]
    assert plan(c, [{"GPU": 1, "CPU": 64}] * 2) == [
        ["learner rank 0", "rollout worker 0"],
        ["learner rank 1", "rollout worker 1"],
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learner.num_ranks=2", "rollout.workers=2"], "train.max_staleness: got 1, takes 0 where cluster.colocate"),
        (["train.max_staleness=0", "rollout.workers=3"], "rollout.workers: got 3, takes learner.num_ranks (4)"),
        (["train.max_staleness=0", "engine.tensor_parallel=2"], "engine.tensor_parallel: got 2, takes 1"),
    ],
)
def test_what_cannot_take_turns_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config("cluster.colocate=true", *overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["learner rank 0"], "learner rank 0"),
        (["rollout worker 3", "learner rank 1", "learner rank 0"], "learner ranks 0-1, rollout worker 3"),
        ([f"rollout worker {i}" for i in (0, 1, 2, 5, 11, 10, 12)], "rollout workers 0-2, 5, 10-12"),
    ],
)
def test_names_are_shown_as_ranges(names: list[str], text: str) -> None:
    assert shown(names) == text


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that holds no actor, and two nodes."""
    ray.shutdown()
    with cluster_of(num_cpus=0, object_store_memory=MEMORY) as cluster:
        for _ in range(2):
            cluster.add_node(num_cpus=2, object_store_memory=MEMORY)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
        ray.shutdown()


def test_a_run_lies_as_printed_takes_a_node_that_comes_and_leaves_one_that_is_drained(
    nodes: Cluster, tmp_path: Path
) -> None:
    settings = [
        "name=nodes",
        f"runs_dir={tmp_path}",
        f"model.path={MINIATURE / 'model'}",
        f"data.train={MINIATURE / 'data' / 'train.jsonl'}",
        "data.eval=null",
        "eval.every=0",
        "rollout.workers={min: 1, max: 2}",
        "rollout.group_size=4",
        "rollout.in_flight_updates=false",
        "engine.kv_cache_mb=64",
        "learner.num_ranks=2",
        "learner.schedule=constant",
        "cluster.cpus_per_worker=2",
        "train.prompts_per_batch=4",
        "train.prompts_per_update=4",
        "train.num_batches=100000",
        "checkpoint.every=0",
    ]
    directory, screen = tmp_path / "nodes", tmp_path / "screen.txt"

    def lines(name: str) -> list[dict[str, Any]]:
        return list(read_json_lines(directory / f"{name}.jsonl"))

    def event(kind: str) -> dict[str, Any] | None:
        return next((e for e in lines("events") if e["kind"] == kind), None)

    def generated(worker: int, event: dict[str, Any] | None) -> bool:
        """Whether a worker has done something since."""
        return event is not None and any(
            s["actor"] == f"rollout worker {worker}" and s["name"] == "generate" and s["start"] > event["time"]
            for s in lines("spans")
        )

    def wait(what: str, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            assert process.poll() is None and time.monotonic() < end, f"{what}: {screen.read_text()}"
            time.sleep(0.2)

    with screen.open("w") as out:
        command = [STEPGRPO, "train", CONFIGS / "quickstart.yaml", *settings]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait("the first batches", lambda: len(lines("draws")) >= 2)
        nodes.add_node(num_cpus=2, object_store_memory=MEMORY)
        wait("work on the new node", lambda: generated(1, event("joined")))
        placed = event("placement")
        assert placed is not None
        old = next(node for node, names in placed["nodes"].items() if "rollout worker 0" in names)
        ray.init(nodes.address, log_to_driver=False, logging_level="ERROR")
        gcs = ray._private.worker.global_worker.gcs_client
        assert gcs.drain_node(old, 2, "spot", int((time.time() + SECONDS) * 1000))[0]
        wait("work without the drained node", lambda: generated(1, event("left")))
        trained = {draw for line in lines("draws") for draw in (*line["trained"], *line["filtered"])}

        def done() -> set[int]:
            return {s["draw"] for s in lines("spans") if s["name"] == "generate"}

        wait("all that was done, also by the worker that left", lambda: trained <= done())
    finally:
        process.terminate()
        process.wait(SECONDS)
    assert not event("death"), lines("events")
    stale = [x["staleness/max"] for x in lines("metrics")]
    assert max(stale) == 1, "no weights came while trajectories were decoded"
    assert {x["staleness/mixed"] for x in lines("metrics")} == {0}
    printed = [line.strip() for line in screen.read_text().splitlines() if line.startswith("  node ")]
    planned = plan(load(Config, CONFIGS / "quickstart.yaml", settings), [{"CPU": 2}] * 2)
    assert planned is not None
    assert sorted(line.split(": ")[1] for line in printed) == sorted(shown(names) for names in planned)
    assert [line.split(":")[0] for line in printed] == [f"node {node[:8]}" for node in placed["nodes"]]
    assert f"leaves node {old[:8]}" in screen.read_text()

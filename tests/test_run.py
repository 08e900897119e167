"""A whole run in the miniature, one version behind at most, over two learner ranks: what it does and leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from stepgrpo.actors.engine import CPU_ENV
from stepgrpo.cli import app
from stepgrpo.config import Config, validate
from stepgrpo.metrics import METRICS
from tests.browser import opened
from tests.runs import MINIATURE, QUICKSTART, SMALL, Run, descendants, read_lines, shared_memory, train


def held_out_prompts(number: int) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(MINIATURE / "model")
    problems = read_lines(MINIATURE / "data" / "heldout.jsonl")[:number]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p["problem"]}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for p in problems
    ]


class Watch:
    """Samples, beside a run, what its published weights take up: (batches done, object store, shared memory)."""

    def __init__(self, address: str, run_dir: Path) -> None:
        self.samples: list[tuple[int, int, int]] = []
        self.directory: Path | None = None
        self._state = get_state_from_address(address)
        self._draws = run_dir / "draws.jsonl"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.3):
            if not self._draws.exists():
                continue
            self.directory = self.directory or next(iter(shared_memory(descendants())), None)
            if self.directory is None:
                continue
            done = len(read_lines(self._draws))
            store = get_memory_info_reply(self._state).store_stats.object_store_bytes_used
            self.samples.append((done, store, sum(f.stat().st_size for f in self.directory.glob("*.bin"))))


@pytest.fixture(scope="module")
def watched(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Watch]:
    """A run of 50 versions, one version behind at most, by two learner ranks."""
    directory = tmp_path_factory.mktemp("stale")
    with Watch(cluster, directory / "stale") as watch:
        return (
            train(
                directory,
                "stale",
                "train.num_batches=50",
                "train.prompts_per_update=4",
                "train.max_staleness=1",
                "train.refill=true",
                "eval.every=10",
                "learner.num_ranks=2",
                "learner.bucket_mb=1",
                "cluster.cpus_per_rank=0.5",
            ),
            watch,
        )


@pytest.fixture(scope="module")
def stale(watched: tuple[Run, Watch]) -> Run:
    return watched[0]


def test_staleness_reaches_its_bound_and_never_exceeds_it(stale: Run) -> None:
    lines = stale.lines("metrics")
    assert {x["staleness/max"] for x in lines} == {0, 1}
    assert all(x["staleness/mean"] <= x["staleness/max"] for x in lines)
    assert any(x["staleness/mixed"] for x in lines), "no weights changed during a trajectory"


def test_every_draw_is_used_once_and_none_is_lost(stale: Run) -> None:
    batches = stale.lines("draws")
    assert [b["batch"] for b in batches] == list(range(50))
    for b in batches:
        assert b["trained"] == sorted(b["trained"]) and b["filtered"] == sorted(b["filtered"])
    used = [sorted(b["trained"] + b["filtered"]) for b in batches]
    assert [d for batch in used for d in batch] == list(range(sum(map(len, used)))), "batches are in draw order"


def test_what_each_actor_did_is_recorded(stale: Run) -> None:
    spans = stale.lines("spans")

    def of(name: str, key: str) -> list[tuple[str, Any]]:
        return sorted((s["actor"], s[key]) for s in spans if s["name"] == name)

    ranks = ("learner rank 0", "learner rank 1")
    draws = sorted(d for b in stale.lines("draws") for d in b["trained"] + b["filtered"])
    assert of("generate", "draw") == [("rollout worker 0", d) for d in draws]
    assert of("grade", "draw") == sorted((ranks[d % 2], d) for d in draws)
    assert of("wait", "batch") == of("batch", "batch") == [("driver", n) for n in range(50)]
    for name, key in (("fetch", "batch"), ("update", "batch"), ("publish", "version")):
        first = key == "version"
        assert of(name, key) == [(r, n) for r in ranks for n in range(first, 50 + first)]
    loaded = [version for _, version in of("load", "version")]
    assert loaded == sorted(set(loaded)) and loaded[-1] == 50
    assert {s["draw"] % 16 for s in spans if s["name"] == "probe"} == {0}
    end = {s["draw"]: s["start"] + s["seconds"] for s in spans if s["name"] == "generate"}
    assert all(s["start"] >= end[s["draw"]] - 0.05 for s in spans if s["name"] == "grade"), "one clock for all"


def test_an_evaluation_belongs_to_one_version(stale: Run) -> None:
    evaluations = stale.lines("evaluations")
    assert [e["version"] for e in evaluations] == [0, 10, 20, 30, 40, 50]
    by_batch = {x["batch"]: x["update"] for x in stale.lines("metrics")}
    assert [e["update"] for e in evaluations] == [0, *(by_batch[v - 1] for v in (10, 20, 30, 40, 50))]
    assert [e["problems"] for e in evaluations] == [40, 10, 10, 10, 10, 40]


def test_a_batchs_last_update_carries_every_metric(stale: Run) -> None:
    lines = stale.lines("metrics")
    assert [x["update"] for x in lines] == list(range(1, len(lines) + 1))
    last = {x["batch"]: x for x in lines}
    assert all(x.keys() == METRICS.keys() for x in last.values())
    never = [k for k in METRICS if all(x[k] is None for x in lines if k in x)]
    assert not never, "null in every update"
    for name in ("accuracy/exited", "accuracy/control", "accuracy/treated", "probe/confident", "probe/confidence_p50"):
        assert all(0 <= x[name] <= 1 for x in lines if x[name] is not None)
    assert any(x["exit/confident"] > 0 for x in lines)


def test_the_summary_holds_before_and_after_with_their_intervals(stale: Run) -> None:
    summary = json.loads((stale.directory / "summary.json").read_text())
    assert summary == stale.summary
    assert summary["status"] == "finished" and summary["updates"] == len(stale.lines("metrics"))
    for moment in ("before", "after"):
        for quantity in ("accuracy", "tokens", "steps"):
            e = summary[moment][quantity]
            assert e["low"] <= e["mean"] <= e["high"]
    tokens = [summary[moment]["tokens"]["mean"] for moment in ("before", "after")]
    assert summary["compression"]["mean"] == pytest.approx(tokens[1] / tokens[0])
    assert summary["seconds"].keys() == {"prepare", "ray", "start", "before", "train", "after", "save"}


def test_the_configuration_of_a_run_reloads(stale: Run) -> None:
    assert validate(Config, json.loads((stale.directory / "config.json").read_text())) == stale.config


def test_old_versions_leave_object_store_and_shared_memory(watched: tuple[Run, Watch]) -> None:
    stale, watch = watched
    size = stale.lines("metrics")[-1]["weights/bytes"]
    early, late = ([s for s in watch.samples if lo <= s[0] < hi] for lo, hi in ((5, 25), (40, 51)))
    assert min(len(early), len(late)) >= 5, "sampled too seldom to show anything"
    for i, what in ((1, "object store"), (2, "shared memory")):
        grown = max(s[i] for s in late) - max(s[i] for s in early)
        # A slow moment may hold the newest and two on their way more than any of the early samples saw.
        assert grown < 4 * size, f"{what}: {grown:,} bytes more after 25 further versions of {size:,}"
    assert max(s[2] for s in watch.samples) == pytest.approx(2 * size, rel=0.05), "two files hold a version each"
    assert watch.directory is not None and not watch.directory.exists(), "the last worker removes it"


def test_the_trained_model_is_a_plain_checkpoint_for_transformers_and_an_unmodified_vllm(stale: Run) -> None:
    prompts = held_out_prompts(8)
    model = AutoModelForCausalLM.from_pretrained(stale.model)
    tokenizer = AutoTokenizer.from_pretrained(stale.model)
    assert model.dtype == torch.float32 and tokenizer.decode([4]) == "</think>"
    expected = [
        model.generate(torch.tensor([p]), do_sample=False, max_new_tokens=100)[0, len(p) :].tolist() for p in prompts
    ]
    found = subprocess.run(
        [sys.executable, "-c", PLAIN_VLLM, str(stale.model), json.dumps(prompts)],
        env={**os.environ, **CPU_ENV},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    assert json.loads(found.splitlines()[-1]) == expected
    assert len({tuple(e) for e in expected}) == 8 and all(len(e) > 5 for e in expected)


PLAIN_VLLM = """
import json, sys
from vllm import LLM, SamplingParams

memory = {"max_model_len": 256, "kv_cache_memory_bytes": 64 << 20, "block_size": 32}
llm = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, **memory)
prompts = [{"prompt_token_ids": p} for p in json.loads(sys.argv[2])]
outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=100), use_tqdm=False)
print(json.dumps([list(o.outputs[0].token_ids) for o in outputs]))
"""


def test_training_changes_every_matrix(stale: Run) -> None:
    before, after = (load_file(d / "model.safetensors") for d in (MINIATURE / "model", stale.model))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[k], after[k]) for k in before if before[k].ndim == 2)


def test_eval_of_the_trained_model_repeats_the_runs_last_evaluation(stale: Run, tmp_path: Path) -> None:
    """Also what shows that the last evaluation met the last version, and the saved model is that version."""
    output = tmp_path / "figures.json"
    settings = [s for s in SMALL if not s.startswith("model.path")]
    result = CliRunner().invoke(
        app, ["eval", str(stale.model), f"--config={QUICKSTART}", f"--output={output}", *settings]
    )
    assert result.exit_code == 0, result.output
    figures, after = json.loads(output.read_text())["benchmarks"]["heldout"], stale.summary["after"]
    for name in ("problems", "samples", "accuracy", "tokens", "steps", "incomplete"):
        assert figures[name] == after[name]
    assert figures["answers"] == json.loads((stale.directory / "heldout.json").read_text())["after"]
    for row, digits, factor in (("accuracy, %", 1, 100), ("tokens per answer", 1, 1), ("steps per answer", 2, 1)):
        mean = after[row.split(",")[0].split()[0]]["mean"]
        assert f"{factor * mean:.{digits}f}" in next(x for x in result.output.splitlines() if row in x)


def test_what_people_read_of_a_run_is_kept_with_rewards_and_probes(stale: Run) -> None:
    samples, probes = stale.lines("samples"), stale.lines("probes")
    assert [s["batch"] for s in samples] == list(range(0, 50, stale.config.train.sample_every))
    draws = {d["batch"]: d["trained"] for d in stale.lines("draws")}
    for s in samples:
        assert s["draw"] in draws[s["batch"]]
        assert len(s["trajectories"]) == stale.config.rollout.group_size
        assert abs(sum(t["advantage"] for t in s["trajectories"])) < 1e-2
        assert all(0 <= t["reward"] < 1.45 for t in s["trajectories"])
    assert [p["batch"] for p in probes] == list(range(50))
    for p in probes:
        assert len(p["confidence"]) == len(p["verdict"]) == len(p["correct"])
        confident = [c for c, v in zip(p["confidence"], p["verdict"], strict=True) if v == "confident"]
        assert all(c > 0.95 for c in confident)
    sure = [r for p in probes for r, v in zip(p["correct"], p["verdict"], strict=True) if v == "confident"]
    unsure = [r for p in probes for r, v in zip(p["correct"], p["verdict"], strict=True) if v == "declined"]
    assert np.mean(sure) > 0.9 > np.mean(unsure)


def test_the_report_of_a_run_opens_offline_and_shows_what_the_run_kept(stale: Run, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["report", str(stale.directory), f"--output={page}"])
    assert result.exit_code == 0, result.output
    with opened(page) as browser:
        browser.wait_for_selector(".js-plotly-plot")
        text = browser.inner_text("body")
    assert stale.directory.name in text
    assert f"{stale.summary['after']['accuracy']['mean']:.1%}"[:-1] in text
    assert stale.lines("samples")[0]["key"] in text

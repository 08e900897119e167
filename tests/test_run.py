"""Whole runs on real vLLM, DeepSpeed and Ray, in the miniature: what they leave behind, and how they end."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from examples.miniature.make_data import sft_rows
from stepgrpo import run
from stepgrpo.actors.engine import CPU_ENV
from stepgrpo.cli import app
from stepgrpo.config import Config, load, validate
from stepgrpo.console import Display
from stepgrpo.metrics import METRICS
from tests.browser import opened

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
MINIATURE = ROOT / "examples" / "miniature"
STEPGRPO = Path(sys.executable).with_name("stepgrpo")
INPUTS = [
    f"model.path={MINIATURE / 'model'}",
    f"data.train={MINIATURE / 'data' / 'train.jsonl'}",
    f"data.eval={MINIATURE / 'data' / 'heldout.jsonl'}",
]
SMALL = [
    *INPUTS,
    "rollout.group_size=4",
    "engine.kv_cache_mb=64",
    "learner.lr=1e-4",
    "train.prompts_per_batch=4",
    "train.prompts_per_update=2",
    "eval.num_prompts=40",
    "eval.num_prompts_during=10",
]
ENDLESS = [*SMALL, "train.num_batches=10000", "eval.num_prompts=4"]
SECONDS_TO_START = 300.0
SECONDS_TO_STOP = 30.0
"""Of which `checkpoint.stop_seconds` is two thirds."""
ACTORS = ("ray::RolloutWorker", "ray::LearnerWorker", "VLLM::EngineCore")

Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A finished run."""

    config: Config
    summary: Json
    screen: str

    @property
    def directory(self) -> Path:
        return self.config.run_dir

    @property
    def model(self) -> Path:
        return self.directory / "model"

    def lines(self, name: str) -> list[Json]:
        return read_lines(self.directory / f"{name}.jsonl")


def read_lines(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(directory: Path, name: str, *overrides: str) -> Run:
    config = load(Config, QUICKSTART, [f"name={name}", f"runs_dir={directory}", *SMALL, *overrides])
    screen = io.StringIO()
    return Run(config, run.train(config, Display(Console(file=screen, width=200))), screen.getvalue())


def held_out_prompts(number: int) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(MINIATURE / "model")
    problems = read_lines(MINIATURE / "data" / "heldout.jsonl")[:number]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p["problem"]}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for p in problems
    ]


# ---- strictly on-policy


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


# ---- with staleness, over two learner ranks


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


def descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def titled(processes: Sequence[psutil.Process], *titles: str) -> list[psutil.Process]:
    """Those whose title begins so."""
    found = []
    for process in processes:
        with suppress(psutil.Error):
            if "".join(process.cmdline()[:1]).startswith(titles):
                found.append(process)
    return found


def shared_memory(processes: Sequence[psutil.Process]) -> set[Path]:
    """Directories of published weights that these processes hold."""
    found = set()
    for process in processes:
        with suppress(psutil.Error):
            found |= {Path(f.path).parent for f in process.open_files() if f.path.startswith("/dev/shm/stepgrpo-")}
    return found


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


def test_eval_of_two_benchmarks_with_early_exit_dumps_every_answer_and_compares_with_a_reference(
    cluster: str, tmp_path: Path
) -> None:
    heldout = (MINIATURE / "data" / "heldout.jsonl").read_text().splitlines()
    sets = {"easy": heldout[:30:5], "hard": heldout[4:44:5]}
    for name, lines in sets.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    common = ["eval", str(MINIATURE / "model"), f"--config={QUICKSTART}", *INPUTS[1:], "eval.samples=4"]
    common += [f"--benchmark={tmp_path / f'{name}.jsonl'}" for name in sets]
    plain, early, dump = (tmp_path / f"{name}.json" for name in ("plain", "early", "dump"))
    first = CliRunner().invoke(app, [*common, f"--output={plain}"])
    assert first.exit_code == 0, first.output
    options = [f"--output={early}", f"--reference={plain}", f"--dump={dump}", "--early-exit=deer"]
    # Of the quickstart's preset, which has this tokenizer's words.
    second = CliRunner().invoke(app, [*common, *options])
    assert second.exit_code == 0, second.output

    figures = json.loads(early.read_text())
    assert list(figures["benchmarks"]) == list(sets)
    easy, hard = figures["benchmarks"].values()
    assert easy["share"]["mean"] < 1 and figures["mean"]["share"]["mean"] < 1
    assert easy["probe_tokens"] > 0 and 0.5 < easy["exited"] <= 1
    assert list(hard["pass_at"]) == ["1", "2", "4"]
    assert hard["pass_at"]["1"]["mean"] == pytest.approx(hard["accuracy"]["mean"])
    assert hard["pass_at"]["4"]["mean"] == np.mean([max(c) for c in hard["answers"]["correct"]])
    for text in ("easy", "hard", "mean", "pass@4", "share of the reference"):
        assert text in second.output

    lines = read_lines(dump)
    assert sorted((x["benchmark"], x["question"]) for x in lines) == sorted(
        (name, json.loads(line)["problem"]) for name, rows in sets.items() for line in rows
    )
    answers = [t for x in lines for t in x["trajectories"]]
    assert len(answers) == 4 * (6 + 8)
    assert np.mean([t["exit"] == "confident" for t in answers if t["probes"]]) > 0.5
    for t in answers:
        if t["exit"] == "confident":
            assert t["text"][t["cut"] : t["closed"]].strip() == "</think>"
            assert t["probes"][-1]["verdict"] == "confident" and t["probes"][-1]["at"] == t["cut"]
    refused = CliRunner().invoke(app, [*common, f"--dump={dump}"])
    assert refused.exit_code == 2 and f"{dump}: exists" in refused.output
    refused = CliRunner().invoke(app, [*common, f"--output={early}"])
    assert refused.exit_code == 2 and f"{early}: exists" in refused.output
    others = [f"--reference={plain}", "eval.num_prompts=3"]
    refused = CliRunner().invoke(app, [*common, *others])
    assert refused.exit_code == 2 and "--reference: has no answers to the same problems of easy" in refused.output
    assert "starting vLLM" not in refused.output


def test_triggers_proposes_the_word_the_model_opens_its_checks_with(cluster: str, tmp_path: Path) -> None:
    output = tmp_path / "words.json"
    command = ["triggers", str(MINIATURE / "model"), f"--config={QUICKSTART}", f"--output={output}", *INPUTS[1:]]
    result = CliRunner().invoke(app, [*command, "eval.num_prompts=20"])
    assert result.exit_code == 0, result.output
    assert json.loads(output.read_text())["triggers"] == ["Wait"]
    assert result.output.splitlines()[-1] == 'rollout.triggers: ["Wait"]'


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


# ---- how runs end


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)


@contextmanager
def in_training(
    directory: Path, before_start: Callable[[], object] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
) -> Iterator[tuple[subprocess.Popen[bytes], Path, Path]]:
    """The command, in the middle of an endless training: (process, run directory, what it printed)."""
    screen = directory / "screen.txt"
    command = [STEPGRPO, "train", QUICKSTART, "name=x", f"runs_dir={directory}", *ENDLESS]
    with screen.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=before_start
        )
    metrics = directory / "x" / "metrics.jsonl"

    def trains() -> bool:
        assert process.poll() is None, screen.read_text()
        return metrics.exists() and len(read_lines(metrics)) > 4

    try:
        wait_for(trains, SECONDS_TO_START, "training")
        yield process, directory / "x", screen
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def assert_usable(run_dir: Path, status: str) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == status
    updates = [x["update"] for x in read_lines(run_dir / "metrics.jsonl")]
    assert updates == list(range(1, summary["updates"] + 1))
    AutoModelForCausalLM.from_pretrained(run_dir / "model")


def listening(processes: Sequence[psutil.Process]) -> set[str]:
    """Addresses on which they take connections."""
    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return found


def test_ctrl_c_ends_a_run_and_everything_it_started(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with environment.context() as alone:
        alone.delenv("RAY_ADDRESS", raising=False)
        with in_training(tmp_path) as (process, run_dir, screen):
            started = psutil.Process(process.pid).children(recursive=True)
            weights = shared_memory(started)
            assert len(titled(started, *ACTORS)) == 3 and weights
            assert {address.removeprefix("::ffff:") for address in listening(started)} == {"127.0.0.1"}
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(SECONDS_TO_STOP) == 130
    wait_for(lambda: not any(map(is_alive, started)), 3, "the end of every process")
    assert not any(w.exists() for w in weights)
    assert screen.read_text().splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in screen.read_text()
    assert_usable(run_dir, "interrupted")


def test_sigterm_ends_a_run_on_a_cluster_that_goes_on(cluster: str, tmp_path: Path) -> None:
    """As `ray job stop` does it; also where Ctrl-C is switched off, as in the background of a script."""
    with in_training(tmp_path, lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) as (process, run_dir, screen):
        actors = titled(descendants(), *ACTORS)
        weights = shared_memory(actors)
        assert len(actors) == 3 and weights
        process.terminate()
        assert process.wait(SECONDS_TO_STOP) == 130
    wait_for(lambda: not any(map(is_alive, actors)), 10, "the end of every actor")
    assert not any(w.exists() for w in weights)
    assert screen.read_text().splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in screen.read_text()
    assert_usable(run_dir, "interrupted")


def test_more_than_the_cluster_has_is_refused_and_leaves_the_name_free(cluster: str, tmp_path: Path) -> None:
    for _ in range(2):
        result = CliRunner().invoke(
            app, ["train", str(QUICKSTART), "name=x", f"runs_dir={tmp_path}", *SMALL, "cluster.cpus_per_rank=7"]
        )
        assert result.exit_code == 2
        assert result.output.splitlines()[-1] == (
            "error: CPUs: the config asks for 8 (rollout.workers takes 1, learner.num_ranks takes 7) "
            "but the Ray cluster has 2; lower them, or add a node"
        )


# ---- supervised


def test_sft_lowers_the_loss_and_its_model_loads(cluster: str, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in sft_rows(2, 200)))
    settings = ["name=brief", f"runs_dir={tmp_path}", INPUTS[0], f"data.train={pairs}", "batch_size=20", "epochs=6"]
    result = CliRunner().invoke(app, ["sft", str(MINIATURE / "sft.yaml"), *settings])
    assert result.exit_code == 0, result.output
    losses = np.array([x["policy/loss"] for x in read_lines(tmp_path / "brief" / "metrics.jsonl")]).reshape(6, 10)
    assert losses[5].mean() < 0.9 * losses[0].mean()
    summary = json.loads((tmp_path / "brief" / "summary.json").read_text())
    assert summary["loss"] == {"first": losses[0, 0], "last": losses[5, 9]}
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "brief" / "model").state_dict()
    start = AutoModelForCausalLM.from_pretrained(MINIATURE / "model").state_dict()
    assert trained.keys() == start.keys() and any(not torch.equal(trained[k], start[k]) for k in start)

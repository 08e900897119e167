"""Tables of methods: rows made on the real stack, kept, and not made twice."""

from __future__ import annotations

import csv
import fcntl
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from stepgrpo.cli import app
from stepgrpo.compare import Job, compare, jobs, markdown, table
from stepgrpo.config import CompareConfig, ConfigError, load, validate
from stepgrpo.console import Display

ROOT = Path(__file__).parents[1]
MINIATURE = ROOT / "examples" / "miniature"
PUBLISHED = ["vanilla", "grpo", "grpo_lp", "grpo_sop", "grpo_lambda", "deer", "deer_sft"]
ABLATIONS = ["step_grpo", "step_grpo_no_reward", "step_grpo_no_rollout", "step_grpo_all_mean"]
RUN: dict[str, Any] = {
    "base": str(ROOT / "configs" / "quickstart.yaml"),
    "model": {"path": str(MINIATURE / "model")},
    "data": {"train": str(MINIATURE / "data" / "train.jsonl"), "eval": str(MINIATURE / "data" / "heldout.jsonl")},
    "rollout": {"group_size": 4},
    "engine": {"kv_cache_mb": 64},
    "train": {"num_batches": 2, "prompts_per_batch": 4, "prompts_per_update": 2},
    "eval": {"every": 0, "num_prompts": 20},
    "learner": {"warmup_updates": 0},
}


def write(directory: Path, methods: dict[str, Any], run: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A comparison in ``directory``, whose runs lie there too."""
    (directory / "run.yaml").write_text(yaml.safe_dump({**RUN, "runs_dir": str(directory / "runs"), **(run or {})}))
    tree = {"name": "small", "run": "run.yaml", "results": "results", "seeds": [0], "methods": methods, **changes}
    path = directory / "small.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def changes(path: Path, job: Job) -> list[str]:
    """What the row of ``path``'s only job lacks to be that of ``job``, made before."""
    (now,) = jobs(path)[1]
    return now.changes({"settings": job.settings, "files": job.files})


def answers(correct: list[int], tokens: list[int]) -> dict[str, Any]:
    """One response to each of some problems."""
    return {
        "correct": [[c] for c in correct],
        "tokens": [[t] for t in tokens],
        "steps": [[1] for _ in tokens],
    }


def row(method: str, seed: int, correct: list[int], tokens: list[int]) -> dict[str, Any]:
    return {"method": method, "seed": seed, "problems": "p", "answers": answers(correct, tokens)}


CONFIG = validate(
    CompareConfig,
    {"name": "t", "run": "r", "results": "d", "methods": {"vanilla": {}, "short": {"published": {"share": 68.0}}}},
)


@pytest.mark.parametrize("name", ["miniature", "stubborn"])
def test_the_papers_table_is_whole_and_every_row_has_settings_of_its_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    path = Path("configs/compare") / f"{name}.yaml"
    config, todo = jobs(path)
    assert list(config.methods)[: len(PUBLISHED + ABLATIONS)] == PUBLISHED + ABLATIONS
    for method in PUBLISHED + ABLATIONS:
        assert [job.seed for job in todo if job.name == method] == [0, 1, 2]
    assert len({json.dumps(job.settings) for job in todo}) == len(todo)
    assert {job.config.learner for job in todo} == {todo[0].config.learner}, "not on equal footing"
    assert {job.config.train for job in todo} == {todo[0].config.train}


def test_rows_come_seed_by_seed(tmp_path: Path) -> None:
    path = write(tmp_path, {"vanilla": {"kind": "eval"}, "a": {}, "sweep": {"seeds": [1]}}, seeds=[0, 1])
    assert [(j.name, j.seed) for j in jobs(path)[1]] == [
        ("vanilla", 0),
        ("a", 0),
        ("vanilla", 1),
        ("a", 1),
        ("sweep", 1),
    ]


def test_a_fault_in_any_row_is_found_before_the_first_is_begun(tmp_path: Path) -> None:
    path = write(tmp_path, {"vanilla": {"kind": "eval"}, "a": {"set": {"reward": {"scheme": "step_awear"}}}})
    with pytest.raises(ConfigError, match=r"reward\.scheme: got 'step_awear' \(did you mean step_aware\?\)"):
        compare(path, Display(Console(file=io.StringIO())))
    assert not (tmp_path / "results").exists()


def test_a_reference_that_is_no_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reference: got vanila, takes one of vanilla"):
        load(CompareConfig, write(tmp_path, {"vanilla": {"kind": "eval"}}, reference="vanila"))


def test_an_unknown_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--only b: takes one of vanilla"):
        jobs(write(tmp_path, {"vanilla": {}}), ["b"])


def test_a_row_is_made_again_when_something_changed_that_decides_about_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    methods = {"vanilla": {"kind": "eval"}}
    for file in ("model/model.safetensors", "model/chat_template.jinja", "heldout.jsonl", "changing_reward.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("def reward(groups, config): ...")
    data = {"train": str(MINIATURE / "data" / "train.jsonl"), "eval": "miniature=heldout.jsonl"}
    run = {"model": {"path": "model"}, "data": data, "reward": {"scheme": "changing_reward:reward"}}
    (made,) = jobs(write(tmp_path, methods, run))[1]
    assert changes(write(tmp_path, methods, run | {"cluster": {"device": "cpu", "object_store_mb": 99}}), made) == []
    assert changes(write(tmp_path, methods, run | {"runs_dir": "elsewhere"}), made) == []
    assert changes(write(tmp_path, methods, run | {"learner": {"warmup_updates": 7}}), made) == [
        "learner.warmup_updates"
    ]
    assert changes(write(tmp_path, {"vanilla": {"kind": "train"}}, run), made) == ["kind"]
    for field, file in (
        ("model.path/model.safetensors", "model/model.safetensors"),
        ("model.path/chat_template.jinja", "model/chat_template.jinja"),
        ("data.eval", "heldout.jsonl"),
        ("reward.scheme", "changing_reward.py"),
    ):
        text = (tmp_path / file).read_text()
        (tmp_path / file).write_text(text + "  # changed")
        assert changes(write(tmp_path, methods, run), made) == [field]
        (tmp_path / file).write_text(text)


def test_a_setting_that_is_younger_than_a_row_was_at_its_default(tmp_path: Path) -> None:
    methods = {"vanilla": {"kind": "eval"}}
    (made,) = jobs(write(tmp_path, methods))[1]
    del made.settings["reward.length_alpha"]
    assert changes(write(tmp_path, methods), made) == []
    assert changes(write(tmp_path, methods, {"reward": {"length_alpha": 0.1}}), made) == ["reward.length_alpha"]


def test_a_section_that_was_null_and_an_entry_that_is_gone_make_another_row(tmp_path: Path) -> None:
    methods = {"vanilla": {"kind": "eval"}}
    (without,) = jobs(write(tmp_path, methods, {"rollout": {"probe": None}}))[1]
    assert "rollout.probe.delta" in changes(write(tmp_path, methods), without)
    (with_probe,) = jobs(write(tmp_path, methods))[1]
    assert "rollout.probe" in changes(write(tmp_path, methods, {"rollout": {"probe": None}}), with_probe)
    options = {"reward": {"scheme": "json:loads", "options": {"a": 1, "b": 2}}}
    (made,) = jobs(write(tmp_path, methods, options))[1]
    options["reward"]["options"] = {"a": 1}
    assert changes(write(tmp_path, methods, options), made) == ["reward.options.b"]


def test_an_entry_of_the_supervised_part_that_is_gone_makes_another_row(tmp_path: Path) -> None:
    def of(sft: dict[str, Any]) -> Path:
        return write(tmp_path, {"deer_sft": {"kind": "distill", "sft": sft}}, reference="deer_sft")

    (made,) = jobs(of({"batch_size": 8, "epochs": 1}))[1]
    assert changes(of({"batch_size": 8}), made) == ["sft.epochs"]


def test_a_second_call_at_the_same_time_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"vanilla": {"kind": "eval"}})
    directory = tmp_path / "runs" / "compare" / "small"
    directory.mkdir(parents=True)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = CliRunner().invoke(app, ["compare", str(path)])
    assert result.exit_code == 2 and "another `stepgrpo compare` works here" in result.output


def test_rows_of_different_problems_are_not_averaged() -> None:
    rows = [row("vanilla", 0, [1], [10]), {**row("vanilla", 1, [1], [10]), "problems": "q"}]
    with pytest.raises(ConfigError, match="rows of different problems"):
        table(CONFIG, rows)


def test_probes_count_in_the_share() -> None:
    short = row("short", 0, [1, 1], [10, 30])
    short["answers"]["probe_tokens"] = [[10], [20]]
    result = table(CONFIG, [row("vanilla", 0, [1, 1], [100, 100]), short])
    assert result["methods"][1]["share"]["mean"] == pytest.approx(0.35)
    assert "| 20.0 [10.0, 30.0] + 15.0 | 35.0" in markdown(result, "command")


def test_the_table_averages_seeds_and_takes_the_share_of_the_same_seeds() -> None:
    rows = [
        row("vanilla", 0, [1, 0], [100, 300]),
        row("vanilla", 1, [1, 1], [100, 100]),
        row("short", 1, [1, 0], [20, 40]),
    ]
    vanilla, short = table(CONFIG, rows)["methods"]
    assert (vanilla["seeds"], vanilla["accuracy"]["mean"], vanilla["tokens"]["mean"]) == (2, 0.75, 150)
    assert vanilla["share"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert (short["accuracy"]["mean"], short["share"]["mean"]) == (0.5, pytest.approx(0.3))
    assert short["points"] == [{"seed": 1, "accuracy": 0.5, "tokens": 30.0, "steps": 1.0}]


def test_the_interval_covers_the_spread_of_seeds_as_well_as_of_problems() -> None:
    rng = np.random.default_rng(0)
    accuracies = [0.5, 0.7, 0.9]
    rows = [row("short", s, rng.binomial(1, p, 2000).tolist(), [1] * 2000) for s, p in enumerate(accuracies)]
    (several,) = table(CONFIG, rows)["methods"]
    (one,) = table(CONFIG, rows[1:2])["methods"]
    # Three seeds of standard deviation 0.2: 4.30 * 0.2 / sqrt(3) to either side, and no more than everything is right.
    assert several["accuracy"]["low"] == pytest.approx(0.7 - 0.5, abs=0.03) and several["accuracy"]["high"] == 1
    assert 0.03 < one["accuracy"]["high"] - one["accuracy"]["low"] < 0.05


def test_a_table_without_the_reference_has_no_share() -> None:
    (short,) = table(CONFIG, [row("short", 0, [1], [10])])["methods"]
    assert short["share"] is None
    assert "| short | 100.0 [100.0, 100.0] | 10.0 [10.0, 10.0] | – | 1.00 [1.00, 1.00] | 1 | – / 68.0 |" in markdown(
        table(CONFIG, [row("short", 0, [1], [10])]), "command"
    )


def test_rows_are_made_on_the_real_stack_and_not_made_twice(cluster: str, tmp_path: Path) -> None:
    methods = {
        "vanilla": {"kind": "eval"},
        "deer": {"kind": "eval", "set": {"eval": {"early_exit": True}}},
        "step": {"label": "Step-GRPO"},
        "deer_sft": {"kind": "distill", "sft": {"batch_size": 8}},
    }
    path = write(tmp_path, methods)
    assert CliRunner().invoke(app, ["compare", str(path), "--table"]).exit_code == 2  # no row yet
    first = CliRunner().invoke(app, ["compare", str(path)])
    assert first.exit_code == 0, first.output
    rows = {p.name: p.read_bytes() for p in (tmp_path / "results").glob("*-0.json")}
    assert set(rows) == {f"{name}-0.json" for name in methods}
    result = json.loads((tmp_path / "results" / "table.json").read_text())
    by_name = {m["method"]: m for m in result["methods"]}
    assert list(by_name) == list(methods)
    assert by_name["deer"]["tokens"]["mean"] < by_name["vanilla"]["tokens"]["mean"]
    assert json.loads(rows["deer-0.json"])["evaluation"]["exited"] > 0.5
    assert 0 < json.loads(rows["deer_sft-0.json"])["pairs"] <= 2 * 4 * 4
    assert json.loads(rows["step-0.json"])["updates"] == 4
    assert "Step-GRPO" in (tmp_path / "results" / "table.md").read_text()
    lines = list(csv.DictReader((tmp_path / "results" / "table.csv").open()))
    assert [line["method"] for line in lines] == list(methods)

    second = CliRunner().invoke(app, ["compare", str(path)])
    assert second.exit_code == 0 and second.output.count("done before") == len(methods)
    assert {p.name: p.read_bytes() for p in (tmp_path / "results").glob("*-0.json")} == rows


def test_a_row_that_fails_leaves_the_others_and_is_named(cluster: str, tmp_path: Path) -> None:
    bad = {"set": {"reward": {"scheme": "test_compare:raises"}}}
    path = write(tmp_path, {"vanilla": {"kind": "eval"}, "bad": bad, "deer": {"kind": "eval"}})
    result = CliRunner().invoke(app, ["compare", str(path)])
    assert result.exit_code == 1
    assert "bad, seed 0 failed and is left for the next call: ZeroDivisionError" in result.output
    assert sorted(p.name for p in (tmp_path / "results").glob("*-0.json")) == ["deer-0.json", "vanilla-0.json"]


def raises(groups: Any, config: Any) -> Any:
    """A reward of the user's with a fault in it."""
    raise ZeroDivisionError("by the user")

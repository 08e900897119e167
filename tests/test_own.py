"""A run whose reward, grader, probe policy and step rule are all the user's own, from the working directory."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from examples.own import within_one_percent
from stepgrpo import run
from stepgrpo.config import Config, ConfigError, RolloutConfig, load
from stepgrpo.console import Display
from stepgrpo.reward.steps import count_steps, make_step_rule
from tests.runs import MINIATURE, QUICKSTART, ROOT, STEPGRPO, read_lines

PRICE = 0.1
SETTINGS = [
    "reward.scheme=mine:step_price",
    f"reward.options={{price: {PRICE}}}",
    "reward.grader=mine:within_one_percent",
    "rollout.probe.policy=mine:FixedBudget",
    "rollout.probe.options={steps: 2}",
    "rollout.step_rule=mine:pattern",
    r"rollout.options={pattern: '\bso\b'}",  # another rule than the miniature's own "Wait"
    "rollout.control_fraction=0.25",
]
INPUTS = [f"model.path={MINIATURE / 'model'}", "data.train=train.jsonl", "data.eval=heldout.jsonl"]
SMALL = [
    "rollout.group_size=4",
    "engine.kv_cache_mb=64",
    "train.num_batches=2",
    "train.prompts_per_batch=4",
    "train.prompts_per_update=2",
    "train.sample_every=1",
    "eval.every=0",
    "eval.num_prompts=20",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature with answers that only the own grader takes for right, being off by half a percent."""
    here = tmp_path_factory.mktemp("own")
    (here / "mine.py").write_text((ROOT / "examples" / "own.py").read_text())
    for name in ("train", "heldout"):
        problems = read_lines(MINIATURE / "data" / f"{name}.jsonl")
        for p in problems:
            p["answer"] = " ".join(f"{int(digit) * 1.005:.4f}" for digit in p["answer"].split())
        (here / f"{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    return here


@pytest.fixture(scope="module")
def finished(directory: Path) -> Path:
    """The run directory."""
    command = [STEPGRPO, "train", QUICKSTART, "name=own", *INPUTS, *SMALL, *SETTINGS]
    settings = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")} | settings
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return directory / "runs" / "own"


def test_every_own_function_did_its_part_in_a_whole_run(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["status"] == "finished"
    metrics = read_lines(finished / "metrics.jsonl")
    assert all(m["probe/tokens"] == 0 and m["exit/confident"] > 0 for m in metrics), "cut without asking"
    assert summary["before"]["accuracy"]["mean"] > 0.3, "math-verify would call all of them wrong"
    assert all(m["reward/grader_failures"] == 0 for m in metrics)

    trajectories = [t for line in read_lines(finished / "samples.jsonl") for t in line["trajectories"]]
    assert {t["exit"] for t in trajectories} >= {"confident"}
    rule = make_step_rule(RolloutConfig(step_rule="examples.own:pattern", options={"pattern": r"\bso\b"}))
    for t in trajectories:
        assert t["num_steps"] == count_steps(t["text"], rule)
        right = t["answer"] is not None and t["correct"]
        kept = max(0.0, 1 - PRICE * (t["num_steps"] - 1)) if right else 0.0
        assert t["reward"] == pytest.approx(0.9 * kept + 0.1 * (t["answer"] is not None), abs=1e-3)
        if t["exit"] == "confident":
            assert [p["verdict"] for p in t["probes"]] == ["declined", "confident"]


@pytest.mark.parametrize(
    "override",
    [
        "reward.scheme=mine:nobody",
        "reward.grader=none:fn",
        "rollout.probe.policy=mine:nobody",
        "rollout.step_rule=mine:x",
    ],
)
def test_a_name_that_leads_nowhere_is_refused_before_anything_starts(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    monkeypatch.chdir(directory)
    monkeypatch.setattr(sys, "path", list(sys.path))
    field, _, name = override.partition("=")
    config = load(Config, QUICKSTART, ["name=refused", f"runs_dir={tmp_path}", *INPUTS, override])
    with pytest.raises(ConfigError, match=f"^{field}: got {name}, which cannot be imported") as refused:
        run.train(config, Display(Console(file=io.StringIO())))
    assert "\n" not in str(refused.value)
    assert list(config.run_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "cause"),
    [
        (
            ["rollout.probe.policy=mine:FixedBudget"],
            r"rollout\.probe\.policy: mine:FixedBudget failed \(KeyError: 'steps'\)",
        ),
        (
            ["rollout.step_rule=mine:pattern", "rollout.options={pattern: '('}"],
            r"rollout\.step_rule: mine:pattern failed",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_starts(
    directory: Path, monkeypatch: pytest.MonkeyPatch, setting: list[str], cause: str
) -> None:
    monkeypatch.chdir(directory)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ConfigError, match=f"^{cause}"):
        run.check_rollout(load(Config, QUICKSTART, ["name=refused", *INPUTS, *setting]))


# ---- the examples


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("100", "100.9", True),
        ("100", "102", False),
        ("0.5", "1/2", None),
        ("about 3", "3", False),
        ("-2e3", "-2001", True),
        ("1 200", "1 201", True),
        ("1", "1 2", False),
    ],
)
def test_a_number_within_one_percent_is_right_and_a_truth_that_is_none_is_the_graders_failure(
    answer: str, truth: str, right: bool | None
) -> None:
    response = rf"3 Wait </think> \boxed{{{answer}}}"
    if right is None:
        with pytest.raises(ValueError, match="could not convert"):
            within_one_percent(response, truth)
    else:
        assert within_one_percent(response, truth) is right
        assert not within_one_percent(response.replace("</think>", ""), truth)


def test_sentences_are_steps_and_numbers_with_points_are_not() -> None:
    rule = make_step_rule(RolloutConfig(step_rule="examples.own:pattern"))
    text = "So x is 3.5 or 4. Then we check! It holds?\n\nYes. and so on.\nNo"
    assert [text[a:].split()[0] for a, _ in rule.openings(text)] == ["Then", "It", "Yes.", "No"]


@pytest.mark.parametrize("text", ["One. Two.\n\nThree! Four. five. Six", "A. B. C.\n\nD"])
def test_sentences_of_a_growing_text_are_those_of_the_whole(text: str) -> None:
    rule = make_step_rule(RolloutConfig(step_rule="examples.own:pattern"))
    whole = rule.openings(text)
    for end in range(len(text)):
        found = rule.openings(text[:end], final=False)
        assert found == whole[: len(found)]

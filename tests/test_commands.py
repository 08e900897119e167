"""Commands around a run: evaluation, search for triggers, supervised fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from examples.miniature.make_data import sft_rows
from stepgrpo.cli import app
from tests.runs import INPUTS, MINIATURE, QUICKSTART, read_lines


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

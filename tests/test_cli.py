"""The command line answers at once, and a mistake ends it in seconds, in one line that says what to do."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stepgrpo import cli, rundir
from stepgrpo.cli import app

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
MINIATURE = ROOT / "examples" / "miniature"
HEAVY = {"torch", "ray", "vllm", "transformers", "deepspeed", "numpy"}


def modules_after(*arguments: str) -> tuple[set[str], str]:
    """The heavy modules the command imported, and what it printed."""
    script = f"""
import sys
from stepgrpo.cli import main
try:
    main()
finally:
    print(*({HEAVY} & sys.modules.keys()))
"""
    command = [sys.executable, "-c", script, *arguments]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    *screen, modules = output.splitlines()
    return set(modules.split()), "\n".join(screen)


COMMANDS = ["train", "sft", "eval", "compare", "data", "report", "triggers"]
COMMANDS += ["submit", "watch", "trace", "doctor", "dashboard"]


@pytest.mark.parametrize("command", [[], *([c] for c in COMMANDS)])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    modules, screen = modules_after(*command, "--help")
    assert "Usage:" in screen and not modules


def test_a_misspelt_key_is_found_before_anything_heavy_is_imported() -> None:
    modules, screen = modules_after("train", str(QUICKSTART), "train.num_batchs=3")
    assert screen == "error: train.num_batchs: unknown key; did you mean train.num_batches?"
    assert not modules


def test_reading_model_and_data_does_not_wait_for_torch() -> None:
    modules, screen = modules_after("data", str(QUICKSTART))
    assert "8,000" in screen and not modules & {"torch", "vllm", "deepspeed"}


def refusal(directory: Path, *overrides: str) -> str:
    """What a refused command says after `error: `."""
    settings = [
        "name=x",
        f"runs_dir={directory / 'runs'}",
        f"model.path={MINIATURE / 'model'}",
        f"data.train={MINIATURE / 'data' / 'heldout.jsonl'}",
        "data.eval=null",
        "eval.every=0",
        *overrides,
    ]
    result = CliRunner().invoke(app, ["train", str(QUICKSTART), *settings], env={"RAY_ADDRESS": None})
    errors = [x for x in result.output.splitlines() if not x.startswith(("…", "✓"))]
    assert result.exit_code == 2, result.output
    assert len(errors) == 1, result.output
    assert errors[0].startswith("error: ")
    return errors[0].removeprefix("error: ")


def with_tokenizer(directory: Path, change: Callable[[str], str]) -> str:
    """A copy of the miniature's model with another tokenizer."""
    model = directory / "model"
    shutil.copytree(MINIATURE / "model", model)
    tokenizer = model / "tokenizer.json"
    tokenizer.write_text(change(tokenizer.read_text()))
    return f"model.path={model}"


def test_a_wrong_type_names_the_field_what_it_got_and_what_it_takes(tmp_path: Path) -> None:
    assert refusal(tmp_path, "train.num_batches=ten").startswith("train.num_batches: got 'ten', takes a valid integer")


def test_a_config_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(tmp_path / "none.yaml")])
    assert result.exit_code == 2
    assert result.output.startswith(
        f"error: {tmp_path / 'none.yaml'}: cannot be read (No such file or directory); name"
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/none", "model.path: got /none, no such directory; takes a checkpoint directory or a hub name"),
        (str(ROOT), f"model.path: got {ROOT}, a directory without config.json; takes a Hugging Face checkpoint"),
    ],
)
def test_a_model_that_is_not_there_is_named(tmp_path: Path, path: str, message: str) -> None:
    assert refusal(tmp_path, f"model.path={path}") == message


@pytest.mark.parametrize(
    ("word", "field"),
    [("</think>", "model.think_close"), ("Wait", "rollout.triggers"), ("\\\\boxed", "rollout.probe.inducer")],
)
def test_a_tokenizer_without_a_word_the_rollout_needs_is_named(tmp_path: Path, word: str, field: str) -> None:
    model = with_tokenizer(tmp_path, lambda text: text.replace(f'"{word}": ', f'"no {word}": '))
    assert refusal(tmp_path, model).startswith(f"{field}: the tokenizer cannot encode ")


def test_a_checkpoint_without_a_fast_tokenizer_is_named(tmp_path: Path) -> None:
    model = with_tokenizer(tmp_path, lambda text: "{")
    assert refusal(tmp_path, model).startswith("model.path: ")


def test_a_budget_too_small_to_think_is_named(tmp_path: Path) -> None:
    message = refusal(tmp_path, "rollout.max_response_tokens=1", "rollout.think_ratio=0.5")
    assert message.startswith("rollout.max_response_tokens: got 1, takes more")


def test_a_prompt_that_is_too_long_is_named_with_its_line(tmp_path: Path) -> None:
    assert refusal(tmp_path, "data.max_prompt_tokens=12") == (
        "heldout.jsonl:2: prompt of 15 tokens, longer than data.max_prompt_tokens (12) "
        "(data.on_bad_line=skip leaves such lines out)"
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("A 1 + 1 ?", "not JSON: Expecting value at column 1"),
        ('{"problem": "A 1 + 1 ?"}', "no field 'answer'; the line has problem"),
    ],
)
def test_a_bad_line_of_data_is_named_with_its_reason(tmp_path: Path, line: str, reason: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"problem": "A 1 + 1 ?", "answer": "2"}) + "\n" + line + "\n")
    assert refusal(tmp_path, f"data.train={data}") == (
        f"data.jsonl:2: {reason} (data.on_bad_line=skip leaves such lines out)"
    )


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    data = tmp_path / "none.jsonl"
    assert refusal(tmp_path, f"data.train={data}") == f"{data}: cannot be read (No such file or directory)"


def test_a_directory_that_holds_a_run_is_left_alone_and_another_name_offered(tmp_path: Path) -> None:
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "metrics.jsonl").write_text("")
    assert refusal(tmp_path) == (
        f"name: {tmp_path / 'runs' / 'x'} already holds a run; go on with it (--resume), choose another with name=x-2, "
        "or remove it"
    )


def test_a_runs_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path, "runs_dir=/proc") == "runs_dir: got /proc, cannot be written (No such file or directory)"


def test_a_temp_dir_that_cannot_be_used_is_named_and_the_name_stays_free(tmp_path: Path) -> None:
    for _ in range(2):
        message = refusal(tmp_path, "cluster.temp_dir=/proc/none")
        assert message == "cluster.temp_dir: got /proc/none, cannot be written (No such file or directory)"


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        message = refusal(tmp_path, f"cluster.dashboard_port={port}")
    assert (
        message == f"cluster.dashboard_port: got {port}, cannot be used (Address already in use); name another, or null"
    )


def test_eval_refuses_a_model_that_is_not_there_as_well() -> None:
    result = CliRunner().invoke(app, ["eval", "/none", f"--config={QUICKSTART}"])
    assert result.exit_code == 2
    assert result.output.splitlines()[-1].startswith("error: model.path: got /none, no such directory")


def test_a_full_disk_is_a_line_that_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli._guard(lambda _: Path("/dev/full").write_text("x"))
    assert end.value.code == 1
    assert capsys.readouterr().out == (
        "error: [Errno 28] No space left on device: make room; a training run goes on with --resume from its last "
        "checkpoint\n"
    )


def test_a_full_disk_does_not_hide_why_a_run_failed(tmp_path: Path) -> None:
    (tmp_path / "error.txt").symlink_to("/dev/full")
    (tmp_path / f".summary.json.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(ValueError, match="the first cause"), rundir.recorded(tmp_path, {}):
        raise ValueError("the first cause")
    assert not (tmp_path / "summary.json").exists()

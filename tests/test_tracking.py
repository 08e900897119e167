"""Weights & Biases, the real client without a network: what gets there, and what a run does where nothing can."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from wandb.proto import wandb_internal_pb2
from wandb.sdk.lib import wbauth
from wandb.sdk.lib.service.service_connection import ServiceConnection

from stepgrpo import run
from stepgrpo.config import Config, ConfigError, load
from stepgrpo.console import Display
from stepgrpo.metrics import RunLog
from stepgrpo.tracking import Tracker
from tests.runs import QUICKSTART, SMALL, variables

Json = dict[str, Any]
BLOCK, HEADER = 32768, 7

SAMPLE = {
    "batch": 3,
    "draw": 12,
    "prompt": "<bos> 4 + 5 = <think>",
    "trajectories": [
        {
            "text": f"4 Wait 5 Wait {i} </think>",
            "exit": "confident",
            "num_steps": 2,
            "num_tokens": 7,
            "reward": 0.5 + i,
            "advantage": None,
            "version": 2,
        }
        for i in range(2)
    ],
}


def config_of(directory: Path, *overrides: str) -> Config:
    (directory / "run").mkdir(exist_ok=True)
    settings = [f"runs_dir={directory}", "name=run", "train.wandb=offline", *overrides]
    return load(Config, QUICKSTART, [*SMALL, *settings])


def records(file: Path) -> Iterator[Any]:
    """What an offline run's file holds: records in LevelDB's log format, behind seven bytes of wandb's own."""
    raw, at, record = file.read_bytes(), HEADER, b""
    while at + HEADER <= len(raw):
        if (left := BLOCK - at % BLOCK) < HEADER:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", raw, at + 4)
        at += HEADER
        record += raw[at : at + length]
        at += length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def offline_file(directory: Path) -> Path:
    (file,) = directory.glob("run/wandb/offline-run-*/*.wandb")
    return file


def rows(directory: Path) -> list[Json]:
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records(offline_file(directory))
        if record.WhichOneof("record_type") == "history"
    ]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that wrote two updates, an evaluation and a sample."""
    directory = tmp_path_factory.mktemp("tracked")
    config = config_of(directory, "train.wandb_group=deer", "train.wandb_project=sums")
    with RunLog(config.run_dir, Tracker(config, pytest.fail)) as log:
        log.write({"update": 1, "reward/mean": 0.5, "accuracy/control": float("nan")})
        log.evaluation({"eval/accuracy": 0.75}, 1)
        log.sample(SAMPLE, 1)
        log.write({"update": 2, "reward/mean": 0.625})
    return directory


def test_updates_and_evaluations_are_there_with_their_steps(tracked: Path) -> None:
    first, second = rows(tracked)
    assert (first["_step"], first["update"], first["reward/mean"], first["eval/accuracy"]) == (1, 1, 0.5, 0.75)
    assert (second["_step"], second["reward/mean"]) == (2, 0.625)
    assert "accuracy/control" not in first, "a quantity that does not exist"


def test_a_kept_sample_is_a_table_with_a_row_for_each_trajectory(tracked: Path) -> None:
    (file,) = tracked.glob("run/wandb/offline-run-*/files/media/table/samples_*.table.json")
    table = json.loads(file.read_text())
    names = ["batch", "prompt", "response", "reward", "advantage", "exit", "steps", "tokens", "version"]
    assert table["columns"] == names
    prompt = "<bos> 4 + 5 = <think>"
    assert table["data"] == [
        [3, prompt, "4 Wait 5 Wait 0 </think>", 0.5, None, "confident", 2, 7, 2],
        [3, prompt, "4 Wait 5 Wait 1 </think>", 1.5, None, "confident", 2, 7, 2],
    ]
    assert rows(tracked)[0]["samples/nrows"] == 2


def test_project_group_and_settings_are_the_runs(tracked: Path) -> None:
    (found,) = [r.run for r in records(offline_file(tracked)) if r.WhichOneof("record_type") == "run"]
    assert (found.project, found.run_group, found.display_name) == ("sums", "deer", "run")
    settings = {item.key: json.loads(item.value_json) for item in found.config.update}
    assert settings["train"]["prompts_per_batch"] == 4


def test_the_end_of_a_run_waits_until_the_last_figure_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = ServiceConnection.inform_finish

    def late(connection: ServiceConnection, run_id: str) -> None:
        (core,) = (p for p in psutil.Process().children() if p.name() == "wandb-core")
        core.suspend()
        threading.Timer(1.0, core.resume).start()
        finish(connection, run_id)

    monkeypatch.setattr(ServiceConnection, "inform_finish", late)
    config = config_of(tmp_path)
    with RunLog(config.run_dir, Tracker(config, pytest.fail)) as log:
        log.write({"update": 1, "reward/mean": 0.5})
    assert [row["update"] for row in rows(tmp_path)] == [1]


def test_online_without_a_key_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wbauth.unauthenticate_session()  # a key that an earlier test of this process has shown
    display = Display(Console(quiet=True))
    with pytest.raises(ConfigError, match=r"train\.wandb: got online, but .* has no key here: run `wandb login`"):
        run.train(config_of(tmp_path, "train.wandb=online"), display)
    assert display.seconds.keys() == {"prepare"} and list((tmp_path / "run").iterdir()) == []


LOSING = """
import sys, time
from pathlib import Path
import psutil
from stepgrpo import tracking
from stepgrpo.metrics import RunLog
from tests.test_tracking import config_of

if sys.argv[2] == "suspend":  # of which it would wait for the end
    tracking.CLOSE_SECONDS = 1.0
config = config_of(Path(sys.argv[1]), *sys.argv[3:])
tracking.check_key(config.train)
log = RunLog(config.run_dir, tracking.Tracker(config, lambda text: print(text, flush=True)))
log.write({"update": 1, "reward/mean": 0.5})
while not log._tracker._queue.empty():
    time.sleep(0.05)
for process in psutil.Process().children():
    if process.name() == "wandb-core":
        getattr(process, sys.argv[2])()
for update in range(2, 500):
    log.write({"update": update, "reward/mean": 0.5})
log.close()
print("done", flush=True)
"""


def losing(directory: Path, what: str, *overrides: str, **environment: str) -> str:
    """What a process says that logs 499 updates while this happens to wandb's process."""
    done = subprocess.run(
        [sys.executable, "-c", LOSING, str(directory), what, *overrides],
        env=variables(**environment),
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout, done.stdout
    assert len((directory / "run" / "metrics.jsonl").read_text().splitlines()) == 499
    return done.stdout


@pytest.mark.parametrize("what", ["kill", "suspend"])
def test_a_run_survives_the_death_of_wandb_and_ends(tmp_path: Path, what: str) -> None:
    said = losing(tmp_path, what).splitlines()
    assert said[0].startswith("Weights & Biases is given up (") and "done" in said  # wandb may complain in between


def test_without_a_network_an_online_run_is_recorded_offline(tmp_path: Path) -> None:
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "5" * 40, "WANDB_INIT_TIMEOUT": "2"}
    said = losing(tmp_path, "is_running", "train.wandb=online", **nowhere)
    assert said.startswith("Weights & Biases cannot be reached (") and said.endswith("uploads it\ndone\n")
    assert rows(tmp_path)[0]["update"] == 1

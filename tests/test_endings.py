"""How runs end: asked to, or refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from stepgrpo.cli import app
from tests.runs import ENDLESS, QUICKSTART, SMALL, command, descendants, read_lines, shared_memory, titled

SECONDS_TO_START = 300.0
SECONDS_TO_STOP = 30.0
"""Of which `checkpoint.stop_seconds` is two thirds."""
ACTORS = ("ray::RolloutWorker", "ray::LearnerWorker", "VLLM::EngineCore")


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
    with screen.open("w") as out:
        process = subprocess.Popen(
            command(directory, "x", ENDLESS),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=before_start,
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


def assert_interrupted(run_dir: Path, screen: Path, weights: set[Path]) -> None:
    """It said so, gave its shared memory back, and left a run that can be used."""
    assert not any(w.exists() for w in weights)
    assert screen.read_text().splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in screen.read_text()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "interrupted"
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
    assert_interrupted(run_dir, screen, weights)


def test_sigterm_ends_a_run_on_a_cluster_that_goes_on(cluster: str, tmp_path: Path) -> None:
    """As `ray job stop` does it; also where Ctrl-C is switched off, as in the background of a script."""
    with in_training(tmp_path, lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) as (process, run_dir, screen):
        actors = titled(descendants(), *ACTORS)
        weights = shared_memory(actors)
        assert len(actors) == 3 and weights
        process.terminate()
        assert process.wait(SECONDS_TO_STOP) == 130
    wait_for(lambda: not any(map(is_alive, actors)), 10, "the end of every actor")
    assert_interrupted(run_dir, screen, weights)


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

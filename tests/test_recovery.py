"""Runs that are cut off and go on: the same as if nothing had happened."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from stepgrpo import checkpoint, recovery, rundir
from stepgrpo.cli import _with_value, app
from stepgrpo.config import Config, ConfigError, load
from stepgrpo.console import Display
from stepgrpo.data import Problem
from tests.runs import QUICKSTART, SMALL, command, read_lines, variables

ON_POLICY = [*SMALL, "train.max_staleness=0", "train.num_batches=5", "eval.every=2", "checkpoint.every=2"]
SECRETS = {
    "WANDB_API_KEY": "5ec4e7aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "HF_TOKEN": "hf_5ec4e7bbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
    "AWS_SECRET_ACCESS_KEY": "5ec4e7cccccccccccccccccccccccccccccccccc",
}


@pytest.fixture(scope="module")
def neighbours(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same run, twice at the same time on one cluster."""
    directory = tmp_path_factory.mktemp("neighbours")
    shares = ["cluster.cpus_per_worker=0.5", "cluster.cpus_per_rank=0.5"]
    names = ["a", "b"]
    running = [
        subprocess.Popen(command(directory, n, [*ON_POLICY, *shares]), env=variables(RAY_ADDRESS=cluster))
        for n in names
    ]
    assert [process.wait(400) for process in running] == [0, 0]
    return [directory / n for n in names]


@pytest.fixture(scope="module")
def uninterrupted(neighbours: list[Path]) -> Path:
    return neighbours[0]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, whose driver was killed after its third batch; its words lie in `screen`."""
    directory = tmp_path_factory.mktemp("killed")
    run = directory / "run"
    with (directory / "screen").open("w") as screen:
        settings = [*ON_POLICY, "train.wandb=offline"]
        supervisor = subprocess.Popen(
            command(directory, "run", settings), env=variables(**SECRETS), stdout=screen, stderr=screen
        )
        deadline = time.monotonic() + 300
        while not any(line["batch"] == 2 for line in rundir.read_json_lines(run / "draws.jsonl")):
            assert supervisor.poll() is None and time.monotonic() < deadline, (directory / "screen").read_text()
            time.sleep(0.02)
        (driver,) = psutil.Process(supervisor.pid).children()
        driver.send_signal(signal.SIGKILL)
        assert supervisor.wait(300) == 0, (directory / "screen").read_text()
    return run


def assert_same(a: Path, b: Path) -> None:
    """Two runs have the same metrics, weights and held-out answers, but for what depends on time."""
    timing = ("time/", "rate/", "checkpoint/", "discarded/", "store/")

    def lines(run: Path, name: str) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in line.items() if not k.startswith(timing) and k not in ("restart", "seconds")}
            for line in read_lines(run / f"{name}.jsonl")
        ]

    for name in ("metrics", "evaluations"):
        assert lines(a, name) == lines(b, name)
    weights, expected = (load_file(run / "model" / "model.safetensors") for run in (a, b))
    assert weights.keys() == expected.keys() and all(torch.equal(weights[k], expected[k]) for k in expected)
    assert (a / "heldout.json").read_text() == (b / "heldout.json").read_text()


def test_two_runs_on_one_cluster_do_not_disturb_each_other(neighbours: list[Path]) -> None:
    assert_same(*neighbours)


def test_a_killed_run_equals_the_uninterrupted_one_bit_for_bit(uninterrupted: Path, killed: Path) -> None:
    screen = (killed.parent / "screen").read_text()
    assert "the driver was killed by SIGKILL" in screen and "going on from r0000-batch-000002" in screen
    assert_same(killed, uninterrupted)


def test_a_run_whose_terminal_hangs_up_loses_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    settings = [*ON_POLICY, "checkpoint.every=100"]
    run, screen = tmp_path / "run", tmp_path / "screen"
    with screen.open("w") as out:
        asked = subprocess.Popen(
            command(tmp_path, "run", settings),
            env=variables(),
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # which may be ignored here
        )
        deadline = time.monotonic() + 300
        while not any(line["batch"] == 2 for line in rundir.read_json_lines(run / "draws.jsonl")):
            assert asked.poll() is None and time.monotonic() < deadline, screen.read_text()
            time.sleep(0.02)
        os.killpg(asked.pid, signal.SIGHUP)  # as a shell tells its jobs: Ray hears it too
        assert asked.wait(60) == 130, screen.read_text()
    assert "asked to end: it finishes its update and writes a checkpoint" in screen.read_text()
    done = len(read_lines(run / "draws.jsonl"))
    assert checkpoint.names(str(run / "checkpoints")) == [f"r0000-batch-{done:06d}"]
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"

    again = subprocess.run([*command(tmp_path, "run", settings), "--resume"], env=variables(), check=False)
    assert again.returncode == 0
    starts = [e for e in read_lines(run / "events.jsonl") if e["kind"] == "start"]
    assert [(e["checkpoint"], e["voided"]) for e in starts] == [(None, 0), (f"r0000-batch-{done:06d}", 0)]
    assert_same(run, uninterrupted)


def test_after_a_kill_every_draw_is_trained_on_once(killed: Path) -> None:
    lines = read_lines(killed / "draws.jsonl")
    assert [line["batch"] for line in lines] == list(range(5))
    assert [line["restart"] for line in lines] == [0, 0, 1, 1, 1]
    assert sorted(d for line in lines for d in (*line["trained"], *line["filtered"])) == list(range(20))
    starts = [e for e in read_lines(killed / "events.jsonl") if e["kind"] == "start"]
    assert [(e["restart"], e["checkpoint"]) for e in starts] == [(0, None), (1, "r0000-batch-000002")]
    assert starts[1]["voided"] > 0


def test_a_run_keeps_its_wandb_id(killed: Path) -> None:
    attempts = list((killed / "wandb").glob("offline-run-*"))
    assert len(attempts) == 2 and len({path.name.split("-")[-1] for path in attempts}) == 1


def test_no_secret_of_the_environment_reaches_what_a_run_leaves(killed: Path) -> None:
    files = [path for path in killed.parent.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        raw = path.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in raw], path


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_taken(killed: Path) -> None:
    place = killed / "checkpoints"
    last = checkpoint.names(place)[-1]
    assert last == "r0001-batch-000005"
    file = place / last / "learner-0-of-1.safetensors"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    (killed / "summary.json").unlink()  # as if it had died before its end
    settings = [*ON_POLICY, "learner.num_ranks=2", "cluster.cpus_per_rank=0.5"]  # two ranks, where there was one
    resumed = subprocess.run(
        [*command(killed.parent, "run", settings), "--resume"], env=variables(), capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stdout
    assert f"refused: {last}: learner-0-of-1.safetensors: checksum differs" in resumed.stdout
    assert "going on from r0001-batch-000004 instead" in resumed.stdout
    lines = read_lines(killed / "draws.jsonl")
    assert [(line["batch"], line["restart"]) for line in lines][-2:] == [(3, 1), (4, 2)]


# ---- where a run may go on from


def config_of(directory: Path, *overrides: str) -> Config:
    return load(Config, QUICKSTART, [*SMALL, f"runs_dir={directory}", "name=run", *overrides])


def began(directory: Path, *batches: int, config: Config | None = None) -> Config:
    """A run that was cut off, with checkpoints at ``batches``."""
    config = config or config_of(directory)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    rundir.save_json(config.run_dir / "config.json", config.model_dump())
    rundir.append_event(config.run_dir, "start", restart=0, checkpoint=None, voided=0)
    for batch in batches:
        name = f"r0000-batch-{batch:06d}"
        entry = checkpoint.put(config.checkpoint_place, name, "learner-0-of-1.safetensors", b"weights")
        state = {"restart": 0, "batch": batch, "settings": config.model_dump(mode="json")}
        state |= {"inputs": {"data.train": "a"}}
        checkpoint.commit(config.checkpoint_place, name, state, [entry])
    return config


def claimed(config: Config, resume: str | None) -> tuple[recovery.Start, str]:
    screen = io.StringIO()
    return recovery.claim(config, resume, Display(Console(file=screen, width=200))), screen.getvalue()


def begun(config: Config, start: recovery.Start) -> tuple[int, str]:
    screen = io.StringIO()
    return recovery.begin(config, start, Display(Console(file=screen, width=200))), screen.getvalue()


def test_without_a_run_there_is_nothing_to_resume_but_auto_begins_one(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with pytest.raises(ConfigError, match=r"--resume: .*run holds no run to go on with"):
        claimed(config, "last")
    assert claimed(config, "auto")[0] == recovery.Start()


def test_a_run_is_not_begun_over_another_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"already holds a run; go on with it \(--resume\)"):
        claimed(began(tmp_path), None)


def test_without_a_checkpoint_auto_begins_anew_and_a_plain_resume_says_so(tmp_path: Path) -> None:
    config = began(tmp_path)
    with pytest.raises(ConfigError, match=r"holds no checkpoint; with --resume auto the run begins anew"):
        claimed(config, "last")
    start, screen = claimed(config, "auto")
    assert (start.restart, start.name) == (1, None) and "the run begins anew" in screen
    (config.run_dir / "metrics.jsonl").write_text('{"batch": 0}\n{"batch": 1}\n')
    (config.run_dir / "evaluations.jsonl").write_text('{"version": 0}\n')
    (config.run_dir / "heldout.json").write_text("{}")
    assert begun(config, start)[0] == 3
    for name in ("metrics", "evaluations"):
        assert (config.run_dir / f"{name}.jsonl").read_text() == ""
    assert not (config.run_dir / "heldout.json").exists()


def test_auto_does_not_begin_anew_where_checkpoints_went_missing(tmp_path: Path) -> None:
    config = began(tmp_path, config=config_of(tmp_path, f"checkpoint.place={tmp_path / 'gone'}"))
    rundir.append_event(config.run_dir, "checkpoint", name="r0000-batch-000002")
    with pytest.raises(ConfigError, match=r"the last of them r0000-batch-000002: set checkpoint\.place to where they"):
        claimed(config, "auto")


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        with pytest.raises((ConfigError, checkpoint.CheckpointError), match=r"cannot be (written|read)"):
            claimed(config_of(tmp_path, f"checkpoint.place={tmp_path / place}"), None)


def test_a_line_that_was_cut_off_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    rundir.append_json(path, {"a": 1})
    with path.open("a") as f:
        f.write('{"b": ')
    rundir.append_json(path, {"c": 3}, {"d": float("nan")})
    assert list(rundir.read_json_lines(path)) == [{"a": 1}, {"c": 3}, {"d": None}]


def test_lines_of_several_threads_do_not_meet(tmp_path: Path) -> None:
    path, record = tmp_path / "lines.jsonl", {"x": "y" * 50_000}
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: rundir.append_json(path, record, record), range(200)))
    assert path.read_text() == (json.dumps(record) + "\n") * 400


def test_what_is_left_of_a_start_that_died_is_no_run(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    (config.run_dir / "ray-logs-20261127-000000").mkdir(parents=True)
    assert claimed(config, "auto")[0] == recovery.Start()


def test_the_newest_good_checkpoint_is_taken_or_the_one_that_is_named(tmp_path: Path) -> None:
    config = began(tmp_path, 2, 4, 6)
    assert claimed(config, "auto")[0].name == "r0000-batch-000006"
    start, _ = claimed(config, "r0000-batch-000002")
    assert (start.restart, start.name, start.files) == (1, "r0000-batch-000002", ("learner-0-of-1.safetensors",))
    assert len(checkpoint.names(config.checkpoint_place)) == 3, "what is only asked for may still be refused"
    _, screen = begun(config, start)
    assert "r0000-batch-000004 lies behind r0000-batch-000002 and is removed" in screen
    assert checkpoint.names(config.checkpoint_place) == ["r0000-batch-000002"]


def test_a_run_whose_machine_is_lost_goes_on_elsewhere_from_its_checkpoints(tmp_path: Path) -> None:
    place = f"checkpoint.place={tmp_path / 'store'}"
    here, there = (config_of(tmp_path / d, place) for d in ("here", "there"))
    began(tmp_path / "here", 2, config=here)
    with pytest.raises(ConfigError, match=r"already holds checkpoints of a run; go on with it \(--resume\)"):
        claimed(there, None)
    for resume in ("auto", "last"):
        start, _ = claimed(there, resume)
        assert (start.restart, start.name) == (1, "r0000-batch-000002")
    begun(there, start)
    assert claimed(there, "auto")[0].restart == 1
    other = there.model_copy(update={"name": "other"})
    assert claimed(other, "auto")[0] == recovery.Start()


def test_a_run_that_was_cut_off_at_any_point_of_its_beginning_can_be_resumed(tmp_path: Path) -> None:
    config = began(tmp_path, 2)
    with (config.run_dir / "events.jsonl").open("a") as events:
        events.write('{"kind": "st')  # as a full disk leaves it
    for restart in (1, 2):
        start, _ = claimed(config, "auto")
        assert start.restart == restart
        begun(config, start)
    assert [e["kind"] for e in read_lines(config.run_dir / "events.jsonl")] == ["start"] * 3


def test_fewer_batches_than_the_run_has_draws_for_are_refused(tmp_path: Path) -> None:
    constant = "learner.schedule=constant"
    began(tmp_path, 2, config=config_of(tmp_path, constant))
    with pytest.raises(ConfigError, match=r"train\.num_batches: got 3, takes 4 or more"):
        claimed(config_of(tmp_path, constant, "train.num_batches=3"), "auto")
    assert claimed(config_of(tmp_path, constant, "train.num_batches=4"), "auto")[0].name == "r0000-batch-000002"


def test_a_name_that_is_no_checkpoint_is_refused_with_those_there_are(tmp_path: Path) -> None:
    config = began(tmp_path, 2)
    with pytest.raises(ConfigError, match=r"batch-7: not in .*; there are r0000-batch-000002"):
        claimed(config, "batch-7")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.lr=0.5", "learner.lr: got 0.5, the run has 0.0001"),
        ("rollout.probe=null", "rollout.probe"),
        ("learner.schedule=constant", "learner.schedule"),
    ],
)
def test_other_settings_make_another_run(tmp_path: Path, override: str, message: str) -> None:
    began(tmp_path, 2)
    with pytest.raises(ConfigError, match=f"^--resume: {message}"):
        claimed(config_of(tmp_path, override), "auto")


@pytest.mark.parametrize(
    "override", ["rollout.workers=3", "learner.num_ranks=2", "cluster.object_store_mb=99", "checkpoint.keep_last=9"]
)
def test_where_a_run_runs_may_change(tmp_path: Path, override: str) -> None:
    began(tmp_path, 2)
    assert claimed(config_of(tmp_path, override), "auto")[0].name == "r0000-batch-000002"


def test_a_finished_run_goes_on_only_for_more_batches(tmp_path: Path) -> None:
    config = began(tmp_path, 2)
    rundir.save_json(config.run_dir / "summary.json", {"status": "finished"})
    rundir.append_json(config.run_dir / "draws.jsonl", {"batch": config.train.num_batches - 1})
    with pytest.raises(ConfigError, match=r"is finished .*; raise train.num_batches to go on"):
        claimed(config, "auto")


def test_more_batches_would_change_a_schedule_that_ends_with_the_last(tmp_path: Path) -> None:
    config = began(tmp_path, 2)
    assert config.learner.schedule == "linear"
    with pytest.raises(ConfigError, match=r"on which its linear learner\.schedule depends"):
        claimed(config_of(tmp_path, "train.num_batches=1000"), "auto")


def test_data_that_changed_on_disk_are_refused(tmp_path: Path) -> None:
    start, _ = claimed(began(tmp_path, 2), "auto")
    recovery.check_inputs(start, {"data.train": "a"})
    with pytest.raises(ConfigError, match=r"--resume: data.train is not what it was when r0000-batch-000002 was"):
        recovery.check_inputs(start, {"data.train": "b"})


def test_a_digest_tells_problems_their_order_and_their_tokens_apart() -> None:
    def problem(key: str, *ids: int) -> Problem:
        return Problem(key, "question", np.array(ids, np.int32), "7")

    a, b = problem("a", 1, 2), problem("b", 3)
    digests = [recovery.digest(p) for p in ([a, b], [b, a], [problem("a", 1), problem("b", 2, 3)], [a], [])]
    assert len(set(digests)) == len(digests) and recovery.digest([a, b]) == digests[0]


# ---- what the files say of later batches


def test_a_roll_back_voids_later_lines_and_what_was_half_written(tmp_path: Path) -> None:
    for name in ("metrics", "draws", "probes", "samples"):
        lines = "".join(json.dumps({"batch": batch, "x": 0.1}) + "\n" for batch in (0, 0, 1, 2, 3))
        (tmp_path / f"{name}.jsonl").write_text(lines + '{"batch": 4, "x"')
    evaluations = "".join(json.dumps({"version": version}) + "\n" for version in (0, 2, 3))
    (tmp_path / "evaluations.jsonl").write_text(evaluations)
    assert rundir.roll_back(tmp_path, 2) == 4 * 3 + 1
    assert [line["batch"] for line in read_lines(tmp_path / "draws.jsonl")] == [0, 0, 1]
    assert [line["version"] for line in read_lines(tmp_path / "evaluations.jsonl")] == [0, 2]
    assert rundir.roll_back(tmp_path, 2) == 0


def test_a_second_driver_of_the_same_run_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with rundir.alone(config.run_dir, "run"):
        arguments = ["train", str(QUICKSTART), *SMALL, f"runs_dir={tmp_path}", "name=run", "--resume=auto"]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "another run works here (" in result.output


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["train", "c.yaml", "--resume"], ["train", "c.yaml", "--resume=last"]),
        (["train", "c.yaml", "--resume", "seed=1"], ["train", "c.yaml", "--resume=last", "seed=1"]),
        (["train", "--resume", "--dry-run", "c.yaml"], ["train", "--resume=last", "--dry-run", "c.yaml"]),
        (["train", "c.yaml", "--resume", "auto"], ["train", "c.yaml", "--resume", "auto"]),
        (["train", "c.yaml", "--resume=auto"], ["train", "c.yaml", "--resume=auto"]),
    ],
)
def test_resume_needs_no_value(given: list[str], meant: list[str]) -> None:
    assert _with_value(given, "--resume", "last") == meant

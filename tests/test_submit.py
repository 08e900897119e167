"""Runs as jobs of a real Ray cluster with its job server, which wants a token, started as a user would."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from stepgrpo.config import ConfigError, masked
from stepgrpo.launch import SCRATCH
from stepgrpo.rundir import read_json_lines
from stepgrpo.submit import ADDRESS, EXCLUDES, connect, given_address, prepare, upload
from tests.nodes import free_port

ROOT = Path(__file__).parents[1]
MINIATURE = ROOT / "examples" / "miniature"
BIN = Path(sys.executable).parent
SECONDS_TO_START = 300.0
SMALL = """
base: base.yaml
model: {path: model}
data: {train: problems.jsonl, eval: null}
rollout: {group_size: 4}
engine: {kv_cache_mb: 64}
learner: {schedule: constant}
train: {prompts_per_batch: 4, prompts_per_update: 2}
eval: {every: 0}
checkpoint: {every: 1}
"""
ATTEND = """
import sys
from stepgrpo.console import Display
from stepgrpo.submit import Job, attend, connect, submit
client = connect(sys.argv[1])
job = sys.argv[2] or submit(client, Job(sys.argv[3], {}))
print("job", job, flush=True)
sys.exit(attend(client, job, Display()))
"""
"""Arguments: address, a job that runs, or else the command of a new one."""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a run that needs all of it."""
    here = tmp_path / "project"
    shutil.copytree(MINIATURE / "model", here / "model")
    shutil.copy(MINIATURE / "data" / "heldout.jsonl", here / "problems.jsonl")
    shutil.copy(ROOT / "configs" / "quickstart.yaml", here / "base.yaml")
    (here / "run.yaml").write_text(SMALL)
    monkeypatch.chdir(here)
    return here


@dataclass(frozen=True)
class Head:
    """A cluster of one node."""

    process: psutil.Process
    port: int
    """Of its dashboard."""
    env: dict[str, str]
    """Of whoever may submit to it."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, *command: object) -> subprocess.Popen[str]:
        words = [str(word) for word in command]
        return subprocess.Popen(
            words, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def result(self, *command: object) -> tuple[int, str]:
        """Exit status and output."""
        with self.start(*command) as process:
            output, _ = process.communicate(timeout=SECONDS_TO_START)
        return process.returncode, output

    def actors(self) -> list[psutil.Process]:
        """All that belongs to runs."""
        titles = ("ray::RolloutWorker", "ray::LearnerWorker", "VLLM::EngineCore", "stepgrpo")
        found = []
        for process in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any(title in word for word in process.cmdline() for title in titles):
                    found.append(process)
        return found


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    directory = tempfile.mkdtemp(prefix="r", dir="/tmp")
    ours = {SCRATCH, ADDRESS, "RAY_ADDRESS", "RAY_TMPDIR"}
    env = {name: value for name, value in os.environ.items() if name not in ours} | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef",
    }
    dashboard = free_port()
    command = [BIN / "ray", "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2"]
    command += [f"--temp-dir={directory}", f"--object-store-memory={100 << 20}", f"--dashboard-port={dashboard}"]
    command += [f"--{name}={free_port()}" for name in ("port", "ray-client-server-port", "metrics-export-port")]
    command += [f"--dashboard-agent-{name}-port={free_port()}" for name in ("listen", "grpc")]
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    cluster = Head(psutil.Process(process.pid), dashboard, env)
    try:
        assert process.stdout is not None
        assert any("Ray runtime started" in line for line in process.stdout)
        yield cluster
    finally:
        left = cluster.process.children(recursive=True)
        process.terminate()
        for each in psutil.wait_procs([cluster.process, *left], timeout=60)[1]:
            each.kill()
        process.communicate()
        shutil.rmtree(directory, ignore_errors=True)


def lines_until(process: subprocess.Popen[str], word: str) -> list[str]:
    """What it prints up to the line with a word."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if word in line:
            return lines
    raise AssertionError(f"ended before it said {word!r}: {''.join(lines)}")


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def refusal(*overrides: str, **options: object) -> str:
    with pytest.raises(ConfigError) as error:
        prepare(Path("run.yaml"), overrides, **options)  # type: ignore[arg-type]
    return str(error.value)


def test_a_job_is_what_the_arguments_say_with_paths_from_the_current_directory(project: Path) -> None:
    job = prepare(project / "run.yaml", ["data.suffix=a b", "runs_dir=/shared"], resume="auto")
    assert job.entrypoint == "python -m stepgrpo train run.yaml 'data.suffix=a b' runs_dir=/shared --resume=auto"
    assert {str(file.relative_to(project)) for file in job.sent} >= {"run.yaml", "base.yaml", "problems.jsonl"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_batchs=3", "train.num_batchs: unknown key; did you mean train.num_batches?"),
        ("runs_dir=runs", "runs_dir: got runs, which would be removed with the job's own directory"),
        ("checkpoint.place=ck", "checkpoint.place: got ck, which would be removed with the job's own directory"),
        ("data.train=../problems.jsonl", "data.train: got ../problems.jsonl, but ../problems.jsonl would not be sent"),
        ("model.path=runs/model", "model.path: got runs/model, but runs/model/config.json would not be sent"),
        ("reward.grader=own.mine:f", "reward.grader: got own.mine:f, but own/mine.py would not be sent"),
        ("over.yaml", "CONFIG: got over.yaml, but hidden.yaml would not be sent"),
    ],
)
def test_what_the_job_would_not_find_is_refused(project: Path, override: str, message: str) -> None:
    shutil.copy(project / "problems.jsonl", project.parent)
    (project / "runs" / "model").mkdir(parents=True)
    shutil.copy(project / "model" / "config.json", project / "runs" / "model")
    (project / "own").mkdir()
    (project / "own" / "mine.py").touch()
    (project / "over.yaml").write_text("base: hidden.yaml\n")
    (project / "hidden.yaml").write_text("name: x\n")
    (project / ".gitignore").write_text("hidden.yaml\n/own\n")
    assert refusal("runs_dir=/shared", override).startswith(message)


def test_a_runtime_environment_that_ray_refuses_is_told_before_anything_is_sent(project: Path) -> None:
    for content, message in (
        ("image_uri: example/image", "--runtime-env: Ray does not take it: The 'image_uri' field currently cannot"),
        ("working_dir: /x", "--runtime-env: env.yaml: takes a mapping, such as `pip: [PACKAGE]`, without working_dir"),
        ("{", "--runtime-env: env.yaml cannot be read"),
    ):
        Path("env.yaml").write_text(content)
        assert refusal("runs_dir=/shared", runtime_env=Path("env.yaml")).startswith(message)
    assert refusal("runs_dir=/shared", env=["NOT_SET_HERE"]).startswith("--env: got NOT_SET_HERE, takes NAME=VALUE")


def test_settings_of_the_runtime_environment_are_kept_beside_ours(project: Path) -> None:
    Path("env.yaml").write_text("pip: [six]\nexcludes: [notes]\nenv_vars: {A: a, B: b}\n")
    env = prepare(Path("run.yaml"), ["runs_dir=/shared"], env=["B=c=d"], runtime_env=Path("env.yaml")).runtime_env
    assert env == {
        "pip": ["six"],
        "excludes": [*EXCLUDES, "notes"],
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "300", "A": "a", "B": "c=d"},
    }


def test_of_a_variable_that_is_given_twice_the_last_one_counts_and_whether_it_is_shown(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A", "hidden")
    for env, value, shown in ((["A", "A=1"], "1", '"A": "1"'), (["A=1", "A"], "hidden", '"A": "\'"$A"\'"')):
        job = prepare(Path("run.yaml"), ["runs_dir=/shared"], env=env)
        assert job.runtime_env["env_vars"]["A"] == value
        assert shown in job.command("http://here:1") and "hidden" not in job.command("http://here:1")


def test_an_address_that_was_tried_is_not_left_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "http://elsewhere:1"):
        monkeypatch.delenv(ADDRESS, raising=False)
        if before:
            monkeypatch.setenv(ADDRESS, before)
        with pytest.raises(ConfigError, match="no Ray job server"):
            connect(f"http://127.0.0.1:{free_port()}")
        assert os.environ.get(ADDRESS) == before


def test_a_password_in_an_address_is_not_shown(project: Path) -> None:
    address = f"http://me:pass@w0rd@127.0.0.1:{free_port()}"
    shown = f"http://***@127.0.0.1:{address.rpartition(':')[2]}"
    command = prepare(Path("run.yaml"), ["runs_dir=/shared"]).command(address)
    assert command.startswith(f"{ADDRESS}={shlex.quote(shown)} ray job submit") and "w0rd" not in command
    for refuse, given in ((connect, address), (given_address, address.removeprefix("http://"))):
        with pytest.raises(ConfigError) as error:
            refuse(given)
        assert "***@127.0.0.1:" in str(error.value) and "w0rd" not in str(error.value)
    for text in ("runs@night/one", "me: nobody@here", "http://here:1"):
        assert masked(text) == text


def test_what_is_counted_is_what_ray_packs(project: Path, tmp_path: Path) -> None:
    for name in ("runs/x", "wandb/x", ".git/x", ".venv/x", "sub/.mypy_cache/x", "sub/ignored", "sub/kept", "by_ray"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(name)
    (project / "sub" / ".gitignore").write_text("ignored\n")
    (project / ".rayignore").write_text("by_ray\n")
    (project / "linked").symlink_to(project / "sub")
    package = tmp_path / "package.zip"
    excludes = [*get_runtime_env_default_excludes(), *EXCLUDES]
    create_package(str(project), package, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(package) as packed:
        sizes = {info.filename: info.file_size for info in packed.infolist() if not info.is_dir()}
    assert {str(f.relative_to(project)): size for f, size in upload(EXCLUDES, 1 << 30).items()} == sizes
    assert {"sub/kept", "linked/kept"} <= sizes.keys() and "sub/ignored" not in sizes


def test_too_much_to_send_is_refused_with_what_is_largest_until_it_is_left_out(project: Path) -> None:
    (project / "corpus" / "raw").mkdir(parents=True)
    os.truncate(os.open(project / "corpus" / "raw" / "all.bin", os.O_CREAT | os.O_WRONLY), 150_000_000)
    message = refusal("runs_dir=/shared")
    assert "to send, takes 100.0 MB at most; the largest are corpus/raw/all.bin (150.0 MB), model" in message
    (project / ".rayignore").write_text("/corpus\n")
    assert sum(prepare(Path("run.yaml"), ["runs_dir=/shared"]).sent.values()) < 10_000_000


def test_a_server_that_is_not_there_or_not_rays_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADDRESS, "http://elsewhere:1")
    assert given_address(None) == "http://elsewhere:1"
    assert given_address("http://here:1") == "http://here:1"
    with pytest.raises(ConfigError, match="--address: got here:1, takes the URL of Ray's dashboard"):
        given_address("here:1")
    with pytest.raises(ConfigError, match=r"no Ray job server answers there .* `ray start --head`"):
        connect(f"http://127.0.0.1:{free_port()}")
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with pytest.raises(ConfigError, match="no Ray job server answers there"):
            connect(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()


def test_without_its_token_a_cluster_says_what_to_set(project: Path, head: Head) -> None:
    command = ["env", "RAY_AUTH_MODE=disabled", BIN / "stepgrpo", "submit", "run.yaml", "runs_dir=/shared"]
    status, output = head.result(*command, f"--address={head.address}")
    assert status == 2 and "lets nobody in without its token" in output and "set RAY_AUTH_MODE=token" in output


def test_a_token_that_is_there_is_used_without_being_asked_for(head: Head) -> None:
    code = f"from stepgrpo import submit; submit.connect({head.address!r}); print(submit._reaching('x'))"
    # What is named wins over what Ray's other variable says.
    elsewhere = ["-u", "RAY_AUTH_MODE", "RAY_ADDRESS=http://127.0.0.1:1"]
    status, output = head.result("env", *elsewhere, sys.executable, "-c", code)
    assert (status, output) == (0, f"{ADDRESS}=x RAY_AUTH_MODE=token\n"), output


def test_the_printed_command_does_the_same_when_pasted_and_shows_no_secret(project: Path, head: Head) -> None:
    (project / "mine.py").write_text("import os\nraise ValueError('the secret is ' + os.environ['SECRET'])\n")
    head.env["SECRET"] = "it's; secret"
    submit = [BIN / "stepgrpo", "submit", "run.yaml", "--env=SECRET", "reward.grader=mine:f"]
    submit += [f"runs_dir={project.parent}"]
    status, output = head.result(*submit, f"--address={head.address}")
    command, *rest = output.splitlines()
    assert status == 2, output  # of a setting that `train` refuses
    assert "the secret is it's; secret" in "".join(rest)
    assert (
        command.startswith(f"{ADDRESS}={head.address} RAY_AUTH_MODE=token ray job submit --") and "it's" not in command
    )

    head.env["RAY_ADDRESS"] = "http://127.0.0.1:1"  # the command says where itself
    assert head.result(*submit, f"--address={head.address}", "--dry-run")[1].splitlines()[0] == command
    status, output = head.result("sh", "-c", command)
    del head.env["RAY_ADDRESS"], head.env["SECRET"]
    assert status == 1 and "the secret is it's; secret" in output  # Ray's own status of any failure


@pytest.mark.parametrize(("command", "status"), [("echo out; echo err >&2; exit 7", 7), ("kill -KILL $$", 137)])
def test_the_exit_status_is_that_of_the_jobs_command(project: Path, head: Head, command: str, status: int) -> None:
    code, output = head.result(sys.executable, "-c", ATTEND, head.address, "", command)
    assert code == status and output.splitlines()[-1].endswith("failed")
    assert "echo" not in command or {"out", "err"} <= set(output.splitlines())


def test_ctrl_c_leaves_the_job_running_or_stops_it(project: Path, head: Head) -> None:
    command = "trap 'echo saving; exit 0' TERM; echo ready; while :; do sleep 0.1; done"
    with head.start(sys.executable, "-c", ATTEND, head.address, "", command) as process:
        job = lines_until(process, "job ")[-1].split()[1]
        lines_until(process, "ready")
        process.send_signal(signal.SIGINT)
        lines_until(process, "Press Ctrl-C again to stop it, Enter to leave it")
        output, _ = process.communicate("\n", timeout=60)
        assert process.returncode == 130 and f"ray job stop {job}" in output

    with head.start(sys.executable, "-c", ATTEND, head.address, job, "") as process:
        lines_until(process, "ready")
        process.send_signal(signal.SIGINT)
        lines_until(process, "The job goes on")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 143 and "saving" in output.splitlines()
        assert output.splitlines()[-1] == f"the job {job} stopped"


class Proxy:
    """Stands before a port, until its connections are cut."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._open: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._open += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                to.sendall(data)
            to.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def close(self) -> None:
        self.cut()
        self._server.close()


def test_a_lost_connection_is_made_anew_and_nothing_is_printed_twice(project: Path, head: Head) -> None:
    go = project.parent / "go"
    command = f"echo one; until [ -e {shlex.quote(str(go))} ]; do sleep 0.1; done; echo two; exit 3"
    proxy = Proxy(head.port)
    with head.start(sys.executable, "-c", ATTEND, f"http://127.0.0.1:{proxy.port}", "", command) as process:
        lines_until(process, "one\n")
        proxy.cut()
        go.touch()
        output, _ = process.communicate(timeout=120)
    proxy.close()
    assert process.returncode == 3
    assert output.count("two\n") == 1 and "one\n" not in output


def test_a_run_that_is_stopped_ends_in_good_order_and_goes_on_in_another_job(project: Path, head: Head) -> None:
    runs = project.parent / "runs"
    settings = ["run.yaml", "name=x", f"runs_dir={runs}"]
    env = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})
    ray = ["env", f"{ADDRESS}={head.address}", "ray", "job"]
    plain = [*ray, "submit", "--no-wait", "--submission-id=plain", "--working-dir=.", f"--runtime-env-json={env}"]
    assert head.result(*plain, "--", "stepgrpo", "train", *settings, "train.num_batches=100000")[0] == 0
    wait_for(lambda: list(runs.glob("x/checkpoints/*/manifest.json")))
    running = head.actors()
    assert any("VLLM" in word for process in running for word in process.cmdline())
    status, output = head.result(*ray, "stop", "plain")
    assert status == 0 and "was stopped" in output
    assert psutil.wait_procs(running, timeout=30)[1] == []
    wait_for((runs / "x" / "summary.json").exists)  # which the driver writes when its actors are gone
    summary = json.loads((runs / "x" / "summary.json").read_text())
    assert summary["status"] == "interrupted"

    last = 3 + max(int(path.name.rpartition("-")[2]) for path in (runs / "x" / "checkpoints").glob("*-batch-*"))
    submit = [BIN / "stepgrpo", "submit", *settings, f"train.num_batches={last}", "--resume"]
    status, output = head.result(*submit, f"--address={head.address}")
    assert status == 0, output
    assert output.splitlines()[-1].endswith("succeeded")
    assert json.loads((runs / "x" / "summary.json").read_text())["status"] == "finished"
    assert {line["batch"] for line in read_json_lines(runs / "x" / "metrics.jsonl")} == set(range(last))
    wait_for(lambda: not head.actors())

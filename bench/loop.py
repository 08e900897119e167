"""Seconds per update of the whole loop: ours against TRL's, and by how far sampling may run ahead.

    python bench/loop.py [--trl PYTHON] [--rounds 2] [--updates 8]

Every row makes updates of 16 problems x 8 responses with the quickstart's model, data and learner, KL term included, at
a learning rate so small that nothing shortens meanwhile. Rows take turns, a process each; the first two updates of a
process are left out (of TRL's, one). Ours samples with one vLLM engine and learns on one rank, side by side; TRL does
one after the other, in one process. `plain` are whole responses with GRPO's reward, as TRL's are: the same work; the
others are truncated as the quickstart truncates them. Idle shares are of the time: the learner while it waits for
groups, the engine while no rollout is in flight.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from figures import machine, spread, table
from sides.asking import ROOT, Side

from stepgrpo.rundir import read_json_lines

RESULTS = Path(__file__).parent / "results" / "loop.json"
WARM_UP = 2
PLAIN = ("rollout.probe=null", "reward.scheme=outcome")
STREAM = ("learner.stream=true", "learner.micro_batch_tokens=2048")
WAYS: dict[str, tuple[str, ...]] = {
    "plain, ahead by 1": PLAIN,
    "plain, ahead by 0": (*PLAIN, "train.max_staleness=0"),
    "truncated, ahead by 0": ("train.max_staleness=0",),
    "truncated, ahead by 0, streamed": ("train.max_staleness=0", *STREAM),
    "truncated, ahead by 1": (),
    "truncated, ahead by 1, weights between trajectories": ("rollout.in_flight_updates=false",),
    "truncated, ahead by 1, streamed": STREAM,
    "truncated, ahead by 2": ("train.max_staleness=2",),
}
TRL = ("TRL, one thread, float32", "TRL as it comes")
"""As it comes: a thread per core, bfloat16 autocast, gradient checkpointing."""
LR = 1e-6
TRL_ROWS = 8


def ours(directory: Path, settings: Sequence[str], updates: int) -> list[dict[str, float]]:
    """What each update of a run took."""
    settings = [
        f"train.num_batches={WARM_UP + updates}",
        "train.prompts_per_update=16",
        f"learner.lr={LR}",
        "learner.warmup_updates=0",
        "learner.schedule=constant",
        "data.eval=null",
        "eval.every=0",
        "checkpoint.every=0",
        *settings,
    ]
    train(directory, settings)
    lines = list(read_json_lines(directory / "metrics.jsonl"))
    return [
        {
            "seconds": line["time/batch"],
            "tokens": line["rollout/tokens"],
            "learner_idle": line["time/wait"] / line["time/batch"],
            "engine_idle": max(0.0, 1 - line["time/generate"] / line["time/batch"]),
        }
        for line in lines[WARM_UP:]
    ]


def train(directory: Path, settings: Sequence[str]) -> None:
    """A run of the quickstart, changed by ``settings``."""
    place = [f"name={directory.name}", f"runs_dir={directory.parent}"]
    subprocess.run(
        [sys.executable, "-m", "stepgrpo", "train", "configs/quickstart.yaml", *place, *settings],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def trl(directory: Path, python: str, updates: int, as_it_comes: bool) -> list[dict[str, float]]:
    miniature = ROOT / "examples" / "miniature"
    job = {
        "model": str(miniature / "model"),
        "data": str(miniature / "data" / "train.jsonl"),
        "prompts": 16,
        "group_size": 8,
        "max_tokens": 180,
        "updates": 1 + updates,
        "rows": TRL_ROWS,
        "lr": LR,
        "kl_coef": 0.01,
        "as_it_comes": as_it_comes,
    }
    threads = len(os.sched_getaffinity(0)) if as_it_comes else 1
    directory.mkdir()
    (directory / "job.json").write_text(json.dumps(job))
    with Side("trl_loop.py", str(directory / "job.json"), python=python, threads=threads) as side:
        return [side.read() for _ in range(1 + updates)][1:]


def report(done: dict[str, list[list[dict[str, float]]]], yardstick: str) -> None:
    """``done``: way -> rounds -> updates."""

    def seconds(rounds: list[list[dict[str, float]]]) -> list[float]:
        return [fmean(u["seconds"] for u in updates) for updates in rounds]

    def idle(rounds: list[list[dict[str, float]]], whose: str) -> str:
        shares = [u[whose] for updates in rounds for u in updates if whose in u]
        return f"{fmean(shares):.0%}" if shares else ""

    base = seconds(done[yardstick])
    rows = [
        [
            way,
            spread(seconds(rounds)),
            spread([s / b for s, b in zip(seconds(rounds), base, strict=True)]),
            f"{fmean(u['tokens'] for updates in rounds for u in updates):.0f}",
            idle(rounds, "learner_idle"),
            idle(rounds, "engine_idle"),
        ]
        for way, rounds in done.items()
    ]
    header = ["", "seconds per update", f"/ {yardstick}", "tokens per response", "learner idle", "engine idle"]
    print(table(header, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds per update of the whole loop.")
    parser.add_argument("--trl", metavar="PYTHON", default=os.environ.get("TRL_PYTHON"), help="a Python that has TRL")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--updates", type=int, default=8, help="of ours in a round; TRL makes a quarter as many")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), metavar="WAY")
    args = parser.parse_args()
    os.environ["DS_ACCELERATOR"] = "cpu"  # transformers imports deepspeed, which says aloud what it found
    start = machine()
    print(start)
    if not args.trl:
        print("TRL's row is left out: --trl PYTHON names an interpreter that has it")
    done: dict[str, list[Any]] = {way: [] for way in ([*TRL] if args.trl else []) + args.ways}
    with tempfile.TemporaryDirectory(prefix="stepgrpo-bench-") as scratch:
        for r in range(args.rounds):
            for i, way in enumerate(list(done)[:: -1 if r % 2 else 1]):
                directory = Path(scratch) / f"{r}-{i}"
                if way in TRL:
                    done[way].append(trl(directory, args.trl, max(1, args.updates // 4), way != TRL[0]))
                else:
                    done[way].append(ours(directory, WAYS[way], args.updates))
                RESULTS.write_text(json.dumps({"machine": start, "ways": done}) + "\n")
                print(f"{way}: {fmean(u['seconds'] for u in done[way][-1]):.2f} s per update", file=sys.stderr)
    report(done, args.ways[0])


if __name__ == "__main__":
    main()

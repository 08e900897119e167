"""Seconds of training until held-out accuracy and tokens reach a target, by how far sampling may run ahead.

    python bench/target.py [--seeds 0 1]        # bench/results/target.json; three minutes for each run

The quickstart, whole, with an evaluation of 300 held-out problems every five batches. Sampling ahead makes a batch
cheaper, and its groups older: what it gains in seconds it may lose in what a batch teaches. A run has met a target at
its first evaluation that does, and stays without an entry where none does. The clock is that of the training, what
evaluations take from it included; start-up is not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import accumulate
from pathlib import Path

from figures import machine, spread, table
from loop import train

from stepgrpo.rundir import read_json_lines

RESULTS = Path(__file__).parent / "results" / "target.json"
STALENESS = (0, 1, 2)
TARGETS = ((0.9, 0.8), (0.95, 0.65), (0.965, 0.55))
"""(accuracy, share of the starting model's tokens)"""
EVERY = 5

Course = list[tuple[float, float, float]]
"""Of each evaluation: seconds since the first batch began, accuracy, tokens."""


def course(directory: Path, staleness: int, seed: int) -> Course:
    train(
        directory,
        [
            f"train.max_staleness={staleness}",
            f"seed={seed}",
            f"eval.every={EVERY}",
            "eval.num_prompts_during=300",
            "checkpoint.every=0",
        ],
    )
    batches = [line["time/batch"] for line in read_json_lines(directory / "metrics.jsonl") if "time/batch" in line]
    seconds = [0.0, *accumulate(batches)]
    found = read_json_lines(directory / "evaluations.jsonl")
    return [(seconds[e["version"]], e["accuracy"]["mean"], e["tokens"]["mean"]) for e in found]


def reached(run: Course, accuracy: float, share: float) -> float | None:
    most = share * run[0][2]
    return next((seconds for seconds, a, tokens in run if a >= accuracy and tokens <= most), None)


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of training until a target is met.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    on = machine()
    print(on)
    done: dict[str, list[Course]] = {str(s): [] for s in STALENESS}
    with tempfile.TemporaryDirectory(prefix="stepgrpo-bench-") as scratch:
        for i, seed in enumerate(args.seeds):
            for staleness in STALENESS[:: -1 if i % 2 else 1]:
                done[str(staleness)].append(course(Path(scratch) / f"{staleness}-{seed}", staleness, seed))
                RESULTS.write_text(json.dumps({"machine": on, "courses": done}) + "\n")
    header = ["train.max_staleness", *(f"{a:.1%} at {t:.0%}" for a, t in TARGETS), "in all, s", "ends at"]
    rows = []
    for staleness, runs in done.items():
        cells = []
        for target in TARGETS:
            met = [s for run in runs if (s := reached(run, *target)) is not None]
            cells.append(f"{spread(met, 0)}, {len(met)} of {len(runs)}" if met else "none")
        ends = " and ".join(f"{run[-1][1]:.1%} at {run[-1][2] / run[0][2]:.1%}" for run in runs)
        rows.append([staleness, *cells, spread([run[-1][0] for run in runs], 0), ends])
    print(table(header, rows))


if __name__ == "__main__":
    main()

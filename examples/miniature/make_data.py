"""Write the miniature's problems, ``data/train.jsonl`` and ``data/heldout.jsonl``, or pairs for ``stepgrpo sft``.

python -m examples.miniature.make_data                              # both problem files, as committed
python -m examples.miniature.make_data --sft runs/sft.jsonl         # 2,000 problems with short responses
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from examples.miniature.task import BRIEF, LEVELS, Problem, conclude, sample_problem, think

DATA = Path(__file__).parent / "data"
NUM_TRAIN, NUM_HELDOUT, NUM_SFT = 8000, 1000, 2000


def problems(seed: int, number: int, *, held_out: bool) -> Iterator[tuple[int, Problem]]:
    """``number`` different problems with their levels, which take turns: any first n are as hard as all."""
    rng = random.Random(seed)
    seen: set[Problem] = set()
    levels = list(LEVELS)
    while len(seen) < number:
        level = levels[len(seen) % len(levels)]
        problem = sample_problem(rng, level, held_out=held_out)
        if problem not in seen:
            seen.add(problem)
            yield level, problem


def problem_rows(seed: int, number: int, *, held_out: bool) -> list[dict[str, object]]:
    rows = problems(seed, number, held_out=held_out)
    return [{"problem": p.text, "answer": p.answer, "level": level} for level, p in rows]


def sft_rows(seed: int, number: int) -> list[dict[str, object]]:
    """Training problems with brief responses, which hold no end-of-sequence token: the trainer appends its own."""
    rng = random.Random(seed)
    rows = []
    for level, p in problems(seed, number, held_out=False):
        words = [*think(rng, p, BRIEF), "</think>", *conclude(p)[:-1]]
        rows.append({"problem": p.text, "response": " ".join(words), "level": level})
    return rows


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the miniature's problems.")
    parser.add_argument("--sft", type=Path, metavar="FILE", help=f"write {NUM_SFT} pairs for `stepgrpo sft` instead")
    args = parser.parse_args()
    if args.sft:
        write(args.sft, sft_rows(2, NUM_SFT))
        return
    write(DATA / "train.jsonl", problem_rows(0, NUM_TRAIN, held_out=False))
    write(DATA / "heldout.jsonl", problem_rows(1, NUM_HELDOUT, held_out=True))


if __name__ == "__main__":
    main()

"""The learner: tokens per second and memory of an update, against TRL's; packing, chunked log-probabilities, balance.

    python bench/learner.py [--trl PYTHON] [--repetitions 3]
    python bench/learner.py --gpu 1.7B --trl PYTHON         # bench/results/learner-gpu.json

Both sides make one optimizer update in float32 on one thread, or on a GPU in bfloat16 with float32 master weights and
gradient checkpointing, of the same model, on the same sequences with the same
advantages, no KL term, gradient norm clipped, AdamW; that they do the same is checked by the gradient norms.

    ours  timed  plan, micro-batches, forward, backward, gradient clipping and the optimizer's step, in
                 `LearnerWorker.update` over one rank of DeepSpeed ZeRO-3
    TRL   timed  from the return of `_generate_and_score_completions`, which got the given completions by
                 `rollout_func`, to `on_step_end`: splitting the batch, forward, backward, clipping and the optimizer's
                 step, in the library's own loop

Neither has sampling, grading or tokenising in it. `--trl` names a Python that has TRL (or set TRL_PYTHON); without it
that row is left out. Each side is a process of its own that stays up; they take turns, and ratios are taken within a
turn. (On a GPU, which would not hold them all, they come one after the other.) Processor seconds are those of the
process: what else the machine does disturbs them less than the clock's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from figures import machine, spread, table
from models import QWEN3, save_qwen3
from sides.asking import ROOT, Side
from simulate import LENGTHS, Lengths

from stepgrpo.learner.batch import partition

RESULTS = Path(__file__).parent / "results" / "learner.json"
MINIATURE = ROOT / "examples" / "miniature" / "model"
GROUP_SIZE = 8
TRL_ROWS = 8
"""Its default of sequences per forward pass, and of 8, 32 and 128 its fastest on the miniature."""
HEAD = (1536, 512, 65536)
"""Tokens, hidden size and vocabulary of the head that is measured alone."""


def miniature_groups(number: int) -> list[dict[str, Any]]:
    """Problems of the miniature's with traces as its starting model writes them."""
    sys.path.insert(0, str(ROOT))  # the example is not installed
    from examples.miniature.task import LEVELS, TOKEN_IDS, ask, conclude, sample_problem, think

    rng = random.Random(0)

    def ids(words: Sequence[str]) -> list[int]:
        return [TOKEN_IDS[w] for w in words]

    problems = [sample_problem(rng, list(LEVELS)[i % len(LEVELS)]) for i in range(number)]
    return [
        {
            "prompt": ids(ask(p)),
            "responses": [ids([*think(rng, p), "</think>", *conclude(p)]) for _ in range(GROUP_SIZE)],
            "rewards": [rng.random() for _ in range(GROUP_SIZE)],
        }
        for p in problems
    ]


def random_groups(number: int, vocabulary: int, shorter: int) -> list[dict[str, Any]]:
    """Random tokens; the long-tailed mix's lengths over ``shorter``."""
    rng = np.random.default_rng(0)
    lengths = LENGTHS["long-tailed"]()

    def tokens(n: int) -> list[int]:
        return rng.integers(3, vocabulary, n).tolist()

    return [
        {
            "prompt": tokens(20),
            "responses": [tokens(max(2, n // shorter)) for n in lengths(draw, GROUP_SIZE)],
            "rewards": rng.random(GROUP_SIZE).tolist(),
        }
        for draw in range(number)
    ]


def make_model(directory: Path, vocabulary: int) -> Path:
    """A random Qwen3 of 59 million parameters, over half of them the vocabulary's."""
    save_qwen3(
        directory,
        vocab_size=vocabulary,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        intermediate_size=1536,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=2,
    )
    return with_words(directory, vocabulary)


def with_words(directory: Path, vocabulary: int) -> Path:
    """The model with a tokenizer, which TRL asks for."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2").save_pretrained(directory)
    return directory


def job_of(model: Path, groups: list[dict[str, Any]], micro_batch_tokens: int, device: str = "cpu") -> dict[str, Any]:
    return {
        "device": device,
        "model": str(model),
        "groups": groups,
        "lr": 1e-6,
        "micro_batch_tokens": micro_batch_tokens,
        "rows": TRL_ROWS,
    }


def compare(
    job: dict[str, Any], trl: str | None, repetitions: int, warm_up: int, ways: Sequence[str] = ()
) -> dict[str, list[dict[str, Any]]]:
    """Measurements of each side, one per turn. ``ways``: of `sides/ours_learner.py`, besides the usual one."""
    with tempfile.TemporaryDirectory(prefix="stepgrpo-bench-") as scratch:
        path = Path(scratch) / "job.json"
        path.write_text(json.dumps(job))
        sides = {"ours": partial(Side, "ours_learner.py", str(path))}
        sides |= {f"ours, {way}": partial(Side, "ours_learner.py", str(path), way) for way in ways}
        if trl:
            sides["TRL"] = partial(Side, "trl_learner.py", str(path), python=trl)
        together = [list(sides)] if job["device"] == "cpu" else [[name] for name in sides]  # a GPU holds one of them
        done: dict[str, list[dict[str, Any]]] = {}
        for names in together:
            done |= in_turns({name: sides[name]() for name in names}, warm_up, repetitions)
    for name, turns in done.items():
        for ours, other in zip(done["ours"], turns, strict=True):  # advantages differ by 1e-4 of their size
            apart, most = abs(other["grad_norm"] / ours["grad_norm"] - 1), 2e-3 if job["device"] == "cpu" else 0.05
            assert apart < most, f"{name} makes another update than ours: {apart:.1%}"
    return done


def in_turns(sides: dict[str, Side], warm_up: int, repetitions: int) -> dict[str, list[dict[str, Any]]]:
    done: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    with ExitStack() as stack:
        for side in sides.values():
            stack.enter_context(side)
        for r in range(warm_up + repetitions):
            for name in list(sides)[:: 1 if r % 2 else -1]:
                taken = sides[name].ask()
                print(f"{name}: {taken['seconds']:.2f} s", file=sys.stderr, flush=True)
                if r >= warm_up:
                    done[name].append(taken)
    return done


def heads(repetitions: int) -> dict[str, list[dict[str, Any]]]:
    ways = ("full", "chunked", "quarter")
    done: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    with Side("head.py", *map(str, HEAD)) as side:
        for r in range(1 + repetitions):
            for way in ways:
                taken = side.ask(way)
                if r:
                    done[way].append(taken)
    return done


def ratios(over: Sequence[dict[str, Any]], under: Sequence[dict[str, Any]], what: str) -> list[float]:
    return [a[what] / b[what] for a, b in zip(over, under, strict=True)]


def above_rest(turns: Sequence[dict[str, Any]]) -> float:
    """MB the process had at most, beyond the libraries."""
    return max(t["peak"] - t["at_rest"] for t in turns)


def padding_and_balance(
    lengths: Lengths, num_prompts: int, group_size: int, prompt: int, budget: int
) -> dict[str, Any]:
    """Of one batch's micro-batches. ``waiting``: the share of all ranks' time that goes by in waiting for the slowest
    rank of a micro-batch, if time is tokens."""
    totals = [prompt + n for draw in range(num_prompts) for n in lengths(draw, group_size)]
    out: dict[str, Any] = {"sequences": len(totals), "mean": float(np.mean(totals)), "longest": max(totals)}
    out |= {"budget": budget}
    for packed in (True, False):
        for ranks in (1, 2, 4):
            plan = partition(totals, num_ranks=ranks, budget_tokens=budget, packed=packed)
            cost = np.array([[_cost([totals[i] for i in mb], packed) for mb in share] for share in plan])
            waits = 1 - cost.sum() / (ranks * cost.max(0).sum())
            out[f"{'packed' if packed else 'rows'}, {ranks}"] = {
                "micro_batches": cost.shape[1],
                "padding": 1 - sum(totals) / cost.sum(),
                "max_over_mean": cost.sum(1).max() / cost.sum(1).mean(),
                "waiting": waits,
            }
    rng = np.random.default_rng(0)
    order = rng.permutation(len(totals))
    rows = [[totals[i] for i in order[k : k + TRL_ROWS]] for k in range(0, len(order), TRL_ROWS)]
    # TRL pads completions to the longest of the whole batch, and prompts too.
    out["trl_padding"] = 1 - sum(totals) / (len(totals) * max(totals))
    out["as_they_come_padding"] = 1 - sum(totals) / sum(len(r) * max(r) for r in rows)
    return out


def _cost(lengths: Sequence[int], packed: bool) -> int:
    return (sum(lengths) if packed else len(lengths) * max(lengths, default=0)) or 1


def report_sides(what: str, job: dict[str, Any], done: dict[str, list[dict[str, Any]]]) -> None:
    tokens = sum(len(r) for g in job["groups"] for r in g["responses"])
    print(f"\n{what}: {len(job['groups'])} x {GROUP_SIZE} responses, {tokens:,} trained tokens in one update")
    rows = []
    for name, turns in done.items():
        rows.append(
            [
                name,
                spread([tokens / t["seconds"] for t in turns], 0),
                spread([tokens / t["cpu"] for t in turns], 0),
                spread(ratios(turns, done["ours"], "seconds")),
                spread(ratios(turns, done["ours"], "cpu")),
                f"{above_rest(turns):,.0f}",
                f"{max(t['gpu_peak'] for t in turns):,.0f}",
            ]
        )
    header = [
        *("", "tokens/s", "tokens/processor s", "time / ours", "processor time / ours", "memory, MB", "GPU memory, MB")
    ]
    print(table(header, rows), flush=True)


def report_heads(done: dict[str, list[dict[str, Any]]]) -> None:
    names = {"full": "whole logits", "chunked": "chunks of 1,024 (the setting)", "quarter": "chunks of 256"}
    print(f"\nlog-probabilities and gradients of {HEAD[0]:,} tokens, hidden size {HEAD[1]}, vocabulary {HEAD[2]:,}")
    rows = []
    for way, turns in done.items():
        rows.append(
            [
                names[way],
                spread(ratios(turns, done["full"], "seconds")),
                spread(ratios(turns, done["full"], "cpu")),
                f"{above_rest(turns):,.0f}",
                f"{max(t['apart'] for t in turns):.0e}",
            ]
        )
    print(table(["", "time", "processor time", "memory, MB", "apart by at most"], rows), flush=True)


def report_mixes(mixes: dict[str, dict[str, Any]]) -> None:
    for name, m in mixes.items():
        print(
            f"\n{name}: {m['sequences']:,} sequences, mean {m['mean']:,.0f}, longest {m['longest']:,} tokens, "
            f"micro-batches of {m['budget']:,}; padding of TRL's one matrix {m['trl_padding']:.0%}"
        )
        rows = [
            [
                f"{kind}, {ranks} rank{'s' if ranks > 1 else ''}",
                str((found := m[f"{kind}, {ranks}"])["micro_batches"]),
                f"{found['padding']:.2%}",
                f"{found['max_over_mean']:.4f}",
                f"{found['waiting']:.2%}",
            ]
            for kind in ("packed", "rows")
            for ranks in (1, 2, 4)
        ]
        print(table(["", "micro-batches", "padding", "max / mean tokens of a rank", "waiting"], rows), flush=True)


def on_gpu(args: argparse.Namespace) -> None:
    """Our learner as it comes, with padded rows, and with Liger's kernels, against TRL."""
    vocabulary = QWEN3[args.gpu]["vocab_size"]
    with tempfile.TemporaryDirectory(prefix="stepgrpo-bench-", dir="/dev/shm") as scratch:
        model = save_qwen3(Path(scratch) / "model", dtype="bfloat16", device="cuda", **QWEN3[args.gpu])
        job = job_of(with_words(model, vocabulary), random_groups(8, vocabulary, 8), 18432, "cuda")
        done = compare(job, args.trl, args.repetitions, 1, args.ways)
    what = f"Qwen3-{args.gpu}'s shape"
    report_sides(what, job, done)
    RESULTS.with_stem("learner-gpu").write_text(json.dumps({"machine": machine(), what: done}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="An update's rate and memory, against TRL's.")
    parser.add_argument("--trl", metavar="PYTHON", default=os.environ.get("TRL_PYTHON"), help="a Python that has TRL")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--gpu", choices=QWEN3, help="on a GPU, a random model of this shape; nothing else")
    parser.add_argument("--ways", nargs="*", choices=("sdpa", "liger"), default=["sdpa"], help="of ours, on a GPU")
    args = parser.parse_args()
    # transformers imports deepspeed, which says aloud what it found
    os.environ["DS_ACCELERATOR"] = "cuda" if args.gpu else "cpu"
    print(machine())
    if not args.trl:
        print("TRL's rows are left out: --trl PYTHON names an interpreter that has it")
    if args.gpu:
        on_gpu(args)
        return
    miniature, long_tailed = LENGTHS["miniature"](), LENGTHS["long-tailed"]()
    mixes = {
        "miniature, the quickstart's update": padding_and_balance(miniature, 8, 8, 19, 8192),
        "long-tailed, an update of configs/qwen3_8b.yaml": padding_and_balance(long_tailed, 128, 5, 150, 18432),
    }
    report_mixes(mixes)
    found: dict[str, Any] = {"machine": machine(), "mixes": mixes}
    found["heads"] = heads(args.repetitions)
    report_heads(found["heads"])
    vocabulary = HEAD[2]
    with tempfile.TemporaryDirectory(prefix="stepgrpo-bench-") as scratch:
        jobs = {
            "miniature, 0.3 M parameters": job_of(MINIATURE, miniature_groups(16), 8192),
            "59 M parameters, vocabulary of 65,536": job_of(
                make_model(Path(scratch), vocabulary), random_groups(1, vocabulary, 64), 1024
            ),
        }
        for what, job in jobs.items():
            is_small = what.startswith("miniature")
            found[what] = compare(job, args.trl, args.repetitions, 2 if is_small else 1, ["sdpa"])
            report_sides(what, job, found[what])
    RESULTS.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

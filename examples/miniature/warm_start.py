"""Make the miniature's starting checkpoint: a model that reasons, and overthinks.

    python -m examples.miniature.warm_start            # about 6 minutes on one core; writes examples/miniature/model/
    python -m examples.miniature.warm_start --stubborn # the same for examples/miniature/stubborn/

Supervised learning on traces made on the fly from training problems, first short drills, then the overthinking ones.
Muon moves the matrices and AdamW the rest: AdamW alone takes many times as long to learn the sums.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Qwen3ForCausalLM

from examples.miniature.measure import measure
from examples.miniature.policy import PAD, build_model, build_tokenizer
from examples.miniature.task import (
    BRIEF,
    LEVELS,
    OVERTHINKING,
    STUBBORN,
    TOKEN_IDS,
    Habits,
    Problem,
    ask,
    conclude,
    sample_drill,
    sample_problem,
    think,
)

HERE = Path(__file__).parent
BATCHES_PER_POOL = 8
STUBBORN_UNCLOSED = 0.3


@dataclass(frozen=True, slots=True)
class Recipe:
    seed: int = 1
    steps: int = 1500
    drill_steps: int = 300
    batch_size: int = 32
    muon_lr: float = 0.02
    adamw_lr: float = 3e-3
    warmup_steps: int = 30
    decay: float = 0.5
    """Last share of the steps, over which the learning rates fall to 3 %; most of the accuracy comes there."""
    unclosed: float = 0.15
    """Share of traces without ``</think>``, so that an answer induced inside thinking is nothing unheard of."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with its trace: token ids and the loss weight of each, both [T]."""

    token_ids: list[int]
    weights: list[float]


def make_example(rng: random.Random, problem: Problem, habits: Habits, unclosed: float) -> Example:
    """The prompt weighs nothing, first tries 2 and answer digits 4, since few tokens carry them; all else weighs 1.

    Habits that never stop early would never show what can be known how soon. There a trace without ``</think>`` ends in
    front of any of its checks: an answer is induced at every stage, and none is volunteered.
    """
    parts = len(problem.parts)
    prompt = ask(problem)
    thinking = think(rng, problem, habits)
    closed = rng.random() >= unclosed
    if not closed and habits.redundant:
        checks = [i for i, word in enumerate(thinking) if word == "Wait"]
        thinking = thinking[: rng.choice([*checks, len(thinking)])]
    final = ["</think>"] * closed + conclude(problem)
    before, after = [1.0] * len(thinking), [1.0] * len(final)
    before[2 : 3 * parts : 3] = [2.0] * parts
    after[-2 - parts : -2] = [4.0] * parts
    if not closed:
        after[0] = 0.0  # asked for, never volunteered
    weights = [0.0] * len(prompt) + before + after
    return Example([TOKEN_IDS[word] for word in prompt + thinking + final], weights)


def batches(rng: random.Random, recipe: Recipe, habits: Habits = OVERTHINKING) -> Iterator[list[Example]]:
    """``recipe.steps`` batches. Each pool of several is sorted by length before it is cut, to save padding."""
    pool: list[list[Example]] = []
    for step in range(recipe.steps):
        if not pool:
            drill = step < recipe.drill_steps
            examples = [
                make_example(rng, sample_drill(rng), BRIEF, recipe.unclosed)
                if drill
                else make_example(rng, sample_problem(rng, rng.choice(list(LEVELS))), habits, recipe.unclosed)
                for _ in range(recipe.batch_size * BATCHES_PER_POOL)
            ]
            examples.sort(key=lambda e: len(e.token_ids))
            pool = [examples[i : i + recipe.batch_size] for i in range(0, len(examples), recipe.batch_size)]
            rng.shuffle(pool)
        yield pool.pop()


def train(recipe: Recipe, habits: Habits = OVERTHINKING, *, report_every: int = 50) -> Qwen3ForCausalLM:
    """Train from scratch; deterministic by seed up to the machine's floating-point arithmetic."""
    model = build_model(recipe.seed)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.0, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    def rate(step: int) -> float:
        warmup = min(1.0, (step + 1) / recipe.warmup_steps)
        return warmup * min(1.0, 0.03 + (1 - step / recipe.steps) / recipe.decay)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    start = time.monotonic()
    for step, batch in enumerate(batches(random.Random(recipe.seed + 1), recipe, habits), 1):
        width = max(len(e.token_ids) for e in batch)
        ids = torch.tensor([e.token_ids + [PAD] * (width - len(e.token_ids)) for e in batch])
        weights = torch.tensor([e.weights + [0.0] * (width - len(e.weights)) for e in batch])[:, 1:]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % report_every == 0:
            print(f"step {step}/{recipe.steps}  loss {loss.item():.4f}  {time.monotonic() - start:.0f} s", flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the miniature's starting checkpoint.")
    parser.add_argument("--stubborn", action="store_true", help="traces that always make four redundant checks")
    parser.add_argument("--out", type=Path, help="where to write it; default: model/ or stubborn/ beside this file")
    parser.add_argument("--seed", type=int, default=Recipe().seed)
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    recipe = Recipe(seed=args.seed, steps=args.steps)
    if args.stubborn:
        recipe = replace(recipe, unclosed=STUBBORN_UNCLOSED)
    habits = STUBBORN if args.stubborn else OVERTHINKING
    out = args.out or HERE / ("stubborn" if args.stubborn else "model")
    start = time.monotonic()
    model = train(recipe, habits)
    seconds = time.monotonic() - start
    model.save_pretrained(out)
    build_tokenizer().save_pretrained(out)
    record = {
        "recipe": asdict(recipe),
        **({"habits": asdict(habits)} if args.stubborn else {}),
        "parameters": model.num_parameters(),
        "torch": torch.__version__,
        "threads": args.threads,
        "seconds": round(seconds),
        "measured": measure(model.eval(), HERE / "data" / "heldout.jsonl"),
    }
    text = json.dumps(record, indent=2)
    (out / "warm_start.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

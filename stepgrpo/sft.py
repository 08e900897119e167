"""Supervised fine-tuning on (problem, response) pairs: the learner of the RL loop, without rollouts."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepgrpo import launch
from stepgrpo.config import SftConfig
from stepgrpo.console import Display
from stepgrpo.data import DataError, Problem, load_problems
from stepgrpo.hub import checkpoint_files, eos_ids
from stepgrpo.run import (
    answer,
    cancel_on_sigterm,
    claim_directory,
    close,
    learner_bundles,
    load_tokenizer,
    note_skipped,
    save_json,
    save_model,
    set_up_ranks,
    start_ranks,
)
from stepgrpo.tokens import Codec
from stepgrpo.types import IntArray

Pair = tuple[IntArray, IntArray]
"""(prompt ids, response ids with the end-of-sequence id)"""


def train(config: SftConfig, display: Display) -> dict[str, Any]:
    """Fine-tune; leaves a run directory with ``metrics.jsonl``, ``summary.json`` and ``model/``.

    Raises:
        ConfigError, DataError: something the user must change.
    """
    with display.phase("prepare", "reading model and data") as phase:
        claim_directory(config.run_dir)
        data = load_problems(config.data.train, config.data, load_tokenizer(config.model.path), config.response_field)
        note_skipped(display, data)
        pairs = _pairs(config, data.items)
        phase.result = f"{len(pairs):,} pairs"
    save_json(config.run_dir / "config.json", config.model_dump())
    bundles = learner_bundles(config)
    with launch.session(config.cluster, bundles):
        return asyncio.run(_train(config, display, pairs, bundles))


def _pairs(config: SftConfig, problems: Sequence[Problem]) -> list[Pair]:
    directory = checkpoint_files(config.model.path)
    codec, eos = Codec.from_dir(directory), eos_ids(directory)[0]
    pairs = []
    for p in problems:
        assert p.response is not None
        ids = codec.encode(p.response)
        if ids[-1] != eos:
            ids = [*ids, eos]
        if len(p.token_ids) + len(ids) > config.max_tokens:
            raise DataError(
                f"{p.key}: a pair of {len(p.token_ids) + len(ids)} tokens, longer than max_tokens ({config.max_tokens})"
            )
        pairs.append((p.token_ids, np.asarray(ids, np.int32)))
    return pairs


async def _train(
    config: SftConfig, display: Display, pairs: Sequence[Pair], bundles: Sequence[launch.Bundle]
) -> dict[str, Any]:
    import ray

    cancel_on_sigterm()
    per_epoch = math.ceil(len(pairs) / config.batch_size)
    total = per_epoch * config.epochs
    with display.phase("start", "starting DeepSpeed"):
        group = await launch.reserve(bundles, config.cluster.start_timeout)
        options = [launch.place(group, i, b) for i, b in enumerate(bundles)]
        ranks = start_ranks(config.learner, config.model, config.cluster.device, total, options)
        await launch.within(set_up_ranks(ranks), config.cluster.start_timeout, "the learner")
    try:
        losses = []
        with (
            display.phase("train", f"training, {total} updates") as phase,
            (config.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as log,
        ):
            for update in range(total):
                epoch, position = divmod(update, per_epoch)
                order = np.random.default_rng([config.seed, epoch]).permutation(len(pairs))
                chosen = order[position * config.batch_size : (position + 1) * config.batch_size]
                ref = ray.put([pairs[i] for i in chosen])
                results = await asyncio.gather(*(answer(r.train_pairs.remote([ref])) for r in ranks))
                losses.append(results[0]["policy/loss"])
                log.write(json.dumps({"update": update + 1, "epoch": (update + 1) / per_epoch, **results[0]}) + "\n")
                phase.show(f"update {update + 1}/{total}  loss {losses[-1]:.4f}", update + 1, total)
            phase.result = f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"
        with display.phase("save", "saving the model"):
            await save_model(ranks, config.run_dir / "model")
    finally:
        await close((), ranks)
    seconds = {k: round(v, 2) for k, v in display.seconds.items()}
    summary = {"name": config.name, "updates": total, "loss": {"first": losses[0], "last": losses[-1]}}
    save_json(config.run_dir / "summary.json", {**summary, "seconds": seconds})
    return summary

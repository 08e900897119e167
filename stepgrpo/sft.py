"""Supervised fine-tuning on (problem, response) pairs: the learner of the RL loop, without rollouts."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepgrpo import launch, rundir
from stepgrpo.config import SftConfig
from stepgrpo.console import Display
from stepgrpo.crew import learner_crew, saved
from stepgrpo.data import ResponseEncoder, load_problems
from stepgrpo.hub import checkpoint_files, eos_ids, load_tokenizer, portable
from stepgrpo.launch import together
from stepgrpo.placement import learner_bundles
from stepgrpo.run import Ending, note_skipped
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
        rundir.claim(config.run_dir)
        config = portable(config)
        data = load_problems(
            config.data.train,
            config.data,
            load_tokenizer(config.model.path),
            config.response_field,
            encode_response=response_encoder(config),
        )
        note_skipped(display, data)
        pairs = [(p.token_ids, p.response_ids) for p in data.items if p.response_ids is not None]
        phase.result = f"{len(pairs):,} pairs"
    return fit(config, display, pairs)


def fit(config: SftConfig, display: Display, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Fine-tune on pairs that are tokens already, in a run directory that is claimed; ``config`` has been through
    ``portable``."""
    with launch.session(config.cluster, learner_bundles(config)):
        rundir.save_json(config.run_dir / "config.json", config.model_dump())
        with rundir.recorded(config.run_dir, display.seconds) as summary:
            asyncio.run(_train(config, display, pairs, summary))
    return summary


def response_encoder(config: SftConfig) -> ResponseEncoder:
    """From text to the ids to learn, ended and checked for their number."""
    directory = checkpoint_files(config.model.path)
    codec, eos = Codec.from_dir(directory), eos_ids(directory)[0]

    def encode(prompt: IntArray, response: str) -> IntArray:
        ids = codec.encode(response)
        if not ids or ids[-1] != eos:
            ids = [*ids, eos]
        length = len(prompt) + len(ids)
        if length > config.max_tokens:
            raise ValueError(f"a pair of {length} tokens, longer than max_tokens ({config.max_tokens})")
        return np.asarray(ids, np.int32)

    return encode


async def _train(config: SftConfig, display: Display, pairs: Sequence[Pair], summary: dict[str, Any]) -> None:
    import ray

    Ending()
    per_epoch = math.ceil(len(pairs) / config.batch_size)
    total = per_epoch * config.epochs
    losses: list[float] = []
    async with (
        learner_crew(config, display, total) as ranks,
        saved(ranks, config.model_dir, display, lambda: bool(losses)),
    ):
        with display.phase("train", f"training, {total} updates") as phase:
            for update in range(total):
                epoch, position = divmod(update, per_epoch)
                order = np.random.default_rng([config.seed, epoch]).permutation(len(pairs))
                chosen = order[position * config.batch_size : (position + 1) * config.batch_size]
                ref = ray.put([pairs[i] for i in chosen])
                results = await together(r.train_pairs.remote([ref]) for r in ranks)
                losses.append(results[0]["policy/loss"])
                summary |= {"updates": update + 1, "loss": {"first": losses[0], "last": losses[-1]}}
                line = {"update": update + 1, "epoch": (update + 1) / per_epoch, **results[0]}
                rundir.append_json(config.run_dir / "metrics.jsonl", line)
                phase.show(f"loss {losses[-1]:.4f}", update + 1, total)
            phase.result = f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"

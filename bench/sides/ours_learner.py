"""Our learner as a process that makes one update per request: ours_learner.py JOB.json [sdpa|liger].

See learner.py. Sequences lie end to end, but for `sdpa`."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np
import torch
from answering import Meter, answer, asked, resident

from stepgrpo.config import LearnerConfig, ModelConfig, RewardConfig, RolloutConfig
from stepgrpo.learner import engine  # noqa: F401  imported before memory is counted
from stepgrpo.learner.batch import make_plan
from stepgrpo.learner.worker import LearnerWorker
from stepgrpo.reward.credit import advantages
from stepgrpo.types import Exit, Group, Prompt, Trajectory, VersionSpan


def group_of(draw: int, row: dict[str, Any]) -> Group:
    ids = np.array(row["prompt"], np.int32)
    return Group(Prompt(draw, str(draw), ids, truth=""), tuple(trajectory(ids, r) for r in row["responses"]))


def trajectory(prompt: np.ndarray, response: list[int]) -> Trajectory:
    sampled = np.arange(len(prompt) + len(response)) >= len(prompt)
    return Trajectory(
        prompt_len=len(prompt),
        token_ids=np.concatenate([prompt, response]).astype(np.int32),
        logprobs=np.where(sampled, -1, 0).astype(np.float32),
        sampled=sampled,
        text="",
        exit=Exit.NATURAL,
        closing=None,
        complete=True,
        control=False,
        spans=(VersionSpan(0, 0, len(response)),),
    )


async def main(job: dict[str, Any], *ways: str) -> None:
    at_rest = resident()
    device = job["device"]
    model = ModelConfig(
        path=job["model"],
        dtype="bfloat16" if device == "cuda" else "float32",
        attention="sdpa" if "sdpa" in ways else "auto",
        liger="liger" in ways,
    )
    config = LearnerConfig.model_validate(
        {
            "importance_cap": None,
            "kl_coef": 0.0,
            "lr": job["lr"],
            "weight_decay": 0.0,
            "clip_high": 0.2,
            "micro_batch_tokens": job["micro_batch_tokens"],
            "gradient_checkpointing": device == "cuda",
        }
    )
    worker = LearnerWorker(
        0,
        1,
        config,
        model,
        device=device,
        total_updates=1000,
        rollout=RolloutConfig(),
        reward=RewardConfig(grader="exact"),
    )
    await worker.setup(*await worker.listen())
    groups = [group_of(draw, row) for draw, row in enumerate(job["groups"])]

    async def ready(value: Any) -> Any:
        return value

    graded = [await worker.ingest([ready(g)]) for g in groups]
    while asked():
        meter = Meter(torch.cuda if device == "cuda" else None)
        plan = make_plan(
            graded,
            advantages([row["rewards"] for row in job["groups"]]),
            version=0,
            num_updates=1,
            num_ranks=1,
            budget_tokens=job["micro_batch_tokens"],
            packed=model.packed_on(device),
        )
        [metrics] = await worker.update(plan, {g.draw: ready(g) for g in groups})
        answer(**meter.read(), at_rest=at_rest, grad_norm=metrics["policy/grad_norm"])


with open(sys.argv[1]) as f:
    asyncio.run(main(json.load(f), *sys.argv[2:]))

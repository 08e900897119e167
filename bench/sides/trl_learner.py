"""TRL's GRPOTrainer as a process that makes one update per request: python trl_learner.py JOB.json (see learner.py).

The trainer is the library's own and so is its loop. `rollout_func` hands it the given completions, a reward function
the given rewards; the clock starts when `_generate_and_score_completions` is done and stops at `on_step_end`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

import torch
from answering import Meter, answer, asked, resident
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

with open(sys.argv[1]) as f:
    job: dict[str, Any] = json.load(f)
groups = job["groups"]
group_size = len(groups[0]["responses"])
on_gpu = job["device"] == "cuda"
at_rest = resident()


class Trainer(GRPOTrainer):
    def _generate_and_score_completions(self, inputs: Any) -> Any:
        if not asked():
            os._exit(0)
        scored = super()._generate_and_score_completions(inputs)
        watch.meter = Meter(torch.cuda if on_gpu else None)
        return scored


class Watch(TrainerCallback):
    meter: Meter

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._taken = self.meter.read()

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        if "grad_norm" in logs:
            answer(**self._taken, at_rest=at_rest, grad_norm=float(logs["grad_norm"]))


watch = Watch()


def given(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    rows = [(g, i) for p in prompts[::group_size] for g in [groups[int(p)]] for i in range(group_size)]
    return {
        "prompt_ids": [g["prompt"] for g, _ in rows],
        "completion_ids": [g["responses"][i] for g, i in rows],
        "logprobs": [[-1.0] * len(g["responses"][i]) for g, i in rows],
    }


def reward(prompts: list[str], **_: Any) -> list[float]:
    return [groups[int(p)]["rewards"][i % group_size] for i, p in enumerate(prompts)]


with tempfile.TemporaryDirectory() as scratch:
    num_rows = len(groups) * group_size
    args = GRPOConfig(
        output_dir=scratch,
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        max_steps=1000,
        per_device_train_batch_size=job["rows"],
        gradient_accumulation_steps=num_rows // job["rows"],
        num_generations=group_size,
        beta=0.0,
        loss_type="dapo",  # the token mean over the whole batch, as ours
        epsilon=0.2,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=on_gpu,
        gradient_checkpointing=on_gpu,  # its default is true, ours false
        use_cpu=not on_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        shuffle_dataset=False,
    )
    Trainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(len(groups))]}),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        rollout_func=given,
        callbacks=[watch],
    ).train()

"""TRL's GRPOTrainer on the quickstart's model and task, one line per update: trl_loop.py JOB.json (see loop.py).

Everything is the library's own: chat template, generation by transformers with a KV cache, 128 sequences at a time,
loss, optimizer. The reward is the quickstart's accuracy and format; grading takes milliseconds.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from typing import Any

import torch
from answering import answer
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

with open(sys.argv[1]) as f:
    job: dict[str, Any] = json.load(f)
with open(job["data"]) as f:
    problems = [json.loads(line) for line, _ in zip(f, range(job["prompts"] * job["updates"]), strict=False)]
tokenizer = AutoTokenizer.from_pretrained(job["model"])


def reward(completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
    texts = tokenizer.batch_decode(completion_ids)
    boxes = [re.findall(r"\{ ([^{}]*) \}", text.rpartition("</think>")[2]) for text in texts]
    return [0.9 * (bool(box) and box[-1] == truth) + 0.1 * bool(box) for box, truth in zip(boxes, answer, strict=True)]


class Watch(TrainerCallback):
    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._seconds = time.perf_counter() - self._began

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        if "grad_norm" in logs:
            tokens = float(logs["completions/mean_length"])
            answer(seconds=self._seconds, tokens=tokens, reward=float(logs["reward"]))


with tempfile.TemporaryDirectory() as scratch:
    args = GRPOConfig(
        output_dir=scratch,
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        max_steps=job["updates"],
        per_device_train_batch_size=job["rows"],
        gradient_accumulation_steps=job["prompts"] * job["group_size"] // job["rows"],
        num_generations=job["group_size"],
        max_completion_length=job["max_tokens"],
        temperature=1.0,
        beta=job["kl_coef"],
        weight_decay=0.0,
        **({} if job.get("as_it_comes") else {"bf16": False, "gradient_checkpointing": False}),
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": p["problem"]}], "answer": p["answer"]} for p in problems]
        ),
        processing_class=tokenizer,
        callbacks=[Watch()],
    ).train()

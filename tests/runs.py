"""Whole runs of the miniature, on real vLLM, DeepSpeed and Ray, and what they leave behind."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from stepgrpo import run
from stepgrpo.config import Config, load
from stepgrpo.console import Display
from stepgrpo.launch import SCRATCH

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
MINIATURE = ROOT / "examples" / "miniature"
STEPGRPO = Path(sys.executable).with_name("stepgrpo")
INPUTS = [
    f"model.path={MINIATURE / 'model'}",
    f"data.train={MINIATURE / 'data' / 'train.jsonl'}",
    f"data.eval={MINIATURE / 'data' / 'heldout.jsonl'}",
]
SMALL = [
    *INPUTS,
    "rollout.group_size=4",
    "engine.kv_cache_mb=64",
    "learner.lr=1e-4",
    "train.prompts_per_batch=4",
    "train.prompts_per_update=2",
    "eval.num_prompts=40",
    "eval.num_prompts_during=10",
]
ENDLESS = [*SMALL, "train.num_batches=10000", "eval.num_prompts=4"]

Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A finished run."""

    config: Config
    summary: Json
    screen: str

    @property
    def directory(self) -> Path:
        return self.config.run_dir

    @property
    def model(self) -> Path:
        return self.directory / "model"

    def lines(self, name: str) -> list[Json]:
        return read_lines(self.directory / f"{name}.jsonl")


def read_lines(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(directory: Path, name: str, *overrides: str) -> Run:
    config = load(Config, QUICKSTART, [f"name={name}", f"runs_dir={directory}", *SMALL, *overrides])
    screen = io.StringIO()
    return Run(config, run.train(config, Display(Console(file=screen, width=200))), screen.getvalue())


def variables(**more: str) -> dict[str, str]:
    """Of a command of its own: with a supervisor, and without the tests' cluster and their service of wandb."""
    inherited = {k: v for k, v in os.environ.items() if k not in (SCRATCH, "RAY_ADDRESS", "WANDB_SERVICE")}
    return inherited | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"} | more


def command(directory: Path, name: str, settings: Sequence[str]) -> list[str]:
    return [str(STEPGRPO), "train", str(QUICKSTART), f"runs_dir={directory}", f"name={name}", *settings]


def descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def titled(processes: Sequence[psutil.Process], *titles: str) -> list[psutil.Process]:
    """Those whose title begins so."""
    found = []
    for process in processes:
        with suppress(psutil.Error):
            if "".join(process.cmdline()[:1]).startswith(titles):
                found.append(process)
    return found


def shared_memory(processes: Sequence[psutil.Process]) -> set[Path]:
    """Directories of published weights that these processes hold."""
    found = set()
    for process in processes:
        with suppress(psutil.Error):
            found |= {Path(f.path).parent for f in process.open_files() if f.path.startswith("/dev/shm/stepgrpo-")}
    return found

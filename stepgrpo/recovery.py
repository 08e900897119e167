"""What an interrupted run goes on from: its last good checkpoint, the same settings, the same model and data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepgrpo import checkpoint, rundir
from stepgrpo.checkpoint import CheckpointError, Manifest
from stepgrpo.config import Config, ConfigError, flat, is_under, validate
from stepgrpo.console import Display
from stepgrpo.data import Problem
from stepgrpo.survey import write_checkpoint

AUTO, LAST = "auto", "last"

_MAY_CHANGE = (
    "name",
    "runs_dir",
    "model.path",  # what lies there is looked at
    "model.attention",
    "model.liger",
    "data.train",
    "data.eval",
    "cluster",
    "engine",
    "checkpoint",
    "rollout.workers",
    "rollout.health_seconds",
    "learner.num_ranks",
    "learner.max_skips",
    "learner.micro_batch_tokens",
    "learner.logprob_chunk_tokens",
    "learner.gradient_checkpointing",
    "learner.offload_optimizer",
    "learner.bucket_mb",
    "learner.full_every",
    "reward.grade_timeout",
    "reward.grade_memory_mb",
    "reward.grade_processes",
    "train.num_batches",
    "train.max_failures",
    "train.sample_every",
    "train.max_restarts",
    "train.wait_warning",
    "train.wait_limit",
    "train.wandb",
    "train.wandb_project",
    "train.wandb_group",
)
"""Settings that decide where and how long a run runs, and not what it is."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins."""

    restart: int = 0
    """How often it was begun before. With their number it names weights: (restart, n) is never used twice."""
    name: str | None = None
    """The checkpoint; None: the beginning."""
    meta: dict[str, Any] = field(default_factory=dict)
    """What ``train.Loop`` keeps in a checkpoint."""
    files: tuple[str, ...] = ()
    """Names of the checkpoint's files."""


def claim(config: Config, resume: str | None, display: Display) -> Start:
    """Take the run directory, empty or for going on.

    Args:
        resume: None: a new run; `last`: from the last good checkpoint; `auto`: the same, or from the beginning where
            there is none yet; otherwise the name of a checkpoint.

    Raises:
        ConfigError: there is nothing to go on from, or it is another run's.
    """
    directory, place = config.run_dir, config.checkpoint_place
    there = checkpoint.names(place)
    if config.checkpoint.every and config.checkpoint.place and (refusal := write_checkpoint(place)):
        raise ConfigError(f"checkpoint.place: got {config.checkpoint.place}, cannot be written ({refusal})")
    if resume is None or (resume == AUTO and rundir.is_free(directory) and not there):
        rundir.claim(directory)
        if there:
            raise ConfigError(
                f"checkpoint.place: {place} already holds checkpoints of a run; go on with it (--resume), or choose "
                "another name"
            )
        return Start()
    if not there and not (directory / "config.json").is_file():
        raise ConfigError(f"--resume: {directory} holds no run to go on with; leave --resume out to begin one")
    if _status(directory) == "finished" and _batches(directory) >= config.train.num_batches:
        raise ConfigError(
            f"--resume: {directory} is finished ({config.train.num_batches} batches); raise train.num_batches to go on"
        )
    restart = sum(e["kind"] == "start" for e in rundir.read_json_lines(directory / "events.jsonl"))
    try:
        # The run directory may have been left behind with its machine.
        restart = max([restart, *(1 + checkpoint.read(place, n).meta["restart"] for n in there[-1:])])
    except CheckpointError:
        restart += 1
    try:
        manifest = _chosen(directory, place, there, resume, display)
    except CheckpointError as e:
        raise ConfigError(f"--resume: {e}") from None
    if manifest is None:
        _same_settings(json.loads((directory / "config.json").read_text()), config)
        return Start(restart)
    _same_settings(manifest.meta["settings"], config)
    fewest = manifest.meta["batch"] + config.train.max_staleness + 1
    if config.train.num_batches < min(fewest, manifest.meta["settings"]["train"]["num_batches"]):
        raise ConfigError(
            f"--resume: train.num_batches: got {config.train.num_batches}, takes {fewest} or more: so far reach draws "
            f"that {manifest.name} has under way"
        )
    return Start(restart, manifest.name, manifest.meta, tuple(f.name for f in manifest.files))


def begin(config: Config, start: Start, display: Display) -> int:
    """Void what files and checkpoints say of later batches than the checkpoint's; returns the number of lines."""
    directory, place = config.run_dir, config.checkpoint_place
    rundir.save_json(directory / "config.json", config.model_dump())
    # The way from there on is taken anew: what lies behind it would be taken for its continuation. First of all, for
    # who is killed in between goes on from the newest there is.
    for later in [n for n in checkpoint.names(place) if start.name and n > start.name]:
        display.warn(f"{later} lies behind {start.name} and is removed")
        checkpoint.discard(place, later)
    voided = rundir.roll_back(directory, -1 if start.name is None else start.meta["batch"])
    leftovers = ["summary.json", "error.txt", *(["heldout.json"] if start.name is None else [])]
    for leftover in leftovers:
        (directory / leftover).unlink(missing_ok=True)
    event = {"restart": start.restart, "checkpoint": start.name, "voided": voided}
    rundir.append_event(directory, "start", **event)
    return voided


def digest(problems: Sequence[Problem]) -> str:
    """Of what the draws are drawn from, in its order."""
    sha = hashlib.sha256()
    for p in problems:
        sha.update(f"{p.key}\0{p.truth}\0{len(p.token_ids)}\0".encode())
        sha.update(p.token_ids.tobytes())
    return sha.hexdigest()


def check_inputs(start: Start, inputs: dict[str, str]) -> None:
    """Refuse to go on with another model, or data that changed on disk.

    Args:
        inputs: field -> digest, as they are now.

    Raises:
        ConfigError: names the field.
    """
    then = start.meta.get("inputs", inputs)
    for name, digest in inputs.items():
        if then.get(name) != digest:
            raise ConfigError(
                f"--resume: {name} is not what it was when {start.name} was written; restore it, or start a new run"
            )


def _chosen(directory: Path, place: str, there: Sequence[str], resume: str, display: Display) -> Manifest | None:
    if resume not in (AUTO, LAST):
        try:
            manifest = checkpoint.verify(place, resume)
        except CheckpointError as e:
            others = [n for n in there if n != resume]
            hint = f"; there are {', '.join(others)}" if others else ""
            raise CheckpointError(f"{e}{hint}") from None
        return manifest
    if not there and not (resume == LAST and checkpoint.half_written(place)):
        written = [e["name"] for e in rundir.read_json_lines(directory / "events.jsonl") if e["kind"] == "checkpoint"]
        if resume == AUTO and written:
            raise CheckpointError(
                f"{place} holds no checkpoint, but the run wrote some, the last of them {written[-1]}: set "
                f"checkpoint.place to where they are, or remove {directory} to begin anew"
            )
        if resume == AUTO:
            display.warn(f"{place} holds no checkpoint yet: the run begins anew")
            return None
        raise CheckpointError(f"{place} holds no checkpoint; with --resume auto the run begins anew")
    manifest, refusals = checkpoint.newest(place)
    for refusal in refusals:
        display.warn(f"refused: {refusal}")
    if refusals:
        display.warn(f"going on from {manifest.name} instead")
    return manifest


def _same_settings(then: dict[str, Any], config: Config) -> None:
    try:
        before = validate(Config, then)
    except ConfigError as e:
        raise ConfigError(f"--resume: the run was begun with settings that this version does not know: {e}") from None
    a, b = (flat(c.model_dump(mode="json")) for c in (before, config))
    for key in sorted(a.keys() | b.keys()):
        got, has = b.get(key), a.get(key)
        if got != has and not is_under(key, _MAY_CHANGE):
            raise ConfigError(
                f"--resume: {key}: got {got!r}, the run has {has!r}; resume it as it is, or begin a new one"
            )
    num_batches, schedule = before.train.num_batches, config.learner.schedule
    if num_batches != config.train.num_batches and schedule != "constant":
        raise ConfigError(
            f"--resume: train.num_batches: got {config.train.num_batches}, the run has {num_batches}, on which its "
            f"{schedule} learner.schedule depends"
        )


def _status(directory: Path) -> str | None:
    path = directory / "summary.json"
    return json.loads(path.read_text())["status"] if path.is_file() else None


def _batches(directory: Path) -> int:
    return max((line["batch"] + 1 for line in rundir.read_json_lines(directory / "draws.jsonl")), default=0)

"""Groups as bytes: those that are finished but not yet trained on belong to a checkpoint.

A safetensors file. Of group g, trajectory t: tensors `g/prompt`, `g/t/token_ids`, `g/t/logprobs`, `g/t/sampled`. The
rest is JSON, in a tensor of its own: the file's metadata may have 100 MB at most, the responses' texts have more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from stepgrpo.types import Exit, Group, Probe, Prompt, Trajectory, Verdict, VersionSpan

Tensors = dict[str, NDArray[Any]]
FILE = "groups.safetensors"
ARRAYS = ("token_ids", "logprobs", "sampled")


def dump(groups: Sequence[Group]) -> bytes:
    """Groups to bytes, from which ``load`` makes equal ones, field for field and bit for bit."""
    tensors: Tensors = {}
    records = []
    for g, group in enumerate(groups):
        record = asdict(group)
        tensors[f"{g}/prompt"] = record["prompt"].pop("token_ids")
        for t, trajectory in enumerate(record["trajectories"]):
            tensors |= {f"{g}/{t}/{name}": trajectory.pop(name) for name in ARRAYS}
        records.append(record)
    tensors["json"] = np.frombuffer(json.dumps(records).encode(), np.uint8)
    return save_tensors(tensors)


def load(source: bytes | Path) -> list[Group]:
    """Groups in the order they were dumped.

    Args:
        source: what ``dump`` returned, or a file of it.
    """
    tensors = load_tensors(source if isinstance(source, bytes) else source.read_bytes())
    return [_group(record, tensors, str(g)) for g, record in enumerate(json.loads(tensors["json"].tobytes()))]


def _group(record: dict[str, Any], tensors: Tensors, at: str) -> Group:
    return Group(
        Prompt(**record["prompt"], token_ids=tensors[f"{at}/prompt"]),
        tuple(_trajectory(t, tensors, f"{at}/{i}") for i, t in enumerate(record["trajectories"])),
    )


def _trajectory(record: dict[str, Any], tensors: Tensors, at: str) -> Trajectory:
    record |= {name: tensors[f"{at}/{name}"] for name in ARRAYS}
    record["exit"] = Exit(record["exit"])
    record["closing"] = record["closing"] and tuple(record["closing"])
    record["spans"] = tuple(VersionSpan(**s) for s in record["spans"])
    record["probes"] = tuple(_probe(p) for p in record["probes"])
    return Trajectory(**record)


def _probe(record: dict[str, Any]) -> Probe:
    return Probe(**record | {"token_ids": tuple(record["token_ids"]), "verdict": Verdict(record["verdict"])})

"""The learner's share of a checkpoint as files: one per rank, each parameter cut as ZeRO-3 cuts it.

`learner-RANK-of-N.safetensors` holds this rank's flat float32 pieces `master/<param>`, `exp_avg/<param>` and
`exp_avg_sq/<param>`, and its random number generators `rng/<device>`. Metadata: `pieces`, JSON of where each piece
belongs, `step`, AdamW's count of updates, and `rank`. Parameters are named as ``LearnerEngine.shards`` names them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from stepgrpo.types import FloatArray

if TYPE_CHECKING:
    from torch import Tensor, nn

MASTER = "master"
KINDS = (MASTER, "exp_avg", "exp_avg_sq")
DTYPES = {"torch.float32": "F32", "torch.uint8": "U8"}
Shape = tuple[int, ...]


class Place(TypedDict):
    """Where a piece belongs."""

    start: int
    """Elements of the flattened parameter before it."""
    shape: list[int]
    """Of the whole parameter."""


def file_name(rank: int, num_ranks: int) -> str:
    return f"learner-{rank}-of-{num_ranks}.safetensors"


def files_for(rank: int, num_ranks: int, names: Sequence[str]) -> list[str]:
    """The files of a checkpoint that a rank has to read: its own if there were equally many ranks, otherwise all.

    Raises:
        ValueError: there are none.
    """
    own = file_name(rank, num_ranks)
    found = [own] if own in names else [n for n in names if n.startswith("learner-")]
    if not found:
        raise ValueError(f"no learner-RANK-of-N.safetensors among {', '.join(names) or 'no files'}")
    return found


def metadata(rank: int, step: int, pieces: Mapping[str, Place]) -> dict[str, str]:
    return {"rank": str(rank), "step": str(step), "pieces": json.dumps(pieces)}


def serialized(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """A safetensors file in parts, without a copy of the tensors, which the library's own ``save`` makes.

    Args:
        tensors: in host memory, contiguous, not empty.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, t in tensors.items():
        start, end = end, end + t.nbytes
        header[name] = {"dtype": DTYPES[str(t.dtype)], "shape": list(t.shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    yield len(raw).to_bytes(8, "little") + raw
    for t in tensors.values():
        yield t.numpy().data.cast("B")


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What a model's files hold besides parameters, such as a router's bias. Training does not change it, so a
    checkpoint does without; whoever has the parameters needs it too."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


class StateFiles:
    """Files of one checkpoint, from however many ranks, read piece by piece."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """
        Raises:
            ValueError: the files are not of one checkpoint.
        """
        assert paths
        self._files: list[Any] = [safe_open(path, framework="np") for path in paths]
        headers = [file.metadata() for file in self._files]
        steps = {int(h["step"]) for h in headers}
        if len(steps) != 1:
            raise ValueError(f"{paths[0]}: its files are of updates {sorted(steps)}, takes those of one checkpoint")
        self.step = steps.pop()
        self.shapes: dict[str, Shape] = {}
        self._ranks = [int(h["rank"]) for h in headers]
        self._pieces: dict[str, list[tuple[int, Any]]] = {}  # name -> (start, file)
        for file, header in zip(self._files, headers, strict=True):
            pieces: dict[str, Place] = json.loads(header["pieces"])
            for name, place in pieces.items():
                self.shapes[name] = tuple(place["shape"])
                self._pieces.setdefault(name, []).append((place["start"], file))

    def check(self, shapes: Mapping[str, Shape], needed: Sequence[str]) -> None:
        """Refuse a checkpoint of another model.

        Args:
            shapes: of all the model's parameters.
            needed: names of those that are going to be read.

        Raises:
            ValueError: names the first difference.
        """
        for name, shape in self.shapes.items():
            if name not in shapes:
                raise ValueError(f"checkpoint of another model: it has {name}, which the model has not")
            if shape != shapes[name]:
                raise ValueError(f"checkpoint of another model: {name} is {shape} there, {shapes[name]} in the model")
        for name in needed:
            if name not in self.shapes:
                raise ValueError(f"checkpoint of another model: it lacks {name}, {shapes[name]} in the model")

    def read(self, kind: str, name: str, start: int, size: int) -> FloatArray:
        """[size] elements of a flattened parameter or its moment, from ``start``, out of whichever files hold them.

        Raises:
            ValueError: the files do not hold all of them.
        """
        out = np.empty(size, np.float32)
        found = 0
        for begin, file in self._pieces[name]:
            piece = file.get_slice(f"{kind}/{name}")
            a, b = max(start, begin), min(start + size, begin + piece.get_shape()[0])
            if a < b:
                out[a - start : b - start] = piece[a - begin : b - begin]
                found += b - a
        if found != size:
            raise ValueError(f"{kind} of {name}: {found} of {size} elements found; a rank's file is missing")
        return out

    def rng(self, rank: int) -> dict[str, NDArray[np.uint8]]:
        """States of the rank's generators by device; empty if that rank did not exist."""
        if rank not in self._ranks:
            return {}
        file = self._files[self._ranks.index(rank)]
        return {k.removeprefix("rng/"): file.get_tensor(k) for k in file.keys() if k.startswith("rng/")}  # noqa: SIM118


def read_parameters(paths: Sequence[Path]) -> dict[str, FloatArray]:
    """Whole float32 parameters from the files of all ranks; tied ones once.

    Raises:
        ValueError: a rank's file is missing.
    """
    files = StateFiles(paths)
    return {n: files.read(MASTER, n, 0, prod(shape)).reshape(shape) for n, shape in files.shapes.items()}

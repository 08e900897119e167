"""What a checkpoint of a larger model costs: the copy, for which the learner waits, and the writing beside it.

    python bench/checkpoint.py [--layers 12] [--repetitions 5] [--place DIRECTORY]

One rank under DeepSpeed with a random Qwen3 (12 layers: 107 M parameters, 1.3 GB of training state). In turns:
`snapshot` copies weights and optimizer, `put` writes the copy with its checksum and fsync, `restore` reads it again. By
their side, on the same bytes: a plain copy in memory, and a plain file written with fsync.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import numpy as np
from figures import machine, spread, table
from models import save_qwen3

MINIATURE = Path(__file__).parents[1] / "examples" / "miniature" / "model"
FILE = "state.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--place", type=Path, default=Path(tempfile.gettempdir()), help="a directory on the disk meant")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory(dir=args.place) as directory:
        seconds, size = measure(Path(directory), args.layers, args.repetitions)
    whose = {
        "snapshot": "the learner waits",
        "memory": "a plain copy",
        "put": "beside the run",
        "disk": "a plain file",
        "restore": "on a restart",
    }
    rows = [[k, whose[k], spread(v), spread([size / s / 1e9 for s in v])] for k, v in seconds.items()]
    print(f"{size / 1e9:.2f} GB")
    print(table(["", "", "seconds", "GB/s"], rows))
    if args.out:
        args.out.write_text(json.dumps({"machine": machine(), "bytes": size, "seconds": seconds}) + "\n")


def measure(directory: Path, layers: int, repetitions: int) -> tuple[dict[str, list[float]], int]:
    from stepgrpo import checkpoint
    from stepgrpo.config import LearnerConfig, ModelConfig
    from stepgrpo.learner import state
    from stepgrpo.learner.engine import LearnerEngine, join

    door = socket.create_server(("127.0.0.1", 0))
    join(0, 1, *door.getsockname(), "cpu", own_host="127.0.0.1", door=door)
    model = make_model(directory / "model", layers)
    engine = LearnerEngine(
        LearnerConfig(), ModelConfig(path=str(model)), temperature=1.0, device="cpu", with_reference=False
    )
    seconds: dict[str, list[float]] = {}

    def timed(name: str, do: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = do()
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    for i in range(repetitions):
        tensors, metadata = timed("snapshot", engine.snapshot)
        size = sum(t.nbytes for t in tensors.values())
        timed("memory", lambda tensors=tensors: [np.copy(t.numpy()) for t in tensors.values()])
        parts = state.serialized(tensors, metadata)
        name = f"r0000-batch-{i:06d}"
        entry = timed("put", lambda name=name, parts=parts: checkpoint.put(directory, name, FILE, parts))
        checkpoint.commit(directory, name, {}, [entry])
        timed("disk", lambda tensors=tensors: write(directory / "plain", [t.numpy().data for t in tensors.values()]))
        del tensors, parts
        timed("restore", lambda name=name: engine.restore([checkpoint.fetch(directory, name, FILE)]))
        checkpoint.discard(directory, name)
    return seconds, size


def make_model(directory: Path, layers: int) -> Path:
    from stepgrpo.hub import copy_tokenizer

    save_qwen3(
        directory,
        vocab_size=32_000,
        hidden_size=768,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=2304,
    )
    copy_tokenizer(str(MINIATURE), directory)
    return directory


def write(path: Path, parts: list[memoryview]) -> None:
    with path.open("wb") as f:
        for part in parts:
            f.write(part)
        f.flush()
        os.fsync(f.fileno())
    path.unlink()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

"""The far end: a process that answers, see ``answering.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "PYTHONWARNINGS": "ignore",
}


class Side:
    """One of the sides of a comparison. It stays up, and so is warm when its turn comes again."""

    def __init__(self, script: str, *args: str, python: str = sys.executable, threads: int = 1) -> None:
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name(script)), *args],
            env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def ask(self, request: str = "go") -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(f"{request}\n")
        return self.read()

    def read(self) -> dict[str, Any]:
        """
        Raises:
            RuntimeError: the process ended, and has said why on stderr.
        """
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args[1]} ended with {self._process.wait()}; its last words are above")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()  # nobody will ask again
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

"""The near end of a process that a measurement asks to do one thing again and again, over a pipe.

A line on standard input is a request, a JSON line on standard output its answer. What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

_out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def asked() -> str | None:
    """The next request; None where nobody will ask again."""
    return sys.stdin.readline().strip() or None


def answer(**values: Any) -> None:
    print(json.dumps(values), file=_out, flush=True)


def resident(what: str = "VmRSS") -> float:
    """MB of this process in memory: now, or, as ``VmHWM``, at most since the last ``Meter`` began."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith(what))


class Meter:
    """Seconds, processor seconds of all threads, and the memory's peak, from its birth on.

    Args:
        gpu: torch.cuda, where that is computed on.
    """

    def __init__(self, gpu: Any = None) -> None:
        self._gpu = gpu
        if gpu:
            gpu.synchronize()
            gpu.reset_peak_memory_stats()
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # the peak is forgotten
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """``peak``: MB, all of the process; ``gpu_peak``: MB, of torch's tensors there."""
        if self._gpu:
            self._gpu.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        gpu_peak = self._gpu.max_memory_allocated() / 2**20 if self._gpu else 0.0
        return {
            "seconds": wall - self._wall,
            "cpu": cpu - self._cpu,
            "peak": resident("VmHWM"),
            "gpu_peak": gpu_peak,
        }

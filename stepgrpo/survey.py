"""Questions to a machine about itself, asked on every node of a Ray cluster.

Ray sends these functions by value (`ray.cloudpickle.register_pickle_by_value`): a node may have another stepgrpo, or
none. So they take and return plain values, and need the standard library alone, but for what they import themselves.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import resource
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any


def survey(packages: Sequence[str] = (), places: Sequence[str] = (), files: Sequence[str] = ()) -> dict[str, Any]:
    """What this machine has; sizes in bytes.

    Args:
        packages: whose versions are asked for.
        places: directories, there or not yet, in which something will be written.
        files: whose presence is asked for.
    """
    versions = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    shm = shutil.disk_usage("/dev/shm")
    return {
        "python": platform.python_version(),
        "versions": versions,
        "cuda": _cuda_build(),
        "source": _source(),
        "cpus": len(os.sched_getaffinity(0)),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        "shm": {"total": shm.total, "free": shm.free},
        "places": {path: _place(path) for path in places},
        "files": {path: Path(path).exists() for path in files},
        **_gpus(),
    }


def _cuda_build() -> str | None:
    """For which CUDA torch was built; None: for CPU, or not there."""
    spec = importlib.util.find_spec("torch")
    with suppress(Exception):
        return runpy.run_path(str(Path(str(spec and spec.origin)).with_name("version.py")))["cuda"]
    return None


def _source() -> str | None:
    """Digest of stepgrpo's own files; None where it cannot be imported."""
    spec = importlib.util.find_spec("stepgrpo")
    if spec is None:
        return None
    directory, sha = Path(str(spec.origin)).parent, hashlib.sha256()
    for file in sorted(directory.rglob("*.py")):
        sha.update(f"{file.relative_to(directory)}\0".encode() + file.read_bytes() + b"\0")
    return sha.hexdigest()


def _place(path: str) -> dict[str, Any]:
    """The disk a directory is or would be on, and why nothing can be written there."""
    near, fault = ground(path), ""
    try:
        with tempfile.TemporaryFile(dir=near):
            pass
    except OSError as e:
        fault = e.strerror or str(e)
    disk = shutil.disk_usage(near)
    return {"total": disk.total, "free": disk.free, "fault": fault}


def ground(path: str | Path) -> Path:
    """As much of a path as is there already."""
    near = Path(path).absolute()
    while not near.exists():
        near = near.parent
    return near


def _gpus() -> dict[str, Any]:
    """All of the machine's, also those that Ray hides from this process."""
    if not shutil.which("nvidia-smi"):
        return {"gpus": [], "gpu_fault": ""}
    fields = ("name", "memory.total", "memory.used", "compute_cap", "driver_version")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
        rows = [dict(zip(fields, map(str.strip, line.split(",")), strict=True)) for line in lines if line.strip()]
        gpus = [
            {
                "name": row["name"],
                "memory": float(row["memory.total"]) * 2**20,
                "used": float(row["memory.used"]) * 2**20,
                "capability": float(row["compute_cap"]),
                "driver": row["driver_version"],
            }
            for row in rows
        ]
    except (OSError, ValueError, subprocess.SubprocessError) as e:
        return {"gpus": [], "gpu_fault": f"nvidia-smi: {e}"}
    return {"gpus": gpus, "gpu_fault": ""}


def now() -> float:
    """By the wall clock."""
    return time.time()


class Door:
    """A node's open port, and knocks at those of others."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("", 0))  # the kernel answers by itself

    def address(self) -> tuple[str, int]:
        import ray

        return str(ray.util.get_node_ip_address()), int(self._socket.getsockname()[1])

    def knock(self, doors: Mapping[str, tuple[str, int]], seconds: float) -> dict[str, str]:
        """Those that do not open, and why."""
        closed = {}
        for name, (host, port) in doors.items():
            try:
                socket.create_connection((host, port), timeout=seconds).close()
            except OSError as e:
                closed[name] = f"{host}:{port}: {e}"
        return closed


def load_libraries(names: Sequence[str], seconds: float) -> dict[str, Any]:
    """Import them in a process of their own, whose end harms nobody.

    Returns:
        "errors": by library, empty where it loads; "num_gpus": how many torch sees.
    """
    script = f"""
import importlib, json
for name in {list(names)!r}:
    error = ""
    try:
        module = importlib.import_module(name)
        if name == "transformers":
            module.AutoModelForCausalLM
    except BaseException as e:
        error = f"{{type(e).__name__}}: {{e}}"
    print(json.dumps([name, error]), flush=True)
import torch
print(json.dumps(["num_gpus", torch.cuda.device_count() if torch.cuda.is_available() else 0]))
"""
    # Ray hides GPUs from a task that asks for none.
    env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    try:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=seconds, env=env)
        output, end = done.stdout, f"the process ended with status {done.returncode}"
    except subprocess.TimeoutExpired as e:
        output, end = (e.stdout or b"").decode(), f"not there after {seconds:g} s"
    said: dict[str, Any] = {}
    for line in output.splitlines():
        with suppress(ValueError):  # a library prints as well
            name, said[name] = json.loads(line)
    num_gpus = said.pop("num_gpus", 0)
    for name in names:
        if name not in said:
            said[name] = end
            break
    return {"errors": said, "num_gpus": num_gpus}


def write_checkpoint(place: str) -> str:
    """Write to a URL as a checkpoint does; returns why that failed."""
    from stepgrpo import checkpoint

    name = f"doctor-{os.getpid()}-{time.time_ns()}"
    try:
        checkpoint.put(place, name, "probe", b"1")
        checkpoint.discard(place, name)
    except Exception as e:
        return f"{type(e).__name__}: {e}"[:160]
    return ""

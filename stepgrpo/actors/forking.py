"""Processes that begin with their imports done: Python's fork server, which imports while who starts it still does.

vLLM's engine runs in a process of its own. Spawned, that one begins to import after the process that starts it has done
the same, and both take many seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from types import MappingProxyType
from typing import Any, TypeVar

import cloudpickle

T = TypeVar("T")


def import_ahead(modules: Sequence[str], environment: Mapping[str, str], directory: str | None = None) -> None:
    """Start this process's fork server, which begins to import; returns at once. Only the first call counts.

    None of the modules may start threads or touch a GPU, which a fork does not survive. One whose import is an
    ``ImportError`` is left to those who need it.

    Args:
        environment: what the server has beyond this process's, such as what must be there when a process begins.
        directory: a short path for its socket, removed by somebody else; None: a temporary one, which a process that is
            killed leaves behind.
    """
    if directory is not None:  # nothing public says where
        multiprocessing.current_process()._config.setdefault("tempdir", directory)  # type: ignore[attr-defined]
    before = {name: os.environ.get(name) for name in environment}
    multiprocessing.set_forkserver_preload(list(modules))
    os.environ.update(environment)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class ForkingContext(ForkServerContext):
    """Of ``multiprocessing``: its processes have the environment of the moment in which they were made over the fork
    server's own, and die with the process that made them, however that ends, of which they are no children."""

    def Process(  # type: ignore[override]
        self,
        *,
        target: Callable[..., object],
        name: str | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> ForkServerProcess:
        return ForkServerProcess(target=_begin, name=name, args=(dict(os.environ), target, args, dict(kwargs)))


def call_forked(function: Callable[[], T]) -> T:
    """Call it, also a lambda, in a process of its own that begins with the imports done."""
    with ProcessPoolExecutor(1, mp_context=ForkingContext()) as process:
        return process.submit(_call, cloudpickle.dumps(function)).result()


def _call(function: bytes) -> Any:
    return cloudpickle.loads(function)()


def _begin(
    environment: Mapping[str, str], target: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    # What is set already stays where it lies in memory, by which a process's title is found.
    os.environ.update({k: v for k, v in environment.items() if os.environ.get(k) != v})
    threading.Thread(target=_die_with_parent, daemon=True).start()
    target(*args, **kwargs)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)

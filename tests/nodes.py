"""Ray clusters of several nodes, and ports, on this machine."""

import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from ray.cluster_utils import Cluster


@contextmanager
def cluster_of(**head: object) -> Iterator[Cluster]:
    """A cluster with a private directory, of which whatever the block starts knows too.

    Args:
        head: what its first node takes, such as ``num_cpus=2``.
    """
    directory = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short, because of Ray's sockets
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_TMPDIR", directory)
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            patch.setenv("RAY_health_check_period_ms", "1000")  # a killed node is missed in 5 s, not 15
            nodes = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **head})
            try:
                yield nodes
            finally:
                nodes.shutdown()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])

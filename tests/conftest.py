"""What all tests share."""

import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest

from stepgrpo.launch import SCRATCH
from tests.nodes import cluster_of

# What a script runs in its background ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def supervised() -> Iterator[None]:
    """`stepgrpo train` runs within the tests' process, as it does under its supervisor."""
    with pytest.MonkeyPatch.context() as patch:
        scratch = tempfile.mkdtemp(prefix="sg", dir="/tmp")  # short, because of Ray's sockets
        patch.setenv(SCRATCH, scratch)
        patch.setenv("VLLM_RPC_BASE_PATH", scratch)
        # For all of the process: Ray reads it once, and a cluster of another mode would end each of its actors.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield
    shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture(scope="module")
def environment() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield patch


@pytest.fixture(scope="module")
def cluster(environment: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Ray cluster, which the runs of this module join unless they start their own."""
    with cluster_of(num_cpus=2, object_store_memory=150 << 20) as nodes:
        environment.setenv("RAY_ADDRESS", nodes.address)
        yield nodes.address
        environment.delenv("RAY_ADDRESS")

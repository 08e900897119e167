"""What all tests share."""

import gc
import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest
from ray.cluster_utils import Cluster

from stepgrpo.launch import SCRATCH

# What a script runs in its background ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def supervised() -> Iterator[None]:
    """`stepgrpo train` runs within the tests' process, as it does under its supervisor."""
    with pytest.MonkeyPatch.context() as patch:
        scratch = tempfile.mkdtemp(prefix="sg", dir="/tmp")  # short, because of Ray's sockets
        patch.setenv(SCRATCH, scratch)
        yield
    shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def no_handles_of_earlier_actors() -> None:
    """Ray numbers actors anew in each session; a handle of an earlier one ends its namesake when it is collected."""
    gc.collect()


@pytest.fixture(scope="module")
def environment() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield patch


@pytest.fixture(scope="module")
def cluster(environment: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Ray cluster, which the runs of this module join unless they start their own."""
    directory = tempfile.mkdtemp(prefix="r", dir="/tmp")
    environment.setenv("RAY_TMPDIR", directory)
    head = {"num_cpus": 2, "object_store_memory": 150 << 20, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    environment.setenv("RAY_ADDRESS", nodes.address)
    yield nodes.address
    environment.delenv("RAY_ADDRESS")
    environment.delenv("RAY_TMPDIR")
    nodes.shutdown()
    shutil.rmtree(directory, ignore_errors=True)

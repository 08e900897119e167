"""What all tests share."""

import shutil
import tempfile
from collections.abc import Iterator

import pytest

from stepgrpo.launch import SCRATCH


@pytest.fixture(autouse=True, scope="session")
def supervised() -> Iterator[None]:
    """`stepgrpo train` runs within the tests' process, as it does under its supervisor."""
    with pytest.MonkeyPatch.context() as patch:
        scratch = tempfile.mkdtemp(prefix="sg", dir="/tmp")  # short, because of Ray's sockets
        patch.setenv(SCRATCH, scratch)
        yield
    shutil.rmtree(scratch, ignore_errors=True)

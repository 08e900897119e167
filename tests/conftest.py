"""What all tests share."""

import pytest

from stepgrpo.launch import SCRATCH


@pytest.fixture(autouse=True)
def supervised(monkeypatch: pytest.MonkeyPatch) -> None:
    """`stepgrpo train` runs within the test's process, as it does under its supervisor."""
    monkeypatch.setenv(SCRATCH, "/tmp")

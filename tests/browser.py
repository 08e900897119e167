"""A page in a real browser: Debian's Chromium, offline, watched for errors and for requests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, sync_playwright


@contextmanager
def opened(file: Path, *, width: int = 1280, height: int = 900, **context: Any) -> Iterator[Page]:
    """The page of ``file`` without a network; leaving fails if it logged an error or asked for anything but itself.

    Skips the test where Chromium is not installed, unless CI is set.
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": width, "height": height}, offline=True, **context).new_page()
        faults: list[str] = []
        page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: faults.append(str(e)))
        page.on("request", lambda r: faults.append(r.url) if r.url not in ("data:,", file.as_uri()) else None)
        page.goto(file.as_uri())
        yield page
        browser.close()
        assert not faults, faults

"""A page in a real browser: Debian's Chromium, watched for errors and for requests elsewhere."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, sync_playwright


@contextmanager
def opened(
    place: Path | str, *, width: int = 1280, height: int = 900, forgiven: str | None = None, **context: Any
) -> Iterator[Page]:
    """The page of a file without a network, or of a URL; leaving fails if it logged an error, but for messages with
    ``forgiven`` in them, or asked for anything but itself and what lies below it.

    Skips the test where Chromium is not installed, unless CI is set.
    """
    url = place.as_uri() if isinstance(place, Path) else place
    own = re.split("[?#]", url)[0]
    chromium = shutil.which("chromium")
    if chromium is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no chromium: apt-get install chromium")
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]) as browser,
    ):
        context = {"viewport": {"width": width, "height": height}, "offline": isinstance(place, Path), **context}
        page = browser.new_context(**context).new_page()
        faults: list[str] = []
        page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: faults.append(str(e)))
        page.on("request", lambda r: faults.append(r.url) if r.url != "data:," and not r.url.startswith(own) else None)
        page.goto(url)
        yield page
    faults = [f for f in faults if forgiven is None or forgiven not in f]
    assert not faults, faults

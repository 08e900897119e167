"""What each actor did, and when: kept by the actor for a while, fetched by the driver, written to ``spans.jsonl``."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LIMIT = 50_000
"""Spans an actor keeps while nobody fetches them; then the oldest go."""


class Spans:
    """Starts are seconds of the node's clock since 1970, so that several nodes share one axis, as far as their
    clocks agree; durations are of a clock that nobody sets."""

    def __init__(self) -> None:
        self._spans: deque[dict[str, Any]] = deque(maxlen=LIMIT)  # of several threads

    @contextmanager
    def span(self, name: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """Record the block, also one that fails or is cancelled.

        Args:
            arguments: what JSON can say.

        Yields:
            The arguments, for what is known only at the end.
        """
        start, began = time.time(), time.perf_counter()
        try:
            yield arguments
        finally:
            seconds = time.perf_counter() - began
            self._spans.append({"name": name, "start": round(start, 6), "seconds": round(seconds, 6), **arguments})

    def fetch(self) -> list[dict[str, Any]]:
        """All since the last call, in the order of their ends."""
        return [self._spans.popleft() for _ in range(len(self._spans))]

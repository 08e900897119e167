"""What each actor did, and when: kept by the actor for a while, fetched by the driver, written to ``spans.jsonl``."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LIMIT = 50_000
"""Spans an actor keeps while nobody has them; then the oldest go."""


class Spans:
    """Starts are seconds of the node's clock since 1970, so that several nodes share one axis, as far as their
    clocks agree; durations are of a clock that nobody sets."""

    def __init__(self) -> None:
        self._spans: deque[dict[str, Any]] = deque(maxlen=LIMIT)
        self._ended = 0
        self._lock = threading.Lock()  # they are of several threads

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
            with self._lock:
                self._spans.append({"name": name, "start": round(start, 6), "seconds": round(seconds, 6), **arguments})
                self._ended += 1

    def fetch(self, had: int) -> tuple[int, list[dict[str, Any]]]:
        """How many have ended so far, and those that the caller does not have yet, in the order of their ends.

        Args:
            had: the number of the last answer that the caller received; 0: none. Only what came in it is forgotten:
                an answer may be given up on.
        """
        with self._lock:
            while self._spans and self._ended - len(self._spans) < had:
                self._spans.popleft()
            return self._ended, list(self._spans)

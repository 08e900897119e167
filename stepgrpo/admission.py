"""Which draws may start, which batch each will meet, and when a batch is complete.

Staleness is bounded by admission: a draw starts only if the batch it may meet at worst is within `max_staleness` of the
weights it starts under. Nothing is dropped for being late, which would favour short answers; and a batch is the first N
groups in DRAW order, never in order of arrival, which would favour short answers too.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any


class _Fate(Enum):
    OPEN = auto()
    KEPT = auto()
    FILTERED = auto()


@dataclass(frozen=True, slots=True)
class ClosedBatch:
    """The draws one rollout batch used up, in draw order."""

    index: int
    """Also the version of the weights that train on it."""
    kept: tuple[int, ...]
    filtered: tuple[int, ...]
    """Without signal, replaced by further draws."""


class Ledger:
    """Keeps invariants 3 (every draw is trained on once, filtered once, or in flight) and 4 (bounded staleness).

    Batch ``i`` is trained by version ``i`` of the weights. It closes when it has ``prompts_per_batch`` groups with
    signal, or when it has used ``prompts_per_batch + refill_limit`` draws; then it trains smaller.
    """

    def __init__(self, *, num_batches: int, prompts_per_batch: int, max_staleness: int, refill_limit: int) -> None:
        self._num_batches = num_batches
        self._size = prompts_per_batch
        self._max_used = prompts_per_batch + refill_limit
        self._max_staleness = max_staleness
        self._fates: dict[int, _Fate] = {}  # in draw order, since draws are admitted in order
        self._next_draw = 0
        self._next: tuple[int, int, int] | None = None
        """Of the next draw, at worst: (batch, kept and used before it there); None: to be walked anew."""
        self.batch = 0
        """Index of the batch that is being collected."""

    def _worst(self) -> tuple[int, int, int]:
        """The latest batch the next draw can fall into, and how many are kept and used before it there.

        A batch closes soonest, and pushes the next draw furthest back, when every group still open turns out to be
        kept; so the walk takes open draws for kept ones.
        """
        if self._next is None:
            self._next = (self.batch, 0, 0)
            for fate in self._fates.values():
                self._next = self._after(*self._next, kept=fate is not _Fate.FILTERED)
        return self._next

    def _after(self, batch: int, kept_before: int, used_before: int, *, kept: bool) -> tuple[int, int, int]:
        """Where the walk stands after one more draw."""
        now_kept, used = kept_before + kept, used_before + 1
        return (batch + 1, 0, 0) if self._full(now_kept, used) else (batch, now_kept, used)

    def may_admit(self, version: int) -> bool:
        """Whether a draw may start on a worker that holds weights ``version``."""
        return self.room(version) > 0

    def room(self, version: int) -> int:
        """How many draws may start under weights ``version``, if all open groups are kept."""
        batch, kept, used = self._worst()
        later = min(version + self._max_staleness, self._num_batches - 1) - batch
        return 0 if later < 0 else min(self._size - kept, self._max_used - used) + later * self._size

    def admit(self) -> int:
        """Take the next draw id."""
        draw = self._next_draw
        self._next_draw += 1
        self._fates[draw] = _Fate.OPEN
        if self._next is not None:
            self._next = self._after(*self._next, kept=True)
        return draw

    def settle(self, draw: int, *, keep: bool) -> None:
        """Record that a draw's group is graded, and whether it has signal."""
        assert self._fates.get(draw) is _Fate.OPEN, f"draw {draw} settled twice, or never admitted"
        self._fates[draw] = _Fate.KEPT if keep else _Fate.FILTERED
        if not keep:  # an open draw counts as kept already, and a batch that closes is the walk's first
            self._next = None

    def due(self) -> range:
        """Draws of the batch that is being collected, admitted or not; known only where nothing is replaced."""
        assert self._max_used == self._size, "which draws make the batch is known when it closes"
        first = next(iter(self._fates), self._next_draw)
        return range(first, first + self._size)

    def close(self) -> ClosedBatch | None:
        """Close the current batch if its draws are all settled; otherwise None."""
        kept: list[int] = []
        filtered: list[int] = []
        for draw, fate in self._fates.items():
            if fate is _Fate.OPEN:
                return None
            (kept if fate is _Fate.KEPT else filtered).append(draw)
            if self._full(len(kept), len(kept) + len(filtered)):
                break
        else:
            return None
        for draw in (*kept, *filtered):
            del self._fates[draw]
        self.batch += 1
        return ClosedBatch(self.batch - 1, tuple(kept), tuple(filtered))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON takes it."""
        fates = [[draw, fate.name] for draw, fate in self._fates.items()]
        return {"batch": self.batch, "next_draw": self._next_draw, "fates": fates}

    def restore(self, state: dict[str, Any], finished: Container[int]) -> list[int]:
        """Go on from ``state``.

        Args:
            finished: draws whose groups are there; one that had settled, but whose group went away, is open again.

        Returns:
            The open draws, which have to be sampled again.
        """
        self.batch, self._next_draw = state["batch"], state["next_draw"]
        self._fates, self._next = {}, None
        for draw, name in state["fates"]:
            self._fates[draw] = _Fate[name] if draw in finished else _Fate.OPEN
        return [draw for draw, fate in self._fates.items() if fate is _Fate.OPEN]

    @property
    def in_flight(self) -> int:
        """Draws admitted and not yet part of a closed batch."""
        return len(self._fates)

    def _full(self, kept: int, used: int) -> bool:
        return kept == self._size or used == self._max_used

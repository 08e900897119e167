"""`spans.jsonl` in columns: what was done in a window of time, as few blocks as a screen has room for.

An actor's spans of one name are a track. Where they overlap, as the groups of a rollout worker do, the track has
several lanes; a span's lane never changes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepgrpo.trace import BESIDE, natural

MOST_BLOCKS = 20_000
"""Of one answer."""
MOST_LANES = 24
"""Of one track: what overlaps more often shares the last one."""
ORDER = ("generate", "probe", "evaluate", "load", "fetch", "update", "reference", "old", "optimize", "publish", "grade")
"""Of an actor's tracks; others follow."""
NONE = -1
PACKING = struct.Struct("<ddqiiiiii")
COLUMNS = np.dtype(
    [(n, "<f8") for n in ("start", "end")]
    + [("at", "<i8")]
    + [(n, "<i4") for n in ("track", "lane", "version", "oldest", "draw", "tokens")]
)
"""Of a span; ``track`` is a number, ``at`` the place of its line."""


@dataclass
class _Track:
    actor: str
    name: str
    ends: list[float] = field(default_factory=list)
    """Of the last span in each lane."""

    def lane(self, start: float, end: float) -> int:
        """Best fit. Spans come in the order of their ends, so the last one of a lane is all that a new one can meet,
        and no fewer lanes would do (interval scheduling on several machines)."""
        free = [i for i, last in enumerate(self.ends) if last <= start]
        if not free and len(self.ends) < MOST_LANES:
            self.ends.append(end)
            return len(self.ends) - 1
        lane = max(free, key=self.ends.__getitem__, default=MOST_LANES - 1)
        self.ends[lane] = max(end, self.ends[lane])
        return lane


class Timeline:
    """All spans so far, some 50 bytes each."""

    def __init__(self) -> None:
        self.tracks: dict[tuple[str, str], _Track] = {}
        """By actor and name, in the order they were met."""
        self._ids: dict[tuple[str, str], int] = {}
        self._packed = bytearray()

    def add(self, at: int, span: dict[str, Any]) -> None:
        """``at``: where its line begins.

        Raises:
            KeyError, TypeError, ValueError, struct.error: it is no span.
        """
        actor, name = str(span["actor"]), str(span["name"])
        start = float(span["start"])
        end = start + float(span["seconds"])
        version = int(span.get("newest", span.get("version", NONE)))
        oldest, draw, tokens = (int(span.get(k, d)) for k, d in (("oldest", version), ("draw", NONE), ("tokens", 0)))
        track = self.tracks.setdefault((actor, name), _Track(actor, name))
        number = self._ids.setdefault((actor, name), len(self._ids))
        self._packed += PACKING.pack(start, end, at, number, track.lane(start, end), version, oldest, draw, tokens)

    def _columns(self) -> NDArray[Any]:
        # A copy: while numpy looks at the bytes themselves, nothing can be added to them.
        return np.frombuffer(bytes(self._packed), COLUMNS)

    def extent(self) -> tuple[float, float]:
        """First start and last end."""
        spans = self._columns()
        return (float(spans["start"].min()), float(spans["end"].max())) if len(spans) else (0.0, 0.0)

    def window(
        self, start: float, end: float, pixels: int, names: Sequence[str] | None, batch_of: Mapping[int, int]
    ) -> dict[str, Any]:
        """What there is to draw of ``start`` to ``end``.

        Spans shorter than a pixel that lie in one pixel of their lane are one block; where that leaves more than
        ``MOST_BLOCKS``, pixels are taken together. In `blocks`, a column each:

            lane     row among all lanes, as `tracks` has them one below the other
            start    seconds after ``start``, and ``seconds`` of it
            busy     share of that in which there was one of them
            count    of spans; all else is the first one's
            version  of the weights: made, loaded, sampled with (the newest); -1: none
            oldest   the oldest that a group was sampled with
            stale    versions between that and the update; -1: not trained on (yet), or no group
            at       where its line begins

        Args:
            names: of the tracks; None: all.
            batch_of: draw -> batch that trained on it.
        """
        chosen = sorted(
            (t for t in self.tracks.values() if names is None or t.name in names),
            key=lambda t: (natural(t.actor), ORDER.index(t.name) if t.name in ORDER else len(ORDER), t.name),
        )
        base = np.full(len(self.tracks) + 1, NONE)
        rows = 0
        for t in chosen:
            base[self._ids[t.actor, t.name]] = rows
            rows += len(t.ends)
        spans = self._columns()
        spans = spans[(spans["start"] < end) & (spans["end"] > start) & (base[spans["track"]] >= 0)]
        starts, ends, lanes = spans["start"], spans["end"], base[spans["track"]] + spans["lane"]
        pixel = (end - start) / max(1, pixels)
        while True:
            order, firsts = _blocks(lanes, starts, ends, start, pixel)
            if len(firsts) <= MOST_BLOCKS or pixel > end - start:  # one block a lane is the least
                break
            pixel *= 1.5
        firsts = firsts[:MOST_BLOCKS]
        first = order[firsts]
        last, busy = (
            op.reduceat(values[order], firsts) if len(firsts) else ends[:0]
            for op, values in ((np.maximum, ends), (np.add, ends - starts))
        )
        taken = spans[first]
        trained = np.array([batch_of.get(draw, NONE) for draw in taken["draw"].tolist()], int)
        group = (trained >= 0) & (taken["oldest"] >= 0)
        return {
            "from": start,
            "to": end,
            "pixel": pixel,
            "spans": len(spans),
            "tracks": [{"actor": t.actor, "name": t.name, "lanes": len(t.ends)} for t in chosen],
            "blocks": {
                "lane": lanes[first].tolist(),
                "start": (starts[first] - start).round(6).tolist(),
                "seconds": (last - starts[first]).round(6).tolist(),
                "busy": (busy / np.maximum(last - starts[first], 1e-9)).clip(0, 1).round(3).tolist(),
                "count": np.diff(np.append(firsts, len(order))).tolist(),
                "version": taken["version"].tolist(),
                "oldest": taken["oldest"].tolist(),
                "stale": np.where(group, trained - taken["oldest"], NONE).tolist(),
                "at": taken["at"].tolist(),
            },
        }

    def shares(self, start: float, end: float) -> list[dict[str, Any]]:
        """For each actor, in what share of the window something of each name was under way, and any work of its own
        (`busy`; None: it has none, as the driver).

        Spans overlap and lie within each other: shares need not add up to `busy`.
        """
        spans = self._columns()

        def share(ids: Sequence[int]) -> float:
            mine = spans[np.isin(spans["track"], ids)]
            return _covered(mine["start"].clip(start, end), mine["end"].clip(start, end)) / (end - start)

        result = []
        for actor in sorted({actor for actor, _ in self._ids}, key=natural):
            ids = {name: i for (a, name), i in self._ids.items() if a == actor}
            names = {name: share([i]) for name, i in ids.items()}
            own = [i for name, i in ids.items() if name not in BESIDE]
            result.append(
                {"actor": actor, "busy": share(own) if own else None, "names": {n: s for n, s in names.items() if s}}
            )
        return result

    def rates(self, start: float, end: float, num_bins: int) -> dict[str, Any]:
        """Tokens per second of each actor's groups, in bins of equal width; a group's tokens are spread evenly over its
        time. `at`: the bins' middles."""
        edges = np.linspace(start, end, num_bins + 1)
        spans = self._columns()
        actors = {}
        for (actor, name), i in sorted(self._ids.items(), key=lambda item: natural(item[0][0])):
            if name == "generate":
                mine = spans[(spans["track"] == i) & (spans["end"] > spans["start"])]
                done = _done(mine["start"], mine["end"], mine["tokens"], edges)
                actors[actor] = (np.diff(done) / np.diff(edges)).round(2).tolist()
        return {"at": ((edges[1:] + edges[:-1]) / 2).round(3).tolist(), "actors": actors}


def _blocks(
    lanes: NDArray[Any], starts: NDArray[Any], ends: NDArray[Any], origin: float, pixel: float
) -> tuple[NDArray[Any], NDArray[Any]]:
    """An order of the spans in which those of one block are neighbours, and the place of each block's first."""
    bins = np.floor((starts - origin) / pixel)
    wide = ends - starts >= pixel
    order = np.lexsort((starts, wide, bins, lanes))
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(lanes[order]) != 0) | (np.diff(bins[order]) != 0) | wide[order][1:] | wide[order][:-1]
    return order, np.flatnonzero(new)


def _covered(starts: NDArray[Any], ends: NDArray[Any]) -> float:
    """Length of the union of intervals."""
    if not len(starts):
        return 0.0
    order = np.argsort(starts)
    starts, reach = starts[order], np.maximum.accumulate(ends[order])
    gaps = np.maximum(0, starts[1:] - reach[:-1]).sum()
    return float(reach[-1] - starts[0] - gaps)


def _done(starts: NDArray[Any], ends: NDArray[Any], amounts: NDArray[Any], at: NDArray[Any]) -> NDArray[Any]:
    """How much of all amounts was done by each of the times, each amount evenly over its interval."""

    def ramp(times: NDArray[Any]) -> Any:
        order = np.argsort(times)
        slope = np.append(0, (amounts / (ends - starts))[order].cumsum())
        moment = np.append(0, (amounts / (ends - starts) * (times - at[0]))[order].cumsum())
        number = np.searchsorted(times[order], at)
        return slope[number] * (at - at[0]) - moment[number]

    done: NDArray[Any] = ramp(starts) - ramp(ends)
    return done

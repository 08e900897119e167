"""What the files of a run say by now: each is read on from where the last look ended."""

from __future__ import annotations

import itertools
import re
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from stepgrpo.config import brief
from stepgrpo.dashboard.files import Tail, Whole, line_at, name_of, opened, text_of
from stepgrpo.dashboard.timeline import Timeline
from stepgrpo.report import FIGURES, Records, curves
from stepgrpo.rundir import is_held

T = TypeVar("T")

MARKS = {"config.json", "metrics.jsonl", "events.jsonl"}
"""A directory with one of these is a run's."""
NUM_EVENTS = 500
"""Shown, the last ones."""
NUM_BINS = 120
"""Of a run's time, in which tokens are counted."""
SCAN_SECONDS = 5.0
"""Between two looks which runs there are."""
STACKS = re.compile(r"stacks-\d{8}-\d{6}\.txt")
BROKEN = (KeyError, TypeError, ValueError, IndexError, AttributeError, struct.error)
"""What a record raises that is not as a run writes it."""

_generations = itertools.count(time.time_ns())
"""No two readings of a file have the same, also after the server was started again."""


class Lines(Generic[T]):
    """What the lines of a growing file amount to."""

    def __init__(self, tail: Tail, make: Callable[[], T], take: Callable[[T, int, dict[str, Any]], object]) -> None:
        """
        Args:
            make: what no line amounts to.
            take: adds one, of its place and its record.
        """
        self._tail, self._make, self._take = tail, make, take
        self._begin()

    def _begin(self) -> None:
        self.value = self._make()
        self.generation = next(_generations)
        self._faults: list[str] = []

    def read(self, *, whole: bool = True) -> bool:
        """Look again. ``whole``: not only at the next chunk; returns whether there is more.

        Raises:
            OSError: the file cannot be read.
        """
        while True:
            part = self._tail.read()
            if part.anew:
                self._begin()
            for at, line in part.lines:
                try:
                    self._take(self.value, at, line)
                except BROKEN as e:
                    what = f"{type(e).__name__}: {brief(e, 80)}"
                    self._faults.append(f"{name_of(self._tail.path)}, byte {at}: {what}; left out")
            if not (part.more and whole):
                return part.more

    @property
    def faults(self) -> list[str]:
        return [*self._tail.faults, *self._faults]

    @property
    def share(self) -> float:
        """Of the file, read so far."""
        return self._tail.offset / self._tail.size if self._tail.size else 1.0


class Run:
    """A run directory, live or done."""

    def __init__(self, fs: AbstractFileSystem, root: str, name: str) -> None:
        self.name, self._fs, self.root = name, fs, root
        self._turn = threading.Lock()
        self._records: dict[str, Lines[list[dict[str, Any]]]] = {
            name: Lines(self._tail(name), list, lambda kept, _, line: kept.append(line))
            for name in ("metrics", "evaluations", "probes", "events")
        }
        self._samples: Lines[list[dict[str, Any]]] = Lines(
            self._tail("samples"), list, lambda kept, at, line: kept.append(_head(at, line))
        )
        self._whole = {name: Whole(fs, f"{root}/{name}.json") for name in ("config", "summary", "heldout")}
        self._spans = Lines(self._tail("spans"), Timeline, Timeline.add)
        self._batch_of = Lines(self._tail("draws"), dict, _add_batch)

    def _tail(self, name: str) -> Tail:
        return Tail(self._fs, f"{self.root}/{name}.jsonl")

    def stamp(self) -> str:
        """Another one whenever there is something new to say."""
        files = [entry for entry in self._listing() if entry["type"] == "file"]
        known = sorted((name_of(f["name"]), f.get("size"), str(f.get("mtime", f.get("LastModified")))) for f in files)
        return f"{hash(tuple(known)):x}-{self._held()}"

    def _listing(self) -> list[dict[str, Any]]:
        try:
            found: list[dict[str, Any]] = self._fs.ls(self.root, detail=True)
        except FileNotFoundError:
            return []
        return found

    def state(self, since: str) -> dict[str, Any]:
        """All but spans and the texts of samples.

        Args:
            since: `mark` of the last answer, whose updates are left out; empty: all.
        """
        with self._turn:
            faults = []
            files: list[Lines[Any] | Whole] = [*self._records.values(), self._samples, *self._whole.values()]
            for file in files:
                try:
                    file.read()
                except OSError as e:
                    faults.append(f"cannot be read: {brief(e)}")
                faults += file.faults
            error = ""
            try:
                error = text_of(self._fs, f"{self.root}/error.txt")
            except OSError as e:
                faults.append(f"error.txt: cannot be read: {brief(e)}")
            kept = {name: lines.value for name, lines in self._records.items()}
            listing = self._listing()
            status = self._status(kept, listing, error)
            records = Records(
                rows=kept["metrics"],
                evaluations=kept["evaluations"],
                probes=kept["probes"],
                samples=self._samples.value,
                config=self._whole["config"].value,
                summary=_so_far(kept["evaluations"], status["word"]) | self._whole["summary"].value,
                heldout=self._whole["heldout"].value,
            )
            generation, rows = self._records["metrics"].generation, kept["metrics"]
            before, _, number = since.partition(".")
            first = int(number) if before == str(generation) and number.isdecimal() else 0
            figures: dict[str, Any] = {}
            for name, make in FIGURES.items():
                try:
                    figures[name] = make(records) if name != "curves" else curves(rows[first:])
                except BROKEN as e:  # a line that lacks something is no reason to show nothing
                    faults.append(f"{name}: cannot be told of these files ({type(e).__name__}: {brief(e, 80)})")
                    figures[name] = None
            names = sorted(name_of(entry["name"]) for entry in listing)
            return {
                "name": self.name,
                "path": self.root,
                "mark": f"{generation}.{len(rows)}",
                "first": first,
                "last": len(rows),
                "status": status,
                **figures,
                "events": kept["events"][-NUM_EVENTS:],
                "num_events": len(kept["events"]),
                "error": error,
                "stacks": [n for n in names if STACKS.fullmatch(n)],
                "ray_logs": [n for n in names if n.startswith("ray-logs-")],
                "spans": "spans.jsonl" in names,
                "faults": faults,
            }

    def _status(self, kept: dict[str, Any], listing: Sequence[dict[str, Any]], error: str) -> dict[str, Any]:
        """How the run stands: `running` where its lock is seen to be held, and without a summary else `unknown`."""
        summary = self._whole["summary"].value
        word = "running" if self._held() else summary.get("status", "unknown")
        reason = ""
        if word == "failed":
            lines = error.strip().splitlines()
            reason = lines[-1] if lines else ""
        starts = [e["time"] for e in kept["events"] if e.get("kind") == "start" and "time" in e]
        return {
            "word": word,
            "reason": reason,
            "written": max((_written(f) for f in listing if f["type"] == "file"), default=0.0),
            "started": starts[0] if starts else None,
            "restarts": max(0, len(starts) - 1),
            "now": time.time(),
        }

    def _held(self) -> bool:
        return isinstance(self._fs, LocalFileSystem) and is_held(Path(self.root))

    def sample(self, index: int) -> dict[str, Any] | None:
        """A sampled group with its texts; None where it is gone."""
        with self._turn:
            heads = self._samples.value
            return (
                line_at(self._fs, f"{self.root}/samples.jsonl", heads[index]["at"]) if 0 <= index < len(heads) else None
            )

    def span(self, at: int) -> dict[str, Any] | None:
        """All that is known of a span."""
        return line_at(self._fs, f"{self.root}/spans.jsonl", at) if at >= 0 else None

    def stacks(self, name: str) -> str:
        """A file of stacks; empty where there is none of that name."""
        return text_of(self._fs, f"{self.root}/{name}", 1 << 20) if STACKS.fullmatch(name) else ""

    def timeline(
        self, start: float | None, end: float | None, pixels: int, names: Sequence[str] | None
    ) -> dict[str, Any]:
        """A window of the spans; see ``Timeline.window``. None: from the first, to the last."""
        with self._turn:
            timeline, about = self._read_spans()
            lo, hi = _window(timeline, start, end)
            about["names"] = sorted({t.name for t in timeline.tracks.values()})
            return about | timeline.window(lo, hi, pixels, names, self._batch_of.value)

    def activity(self) -> dict[str, Any]:
        """What share of its time each actor worked, and how many tokens it made in each part of it."""
        with self._turn:
            timeline, about = self._read_spans()
            whole = _window(timeline, None, None)
            return about | {"shares": timeline.shares(*whole), "rates": timeline.rates(*whole, NUM_BINS)}

    def _read_spans(self) -> tuple[Timeline, dict[str, Any]]:
        self._batch_of.read()
        more = self._spans.read(whole=False)
        timeline = self._spans.value
        return timeline, {"extent": timeline.extent(), "more": more, "read": self._spans.share}


class Runs:
    """The runs of some places, each a run directory or one that holds some; which, is looked up now and then."""

    def __init__(self, sources: Sequence[str]) -> None:
        """
        Raises:
            ConfigError: a source cannot be opened.
        """
        self._places = [opened(source) for source in sources]
        self._runs: dict[str, Run] = {}
        self._scanned = -SCAN_SECONDS
        self._turn = threading.Lock()

    def all(self) -> dict[str, Run]:
        """By name, the last written first."""
        with self._turn:
            if time.monotonic() - self._scanned >= SCAN_SECONDS:
                self._scan()
                self._scanned = time.monotonic()
            return self._runs

    def _scan(self) -> None:
        found: dict[str, tuple[float, AbstractFileSystem]] = {}
        for fs, root in self._places:
            with suppress(OSError):  # it is away for now: other places are not
                children = fs.ls(root, detail=True)
                inner = [c["name"].rstrip("/") for c in children if c["type"] != "file"]  # a link is of another type
                for directory in [root] if _is_run(children) else inner:
                    with suppress(OSError):  # one that cannot be read does not hide the others
                        listing = children if directory == root else fs.ls(directory, detail=True)
                        if _is_run(listing):
                            found[directory] = max(map(_written, listing)), fs
        names = Counter(map(name_of, found))
        known = {run.root: run for run in self._runs.values()}
        self._runs = {}
        for directory, (_, fs) in sorted(found.items(), key=lambda item: -item[1][0]):
            name = name_of(directory) if names[name_of(directory)] == 1 else directory
            run = self._runs[name] = known.get(directory) or Run(fs, directory, name)
            run.name = name


def _is_run(listing: Sequence[dict[str, Any]]) -> bool:
    return any(name_of(entry["name"]) in MARKS for entry in listing)


def _written(entry: dict[str, Any]) -> float:
    when = entry.get("mtime") or entry.get("LastModified") or 0.0
    return float(when.timestamp() if hasattr(when, "timestamp") else when)


def _head(at: int, line: dict[str, Any]) -> dict[str, Any]:
    """What the list of samples shows of one."""
    return {
        "at": at,
        "batch": line["batch"],
        "draw": line["draw"],
        "trajectories": [{"correct": t["correct"]} for t in line["trajectories"]],
    }


def _add_batch(batch_of: dict[int, int], _: int, line: dict[str, Any]) -> None:
    batch_of.update(dict.fromkeys(line["trained"], line["batch"]))


def _so_far(evaluations: Sequence[dict[str, Any]], word: str) -> dict[str, Any]:
    """What a run's summary will say, as far as it is known; one that failed does not say it."""
    first = evaluations[0] if evaluations else {}
    return {"status": word, **({"before": first} if first.get("version") == 0 else {})}


def _window(timeline: Timeline, start: float | None, end: float | None) -> tuple[float, float]:
    first, last = timeline.extent()
    lo, hi = first if start is None else start, last if end is None else end
    return lo, max(hi, lo + 1e-3)

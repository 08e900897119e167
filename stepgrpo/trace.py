"""Some batches of a run as a Chrome trace, which Perfetto opens, and where their seconds went.

A process of the trace is a node, its threads are lanes: slices of one lane must not overlap, so what an actor does at
the same time takes several. Arrows lead from a group's sampling over its grading into the update it was trained in,
from there to the publication of the new weights, and from that to every worker that loaded them.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepgrpo.config import ConfigError
from stepgrpo.rundir import read_json_lines

if TYPE_CHECKING:
    from rich.table import Table

Span = Mapping[str, Any]
"""A line of ``spans.jsonl``."""
Trained = Mapping[tuple[int, int], Sequence[int]]
"""(batch, restart) -> the draws it was trained on."""

MANY = ("generate", "probe", "grade", "evaluate")
"""Of these an actor has several under way at a time."""
PARENTS = {"wait": "batch", "reference": "update", "old": "update", "optimize": "update"}
"""Part -> what it is a part of."""
BESIDE = ("batch", "wait", "grade", "checkpoint")
"""No work of the actor's own: the driver waits, and others grade and write beside the learner."""
LAST = 10
"""Batches, where nobody says which."""
SLACK = 1000
"""Microseconds by which a part may seem to outlast the whole: starts and durations are of two clocks."""
FIRST_TID = 1000
"""Perfetto tells threads of all processes apart by number alone, and takes a process's number for its main thread."""


@dataclass(frozen=True, slots=True)
class Window:
    """From the start of one batch to the end of another, in seconds since 1970."""

    first: int
    last: int
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of a window that one actor spent on one thing."""

    any: float
    """With at least one under way."""
    sum: float
    """Of each, those at the same time as well."""


@dataclass(slots=True, eq=False)
class _Slice:
    span: Span
    start: int  # microseconds since the trace's beginning, as is `end`
    end: int
    pid: int = 0
    tid: int = 0
    depth: int = 0


def write(directory: Path, output: Path, batches: str | None = None, last: int | None = None) -> tuple[Window, Table]:
    """Write the trace, compressed where the name ends in `.gz`.

    Args:
        batches: `A-B`, both included, or a single one; None: the ``last`` ones.

    Returns:
        The window, and where its seconds went.

    Raises:
        ConfigError: the run has no spans or no such batches, or the file cannot be written.
    """
    if batches is not None and last is not None:
        raise ConfigError("--batches, --last: got both, takes one of them")
    path = directory / "spans.jsonl"
    window = _window(path, batches, last or LAST)
    trained = {
        (line["batch"], line["restart"]): line["trained"]
        for line in read_json_lines(directory / "draws.jsonl")
        if window.first <= line["batch"] <= window.last
    }
    drawn = {draw for draws in trained.values() for draw in draws}  # with staleness, some are of before the window
    spans = [
        s
        for s in read_json_lines(path)
        if _within(s, window.start, window.end) > 0 or (s["name"] in ("generate", "grade") and s["draw"] in drawn)
    ]
    trace = {
        "traceEvents": events(spans, trained),
        "displayTimeUnit": "ms",
        "otherData": {"run": directory.name, "batches": f"{window.first}-{window.last}"},
    }
    text = json.dumps(trace, separators=(",", ":")).encode()
    try:
        output.write_bytes(gzip.compress(text) if output.suffix == ".gz" else text)
    except OSError as e:
        raise ConfigError(f"--output: got {output}, cannot be written ({e.strerror})") from None
    return window, table(spent(spans, window.start, window.end), window.seconds)


def _window(path: Path, batches: str | None, last: int) -> Window:
    # The last time counts of a batch that was done again.
    of = {s["batch"]: (s["start"], end_of(s)) for s in read_json_lines(path) if s["name"] == "batch"}
    if not of:
        raise ConfigError(
            f"{path.parent}: has no spans.jsonl with a batch; takes the directory of a `stepgrpo train` that has "
            "trained on one"
        )
    if batches is None:
        first, final = sorted(of)[-last:][0], max(of)
    else:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", batches)
        first, final = (int(match[1]), int(match[2] or match[1])) if match else (-1, -1)
        if not (first in of and final in of and first <= final):
            raise ConfigError(f"--batches: got {batches}, takes A-B or one batch, of {min(of)}-{max(of)}")
    return Window(first, final, of[first][0], of[final][1])


def end_of(span: Span) -> float:
    return float(span["start"] + span["seconds"])


def _within(span: Span, start: float, end: float) -> float:
    """Seconds of a span between ``start`` and ``end``; not above 0 where it lies outside."""
    return float(min(end_of(span), end) - max(span["start"], start))


# ---- the trace


def events(spans: Sequence[Span], trained: Trained) -> list[dict[str, Any]]:
    """The trace's events: names of processes and threads, then slices and arrows in the order of their times."""
    origin = min(s["start"] for s in spans)
    slices = []
    for span in spans:
        start = _micros(span["start"] - origin)
        # An arrow cannot end at a slice without length.
        slices.append(_Slice(span, start, max(start + 1, _micros(span["start"] - origin + span["seconds"]))))
    slices.sort(key=lambda s: (s.start, -s.end))
    out = _into_lanes(slices)
    timed = []
    for s in slices:
        arguments = {k: v for k, v in s.span.items() if k not in ("actor", "node", "name", "start", "seconds")}
        timed.append(((s.start, s.depth, 0), _event(s, "X", title(s.span), dur=s.end - s.start, args=arguments)))
    for number, (name, chain) in enumerate(_arrows(slices, trained), 1):
        for s in chain:
            phase = "s" if s is chain[0] else "f" if s is chain[-1] else "t"
            bound = {"bp": "e"} if phase == "f" else {}
            # Right after its slice: an arrow ends at the innermost slice open so far.
            timed.append(((s.start, s.depth, 1), _event(s, phase, name, cat="flow", id=number, **bound)))
    return out + [event for _, event in sorted(timed, key=lambda t: t[0])]


def title(span: Span) -> str:
    """What Perfetto writes on a slice. Its colour follows from the name alone, without the number."""
    return " ".join([span["name"], *(str(span[k]) for k in ("draw", "batch", "version") if k in span)][:2])


def _into_lanes(slices: Sequence[_Slice]) -> list[dict[str, Any]]:
    """Give each slice, in the order of their starts, its place; returns the events that name processes and threads."""
    groups: dict[tuple[str, str, int], list[_Slice]] = defaultdict(list)
    for s in slices:
        name = s.span["name"]
        groups[s.span["node"], s.span["actor"], MANY.index(name) + 1 if name in MANY else 0].append(s)
    out: list[dict[str, Any]] = []
    pids: dict[str, int] = {}
    tid = FIRST_TID
    for (node, actor, kind), members in sorted(groups.items(), key=lambda g: (natural(g[0][1]), g[0])):
        if node not in pids:
            pids[node] = len(pids) + 1
            out.append(_name("process", pids[node], 0, f"node {node}"))
        name = f"{actor}: {MANY[kind - 1]}" if kind else actor
        for number, lane in enumerate(_lanes(members), 1):
            tid += 1
            out.append(_name("thread", pids[node], tid, f"{name} {number}" if number > 1 else name))
            for s in lane:
                s.pid, s.tid = pids[node], tid
    return out


def _lanes(slices: Iterable[_Slice]) -> list[list[_Slice]]:
    """As few lanes as it takes to have no two slices of a lane overlap, unless one is a part of the other."""
    lanes: list[list[_Slice]] = []
    open_in: list[list[_Slice]] = []
    for s in slices:
        for stack in open_in:
            while stack and stack[-1].end <= s.start:
                stack.pop()
        whole = PARENTS.get(s.span["name"])
        fits = [i for i, o in enumerate(open_in) if o and o[-1].span["name"] == whole and s.end <= o[-1].end + SLACK]
        fits = fits or [i for i, o in enumerate(open_in) if not o] or [len(lanes)]
        if fits[0] == len(lanes):
            lanes.append([])
            open_in.append([])
        lane, stack = lanes[fits[0]], open_in[fits[0]]
        if stack:
            s.end, s.depth = min(s.end, stack[-1].end), len(stack)
        lane.append(s)
        stack.append(s)
    return lanes


def _arrows(slices: Sequence[_Slice], trained: Trained) -> Iterator[tuple[str, list[_Slice]]]:
    """Name of each arrow and the slices it leads over, in the order of their starts."""
    by_key: dict[tuple[Any, ...], list[_Slice]] = defaultdict(list)

    def before(s: _Slice, *key: Any) -> list[_Slice]:
        """The last of that key which began before ``s``, if there is one."""
        return [b for b in by_key[key] if b.start <= s.start][-1:]

    for s in slices:
        match s.span:
            case {"name": "generate", "draw": draw, "tokens": _}:  # one that failed has none
                by_key["generate", draw].append(s)
            case {"name": "grade", "draw": draw}:
                by_key["grade", draw].append(s)
            case {"name": "update" | "publish" as name, "version": version, "actor": actor}:
                by_key[name, version, actor].append(s)
    for s in slices:
        match s.span:
            case {"name": "update", "batch": batch, "restart": restart, "actor": actor}:
                for draw in trained.get((batch, restart), ()):
                    for graded in before(s, "grade", draw):
                        if graded.span["actor"] == actor:  # of all ranks' updates, the one where it was graded
                            yield "group", [*before(graded, "generate", draw), graded, s]
            case {"name": "publish", "version": version, "actor": actor}:
                for update in before(s, "update", version, actor):
                    yield "weights", [update, s]
            case {"name": "load", "version": version}:
                for publication in before(s, "publish", version, "learner rank 0"):
                    yield "weights", [publication, s]


def _event(s: _Slice, phase: str, name: str, **more: Any) -> dict[str, Any]:
    return {"ph": phase, "name": name, "pid": s.pid, "tid": s.tid, "ts": s.start, **more}


def _name(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": f"{what}_name", "pid": pid, "tid": tid, "args": {"name": name}}


def _micros(seconds: float) -> int:
    return round(seconds * 1e6)


def natural(name: str) -> list[tuple[str, int]]:
    """Sorts `worker 10` after `worker 9`."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D+)(\d*)", name)]


# ---- where the seconds went


def spent(spans: Iterable[Span], start: float, end: float) -> dict[str, dict[str, Spent]]:
    """By actor and by name of what it did, between ``start`` and ``end``; `idle` is what was left of its own time."""
    by_actor: dict[str, list[Span]] = defaultdict(list)
    for s in spans:
        if _within(s, start, end) > 0:
            by_actor[s["actor"]].append(s)

    def of(spans: Sequence[Span]) -> Spent:
        return Spent(_union(spans, start, end), sum(_within(s, start, end) for s in spans))

    out = {}
    for actor in sorted(by_actor, key=natural):
        by_name: dict[str, list[Span]] = defaultdict(list)
        for s in by_actor[actor]:
            by_name[s["name"]].append(s)
        out[actor] = {name: of(spans) for name, spans in by_name.items()}
        if own := [s for s in by_actor[actor] if s["name"] not in BESIDE]:
            left = end - start - of(own).any
            out[actor]["idle"] = Spent(left, left)
        if "load" in by_name:
            paused = sum(s.get("paused", 0.0) for s in by_name["load"])
            out[actor]["paused"] = Spent(paused, paused)
    return out


def _union(spans: Iterable[Span], start: float, end: float) -> float:
    seconds, reached = 0.0, start
    for s in sorted(spans, key=lambda s: s["start"]):
        until = min(end_of(s), end)
        seconds += max(0.0, until - max(s["start"], reached))
        reached = max(reached, until)
    return seconds


def table(of: Mapping[str, Mapping[str, Spent]], seconds: float) -> Table:
    """For a terminal: means over the actors of a kind, parts below their whole."""
    from rich import box
    from rich.table import Table

    kinds: dict[str, list[Mapping[str, Spent]]] = defaultdict(list)
    for actor, names in of.items():
        kinds[re.sub(r" \d+$", "", actor)].append(names)
    shown = Table(box=box.SIMPLE_HEAD)
    for column in ("", "of the time, %", "seconds", "at a time"):
        shown.add_column(column, justify="right" if column else "left")
    parents = {**PARENTS, "paused": "load"}
    for kind, actors in kinds.items():
        shown.add_row(f"[bold]{kind}[/]" + (f" × {len(actors)}" if len(actors) > 1 else ""))

        def mean(name: str, select: Callable[[Spent], float], actors: Sequence[Mapping[str, Spent]] = actors) -> float:
            return sum(select(a[name]) for a in actors if name in a) / len(actors)

        seconds_of = {name: mean(name, lambda s: s.any) for name in {n for a in actors for n in a} - {"batch"}}

        def place(name: str, seconds_of: Mapping[str, float] = seconds_of) -> tuple[Any, ...]:
            whole = parents.get(name, name)
            return name == "idle", -seconds_of.get(whole, 0.0), whole, name != whole, -seconds_of[name]

        for name in sorted(seconds_of, key=place):
            indent = "    " if parents.get(name) in seconds_of else "  "
            share, at_a_time = seconds_of[name] / seconds, mean(name, lambda s: s.sum) / seconds
            shown.add_row(f"{indent}{name}", f"{100 * share:.1f}", f"{seconds_of[name]:.1f}", f"{at_a_time:.2f}")
    return shown

"""A run seen from outside, while it goes on: by its directory alone, which may be a copy or on a shared disk.

Each look reads the ends of the files anew: they grow, and are replaced where a run goes back to a checkpoint.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepgrpo import rundir
from stepgrpo.config import Config, ConfigError, brief, validate
from stepgrpo.console import Display, clock, progress_line
from stepgrpo.placement import shown
from stepgrpo.trace import Span, end_of, natural, spent, title

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

LOOK_SECONDS = 1.0
"""Between two looks."""
BEGIN_SECONDS = 120.0
"""To wait for a run to begin."""
DEAD_SECONDS = 90.0
"""Without a sign of life after which a run that nobody works on is dead. A supervisor starts it again before."""
RECENT_SECONDS = 60.0
"""Over which rates are taken."""
TAIL_BYTES = 1 << 19
"""Of the end of a file that is read."""
NUM_EVENTS = 5
"""Shown at a time."""


class NotFinishedError(Exception):
    """A run that was watched has ended early; the message says how, and what to do."""


@dataclass(frozen=True)
class _Look:
    """The ends of a run's files. What is older is not there."""

    rows: list[dict[str, Any]]
    """Metrics of batches' last updates."""
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    draws: list[dict[str, Any]]
    spans: list[dict[str, Any]]

    @classmethod
    def at(cls, directory: Path) -> _Look:
        names = ("metrics", "evaluations", "events", "draws", "spans")
        metrics, *others = (_tail(directory / f"{name}.jsonl") for name in names)
        return cls([row for row in metrics if "time/batch" in row], *others)


def watch(directory: Path, display: Display) -> dict[str, Any]:
    """Show a run until it ends; returns its summary.

    Raises:
        ConfigError: there is no run, and none begins in time.
        NotFinishedError: it failed, was interrupted, or died without a word.
    """
    config = _begun(directory, display)
    with display.phase("watch", f"watching {directory}") as phase:
        told: dict[str, Any] | None = None
        while (summary := _ended(directory, config)) is None:
            look = _Look.at(directory)
            if not display.live:
                for event in _after(told, look.events):
                    display.console.print(f"  {_told(event)}", markup=False, soft_wrap=True)
                    told = event
            done = look.rows[-1]["batch"] + 1 if look.rows else 0
            phase.show(_line(look, config), done, config.train.num_batches, _below(look))
            time.sleep(LOOK_SECONDS)
        _raise_unfinished(directory, summary)
        phase.result = f"{summary['updates']} updates"
    return summary


def _begun(directory: Path, display: Display) -> Config:
    """Settings of the run, which may still be about to begin."""
    settings, since = directory / "config.json", time.monotonic()
    if not settings.is_file():
        with display.phase("begin", f"waiting for a run to begin in {directory}") as phase:
            while not settings.is_file():
                if time.monotonic() - since > BEGIN_SECONDS and not rundir.is_held(directory):
                    raise ConfigError(
                        f"{directory}: holds no run, and none began within {BEGIN_SECONDS:g} s; takes a run's "
                        "directory, such as runs/quickstart, or the id of a Ray job"
                    )
                phase.show("somebody prepares one" if rundir.is_held(directory) else "it has no config.json yet")
                time.sleep(LOOK_SECONDS)
    try:
        return validate(Config, json.loads(settings.read_text()))
    except (ConfigError, ValueError) as e:
        raise ConfigError(f"{directory}: takes a run of `stepgrpo train` ({brief(e)})") from None


def _ended(directory: Path, config: Config) -> dict[str, Any] | None:
    """The summary of a run that will not go on by itself; without a status where it died before it wrote any."""
    summary: dict[str, Any] = {}
    with suppress(FileNotFoundError):
        summary = json.loads((directory / "summary.json").read_text())
    # A failed run may be started again.
    final = summary and (summary["status"] != "failed" or not config.train.max_restarts)
    ended = (final or _silent_seconds(directory) > DEAD_SECONDS) and not rundir.is_held(directory)
    return summary if ended else None


def _raise_unfinished(directory: Path, summary: Mapping[str, Any]) -> None:
    status = summary.get("status")
    if status == "finished":
        return
    again = "go on with it by its command with --resume"
    if status is None:
        silent = f"nothing was written for {clock(_silent_seconds(directory))} and nobody works on it"
        raise NotFinishedError(f"{directory}: the run died: {silent}; {again}")
    cause = ""
    with suppress(FileNotFoundError):
        # An exception group's traceback has a frame.
        lines = [line.strip(" |+-") for line in (directory / "error.txt").read_text().splitlines()]
        cause = f": {next((line for line in reversed(lines) if line), '')}"
    raise NotFinishedError(
        f"{directory}: the run {'was interrupted' if status == 'interrupted' else status + cause}; {again}"
    )


def _silent_seconds(directory: Path) -> float:
    changed = [directory.stat().st_mtime]
    for path in directory.iterdir():
        with suppress(FileNotFoundError):  # files are replaced
            changed.append(path.stat().st_mtime)
    return time.time() - max(changed)


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last lines, as far as they are whole."""
    try:
        with path.open("rb") as f:
            skipped = max(0, path.stat().st_size - TAIL_BYTES)
            f.seek(skipped)
            lines = f.read().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return list(rundir.whole_lines(lines[1 if skipped else 0 :]))


# ---- what is shown


def _line(look: _Look, config: Config) -> str:
    if not look.rows:
        started = [e["time"] for e in look.events if e["kind"] == "start"]
        since = f", begun {time.strftime('%H:%M:%S', time.localtime(started[-1]))}" if started else ""
        return f"no batch is done yet{since}"
    t = config.train
    recent = look.rows[-20:]
    per_batch = sum(row["time/batch"] for row in recent) / len(recent)
    row = recent[-1]
    during = [e for e in look.evaluations if e["version"] > 0]
    return progress_line(
        row,
        num_updates=t.num_batches * config.updates_per_batch,
        held_out=(during[-1]["accuracy"]["mean"], during[-1]["tokens"]["mean"]) if during else None,
        seconds_left=per_batch * (t.num_batches - 1 - row["batch"]),
    )


def _after(told: Mapping[str, Any] | None, events: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The events since one; the last few where it is not there any more."""
    there = [i for i, event in enumerate(events) if event == told]
    return events[there[-1] + 1 :] if there else events[-NUM_EVENTS:]


def _below(look: _Look) -> RenderableType:
    """The actors, what waits to be trained on, what was measured and what happened."""
    from rich.console import Group
    from rich.text import Text

    lines = []
    if look.spans:  # of a few seconds ago, as all that is held against them has to be
        trained = max((s["batch"] for s in look.spans if s["name"] == "update"), default=-1)
        draws = [d for line in look.draws if line["batch"] <= trained for d in (*line["trained"], *line["filtered"])]
        graded = {s["draw"] for s in look.spans if s["name"] == "grade" and s["draw"] > max(draws, default=-1)}
        lines.append(f"{len(graded)} groups are graded and not trained on yet")
    lines += [
        f"held-out, weights {e['version']}: accuracy {e['accuracy']['mean']:.1%}  tokens {e['tokens']['mean']:.1f}  "
        f"steps {e['steps']['mean']:.2f}"
        for e in look.evaluations[-2:]
    ]
    lines += [_told(e) for e in look.events[-NUM_EVENTS:]]
    texts = [Text(f"  {line}", style="dim", no_wrap=True, overflow="ellipsis") for line in lines]
    return Group(*([_actors(look)] if look.spans else []), *texts)


def _actors(look: _Look) -> Table:
    """One line each. What is under way is not known, only what has ended: rates are of the last minute of that."""
    from rich.table import Table
    from rich.text import Text

    spans = [s for s in look.spans if s["restart"] == look.spans[-1]["restart"]]
    by_actor: dict[str, list[Span]] = defaultdict(list)
    for s in sorted(spans, key=end_of):
        by_actor[s["actor"]].append(s)
    now = max(map(end_of, spans))
    start = max(now - RECENT_SECONDS, min(map(end_of, spans)))
    seconds = max(now - start, 1.0)
    times = spent(spans, start, now)
    gone = _gone(look.events)
    table = Table(box=None, padding=(0, 0, 0, 2), header_style="dim")
    for column in ("", "node", "weights", "groups", "tokens/s", "busy", "last"):
        table.add_column(column, justify="left" if column in ("", "node", "last") else "right")
    for actor in sorted(by_actor, key=natural):
        mine = by_actor[actor]
        groups = [s for s in mine if s["name"] == "generate" and end_of(s) > start]
        idle = times.get(actor, {}).get("idle")
        last = next((s for s in reversed(mine) if s["name"] not in ("probe", "grade")), mine[-1])
        table.add_row(
            actor,
            mine[-1]["node"][:4],
            next((str(s["version"]) for s in reversed(mine) if s["name"] in ("load", "publish")), ""),
            f"{sum(s['seconds'] for s in groups) / seconds:.1f}" if groups else "",
            f"{sum(s.get('tokens', 0) for s in groups) / seconds:,.0f}" if groups else "",
            f"{1 - idle.any / seconds:.0%}" if idle else "",
            Text(gone.get(actor) or f"{title(last)}, {clock(max(0.0, time.time() - end_of(last)))} ago"),
        )
    return table


def _gone(events: list[dict[str, Any]]) -> dict[str, str]:
    """Workers that are not up -> why."""
    gone: dict[str, str] = {}
    for e in events:
        if e["kind"] == "start":
            gone.clear()
        elif "worker" in e:
            gone[f"rollout worker {e['worker']}"] = "" if e["kind"] == "joined" else f"{e['kind']}: {e['reason']}"
    return gone


def _told(event: Mapping[str, Any]) -> str:
    if event["kind"] == "placement":
        event = {**event, "nodes": "; ".join(f"{node[:4]}: {shown(names)}" for node, names in event["nodes"].items())}
    details = [f"{k} {v}" for k, v in event.items() if k not in ("time", "kind") and v not in (None, [], "")]
    return f"{time.strftime('%H:%M:%S', time.localtime(event['time']))}  {event['kind']}  {', '.join(details)}"

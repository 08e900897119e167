"""One self-contained HTML page about runs and tables of methods: it opens offline and asks the network for nothing.

Python reads, counts and puts the page together; `parts.js` draws, here and in the dashboard. A file that an older run
directory lacks leaves its part of the page to say so.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from stepgrpo.config import ConfigError, brief
from stepgrpo.metrics import METRICS, TriggerWatch

NUM_WINDOWS = 16
"""Most points of a curve that pools what is too rare to be read batch by batch."""
NUM_BARS = 40
"""About as many bars of a histogram as can be told apart."""
CONFIDENCE_EDGES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)
"""Narrow towards 1, where nearly all probes are."""
Z = 1.96
"""Half the width of a 95 % interval, in standard errors."""


def write(sources: Sequence[Path], output: Path) -> None:
    """Write the page.

    Args:
        sources: run directories and results directories of `stepgrpo compare`, in any number and order.

    Raises:
        ConfigError: a source is neither, a file cannot be read, or ``output`` cannot be written.
    """
    runs, tables = [], []
    for source in sources:
        if (source / "table.json").is_file():
            tables.append(_json(source / "table.json"))
        elif (source / "metrics.jsonl").is_file():
            runs.append(_run(source))
        else:
            raise ConfigError(_no_source(source))
    repeated = Counter(run["name"] for run in runs)
    for run in runs:
        if repeated[run["name"]] > 1:
            run["name"] = run["path"]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(_page(runs, tables), encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"--output: got {output}, cannot be written ({e.strerror})") from None


def _no_source(source: Path) -> str:
    within = sorted(p.parent.name for name in ("metrics.jsonl", "table.json") for p in source.glob(f"*/{name}"))
    hint = f"; try what lies in it: {', '.join(within)}" if within else ""
    return (
        f"{source}: takes a run directory (with metrics.jsonl) or a results directory of `stepgrpo compare` "
        f"(with table.json){hint}"
    )


def _page(runs: list[dict[str, Any]], tables: list[dict[str, Any]]) -> str:
    from plotly.offline import get_plotlyjs

    files = resources.files(__package__)
    names = [x["name"] for x in [*runs, *tables]]
    title = ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"
    # Inside a script element only "<" can end it or open a comment.
    data = json.dumps({"runs": runs, "tables": tables, "metrics": METRICS}, ensure_ascii=False).replace("<", "\\u003c")
    parts = {
        "title": html.escape(title),
        "style": (files / "page.css").read_text(encoding="utf-8"),
        "plotly": get_plotlyjs(),
        "data": data,
        "script": "\n".join((files / name).read_text(encoding="utf-8") for name in ("parts.js", "page.js")),
    }
    page = (files / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], page)


@dataclass
class Records:
    """What the files of a run directory hold; empty where one is not there."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of metrics.jsonl."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    probes: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    heldout: dict[str, Any] = field(default_factory=dict)


FIGURES: dict[str, Callable[[Records], Any]] = {
    "config": lambda run: run.config,
    "summary": lambda run: run.summary,
    "curves": lambda run: curves(run.rows),
    "evaluations": lambda run: run.evaluations,
    "warnings": lambda run: _warnings(run.rows, run.summary),
    "heldout": lambda run: _histograms(run.heldout),
    "calibration": lambda run: _calibration(run.probes, run.config),
    "false_exits": lambda run: _false_exits(run.probes),
    "exit_cost": lambda run: _exit_cost(run.rows, run.summary),
    "samples": lambda run: run.samples,
}
"""What `parts.js` draws of a run."""


def _run(directory: Path) -> dict[str, Any]:
    records = Records(
        rows=_lines(directory / "metrics.jsonl"),
        config=_json(directory / "config.json") or {},
        summary=_json(directory / "summary.json") or {},
        heldout=_json(directory / "heldout.json") or {},
        **{name: _lines(directory / f"{name}.jsonl") for name in ("evaluations", "probes", "samples")},
    )
    figures = {name: make(records) for name, make in FIGURES.items()}
    return {"name": directory.resolve().name, "path": str(directory), **figures}


def curves(rows: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    """By metric, of those that any of the rows has."""
    return {
        name: [_short(row.get(name)) for row in rows]
        for name in METRICS
        if any(row.get(name) is not None for row in rows)
    }


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ConfigError(f"{path}: is not JSON ({brief(e)}); restore the file or leave this source out") from None


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # a run that is still going on is writing it
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as e:
            raise ConfigError(f"{path}:{number}: is not JSON ({brief(e)}); repair or remove the line") from None
    return records


def _short(value: float | None) -> float | None:
    return value if value is None else float(f"{value:.5g}")


def _warnings(rows: list[dict[str, Any]], summary: dict[str, Any]) -> list[str]:
    """Whether steps fell without tokens: on held-out problems, or in rollouts where there are none."""
    if "before" in summary and "after" in summary:
        ends = (summary["before"], summary["after"])
        where, size, pairs = "Held-out problems", 1, [(e["steps"]["mean"], e["tokens"]["mean"]) for e in ends]
    else:
        seen = [(r["rollout/steps"], r["rollout/tokens"]) for r in rows if r.get("rollout/steps") is not None]
        where, size = "Rollouts", max(1, min(20, len(seen) // 4))
        pairs = seen[:size] + seen[-size:]
    watch = TriggerWatch(size)
    return [f"{where}: {message}" for steps, tokens in pairs if (message := watch.see(steps, tokens))]


def _histograms(heldout: dict[str, Any]) -> dict[str, Any]:
    """For steps and for tokens: left edges of bars of one width, and each evaluation's share of answers per bar."""
    if not heldout:
        return {}
    result = {}
    for quantity in ("steps", "tokens"):
        values = {when: np.concatenate(answers[quantity]) for when, answers in heldout.items() if answers}
        pooled = np.concatenate(list(values.values()))
        width = math.ceil((pooled.max() - pooled.min() + 1) / NUM_BARS)
        edges = np.arange(pooled.min() // width * width, pooled.max() + width + 1, width)
        result[quantity] = {
            "left": edges[:-1].tolist(),
            "width": width,
            "shares": {when: (np.histogram(v, edges)[0] / len(v)).round(5).tolist() for when, v in values.items()},
            "means": {when: float(v.mean()) for when, v in values.items()},
        }
    return result


def _calibration(probes: list[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    """How often tentative answers were right, by confidence; the threshold is one of the edges."""
    confidence = np.array([c for batch in probes for c in batch["confidence"]], float)
    right = np.array([r for batch in probes for r in batch["correct"]], float)
    delta = (config.get("rollout", {}).get("probe") or {}).get("delta")
    edges = sorted({*CONFIDENCE_EDGES, *([delta] if delta is not None else [])})
    place = np.digitize(confidence, edges[1:-1])
    bins = [
        {
            "label": f"{edges[i]:g}–{edges[i + 1]:g}",
            "confidence": float(confidence[place == i].mean()),
            **_share(right[place == i]),
        }
        for i in np.unique(place).tolist()
    ]
    return {
        "bins": bins,
        "delta": delta,
        "below_delta": len({i for i in place.tolist() if edges[i] < delta}) if delta is not None else None,
    }


def _false_exits(probes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Share of confident probes whose answer was wrong, over windows of batches."""
    wrong = [
        (batch["batch"], [1.0 - r for r, v in zip(batch["correct"], batch["verdict"], strict=True) if v == "confident"])
        for batch in probes
    ]
    windows = []
    for window in np.array_split(np.arange(len(wrong)), min(len(wrong), NUM_WINDOWS)) if wrong else []:
        pooled = np.array([w for i in window for w in wrong[i][1]], float)
        if len(pooled):
            windows.append({"first": wrong[window[0]][0], "last": wrong[window[-1]][0], **_share(pooled)})
    return windows


def _exit_cost(rows: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
    """Accuracy of control samples and of those that may be cut, over windows of updates that have both."""
    both = [
        (r["update"], r["accuracy/control"], r["accuracy/treated"])
        for r in rows
        if r.get("accuracy/control") is not None and r.get("accuracy/treated") is not None
    ]
    windows = [
        {
            "first": int(window[0, 0]),
            "last": int(window[-1, 0]),
            "control": _mean(window[:, 1]),
            "treated": _mean(window[:, 2]),
        }
        for window in (np.array_split(np.array(both, float), min(len(both), NUM_WINDOWS)) if both else [])
    ]
    difference = np.array([control - treated for _, control, treated in both])
    return {"windows": windows, "total": summary.get("exit_cost") or (_mean(difference) if both else None)}


def _share(hits: np.ndarray) -> dict[str, float]:
    """Share of ones with its 95 % Wilson score interval (Wilson 1927), as if all were independent."""
    n, p = len(hits), float(hits.mean())
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    # The interval holds p but for the last digit of its own arithmetic.
    return {"n": n, "mean": p, "low": min(p, centre - half), "high": max(p, centre + half)}


def _mean(values: np.ndarray) -> dict[str, float]:
    """Mean with its 95 % normal interval; of a single value there is none."""
    mean = float(values.mean())
    half = Z * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": mean, "low": mean - half, "high": mean + half}

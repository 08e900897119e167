"""Every method of a table on equal footing: same start, prompts, budget and evaluation, several seeds; row by row.

A finished row (one method, one seed) is a JSON file with everything the table needs. A later call goes on with what is
missing, or was made with other settings.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepgrpo import run, rundir, sft
from stepgrpo.config import CompareConfig, Config, ConfigError, MethodConfig, SftConfig, load, overlay, read, validate
from stepgrpo.console import Display
from stepgrpo.evaluate import COLUMNS, NUM_RESAMPLES, Answers, Estimate
from stepgrpo.train import one_line


class Job:
    """One row to be made."""

    def __init__(self, table: CompareConfig, directory: Path, name: str, seed: int) -> None:
        self.name, self.method, self.seed = name, table.methods[name], seed
        tree = read(directory / table.run)
        if self.method.overlay:
            tree = overlay(tree, read(directory / self.method.overlay))
        tree = overlay(overlay(tree, self.method.set), {"name": f"{name}-{seed}", "seed": seed})
        tree["runs_dir"] = str(Path(tree.get("runs_dir", "runs")) / "compare" / table.name)
        self.config = validate(Config, tree)
        if self.config.data.eval is None:
            raise ConfigError(f"{table.run}: data.eval: got null, takes the held-out problems to compare on")
        self.path = directory / table.results / f"{name}-{seed}.json"
        self.hash = _hash(self.config, self.method)

    def row(self) -> dict[str, Any] | None:
        """The finished row, if there is one of these settings."""
        if not self.path.is_file():
            return None
        row: dict[str, Any] = json.loads(self.path.read_text())
        return row if row["config_hash"] == self.hash else None

    def make(self, display: Display) -> None:
        """Run the method and write its row."""
        shutil.rmtree(self.config.run_dir, ignore_errors=True)  # of an attempt that did not get to its row
        start = time.monotonic()
        kinds = {"train": self._train, "eval": self._evaluate, "distill": self._distill}
        evaluation, answers, details = kinds[self.method.kind](display)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        row = {
            "method": self.name,
            "seed": self.seed,
            "config_hash": self.hash,
            "config": _settings(self.config),
            "evaluation": evaluation,
            "seconds": round(time.monotonic() - start, 1),
            **details,
            "answers": {k: v for k, v in answers.items() if k != "key"},  # the hash holds the problems and their order
        }
        rundir.save_json(self.path, row, indent=None)

    def _train(self, display: Display) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        summary = run.train(self.config, display)
        answers = json.loads((self.config.run_dir / "heldout.json").read_text())["after"]
        return summary["after"], answers, {"updates": summary["updates"], "exit_cost": summary.get("exit_cost")}

    def _evaluate(
        self, display: Display, config: Config | None = None
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        config = config or self.config
        assert config.data.eval is not None
        ((evaluation, answers),) = run.evaluate(config, display, [config.data.eval]).values()
        return evaluation.as_dict(), answers.as_dict(), {}

    def _distill(self, display: Display) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Early-exit decoding of the training prompts, its correct answers as supervised pairs, then plain decoding."""
        c, t = self.config, self.config.train
        pairs: list[dict[str, str]] = []
        decoding = c.eval.model_copy(
            update={
                "early_exit": True,
                "samples": c.rollout.group_size,
                "num_prompts": t.num_batches * t.prompts_per_batch,
                "max_response_tokens": c.rollout.max_response_tokens,
                "temperature": c.rollout.temperature,
                "top_p": c.rollout.top_p,
            }
        )

        def keep(_: str, group: dict[str, Any]) -> None:
            pairs.extend(
                {"problem": group["question"], "response": a["text"]} for a in group["trajectories"] if a["correct"]
            )

        run.evaluate(c.model_copy(update={"eval": decoding}), display, [c.data.train], keep)
        path = c.run_dir.with_name(f"{c.run_dir.name}-pairs.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(p) + "\n" for p in pairs), encoding="utf-8")
        tree = {k: getattr(c, k).model_dump() for k in ("model", "data", "learner", "cluster")}
        tree["data"] |= {"train": str(path), "eval": None, "question_field": "problem", "suffix": ""}
        tree |= {"name": c.name, "runs_dir": c.runs_dir, "seed": c.seed}
        tree["max_tokens"] = c.data.max_prompt_tokens + c.rollout.max_response_tokens
        sft.train(validate(SftConfig, overlay(tree, self.method.sft)), display)
        trained = c.model_copy(update={"model": c.model.model_copy(update={"path": str(c.model_dir)})})
        evaluation, answers, _ = self._evaluate(display, trained)
        return evaluation, answers, {"pairs": len(pairs)}


def jobs(path: Path, only: Sequence[str] = ()) -> tuple[CompareConfig, list[Job]]:
    """The comparison in a YAML file and its rows, seed by seed: an interrupted table has whole seeds.

    Raises:
        ConfigError: a fault in any of the rows' settings, before the first is begun.
    """
    table = load(CompareConfig, path)
    if unknown := sorted(set(only) - table.methods.keys()):
        raise ConfigError(f"--only {unknown[0]}: takes one of {', '.join(table.methods)}")
    wanted = [(seed, name) for name, m in table.methods.items() for seed in m.seeds or table.seeds]
    wanted.sort(key=lambda w: w[0])  # methods keep their order
    return table, [Job(table, path.parent, name, seed) for seed, name in wanted if not only or name in only]


def compare(path: Path, display: Display, only: Sequence[str] = ()) -> dict[str, Any]:
    """Make the rows that are missing, then the table, which is also written as Markdown, CSV and JSON.

    A row that fails is told and left for the next call.
    """
    config, todo = jobs(path, only)
    every = jobs(path)[1] if only else todo
    failed: list[str] = []
    for i, job in enumerate(todo, 1):
        title = f"[{i}/{len(todo)}] {job.name}, seed {job.seed}"
        if job.row():
            display.print(f"{title}: done before")
            continue
        display.print(f"\n{title}")
        try:
            job.make(Display(display.console))  # of its own, because it counts the seconds of each phase
        except ConfigError:
            raise
        except Exception as e:
            failed.append(f"{job.name}, seed {job.seed}")
            display.warn(f"{failed[-1]} failed and is left for the next call: {one_line(e)}")
        write_table(config, every, path)
    result = write_table(config, every, path)
    result["failed"] = failed
    return result


def write_table(config: CompareConfig, every: Sequence[Job], path: Path) -> dict[str, Any]:
    """``table.json``, ``table.md`` and ``table.csv`` of the rows there are.

    Args:
        every: all rows of the comparison, which lies at ``path``.
    """
    results = path.parent / config.results
    rows = [job.row() for job in every]
    result = table(config, [r for r in rows if r])
    if not result["methods"]:
        return result
    rundir.save_json(results / "table.json", result)
    (results / "table.md").write_text(markdown(result, f"stepgrpo compare {path}"), encoding="utf-8")
    (results / "table.csv").write_text(_csv(result), encoding="utf-8")
    return result


def table(config: CompareConfig, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all methods that have rows. Intervals resample seeds, and problems within them."""
    by_method: dict[str, dict[int, Answers]] = {}
    for row in rows:
        by_method.setdefault(row["method"], {})[row["seed"]] = Answers(key=[], **row["answers"])
    reference = by_method.get(config.reference, {})
    methods = []
    for name, method in config.methods.items():
        if name not in by_method:
            continue
        answers = by_method[name]
        shared = [s for s in answers if s in reference]
        share = None
        if shared:
            share = _two_level(_matrix(answers, shared, "tokens"), _matrix(reference, shared, "tokens"))
        seeds = list(answers)
        accuracy, tokens, steps = (_two_level(_matrix(answers, seeds, w)) for w in ("correct", "tokens", "steps"))
        methods.append(
            {
                "method": name,
                "label": method.label or name,
                "group": method.group,
                "seeds": len(seeds),
                "accuracy": asdict(accuracy),
                "tokens": asdict(tokens),
                "share": share and asdict(share),
                "steps": asdict(steps),
                "published": method.published,
                "points": [
                    {"seed": s, **{k: float(answers[s].means(w).mean()) for k, w in COLUMNS.items()}} for s in seeds
                ],
            }
        )
    return {"name": config.name, "reference": config.reference, "methods": methods}


def markdown(result: dict[str, Any], command: str) -> str:
    """The table for people."""
    lines = [
        f"# {result['name']}",
        "",
        f"Made by `{command}`. In brackets: 95 % intervals over seeds and problems.",
        "",
    ]
    group = None
    for m in result["methods"]:
        if m["group"] != group:
            group = m["group"]
            lines += [
                *([""] if group != MethodConfig.MAIN else []),
                f"## {group}",
                "",
                f"| method | accuracy, % | tokens | tokens, % of {result['reference']} | steps | seeds "
                "| paper: accuracy / tokens, % |",
                "|---|---|---|---|---|---|---|",
            ]
        published = " / ".join(str(m["published"].get(k, "–")) for k in ("accuracy", "share")) if m["published"] else ""
        cells = [
            m["label"],
            _cell(m["accuracy"], 100, 1),
            _cell(m["tokens"], 1, 1),
            _cell(m["share"], 100, 1) if m["share"] else "–",
            _cell(m["steps"], 1, 2),
            str(m["seeds"]),
            published,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(e: dict[str, float], factor: float, digits: int) -> str:
    mean, low, high = (f"{e[k] * factor:.{digits}f}" for k in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _csv(result: dict[str, Any]) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    figures = [f"{k}_{p}" for k in ("accuracy", "tokens", "share", "steps") for p in ("mean", "low", "high")]
    writer.writerow(["method", "group", "seeds", *figures])
    for m in result["methods"]:
        values = [
            (m[k] or {}).get(p) for k in ("accuracy", "tokens", "share", "steps") for p in ("mean", "low", "high")
        ]
        writer.writerow([m["method"], m["group"], m["seeds"], *values])
    return out.getvalue()


def _matrix(answers: dict[int, Answers], seeds: Sequence[int], what: Any) -> NDArray[np.float64]:
    """[seeds, problems]"""
    return np.stack([answers[s].means(what) for s in seeds])


def _two_level(values: NDArray[np.float64], over: NDArray[np.float64] | None = None) -> Estimate:
    """Mean, or ratio of means, of [seeds, problems] and its interval: seeds are resampled, and problems."""
    rng = np.random.default_rng(0)
    num_seeds, num_problems = values.shape

    def figure(chosen: Any) -> float:
        return float(values[chosen].mean() / (1 if over is None else over[chosen].mean()))

    draws = [
        figure(np.ix_(rng.integers(0, num_seeds, num_seeds), rng.integers(0, num_problems, num_problems)))
        for _ in range(NUM_RESAMPLES)
    ]
    return Estimate.of(figure(...), np.array(draws))


def _settings(config: Config) -> dict[str, Any]:
    """What decides about a row: everything that is set, but for where it runs and what it is called."""
    tree = config.model_dump(mode="json", exclude_defaults=True, exclude={"name", "runs_dir", "cluster"})
    train = tree.get("train", {})
    for key in ("wandb", "wandb_project", "sample_every"):
        train.pop(key, None)
    return tree


def _hash(config: Config, method: MethodConfig) -> str:
    """Of the settings, and of the local files they name: a row of another starting model is another row."""
    digest = hashlib.sha256(
        json.dumps([_settings(config), method.kind, method.sft], sort_keys=True, default=str).encode()
    )
    files = [
        Path(config.data.train),
        Path(config.data.eval or ""),
        *sorted(Path(config.model.path).glob("*.safetensors")),
    ]
    for file in files:
        if file.is_file():
            stat = file.stat()
            digest.update(_file_digest(file, stat.st_mtime_ns, stat.st_size))
    return digest.hexdigest()[:16]


@lru_cache
def _file_digest(file: Path, changed_ns: int, size: int) -> bytes:
    """Read once for all rows: a checkpoint may be large. ``changed_ns`` and ``size`` tell a changed file apart."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").digest()

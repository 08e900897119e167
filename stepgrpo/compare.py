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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from stepgrpo import checkpoint, run, rundir, sft
from stepgrpo.benchmarks import resolve
from stepgrpo.config import (
    CompareConfig,
    Config,
    ConfigError,
    MethodConfig,
    SftConfig,
    flat,
    is_own,
    is_under,
    load,
    overlay,
    read,
    validate,
)
from stepgrpo.console import Display
from stepgrpo.data import PromptStream
from stepgrpo.evaluate import COLUMNS, NUM_RESAMPLES, Answers, Estimate
from stepgrpo.hub import portable
from stepgrpo.plugin import own_file
from stepgrpo.pool import TrainError, one_line


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
        self.settings = _settings(self.config, self.method)
        self.files = _digests(self.config)

    def row(self) -> dict[str, Any] | None:
        """The finished row, if there is one of these settings and files."""
        if not self.path.is_file():
            return None
        row: dict[str, Any] = json.loads(self.path.read_text())
        return None if self.changes(row) else row

    def changes(self, row: dict[str, Any]) -> list[str]:
        """Settings and files that were others when ``row`` was made; a setting it does not know was at its default."""
        made, now = flat(row["settings"]), flat(self.settings)
        # What only the row says is a setting of an earlier version, which decides about nothing any more; or it is an
        # entry of a mapping, or of a section, that is another one now.
        mappings = ["sft", *(k for k, v in _defaults().items() if v == {})]
        entries = {k for k in made if is_under(k, mappings) or _related(k, now)}
        settings = [k for k in sorted(entries | now.keys()) if _value(made, k) != _value(now, k)]
        return settings + [k for k, v in self.files.items() if row["files"].get(k) != v]

    def make(self, display: Display) -> None:
        """Run the method and write its row."""
        if self.config.run_dir.exists():  # an attempt that did not get to its row
            place = self.config.checkpoint_place
            for left in [*checkpoint.names(place), *checkpoint.half_written(place)]:
                checkpoint.discard(place, left)
            shutil.rmtree(self.config.run_dir, ignore_errors=True)
        start = time.monotonic()
        kinds = {"train": self._train, "eval": self._evaluate, "distill": self._distill}
        evaluation, answers, details = kinds[self.method.kind](display)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        row = {
            "method": self.name,
            "seed": self.seed,
            "config_hash": _sha256(json.dumps([self.settings, self.files], sort_keys=True).encode()),
            "settings": self.settings,
            "files": self.files,
            "evaluation": evaluation,
            "seconds": round(time.monotonic() - start, 1),
            **details,
            "problems": _sha256(json.dumps(answers["key"]).encode()),
            "answers": {k: v for k, v in answers.items() if k != "key"},
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
        """Early-exit decoding of the draws that training would meet, supervised learning on the correct answers, then
        plain decoding."""
        c, t = portable(self.config), self.config.train
        tree = {k: getattr(c, k).model_dump() for k in ("model", "data", "learner", "cluster")}
        tree |= {"name": c.name, "runs_dir": c.runs_dir, "seed": c.seed}
        tree["max_tokens"] = c.data.max_prompt_tokens + c.rollout.max_response_tokens
        supervised = validate(SftConfig, overlay(tree, self.method.sft))
        with display.phase("prepare", "reading model and data") as phase:
            rundir.claim(c.run_dir)
            run.check_rollout(c)
            train_set, held_out = run.read_problems(c, display)
            phase.result = f"{len(train_set.items):,} training and {len(held_out.items):,} held-out problems"
        stream = PromptStream(train_set.items, c.seed)
        prompts = {draw: stream[draw] for draw in range(t.num_batches * t.prompts_per_batch)}
        encode = sft.response_encoder(supervised)
        pairs: list[sft.Pair] = []
        unspelt: list[str] = []
        decoding = c.eval.model_copy(
            update={
                "early_exit": True,
                "samples": c.rollout.group_size,
                "max_response_tokens": c.rollout.max_response_tokens,
                "temperature": c.rollout.temperature,
                "top_p": c.rollout.top_p,
            }
        )

        def keep(_: str, group: dict[str, Any]) -> None:
            prompt = prompts[group["draw"]].token_ids
            for answer in (a["text"] for a in group["trajectories"] if a["correct"]):
                try:
                    pairs.append((prompt, encode(prompt, answer)))
                except ValueError as e:
                    unspelt.append(str(e))

        run.answer(c.model_copy(update={"eval": decoding}), display, {"training": list(prompts.values())}, keep)
        if unspelt:
            display.warn(f"{len(unspelt)} correct answers cannot be spelt again and are left out: {unspelt[0]}")
        if not pairs:
            raise TrainError("no decoded answer is correct: there is nothing to learn from")
        sft.fit(supervised, display, pairs)
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

    Raises:
        ConfigError: a fault in the settings, or another call is making rows of this table.
    """
    config, todo = jobs(path, only)
    # A second call would remove the runs of the first.
    with rundir.alone(todo[0].config.run_dir.parent, "`stepgrpo compare`"):
        return _compare(config, todo, jobs(path)[1] if only else todo, path, display)


def _compare(
    config: CompareConfig, todo: Sequence[Job], every: Sequence[Job], path: Path, display: Display
) -> dict[str, Any]:
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
    """The figures of all methods that have rows.

    Raises:
        ConfigError: rows of different problems, which cannot be compared.
    """
    by_method: dict[str, dict[int, Answers]] = {}
    for row in rows:
        by_method.setdefault(row["method"], {})[row["seed"]] = Answers(key=[], **row["answers"])
    if len({row["problems"] for row in rows}) > 1:
        raise ConfigError(f"results: got rows of different problems in {config.results}; remove the older ones")
    reference = by_method.get(config.reference, {})
    methods = []
    for name, method in config.methods.items():
        if name not in by_method:
            continue
        answers = by_method[name]
        shared = [s for s in answers if s in reference]
        share = None
        if shared:
            share = _estimate(_matrix(answers, shared, "decoded"), _matrix(reference, shared, "decoded"))
        seeds = list(answers)
        accuracy, tokens, steps = (_estimate(_matrix(answers, seeds, w)) for w in COLUMNS.values())
        methods.append(
            {
                "method": name,
                "label": method.label or name,
                "group": method.group,
                "seeds": len(seeds),
                "accuracy": asdict(accuracy),
                "tokens": asdict(tokens),
                "probe_tokens": round(float(_matrix(answers, seeds, "decoded").mean() - tokens.mean), 3),
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
        f"Made by `{command}`. In brackets: 95 % intervals over seeds (t) and problems (bootstrap); of a single seed, "
        "over problems alone. Probes count in the share.",
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
            _cell(m["tokens"], 1, 1) + (f" + {m['probe_tokens']:.1f}" if m["probe_tokens"] else ""),
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


def _estimate(values: NDArray[np.float64], over: NDArray[np.float64] | None = None) -> Estimate:
    """Mean, or ratio of means, of [seeds, problems] and its interval.

    All seeds answer the same problems, and there are few: problems are resampled, seeds get a t interval (a bootstrap
    over three of them would cover 65 %, not 95 %), and the two half-widths add up like independent errors.
    """
    num_seeds, num_problems = values.shape
    below = np.ones_like(values) if over is None else over
    by_seed = values.mean(1) / below.mean(1)
    sums, sums_below = values.sum(0), below.sum(0)
    chosen = np.random.default_rng(0).integers(0, num_problems, (NUM_RESAMPLES, num_problems))
    e = Estimate.of(sums.mean() / sums_below.mean(), sums[chosen].mean(1) / sums_below[chosen].mean(1))
    if num_seeds == 1:
        return e
    of_seeds = stats.t.ppf(0.975, num_seeds - 1) * by_seed.std(ddof=1) / np.sqrt(num_seeds)
    low = float(e.mean - np.hypot(e.mean - e.low, of_seeds))
    high = float(e.mean + np.hypot(e.high - e.mean, of_seeds))
    if over is not None:
        return Estimate(e.mean, low, high)
    # A share of right answers is at most 1, whatever three seeds make of its spread.
    return Estimate(e.mean, max(low, float(values.min())), min(high, float(values.max())))


_WHERE_IT_RUNS = {
    "name",
    "runs_dir",
    "cluster",
    "checkpoint",
    "rollout.workers",
    "rollout.health_seconds",
    "train.wandb",
    "train.wandb_project",
    "train.wandb_group",
    "train.sample_every",
    "train.max_restarts",
    "train.wait_warning",
    "train.wait_limit",
}
_MISSING = object()


def _settings(config: Config, method: MethodConfig) -> dict[str, Any]:
    """Everything that decides about a row."""
    tree = config.model_dump(mode="json") | {"kind": method.kind, "sft": method.sft}
    return {k: v for k, v in flat(tree).items() if not is_under(k, _WHERE_IT_RUNS)}


def _related(key: str, settings: Iterable[str]) -> bool:
    """Whether something is said about a part of it, or about what it is a part of."""
    return any(is_under(key, [k]) or is_under(k, [key]) for k in settings)


def _value(settings: Mapping[str, Any], key: str) -> Any:
    """A default counts where nothing is said, not where its whole section is null."""
    if key in settings:
        return settings[key]
    return _MISSING if _related(key, settings) else _defaults().get(key, _MISSING)


@cache
def _defaults() -> dict[str, Any]:
    empty = validate(Config, {"name": "defaults", "model": {"path": ""}, "data": {"train": ""}})
    return flat(empty.model_dump(mode="json"))


def _digests(config: Config) -> dict[str, str]:
    """Of the local files that the settings name: a row of another starting model is another row."""
    files: dict[str, Path] = {}
    for field in ("train", "eval"):
        place = Path(resolve(getattr(config.data, field), config.data).place)
        files[f"data.{field}"] = place
    files |= {f"model.path/{f.name}": f for f in sorted(Path(config.model.path).glob("*"))}
    own = {
        "reward.scheme": config.reward.scheme,
        "reward.grader": config.reward.grader,
        "rollout.step_rule": config.rollout.step_rule,
        "rollout.probe.policy": config.rollout.probe.policy if config.rollout.probe else "",
    }
    for field, name in own.items():
        if is_own(name):
            files[field] = own_file(name, field)
    return {k: _file_digest(f, f.stat().st_mtime_ns, f.stat().st_size) for k, f in files.items() if f.is_file()}


@lru_cache
def _file_digest(file: Path, changed_ns: int, size: int) -> str:
    """Read once for all rows: a checkpoint may be large. ``changed_ns`` and ``size`` tell a changed file apart."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]

"""The command line. It parses first and imports the heavy parts after: `--help` answers at once."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from stepgrpo.config import Config
    from stepgrpo.console import Display
    from stepgrpo.triggers import Survey


class Preset(StrEnum):
    """Of probes."""

    DEER = "deer"
    PAPER = "paper"


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Teach reasoning models to stop when they are done: Step-GRPO on Ray, vLLM and DeepSpeed.",
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as train.num_batches=10.")
]
Resume = Annotated[
    str | None,
    typer.Option(
        metavar="[auto|NAME]",
        help="Go on with a run that was cut off: from its last good checkpoint, that of a name, or with `auto` "
        "from the beginning where there is none yet.",
    ),
]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Explain placement, memory and batches; start nothing.")
    ] = False,
    gpu_memory: Annotated[float, typer.Option(help="GB of one GPU, for --dry-run.")] = 80.0,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="The same.")] = 8,
    resume: Resume = None,
) -> None:
    """Train a model with Step-GRPO. A crash restarts it from its last checkpoint (train.max_restarts)."""
    from stepgrpo import launch
    from stepgrpo.config import Config, load

    def job(display: Display) -> None:
        settings = load(Config, config, overrides)
        if dry_run:
            from stepgrpo.dryrun import explain, render

            plan = explain(settings, gpu_memory, gpus_per_node)
            display.console.print(render(plan))
            if plan.faults:
                raise SystemExit(1)
            return
        if settings.train.max_restarts and launch.SCRATCH not in os.environ:
            _supervise(settings, display)
        from stepgrpo import run, supervise

        supervise.mark_end()
        summary = run.train(settings, display, resume)
        _print_summary(display, summary, settings.run_dir)

    _guard(job, goes_on=True)


def _supervise(settings: Config, display: Display) -> NoReturn:
    """Run this very command as a child process, which trains, and again where that crashes."""
    from stepgrpo import checkpoint, supervise

    last: list[str] = []

    def reached() -> object:
        nonlocal last
        with suppress(Exception):  # a store that does not answer now: no progress is known
            last = checkpoint.names(settings.checkpoint_place)
        return last

    command = [sys.executable, "-m", "stepgrpo", *sys.argv[1:]]
    limit = settings.train.max_restarts
    raise SystemExit(
        supervise.run(
            command,
            max_restarts=limit,
            display=display,
            progress=reached,
            hung_seconds=settings.train.wait_limit,
            keep=settings.run_dir,
        )
    )


@app.command()
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Ray's dashboard; none: $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS, or http://127.0.0.1:8265.",
        ),
    ] = None,
    resume: Resume = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=VALUE]",
            help="Environment variable of the job; without a value the one it has here, which is not shown.",
        ),
    ] = None,
    runtime_env: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Ray runtime environment (pip, uv, conda, ...), YAML.")
    ] = None,
    submission_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Name of the job; none: Ray's choice.")
    ] = None,
    upload_limit: Annotated[int, typer.Option(min=1, max=500, metavar="MB", help="Most to send.")] = 100,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Do not wait for the job.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the `ray job submit` command; send nothing.")
    ] = False,
) -> None:
    """Train on a Ray cluster: `train` as a job there, in a copy of the current directory."""

    def job(display: Display) -> None:
        import stepgrpo.submit as submission

        where = submission.given_address(address)
        prepared = submission.prepare(
            config,
            overrides or [],
            resume=resume,
            env=env or [],
            runtime_env=runtime_env,
            submission_id=submission_id,
            limit=upload_limit * 10**6,
        )
        client = None if dry_run else submission.connect(where)
        display.console.print(prepared.command(where), markup=False, soft_wrap=True)
        display.print(f"{len(prepared.sent):,} files of this directory, {_bytes(sum(prepared.sent.values()))}")
        if client is None:
            return
        name = submission.submit(client, prepared)
        display.print(submission.ways(client, name))
        if not no_follow:
            raise SystemExit(submission.attend(client, name, display))

    _guard(job)


@app.command()
def sft(config: ConfigFile, overrides: Overrides = None) -> None:
    """Fine-tune a model on (problem, response) pairs, through the same learner."""
    from stepgrpo.config import SftConfig, load

    def job(display: Display) -> None:
        import stepgrpo.sft as supervised

        settings = load(SftConfig, config, overrides)
        supervised.train(settings, display)
        display.print(f"\nThe trained model: {settings.run_dir / 'model'}")

    _guard(job, goes_on=True)


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory or hub name.")],
    overrides: Overrides = None,
    config: Annotated[Path, typer.Option(help="Run configuration to take data and decoding from.")] = Path(
        "configs/quickstart.yaml"
    ),
    benchmark: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=FILE]|FILE", help="May be given several times; none: data.eval. See docs/data.md."),
    ] = None,
    early_exit: Annotated[
        Preset | None, typer.Option(help="Probe while decoding and end thinking on confidence, with this preset.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="--output of another evaluation: share of its tokens, paired by problem.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
    dump: Annotated[Path | None, typer.Option(help="Write every answer to this file of JSON lines.")] = None,
) -> None:
    """Measure a checkpoint on benchmarks or held-out problems."""
    from stepgrpo.config import Config, ConfigError, load

    def job(display: Display) -> None:
        from stepgrpo import evaluate, run, rundir

        settings = [f"model.path={model}", *(overrides or [])]
        if early_exit:
            settings += ["eval.early_exit=true", f"rollout.probe.preset={early_exit.value}"]
        loaded = load(Config, config, settings)
        sources = benchmark or ([loaded.data.eval] if loaded.data.eval else [])
        if not sources:
            raise ConfigError("--benchmark: got none and data.eval is null; takes a benchmark's name or a file")
        before = evaluate.read_answers(reference) if reference else {}
        for file in filter(None, (dump, output)):
            rundir.writable(file)

        def keep(name: str, group: dict[str, Any]) -> None:
            assert dump is not None
            rundir.append_json(dump, {"benchmark": name, **group})

        results = run.evaluate(loaded, display, sources, keep if dump else None, before)
        record = {"model": model, **evaluate.record(results, before)}
        display.console.print(_benchmarks(record))
        _note_failures(display, sum(result.grader_failures for result, _ in results.values()))
        if output:
            rundir.save_json(output, record)

    _guard(job)


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Such as configs/compare/miniature.yaml.")],
    only: Annotated[list[str] | None, typer.Option(metavar="METHOD", help="Only these methods' rows.")] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Train nothing: write the table of the rows there are.")
    ] = False,
) -> None:
    """Train every method of a table on equal footing; a second call goes on where the first ended."""
    from stepgrpo.config import ConfigError

    def job(display: Display) -> None:
        import stepgrpo.compare as comparison

        if table:
            result = comparison.write_table(*comparison.jobs(config), config)
        else:
            result = comparison.compare(config, display, only or [])
        if not result["methods"]:
            raise ConfigError(f"{config}: no row is finished yet; run the command without --table")
        display.console.print(_methods(result))
        if failed := result.get("failed"):
            raise SystemExit(
                f"{len(failed)} rows failed: {', '.join(failed)}; run the command again to go on with them"
            )

    _guard(job, goes_on=True)


@app.command()
def data(
    config: ConfigFile,
    overrides: Overrides = None,
    benchmark: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=FILE]|FILE", help="Look for overlap with these as well.")
    ] = None,
) -> None:
    """Report on a run's data: repeated problems, bad lines, prompt lengths, overlap with what it is evaluated on."""
    from stepgrpo.config import Config, load

    def job(display: Display) -> None:
        from stepgrpo.data import describe

        sets = describe(load(Config, config, overrides), benchmark or [])
        rows = {
            s.source: [
                *(f"{n:,}" for n in (s.problems, s.duplicates, s.conflicts, s.bad_lines)),
                f"{s.median_prompt_tokens:,} / {s.max_prompt_tokens:,}",
            ]
            for s in sets
        }
        columns = ["problems", "repeated", "in\nconflict", "bad\nlines", "prompt tokens,\nmedian / most"]
        display.console.print(_grid(columns, rows))
        for name, number in sets[0].overlap.items():
            display.print(f"{number:,} training problems are also in {name}")

    _guard(job)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, or results of `compare`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page: curves, exits, methods, and the trajectories themselves."""

    def job(display: Display) -> None:
        from stepgrpo.report import write

        write(runs, output)
        display.print(f"The report: {output}")

    _guard(job)


@app.command()
def dashboard(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN_DIR|URL]...", help="Runs, or directories that hold some, such as runs."),
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Show a recorded run instead.")] = False,
    host: Annotated[
        str, typer.Option(help="Address to listen at; one that others reach asks for a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8270,
) -> None:
    """Serve a web page about runs, live and afterwards: curves, timeline, trajectories, errors, comparison."""

    def job(display: Display) -> None:
        from stepgrpo.dashboard import serve

        serve(sources or [], display, host=host, port=port, demo=demo)

    _guard(job)


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Of the run that shall be possible; none: any run.")
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster whose nodes are looked at; none: as a run finds it.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Load no library and no model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look for what would break a run, here and on every node, and try a tiny one. Status 1 on a fault."""
    from stepgrpo.config import Config, load

    def job(display: Display) -> None:
        settings = load(Config, config, overrides) if config else None
        from stepgrpo.doctor import examine, render

        findings = []
        for finding in examine(settings, address=address, quick=quick):
            findings.append(finding)
            if not as_json:
                display.console.print(render(finding))
        if as_json:
            print(json.dumps({"findings": [finding.record() for finding in findings]}, indent=2))
        if any(finding.level == "fault" for finding in findings):
            raise SystemExit(1)

    _guard(job)


@app.command()
def triggers(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory or hub name.")],
    overrides: Overrides = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE|BENCHMARK", help="Problems to think about; none: data.eval.")
    ] = None,
    config: Annotated[Path, typer.Option(help="Run configuration to take data and decoding from.")] = Path(
        "configs/quickstart.yaml"
    ),
    samples: Annotated[int, typer.Option(min=1, help="Responses per problem.")] = 1,
    output: Annotated[Path | None, typer.Option(help="Write the proposals to this JSON file.")] = None,
) -> None:
    """Propose trigger words: how does this model open its steps? Takes 64 problems (eval.num_prompts)."""
    from stepgrpo.config import Config, ConfigError, load

    def job(display: Display) -> None:
        from stepgrpo import run, rundir
        from stepgrpo.triggers import survey

        # `structure`: the words of rollout.triggers may be none that this model's tokenizer can spell.
        settings = [f"model.path={model}", "eval.num_prompts=64", "rollout.step_rule=structure"]
        loaded = load(Config, config, [*settings, f"eval.samples={samples}", *(overrides or [])])
        source = prompts or loaded.data.eval
        if source is None:
            raise ConfigError("--prompts: got none and data.eval is null; takes a benchmark's name or a file")
        if output:
            rundir.writable(output)
        groups: list[dict[str, Any]] = []
        run.evaluate(loaded, display, [source], lambda _, group: groups.append(group))
        found = survey(groups, loaded.model.think_close)
        if found.candidates:
            display.console.print(_candidates(found))
        for line in [*(f"... {example}" for c in found.candidates for example in c.examples), "", *found.advice]:
            display.console.print(line, markup=False, soft_wrap=True)
        if output:
            rundir.save_json(output, {"model": model, **found.as_dict()})

    _guard(job)


@app.command()
def watch(
    run: Annotated[
        str, typer.Argument(metavar="RUN|JOB", help="Directory of a run, or the id of a Ray job (raysubmit_...).")
    ],
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="Of Ray's dashboard; RUN is a job there. As `submit` takes it.")
    ] = None,
) -> None:
    """Show a run from another terminal until it ends. Ctrl-C leaves it alone."""

    def job(display: Display) -> None:
        if address or (run.startswith("raysubmit_") and not Path(run).exists()):
            _watch_job(run, address, display)
        from stepgrpo.watch import NotFinishedError, watch

        try:
            summary = watch(Path(run), display)
        except NotFinishedError as e:
            _stop(display, str(e), 1)
        except KeyboardInterrupt:
            display.print(f"\nThe run is left alone. To see it again: stepgrpo watch {run}")
            raise SystemExit(130) from None
        _print_summary(display, summary, Path(run))

    _guard(job)


def _watch_job(name: str, address: str | None, display: Display) -> NoReturn:
    """Print what a job prints; ends with its status."""
    import stepgrpo.submit as submission
    from stepgrpo.config import ConfigError, brief, masked

    client = submission.connect(submission.given_address(address))
    try:
        client.get_job_info(name)
    except RuntimeError as e:
        where = masked(client.get_address())
        raise ConfigError(f"{name}: {where} has no such job ({brief(e)}); see `ray job list`") from None
    raise SystemExit(submission.attend(client, name, display))


@app.command()
def trace(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The trace; compressed where it ends in .gz.")] = Path(
        "trace.json"
    ),
    batches: Annotated[str | None, typer.Option(metavar="A-B", help="These batches, or a single one.")] = None,
    last: Annotated[int | None, typer.Option(min=1, help="The last batches; none: 10.")] = None,
) -> None:
    """Write what every actor did, and when, for https://ui.perfetto.dev; print where the time went."""

    def job(display: Display) -> None:
        import stepgrpo.trace as tracing

        window, table = tracing.write(run, output, batches, last)
        display.print(f"batches {window.first} to {window.last}, {window.seconds:.1f} s")
        display.console.print(table)
        display.print(f"The trace, for https://ui.perfetto.dev: {output}")

    _guard(job)


checkpoints = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, check or export checkpoints.")
app.add_typer(checkpoints, name="checkpoint")

Place = Annotated[str, typer.Argument(metavar="PLACE", help="Directory or URL that holds checkpoints.")]


@checkpoints.command()
def inspect(place: Place) -> None:
    """List all checkpoints. Looks at sizes only; `verify` reads everything."""

    def job(display: Display) -> None:
        from stepgrpo import checkpoint
        from stepgrpo.rundir import read_json_lines

        rows, faults = {}, []
        known = {
            line["version"]: line["accuracy"]["mean"]
            for line in read_json_lines(Path(place, "..", "evaluations.jsonl"))
        }
        for name in sorted([*checkpoint.names(place), *checkpoint.half_written(place)]):
            cells, state = [""] * 4, "good"
            try:
                manifest = checkpoint.read(place, name)
                meta, accuracy = manifest.meta, known.get(manifest.meta.get("batch"))
                cells = [
                    _bytes(manifest.size),
                    f"{manifest.created:%y-%m-%d %H:%M}",
                    " / ".join(str(meta.get(key, "-")) for key in ("restart", "batch", "update")),
                    "" if accuracy is None else f"{accuracy:.1%}"[:-1],
                ]
                checkpoint.verify(place, name, checksums=False)
            except checkpoint.CheckpointError as e:
                state = "bad"
                faults.append(str(e))
            rows[name] = [*cells, state]
        if not rows:
            raise checkpoint.CheckpointError(f"{place}: holds no checkpoint")
        columns = ["size", "written, UTC", "restart /\nbatch / update", "accuracy,\n%", "state"]
        display.console.print(_grid(columns, rows))
        for fault in faults:
            display.warn(fault)

    _guard(job)


@checkpoints.command()
def verify(
    place: Place, name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="None: all of them.")] = None
) -> None:
    """Read one or all checkpoints whole and compare checksums; status 1 on a fault."""

    def job(display: Display) -> None:
        from stepgrpo import checkpoint

        committed = [name] if name else checkpoint.names(place)
        if not committed:
            raise checkpoint.CheckpointError(f"{place}: holds no checkpoint")
        damaged = False
        for each in committed:
            try:
                manifest = checkpoint.verify(place, each)
                display.print(f"{each}: good ({len(manifest.files)} files, {_bytes(manifest.size)})")
            except checkpoint.CheckpointError as e:
                damaged = True
                display.warn(str(e))
        for each in [] if name else checkpoint.half_written(place):
            display.print(f"{each}: half written, no checkpoint; the run removes it")
        if damaged:
            raise SystemExit(1)

    _guard(job)


@checkpoints.command()
def export(
    place: Place,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="None: the newest good one.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write; must not hold anything.")] = Path(
        "exported"
    ),
    model: Annotated[
        str | None, typer.Option(help="Take configuration and tokenizer from here, not from the run's model.path.")
    ] = None,
) -> None:
    """Write a checkpoint's policy as a Hugging Face directory."""

    def job(display: Display) -> None:
        from stepgrpo import checkpoint
        from stepgrpo.export import export

        if name:
            manifest = checkpoint.verify(place, name)
        else:
            manifest, refusals = checkpoint.newest(place)
            for refusal in refusals:
                display.warn(refusal)
        export(place, manifest, output, model)
        display.print(f"The model of {manifest.name}: {output}")

    _guard(job)


def main() -> None:
    # An option's value cannot be left out otherwise.
    app(_with_value(sys.argv[1:], "--resume", "last"))


def _with_value(arguments: list[str], option: str, value: str) -> list[str]:
    """Command line in which ``option`` has a value where it stands alone: at the end, before another option, or before
    a setting."""
    out = []
    for argument, following in zip(arguments, [*arguments[1:], "-"], strict=True):
        alone = argument == option and (following.startswith("-") or "=" in following)
        out.append(f"{option}={value}" if alone else argument)
    return out


def _guard(job: Callable[[Display], None], *, goes_on: bool = False) -> None:
    """Run a job; the user's mistakes and a lost run end in one line, not in a traceback.

    Args:
        goes_on: also when its screen is gone.
    """
    from stepgrpo.config import ConfigError
    from stepgrpo.console import Display, Screen

    display = Display(Screen(highlight=False) if goes_on else None)
    try:
        job(display)
    except KeyboardInterrupt:
        _stop(display, "interrupted", 130)
    except ConfigError as e:
        _stop(display, str(e), 2)
    except Exception as e:
        from ray.exceptions import RayError, RayTaskError

        from stepgrpo.checkpoint import CheckpointError
        from stepgrpo.data import DataError
        from stepgrpo.launch import SCRATCH
        from stepgrpo.pool import TrainError, one_line, root_cause
        from stepgrpo.supervise import RECOVERABLE
        from stepgrpo.watchdog import Stuck

        first = root_cause(e)
        if isinstance(first, ConfigError | DataError):
            _stop(display, str(first), 2)
        if isinstance(first, RayError | Stuck) and not isinstance(first, RayTaskError):
            # Not what was asked for failed, but what it ran on: the supervisor starts it again.
            where = [] if SCRATCH in os.environ else _notes(e)  # the supervisor takes the logs along
            _stop(display, "\n".join([one_line(e), *_notes(first), *where]), RECOVERABLE)
        if isinstance(first, TrainError | TimeoutError | CheckpointError):
            _stop(display, "\n".join([str(first), *_notes(e)]), 1)
        if isinstance(first, OSError) and first.errno in (errno.ENOSPC, errno.EDQUOT):
            _stop(display, f"{first}: make room; a training run goes on with --resume from its last checkpoint", 1)
        if first is not e:  # raised in an actor: the traceback lies in the run directory, and does not fit a screen
            _stop(display, "\n".join([one_line(e), *_notes(e)]), 1)
        raise


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


def _stop(display: Display, message: str, code: int) -> NoReturn:
    from rich.text import Text

    for line in message.splitlines():
        display.console.print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True)
    raise SystemExit(code)


def _print_summary(display: Display, summary: dict[str, Any], directory: Path) -> None:
    if "before" in summary:
        before, after, ratio = summary["before"], summary["after"], summary["compression"]
        display.print("")
        display.console.print(_table({"before": before, "after": after}, ratio))
        display.print(
            f"[dim]{after['problems']} held-out problems, {after['samples']} plain response(s) each; "
            "in brackets: 95 % bootstrap intervals[/]"
        )
        if cost := summary.get("exit_cost"):
            display.print(
                "[dim]while training, samples that may be cut were right less often than untouched ones by "
                f"{_show(cost, 1, 100)} points[/]"
            )
        _note_failures(display, before["grader_failures"] + after["grader_failures"])
    display.print(f"\nThe run:           {directory}  (metrics.jsonl, summary.json)")
    display.print(f"The trained model: {directory / 'model'}")


def _table(columns: dict[str, dict[str, Any]], compression: dict[str, float]) -> Any:
    return _grid(
        columns,
        {
            "accuracy, %": [_show(c["accuracy"], 1, 100) for c in columns.values()],
            "tokens per answer": [_show(c["tokens"], 1) for c in columns.values()],
            "steps per answer": [_show(c["steps"], 2) for c in columns.values()],
            "share of the starting tokens, %": ["100", _show(compression, 1, 100)],
        },
    )


def _benchmarks(record: dict[str, Any]) -> Any:
    columns = dict(record["benchmarks"])
    if len(columns) > 1:
        columns["mean"] = record["mean"]
    samples = max(c.get("samples", 1) for c in columns.values())
    of = f" (mean@{samples})" if samples > 1 else ""
    rows = {f"accuracy{of}, %": [_stacked(c["accuracy"], 1, 100) for c in columns.values()]}
    for k in sorted({int(k) for c in columns.values() for k in c.get("pass_at", {}) if int(k) > 1}):
        rows[f"pass@{k}, %"] = [
            _stacked(c["pass_at"][str(k)], 1, 100) if "pass_at" in c else "" for c in columns.values()
        ]
    rows["tokens per answer"] = [_stacked(c["tokens"], 1) for c in columns.values()]
    rows["steps per answer"] = [_stacked(c["steps"], 2) for c in columns.values()]
    if any(c.get("probe_tokens") for c in columns.values()):
        rows["probe tokens on top"] = [
            f"{c['probe_tokens']:.1f}" if "probe_tokens" in c else "" for c in columns.values()
        ]
        rows["ended on confidence, %"] = [f"{c['exited']:.1%}"[:-1] if "exited" in c else "" for c in columns.values()]
    if any(c.get("share") for c in columns.values()):
        rows["share of the reference's tokens, %"] = [_stacked(c["share"], 1, 100) for c in columns.values()]
    return _grid(columns, rows)


def _candidates(found: Survey) -> Any:
    rows = {}
    for c in found.candidates:
        held_by, *traits = ["" if math.isnan(share) else f"{share:.0%}" for share in (c.responses, *c.traits)]
        rows[c.phrase] = [held_by, f"{c.per_response:.2f}", *traits, f"{c.mark:.2f}"]
    return _grid(["held by", "times", "place", "repeats", "after truth", "alone", "mark"], rows)


def _methods(result: dict[str, Any]) -> Any:
    """As much as fits a terminal; all intervals are in the written table."""
    rows = {}
    for m in result["methods"]:
        share = _stacked(m["share"], 1, 100) if m["share"] else ""
        figures = [f"{m['tokens']['mean']:.1f}", share, f"{m['steps']['mean']:.2f}", str(m["seeds"])]
        rows[m["label"]] = [_stacked(m["accuracy"], 1, 100), *figures]
    return _grid(["accuracy, %", "tokens", f"% of {result['reference']}", "steps", "seeds"], rows)


def _grid(columns: Iterable[str], rows: dict[str, list[str]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", min_width=8, overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _show(e: dict[str, float], digits: int, factor: float = 1.0) -> str:
    mean, low, high = (e[k] * factor for k in ("mean", "low", "high"))
    return f"{mean:.{digits}f}  \\[{low:.{digits}f}, {high:.{digits}f}]"


def _stacked(e: dict[str, float], digits: int, factor: float = 1.0) -> str:
    """The interval below: several columns would not fit a terminal's width."""
    return _show(e, digits, factor).replace("  ", "\n")


def _bytes(size: int) -> str:
    """As a person reads it, in powers of 1000."""
    from rich.filesize import decimal

    return decimal(size)


def _note_failures(display: Display, failures: int) -> None:
    if failures:
        display.warn(f"{failures} answers could not be graded and count as wrong")

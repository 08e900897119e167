"""The command line. It parses first and imports the heavy parts after: `--help` answers at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from stepgrpo.console import Display

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


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Explain placement, memory and batches; start nothing.")
    ] = False,
    gpu_memory: Annotated[float, typer.Option(help="GB of one GPU, for --dry-run.")] = 80.0,
) -> None:
    """Train a model with Step-GRPO."""
    from stepgrpo.config import Config, load

    def job(display: Display) -> None:
        settings = load(Config, config, overrides)
        if dry_run:
            from stepgrpo.dryrun import explain, render

            plan = explain(settings, gpu_memory)
            display.console.print(render(plan))
            if plan.faults:
                raise SystemExit(1)
            return
        from stepgrpo import run

        summary = run.train(settings, display)
        _print_summary(display, summary, settings.run_dir)

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

    _guard(job)


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory or hub name.")],
    overrides: Overrides = None,
    config: Annotated[Path, typer.Option(help="Run configuration to take data and decoding from.")] = Path(
        "configs/quickstart.yaml"
    ),
    output: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
) -> None:
    """Measure a checkpoint by plain decoding of held-out problems."""
    from stepgrpo.config import Config, load

    def job(display: Display) -> None:
        from stepgrpo import run, rundir

        settings = load(Config, config, [f"model.path={model}", *(overrides or [])])
        result = run.evaluate(settings, display)
        display.console.print(_table({model: result.as_dict()}))
        _note_failures(display, result.grader_failures)
        if output:
            rundir.save_json(output, {"model": model, **result.as_dict()})

    _guard(job)


def main() -> None:
    app()


def _guard(job: Callable[[Display], None]) -> None:
    """Run a job; the user's mistakes and a lost run end in one line, not in a traceback."""
    from stepgrpo.config import ConfigError
    from stepgrpo.console import Display

    display = Display()
    try:
        job(display)
    except KeyboardInterrupt:
        _stop(display, "interrupted", 130)
    except ConfigError as e:
        _stop(display, str(e), 2)
    except Exception as e:
        from stepgrpo.data import DataError
        from stepgrpo.train import TrainError, one_line, root_cause

        first = root_cause(e)
        if isinstance(first, ConfigError | DataError):
            _stop(display, str(first), 2)
        if isinstance(first, TrainError | TimeoutError):
            _stop(display, "\n".join([str(first), *_notes(e)]), 1)
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
        _note_failures(display, before["grader_failures"] + after["grader_failures"])
    display.print(f"\nThe run:           {directory}  (metrics.jsonl, summary.json)")
    display.print(f"The trained model: {directory / 'model'}")


def _table(columns: dict[str, dict[str, Any]], compression: dict[str, float] | None = None) -> Any:
    from rich import box
    from rich.table import Table

    def show(e: dict[str, float], digits: int, factor: float = 1.0) -> str:
        mean, low, high = (e[k] * factor for k in ("mean", "low", "high"))
        return f"{mean:.{digits}f}  \\[{low:.{digits}f}, {high:.{digits}f}]"

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_row("accuracy, %", *(show(c["accuracy"], 1, 100) for c in columns.values()))
    table.add_row("tokens per answer", *(show(c["tokens"], 1) for c in columns.values()))
    table.add_row("steps per answer", *(show(c["steps"], 2) for c in columns.values()))
    if compression:
        table.add_row("share of the starting tokens, %", "100", show(compression, 1, 100))
    return table


def _note_failures(display: Display, failures: int) -> None:
    if failures:
        display.warn(f"{failures} answers could not be graded and count as wrong")

"""What a person sees while it runs: phases, a progress line, and the seconds each phase took.

On a terminal the line moves; in a log file (a job on a cluster, CI) one is printed now and then instead, with the time.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

QUIET_SECONDS = 10.0


class Phase:
    """One stretch of work with a line of its own."""

    def __init__(self, display: Display, title: str) -> None:
        self._display, self._title = display, title
        self._printed, self._said = time.monotonic(), ""
        self.result = ""
        """What the closing line says."""

    def show(self, text: str, done: int = 0, total: int | None = None, below: RenderableType = "") -> None:
        """Update the line: free text, and a bar where ``total`` is known. ``below`` is for terminals alone."""
        d = self._display
        if d.live:
            d.progress.update(d.task, completed=done, total=total)
            d.detail.plain = f"  {text}"
            d.below = below
        elif text != self._said and time.monotonic() - self._printed >= QUIET_SECONDS:
            self._printed, self._said = time.monotonic(), text
            d.print(f"  {time.strftime('%H:%M:%S')}  {f'{done}/{total}  ' if total else ''}{text}")

    def problems(self, done: int, total: int) -> None:
        self.show(f"{done} problems", done, total)


class Screen(Console):
    """A terminal or a pipe, which may go away before the run does: then nothing is shown any more, and that is all."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with suppress(OSError, ValueError):  # what waits in Python's own buffer would fail at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:  # a terminal that hung up
            self.on_broken_pipe()


class Display:
    """Prints phases to ``console`` and keeps their seconds."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.live = self.console.is_interactive
        self.detail = Text(style="dim")
        self.below: RenderableType = ""
        self.seconds: dict[str, float] = {}
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=self.console,
            auto_refresh=False,
        )
        self.task = self.progress.add_task("", total=None)

    def print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print words that are not ours, such as an error's: brackets in them are no markup."""
        self.console.print(Text(text, style="yellow"), soft_wrap=True)

    @contextmanager
    def phase(self, name: str, title: str) -> Iterator[Phase]:
        """Time a phase. Its closing line is printed only if it ended well: an error speaks for itself."""
        start = time.monotonic()
        phase = Phase(self, title)
        try:
            if self.live:
                self.detail.plain = self.below = ""
                self.progress.reset(self.task, total=None, description=title)
                with Live(
                    console=self.console,
                    transient=True,
                    refresh_per_second=8,
                    get_renderable=lambda: Group(self.progress, self.detail, self.below),
                ):
                    yield phase
            else:
                self.print(f"… {title}  {time.strftime('%Y-%m-%d %H:%M:%S')}")
                yield phase
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
        took = clock(time.monotonic() - start)
        self.print(f"[green]✓[/] {title}{'  ' + phase.result if phase.result else ''}  [dim]{took}[/]")


def clock(seconds: float) -> str:
    """`43 s`, `3:12` or `1:04:09`."""
    s = round(seconds)
    if s < 100:
        return f"{s} s"
    hours, rest = divmod(s, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def progress_line(
    row: Mapping[str, Any], *, num_updates: int, held_out: tuple[float, float] | None, seconds_left: float
) -> str:
    """The line of a run under way.

    Args:
        row: metrics of a batch's last update.
        num_updates: of the whole run.
        held_out: accuracy and mean tokens of the last evaluation during training.
    """
    parts = [
        f"update {row['update']} of {num_updates}",
        f"accuracy {row['reward/accuracy']:.0%}",
        f"{row['rollout/tokens']:.0f} tokens",
        f"{row['rollout/steps']:.1f} steps",
        f"{row['exit/confident']:.0%} confident",
        f"{row['staleness/mean']:.1f} stale",
        f"{row['rate/tokens']:,.0f} tok/s",
        *([f"held-out {held_out[0]:.0%}, {held_out[1]:.0f} tokens"] if held_out else []),
        f"{clock(seconds_left)} left",
    ]
    return " · ".join(parts)

"""What a person sees while it runs: phases, a progress line, and the seconds each phase took.

On a terminal the line moves; in a log file (a job on a cluster, CI) a line is printed now and then instead.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

QUIET_SECONDS = 10.0


class Phase:
    """One stretch of work with a line of its own."""

    def __init__(self, display: Display, title: str) -> None:
        self._display, self._title = display, title
        self._printed = time.monotonic()
        self.result = ""
        """What the closing line says."""

    def show(self, text: str, done: int = 0, total: int | None = None) -> None:
        """Update the line: free text, and a bar where ``total`` is known."""
        d = self._display
        if d.live:
            d.progress.update(d.task, completed=done, total=total)
            d.detail.plain = f"  {text}"
        elif time.monotonic() - self._printed >= QUIET_SECONDS:
            self._printed = time.monotonic()
            d.print(f"  {done}/{total}  {text}" if total else f"  {text}")

    def problems(self, done: int, total: int) -> None:
        self.show(f"{done} problems", done, total)


class Display:
    """Prints phases to ``console`` and keeps their seconds."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.live = self.console.is_terminal
        self.detail = Text(style="dim")
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
                self.detail.plain = ""
                self.progress.reset(self.task, total=None, description=title)
                with Live(
                    Group(self.progress, self.detail), console=self.console, transient=True, refresh_per_second=8
                ):
                    yield phase
            else:
                self.print(f"… {title}")
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

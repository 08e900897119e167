"""Weights & Biases beside a run, in a thread of its own: whatever becomes of it, the run neither waits nor fails."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import psutil

from stepgrpo.config import Config, ConfigError, TrainConfig, brief

CLOSE_SECONDS = 60.0
"""How long the end of a run waits for what is not uploaded yet."""
HURRIED_CLOSE_SECONDS = 2.0
"""The same, where the run was interrupted or failed."""
COLUMNS = {
    "response": "text",
    "reward": "reward",
    "advantage": "advantage",
    "exit": "exit",
    "steps": "num_steps",
    "tokens": "num_tokens",
    "version": "version",
}
"""Of the table of samples, behind batch and prompt -> what a trajectory in ``samples.jsonl`` calls it."""


def has_key() -> bool:
    """Whether Weights & Biases has a key here, wherever it looks for one."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    return bool(wandb.login(prompt=False, verify=False))


def check_key(config: TrainConfig) -> None:
    """Look for a key, before anything is started that would wait for one.

    Raises:
        ConfigError: there is none.
    """
    if config.wandb == "online" and not has_key():
        raise ConfigError(
            "train.wandb: got online, but Weights & Biases has no key here: run `wandb login`, set WANDB_API_KEY, or "
            "take train.wandb=offline"
        )


class Tracker:
    """One run at Weights & Biases. A run that goes on keeps its id.

    The run's directory gets `wandb/` and `wandb-id.txt`.

    Args:
        warn: told why nothing gets there any more; called from another thread.
    """

    def __init__(self, config: Config, warn: Callable[[str], None]) -> None:
        self._config, self._directory, self._warn = config, config.run_dir, warn
        self._queue: queue.SimpleQueue[tuple[Callable[[], dict[str, Any]], int] | None] = queue.SimpleQueue()
        self._lost = False
        self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, Any], update: int) -> None:
        """Figures at an update, which may not go back; None is left out."""
        self._put(lambda: {k: v for k, v in values.items() if v is not None}, update)

    def sample(self, line: Mapping[str, Any], update: int) -> None:
        """A line of ``samples.jsonl``, as a table with a row for each trajectory."""

        def table() -> dict[str, Any]:
            import wandb

            rows = [[line["batch"], line["prompt"], *(t[k] for k in COLUMNS.values())] for t in line["trajectories"]]
            return {"samples": wandb.Table(["batch", "prompt", *COLUMNS], rows)}

        self._put(table, update)

    def close(self, patient: bool = True) -> None:
        """Wait until all is uploaded or, offline, written: a minute if `patient`, else only so long as a user would."""
        seconds = CLOSE_SECONDS if patient else HURRIED_CLOSE_SECONDS
        self._queue.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._lose(f"it did not finish within {seconds:g} s")

    def _put(self, values: Callable[[], dict[str, Any]], update: int) -> None:
        if not self._lost:
            self._queue.put((values, update))

    def _serve(self) -> None:
        try:
            import wandb

            run = self._begin()
            while (item := self._queue.get()) is not None:
                values, update = item
                run.log(values(), step=update)
            run.finish()
            wandb.teardown()  # finish() returns while the last of an offline run's file is still being written
        except (Exception, SystemExit) as e:  # teardown() exits where its process failed
            self._lose(f"{type(e).__name__}: {brief(e, 120)}")

    def _begin(self) -> Any:
        try:
            return self._init(self._config.train.wandb)
        except Exception as e:
            if self._config.train.wandb != "online":
                raise
            self._warn(
                f"Weights & Biases cannot be reached ({brief(e, 120)}): this attempt is recorded offline, and "
                f"`wandb sync {self._directory}/wandb/offline-run-*` uploads it"
            )
            return self._init("offline")

    def _init(self, mode: Any) -> Any:
        import wandb

        t, known = self._config.train, self._directory / "wandb-id.txt"
        run = wandb.init(
            project=t.wandb_project,
            group=t.wandb_group,
            name=self._directory.name,
            id=known.read_text() if known.is_file() else None,
            resume="allow",
            dir=str(self._directory),
            mode=mode,
            config=self._config.model_dump(mode="json"),
            # Its copy of what is printed would break the moving line of a terminal.
            settings=wandb.Settings(silent=True, console="off"),
        )
        known.write_text(run.id)
        return run

    def _lose(self, reason: str) -> None:
        """Go on without it. Its process is killed, which would otherwise be waited for at the interpreter's exit."""
        if self._lost:
            return
        self._lost = True
        self._warn(
            f"Weights & Biases is given up ({reason}); the run goes on, its files are complete, and "
            f"`wandb sync {self._directory}/wandb/*run-*` uploads what was recorded until now"
        )
        for process in psutil.Process().children():
            with suppress(psutil.Error):
                if process.name() == "wandb-core":
                    process.kill()
        import wandb

        with suppress(Exception, SystemExit):  # nobody is left to say goodbye to
            wandb.teardown()

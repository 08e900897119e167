"""A run's figures as Ray metrics: the agent on the driver's node exports them, next to Ray's own and the engines'.

Ray forgets a gauge that was not set for two of its report intervals (20 s), so all that is known is told again every
few seconds; what is no longer told, a worker that left or a run that ended, vanishes by itself. A counter stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stepgrpo.metrics import METRICS

TELL_SECONDS = 5.0
"""Between two times that everything is told."""

NOW: dict[str, str] = {
    "queue/finished": "Groups sampled and graded that no batch has trained on yet.",
    "queue/again": "Draws that wait for a worker to sample them again.",
    "learner/busy": "1 while the learner works on a batch, 0 while it waits for one to close.",
    "failures/in_a_row": "Failures of rollouts and workers in a row; the run ends at train.max_failures.",
    "eval/accuracy": "Accuracy of the last evaluation on held-out problems.",
    "eval/tokens": "Its mean response tokens.",
    "eval/steps": "Its mean number of reasoning steps.",
}
"""What is told besides ``METRICS``; all of it, with tag `run`."""
OF_WORKERS: dict[str, str] = {
    "worker/draws": "Draws in flight on the rollout worker.",
    "worker/version": "Version of the weights that it holds.",
}
"""The same with tags `run` and `worker`."""
COUNTED: dict[str, str] = {
    "worker/tokens": "Response tokens that the rollout worker has sampled.",
    "worker/trajectories": "Trajectories that it has sampled.",
}
"""Counters with tags `run` and `worker`, also of what had to be sampled again."""


class Telemetry:
    """Tells the figures of one run; needs Ray to be up from its first call on."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._known: dict[str, float] = {}
        self._instruments: dict[str, Any] = {}

    def note(self, values: Mapping[str, float]) -> None:
        """Keep the newest value of each name, to be told until there is a newer one."""
        self._known |= values

    def tell(self, now: Mapping[str, float], workers: Mapping[int, Mapping[str, float]]) -> None:
        """Tell what was noted, what is so now, and what is so of each worker that is up."""
        for name, value in {**self._known, **now}.items():
            self._set(name, value)
        for worker, values in workers.items():
            for name, value in values.items():
                self._set(name, value, worker)

    def count(self, worker: int, **amounts: float) -> None:
        """Add to what a worker has sampled."""
        for quantity, amount in amounts.items():
            self._instrument(f"worker/{quantity}").inc(amount, {"worker": str(worker)})

    def _set(self, name: str, value: float, worker: int | None = None) -> None:
        if math.isfinite(value):
            self._instrument(name).set(float(value), None if worker is None else {"worker": str(worker)})

    def _instrument(self, name: str) -> Any:
        if name not in self._instruments:
            from ray.util.metrics import Counter, Gauge

            kind, tags = (Counter if name in COUNTED else Gauge), ("run", "worker")
            meaning = {**METRICS, **NOW, **OF_WORKERS, **COUNTED}[name]
            instrument = kind(metric(name), meaning, tags if name in {**OF_WORKERS, **COUNTED} else tags[:1])
            self._instruments[name] = instrument.set_default_tags({"run": self._run})
        return self._instruments[name]


def metric(name: str) -> str:
    """What Ray calls it; in Prometheus `ray_` stands before it, and `_total` behind a counter."""
    return f"stepgrpo_{name.replace('/', '_')}"

"""What the actors of a run take of a cluster, and where Ray lays them.

Learner ranks lie together on as few nodes as hold them, in the order of their numbers, because they exchange every
gathered weight and gradient; rollout workers, which exchange nothing, each go where most is free. Where the two share
GPUs (`cluster.colocate`), rank n and worker n are in one bundle, and bundles are packed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from stepgrpo.config import Config, RunConfig


@dataclass(frozen=True, slots=True)
class Bundle:
    """What one actor takes of a node."""

    role: str
    """Config field that decides how many there are, for messages."""
    cpus: float
    gpus: float

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": self.cpus, **({"GPU": float(self.gpus)} if self.gpus else {})}


def rollout_bundles(config: Config) -> list[Bundle]:
    """Of the fewest workers that will do."""
    gpus = config.engine.tensor_parallel if config.cluster.device == "cuda" else 0
    return [Bundle("rollout.workers", config.cluster.cpus_per_worker, gpus)] * config.rollout.workers.min


def learner_bundles(config: RunConfig) -> list[Bundle]:
    gpus = 1 if config.cluster.device == "cuda" else 0
    return [Bundle("learner.num_ranks", config.cluster.cpus_per_rank, gpus)] * config.learner.num_ranks


def shared_bundles(config: Config) -> list[Bundle]:
    """Of a rank and the worker that takes turns with it."""
    pairs = zip(learner_bundles(config), rollout_bundles(config), strict=True)
    return [Bundle(rank.role, rank.cpus + worker.cpus, rank.gpus) for rank, worker in pairs]


def half(bundle: Bundle) -> Bundle:
    """What one of the two takes of a GPU that they share."""
    return replace(bundle, gpus=bundle.gpus / 2)


def all_bundles(config: Config) -> list[Bundle]:
    if config.cluster.colocate:
        return shared_bundles(config)
    return [*rollout_bundles(config), *learner_bundles(config)]


def plan(config: Config, nodes: Sequence[Mapping[str, float]]) -> list[list[str]] | None:
    """Names of the actors on each of some empty nodes; None where they do not fit.

    Args:
        nodes: resources of each, such as ``{"CPU": 96, "GPU": 8}``.
    """
    free = [dict(n) for n in nodes]
    lies: list[list[str]] = [[] for _ in nodes]
    kind = "GPU" if config.cluster.device == "cuda" else "CPU"
    last = -1

    def lay(names: Sequence[str], bundle: Bundle, *, pack: bool) -> bool:
        nonlocal last
        able = [i for i, f in enumerate(free) if all(f.get(k, 0) >= v for k, v in bundle.resources.items())]
        if not able:
            return False
        at = last if pack and last in able else max(able, key=lambda i: free[i].get(kind, 0))
        for k, v in bundle.resources.items():
            free[at][k] -= v
        lies[at] += names
        last = at
        return True

    if config.cluster.colocate:
        pairs = enumerate(shared_bundles(config))
        fits = all(lay([f"learner rank {i}", f"rollout worker {i}"], b, pack=True) for i, b in pairs)
    else:
        fits = all(lay([f"learner rank {i}"], b, pack=True) for i, b in enumerate(learner_bundles(config))) and all(
            lay([f"rollout worker {i}"], b, pack=False) for i, b in enumerate(rollout_bundles(config))
        )
    return lies if fits else None


def shown(names: Sequence[str]) -> str:
    """`learner ranks 0-3, rollout worker 0`, from names that end in a number."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        kind, _, number = name.rpartition(" ")
        numbers.setdefault(kind, []).append(int(number))
    return ", ".join(f"{kind}{'s' * (len(n) > 1)} {_ranges(sorted(n))}" for kind, n in sorted(numbers.items()))


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)

import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepgrpo.groups import dump, load
from stepgrpo.types import Exit, Group, Probe, Prompt, Trajectory, Verdict, VersionSpan

TEXTS = ("", "4 Wait 5 </think> \\boxed{4}", "größer 😀 \x00 \n\"'", "half a character \ud83d")


def same(a: Any, b: Any) -> bool:
    """Equal in type and value, field for field; nan equals nan."""
    if type(a) is not type(b):
        return False
    if is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def random_probe(rng: np.random.Generator) -> Probe:
    return Probe(
        trigger=int(rng.integers(9)),
        position=int(rng.integers(99)),
        confidence=float(rng.choice([math.nan, 0.0, 1.0, rng.random()])),
        token_ids=tuple(rng.integers(0, 9, rng.integers(0, 4)).tolist()),
        verdict=list(Verdict)[rng.integers(len(Verdict))],
        text=TEXTS[rng.integers(len(TEXTS))],
    )


def random_trajectory(rng: np.random.Generator, prompt: np.ndarray) -> Trajectory:
    n = int(rng.integers(4, 30))
    exit_ = list(Exit)[rng.integers(len(Exit))]
    sampled = np.arange(len(prompt) + n) >= len(prompt)
    closing = None
    if exit_ in (Exit.CONFIDENT, Exit.BUDGET, Exit.REPETITION):
        closing = (len(prompt) + 1, len(prompt) + 3)
        sampled[slice(*closing)] = False
    cut = int(rng.integers(1, n))
    return Trajectory(
        prompt_len=len(prompt),
        token_ids=np.concatenate([prompt, rng.integers(0, 2**31, n)]).astype(np.int32),
        logprobs=np.where(sampled, -rng.exponential(size=len(sampled)), 0).astype(np.float32),
        sampled=sampled,
        text=TEXTS[rng.integers(len(TEXTS))],
        exit=exit_,
        closing=closing,
        complete=bool(rng.integers(2)),
        control=bool(rng.integers(2)),
        spans=(VersionSpan(3, 0, n),) if rng.integers(2) else (VersionSpan(3, 0, cut), VersionSpan(4, cut, n)),
        probes=tuple(random_probe(rng) for _ in range(rng.integers(0, 4))),
        probe_tokens=int(rng.integers(99)),
        discarded_tokens=int(rng.integers(99)),
    )


def random_group(rng: np.random.Generator) -> Group:
    ids = rng.integers(0, 2**31, rng.integers(1, 9)).astype(np.int32)
    prompt = Prompt(int(rng.integers(2**40)), "train.jsonl:1", ids, truth=TEXTS[rng.integers(len(TEXTS))])
    return Group(prompt, tuple(random_trajectory(rng, ids) for _ in range(rng.integers(0, 5))))


@pytest.mark.parametrize("seed", range(50))
def test_groups_come_back_as_they_were(seed: int, tmp_path: Path):
    rng = np.random.default_rng(seed)
    groups = [random_group(rng) for _ in range(rng.integers(0, 6))]
    data = dump(groups)
    assert same(load(data), groups)
    (tmp_path / "groups").write_bytes(data)
    assert same(load(tmp_path / "groups"), groups)


def test_a_difference_in_any_field_is_one():
    """The comparison above can fail."""
    a, b = (random_group(np.random.default_rng(seed)) for seed in (2, 3))
    assert a.trajectories and not same(a, b)
    assert not same(random_probe(np.random.default_rng(0)), random_probe(np.random.default_rng(1)))

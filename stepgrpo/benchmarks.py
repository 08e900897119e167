"""Benchmarks by name: where each is on the hub, its columns, and how its answer is got.

A source is written as a benchmark's name (``gsm8k``), as ``NAME=FILE`` for a local copy of it, or as a file or a hub
data set with the columns that the configuration names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from string import ascii_uppercase

from stepgrpo.config import ConfigError, DataConfig

CHOICE_SUFFIX = r"Please reason step by step, and put the letter of your choice within \boxed{}."
"""Asks for a letter; a multiple-choice question has it in the place of ``data.suffix``."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of columns; a dot descends."""

    question: str
    answer: str
    wrong: tuple[str, ...] = ()
    """The wrong choices of a multiple-choice question; ``answer`` is then the right choice's text."""
    final: Callable[[str], str] = str
    """From the answer's text to what is graded; raises ValueError where there is no answer in it."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where problems are and how a row is read."""

    name: str
    """Short, for tables."""
    place: str
    """A file, or a data set on the hub."""
    subset: str | None
    """Of a hub data set; None: its default."""
    split: str
    """Of a hub data set."""
    columns: tuple[Columns, ...]
    """Alternatives: the first whose question a row has."""


def resolve(spec: str, config: DataConfig) -> Source:
    """What a person means by ``spec``: NAME, NAME=FILE, a file, or a hub data set.

    Raises:
        ConfigError: NAME is no benchmark, is to be trained on, or its file is not there.
    """
    if spec in BENCHMARKS:
        if spec == config.train:
            raise ConfigError(
                f"data.train: got {spec}, a benchmark; takes a file or a hub data set ({spec}=FILE for its columns)"
            )
        source = BENCHMARKS[spec]
        if _is_file(source.place) and not Path(source.place).is_file():
            raise ConfigError(
                f"{spec}: {source.place} is not here; run it in the project's root, or name the file: {spec}=FILE"
            )
        return source
    name, sep, file = spec.partition("=")
    if sep and not Path(spec).exists():
        if name not in BENCHMARKS:
            raise ConfigError(f"{spec}: no benchmark {name!r}; NAME=FILE takes one of {', '.join(BENCHMARKS)}")
        if not _is_file(file):
            raise ConfigError(f"{spec}: NAME=FILE takes a .jsonl or .parquet file")
        return Source(name, file, None, "", BENCHMARKS[name].columns)
    own = Columns(config.question_field, config.answer_field)
    return Source(Path(spec).stem if _is_file(spec) else Path(spec).name, spec, config.subset, config.split, (own,))


def by_name(specs: Sequence[str], config: DataConfig) -> dict[str, str]:
    """Short name -> spec, in order.

    Raises:
        ConfigError: a spec means nothing, or two have the same name.
    """
    names: dict[str, str] = {}
    for spec in specs:
        name = resolve(spec, config).name
        if names.setdefault(name, spec) != spec:
            raise ConfigError(f"{spec}: would be called {name} as {names[name]} is; rename the file")
    return names


def lettered(question: str, right: str, wrong: Sequence[str]) -> tuple[str, str]:
    """A multiple-choice question with its choices under letters, and the letter of the right one.

    The order is that of hashes of question and choice: the same on every machine, whatever the order of the file.

    Raises:
        ValueError: the right choice is also a wrong one.
    """
    right, wrong = right.strip(), [w.strip() for w in wrong]
    if right in wrong:
        raise ValueError(f"the right choice {right!r} is also a wrong one")
    order = sorted([right, *wrong], key=lambda choice: sha256(f"{question.strip()}\0{choice}".encode()).digest())
    lines = [f"{letter}) {choice}" for letter, choice in zip(ascii_uppercase, order, strict=False)]
    return "\n".join([question.strip(), "", *lines]), ascii_uppercase[order.index(right)]


def _is_file(place: str) -> bool:
    return place.endswith((".jsonl", ".json", ".parquet"))


def _number(answer: str) -> str:
    """Collections differ in whether an integer is `27` or `27.0`."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", answer.strip())


def _after_hashes(answer: str) -> str:
    """GSM8K ends its worked solutions with `#### 1,234`."""
    _, sep, final = answer.rpartition("####")
    if not sep:
        raise ValueError("the answer has no '####' before its final number")
    return _number(final.replace(",", ""))


_PLAIN = Columns("problem", "answer", final=_number)
_WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")

BENCHMARKS = {
    source.name: source
    for source in (
        Source("gsm8k", "openai/gsm8k", "main", "test", (Columns("question", "answer", final=_after_hashes), _PLAIN)),
        Source("math500", "HuggingFaceH4/MATH-500", None, "test", (_PLAIN,)),
        Source("amc23", "math-ai/amc23", None, "test", (Columns("question", "answer", final=_number), _PLAIN)),
        Source("aime24", "HuggingFaceH4/aime_2024", None, "train", (_PLAIN,)),
        Source("aime25", "math-ai/aime25", None, "test", (_PLAIN,)),
        Source(
            "gpqa_diamond",
            "Idavidrein/gpqa",
            "gpqa_diamond",
            "train",
            (Columns("Question", "Correct Answer", _WRONG), Columns("problem", "answer", _WRONG)),
        ),
        Source("miniature", "examples/miniature/data/heldout.jsonl", None, "", (_PLAIN,)),
    )
}
"""By name. A local copy may have the hub's columns, or `problem` and `answer`."""

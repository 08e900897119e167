"""Files or hub data sets -> problems -> a resumable stream of prompts.

A line that cannot be used is named with file, line and reason, and stops the run or is counted, as `data.on_bad_line`
says; nothing is left out silently.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stepgrpo.config import ConfigError, DataConfig, brief
from stepgrpo.types import IntArray, Prompt


class DataError(ValueError):
    """Data the user must change. The message names the place and the reason."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with its true answer and the tokens it becomes."""

    key: str
    """`file:line` or `set:row`."""
    token_ids: IntArray
    truth: str
    response: str | None = None
    """The response to imitate, for supervised fine-tuning only."""


@dataclass(frozen=True, slots=True)
class Problems:
    """A loaded data set and what was left out of it."""

    items: tuple[Problem, ...]
    skipped: tuple[str, ...]
    """Each left-out line: place and reason."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...

    def encode(self, text: str) -> list[int]: ...


def load_problems(source: str, config: DataConfig, tokenizer: Tokenizer, response_field: str | None = None) -> Problems:
    """Read and tokenise ``source``.

    Raises:
        ConfigError: a chat template is asked for and there is none.
        DataError: the source cannot be read, nothing is left, or a line is bad and `data.on_bad_line` is `fail`.
    """
    if config.chat_template and not tokenizer.chat_template:
        raise ConfigError("data.chat_template: got true, but the tokenizer has no chat template; set it to false")
    items, skipped = [], []
    for key, row in _rows(source, config):
        try:
            if isinstance(row, DataError):
                raise row
            items.append(_problem(key, row, config, tokenizer, response_field))
        except DataError as e:
            if config.on_bad_line == "fail":
                raise DataError(f"{e} (data.on_bad_line=skip leaves such lines out)") from None
            skipped.append(str(e))
    if not items:
        reason = f"; {len(skipped)} lines were left out, the first: {skipped[0]}" if skipped else ""
        raise DataError(f"{source}: no problem left to use{reason}")
    return Problems(tuple(items), tuple(skipped))


def _problem(key: str, row: Any, config: DataConfig, tokenizer: Tokenizer, response_field: str | None) -> Problem:
    question = _field(key, row, config.question_field)
    # A prompt that is already a conversation (a list of messages) keeps its own turns.
    if isinstance(question, list):
        if not all(isinstance(m, dict) and "role" in m and "content" in m for m in question):
            raise DataError(f"{key}: field {config.question_field!r} is a list, but not of messages (role, content)")
        messages = [dict(m) for m in question]
    else:
        text = f"{question} {config.suffix}" if config.suffix else str(question)
        messages = [{"role": "user", "content": text}]
    response = None if response_field is None else str(_field(key, row, response_field))
    # For supervised pairs the response is the answer; grading never sees it.
    truth = "" if response_field is not None else str(_field(key, row, config.answer_field))
    try:
        if config.chat_template:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        else:
            ids = tokenizer.encode("\n".join(str(m["content"]) for m in messages))
    except Exception as e:  # tokenizers and templates raise all kinds
        raise DataError(f"{key}: cannot be tokenised ({brief(e)})") from None
    if len(ids) > config.max_prompt_tokens:
        raise DataError(
            f"{key}: prompt of {len(ids)} tokens, longer than data.max_prompt_tokens ({config.max_prompt_tokens})"
        )
    if not ids:
        raise DataError(f"{key}: the prompt is empty")
    return Problem(key, np.asarray(ids, np.int32), truth, response)


def _field(key: str, row: Any, dotted: str) -> Any:
    value = row
    for part in dotted.split("."):
        if not isinstance(value, dict) or value.get(part) is None:
            have = ", ".join(map(str, row)) if isinstance(row, dict) else f"a {type(row).__name__}"
            raise DataError(f"{key}: no field {dotted!r}; the line has {have}")
        value = value[part]
    if isinstance(value, str) and not value.strip():
        raise DataError(f"{key}: field {dotted!r} is empty")
    return value


def _rows(source: str, config: DataConfig) -> Iterator[tuple[str, Any]]:
    """(key, row); a line that is no row at all comes as its DataError."""
    path = Path(source)
    if path.suffix in (".jsonl", ".json"):
        yield from _jsonl(path)
    elif path.suffix == ".parquet":
        yield from _table(source, path)
    elif path.exists():
        raise DataError(f"{source}: takes a .jsonl or .parquet file, or the name of a data set on the hub")
    else:
        yield from _hub(source, config)


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        file = path.open("rb")
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            key = f"{path.name}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as e:
                row = DataError(f"{key}: not JSON: {e.msg} at column {e.colno}")
            except UnicodeDecodeError as e:
                row = DataError(f"{key}: not UTF-8 at byte {e.start + 1}")
            yield key, row


def _table(source: str, path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowInvalid) as e:
        raise DataError(f"{source}: cannot be read ({e})") from None
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{path.name}:{number}", row


def _hub(source: str, config: DataConfig) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(source, config.subset, split=config.split)
    except Exception as e:  # the hub client raises many kinds; each means the set is not at hand
        raise DataError(
            f"{source}: neither a file here nor a data set that can be fetched ({type(e).__name__}: {brief(e, 200)}); "
            f"with a network: hf download --repo-type dataset {source}"
        ) from None
    for number, row in enumerate(rows):
        yield f"{source}:{number}", row


class PromptStream:
    """Draw ids -> prompts: every epoch a new order, every draw the same prompt however often it is asked for.

    Being a function of (seed, draw), the stream is resumed by the next draw id alone.
    """

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        self._problems = problems
        self._order = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(problems))
        )

    def __len__(self) -> int:
        """Problems of one epoch."""
        return len(self._problems)

    def __getitem__(self, draw: int) -> Prompt:
        epoch, position = divmod(draw, len(self._problems))
        p = self._problems[self._order(epoch)[position]]
        return Prompt(draw, p.key, p.token_ids, p.truth)


def in_order(problems: Sequence[Problem]) -> list[Prompt]:
    """Problems as prompts in the order of the file, for evaluation. Their draws are negative: they share no noise with
    training, and the same noise with each other in every evaluation of a run."""
    return [Prompt(-1 - i, p.key, p.token_ids, p.truth) for i, p in enumerate(problems)]

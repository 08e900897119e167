"""Files or hub data sets -> problems -> a resumable stream of prompts.

A line that cannot be used is named with file, line and reason, and stops the run or is counted, as `data.on_bad_line`
says. Repeated problems, and training problems that are also held out, are left out or kept as the settings say, and
counted; nothing is left out silently.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Number
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from stepgrpo.benchmarks import BENCHMARKS, CHOICE_SUFFIX, Source, by_name, lettered, resolve
from stepgrpo.config import ConfigError, DataConfig, RunConfig, brief
from stepgrpo.hub import hub_answers, load_tokenizer
from stepgrpo.types import IntArray, Prompt

NGRAM = 13
"""Words in a row that two questions must share to be compared further: the length of the usual contamination checks."""


class DataError(ValueError):
    """Data the user must change. The message names the place and the reason."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with its true answer and the tokens it becomes."""

    key: str
    """`file:line` or `set:row`."""
    question: str
    """As it stands in the data: without suffix, choices and template."""
    token_ids: IntArray
    truth: str
    response: str | None = None
    """The response to imitate, for supervised fine-tuning only."""
    response_ids: IntArray | None = None
    """Its tokens, where an encoder is given."""


@dataclass(frozen=True, slots=True)
class Problems:
    """A loaded data set and what was found in it."""

    items: tuple[Problem, ...]
    skipped: tuple[str, ...]
    """Each left-out line: place and reason."""
    duplicates: tuple[str, ...] = ()
    """Each repetition of a problem: its place and the first's."""
    conflicts: tuple[str, ...] = ()
    """Each question with several answers: the places and what they say."""
    overlapping: tuple[str, ...] = ()
    """Each training problem that is also held out: both places, and how alike they are."""
    notes: tuple[str, ...] = ()
    """One-line remarks on all of these, for the user."""


class Overlap(NamedTuple):
    """A training problem that is also held out."""

    train: Problem
    held_out: Problem
    exact: bool
    """Equal after normalisation; otherwise nearly so."""

    def __str__(self) -> str:
        return f"{self.train.key} {'is' if self.exact else 'is nearly'} {self.held_out.key}"


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...

    def encode(self, text: str) -> list[int]: ...


ResponseEncoder = Callable[[IntArray, str], IntArray]
"""(prompt ids, response) -> response ids; raises ValueError for a pair that cannot be used."""


class _Row(NamedTuple):
    """A row that has all its columns."""

    key: str
    question: str
    messages: list[dict[str, Any]]
    truth: str
    response: str | None


def load_problems(
    source: str,
    config: DataConfig,
    tokenizer: Tokenizer,
    response_field: str | None = None,
    *,
    encode_response: ResponseEncoder | None = None,
) -> Problems:
    """Read, de-duplicate and tokenise ``source``.

    Args:
        source: a benchmark's name, NAME=FILE, a file, or a hub data set (`stepgrpo.benchmarks`).
        response_field: column of the response to imitate, in the place of an answer.
        encode_response: makes ``Problem.response_ids``; a response it refuses is a bad line.

    Raises:
        ConfigError: there is no chat template with the variables that are set, or ``source`` names no benchmark.
        DataError: the source cannot be read, nothing is left, or a line is bad and `data.on_bad_line` is `fail`.
    """
    _check_template(config, tokenizer)
    where = resolve(source, config)
    rows: list[_Row] = []
    items: list[Problem] = []
    skipped: list[str] = []
    for key, row in _rows(where):
        try:
            rows.append(_row(key, row, where, config, response_field))
        except DataError as e:
            _leave_out(e, skipped, config)
    # Before they are tokenised: a published set may repeat each problem a hundred times.
    rows, duplicates, conflicts = _distinct(rows, config)
    for r in rows:
        try:
            items.append(_problem(r, config, tokenizer, encode_response))
        except DataError as e:
            _leave_out(e, skipped, config)
    fate = "left out" if config.duplicates == "drop" else "kept"
    notes = (
        *_note(skipped, "bad lines left out (data.on_bad_line)"),
        *_note(duplicates, f"repeated problems {fate} (data.duplicates)"),
        *_note(conflicts, f"questions with several answers {fate} (data.duplicates)"),
    )
    if not items:
        raise DataError("; ".join([f"{source}: no problem left to use", *notes]))
    remarks = tuple(f"{where.name}: {n}" for n in notes)
    return Problems(tuple(items), tuple(skipped), tuple(duplicates), tuple(conflicts), notes=remarks)


def normalised(text: str) -> str:
    """Equal for questions that differ in case, blanks, Unicode form and punctuation at the ends only: not in a sign, a
    factorial or an exponent."""
    text = _SUPERSCRIPT.sub(r"^\g<0>", text)
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    # A question of nothing but punctuation stays itself.
    return _ENDS.sub("", text) or text


_SUPERSCRIPT = re.compile("[⁰¹²³⁴-⁹⁺⁻ⁱⁿ]+")
_ENDS = re.compile(r"""^[\s*_"'“”‘’«»「」.:;,?。、#>]+|[\s*_"'“”‘’«»「」.:;,?。、]+$""")


def overlap(train: Sequence[Problem], held_out: Sequence[Problem]) -> list[Overlap]:
    """Training problems that are also held out, in their order, each with the first such held-out problem.

    Two questions are the same if they are equal after normalisation, or nearly so: more than half of the held-out
    question's words lie in runs of ``NGRAM`` words that both have. A single run is not enough, since phrases such as
    "where m and n are relatively prime positive integers, find m + n" are that long. Shorter questions must be equal.
    """
    exact: dict[str, Problem] = {}
    runs: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    lengths = []
    for index, problem in enumerate(held_out):
        question = normalised(problem.question)
        exact.setdefault(question, problem)
        words = _words(question)
        lengths.append(len(words))
        for start, run in enumerate(_ngrams(words)):
            runs[run].append((index, start))
    found = []
    for problem in train:
        question = normalised(problem.question)
        if same := exact.get(question):
            found.append(Overlap(problem, same, True))
            continue
        covered: dict[int, set[int]] = defaultdict(set)
        for run in filter(runs.__contains__, _ngrams(_words(question))):
            for index, start in runs[run]:
                covered[index].update(range(start, start + NGRAM))
        near = [index for index, places in covered.items() if 2 * len(places) > lengths[index]]
        if near:
            found.append(Overlap(problem, held_out[min(near)], False))
    return found


def without_overlap(train: Problems, held_out: Problems, config: DataConfig) -> Problems:
    """The training problems, treated as `data.overlap` says where they are also held out.

    Raises:
        DataError: there are some and `data.overlap` is `fail`, or nothing is left.
    """
    found = overlap(train.items, held_out.items)
    if not found:
        return train
    places = tuple(map(str, found))
    fate = "left out" if config.overlap == "drop" else "kept"
    [note] = _note(places, f"training problems are also held out, {fate} (data.overlap)")
    if config.overlap == "fail":
        [note] = _note(places, "training problems are also held out")
        raise DataError(f"{note} (data.overlap=drop leaves them out)")
    items = train.items
    if config.overlap == "drop":
        keys = {o.train.key for o in found}
        items = tuple(p for p in items if p.key not in keys)
        if not items:
            raise DataError(f"no training problem left to use: {note}")
    return replace(train, items=items, overlapping=places, notes=(*train.notes, note))


@dataclass(frozen=True, slots=True)
class SetReport:
    """What is in a set and what was left out of it, in problems."""

    source: str
    problems: int
    """Left to use."""
    duplicates: int
    conflicts: int
    bad_lines: int
    median_prompt_tokens: int
    max_prompt_tokens: int
    overlap: dict[str, int]
    """Training problems also in each benchmark, by its name; empty for a benchmark."""


def describe(config: RunConfig, benchmarks: Sequence[str]) -> list[SetReport]:
    """Report on the training set, then on `data.eval` and on ``benchmarks``; bad lines are counted, not refused.

    Raises:
        ConfigError, DataError: the model's tokenizer or a set is not at hand.
    """
    data = config.data.model_copy(update={"on_bad_line": "skip"})
    tokenizer = load_tokenizer(config.model.path)
    specs = by_name([*([data.eval] if data.eval else []), *benchmarks], data)
    held_out = {name: load_problems(spec, data, tokenizer) for name, spec in specs.items()}
    train = load_problems(data.train, data, tokenizer)
    shared = {name: len(overlap(train.items, problems.items)) for name, problems in held_out.items()}
    return [
        _report(resolve(data.train, data).name, train, shared),
        *(_report(name, problems, {}) for name, problems in held_out.items()),
    ]


def _report(name: str, problems: Problems, shared: dict[str, int]) -> SetReport:
    lengths = [len(p.token_ids) for p in problems.items]
    found = len(problems.duplicates), len(problems.conflicts), len(problems.skipped)
    return SetReport(name, len(lengths), *found, round(float(np.median(lengths))), max(lengths), shared)


def _leave_out(error: DataError, skipped: list[str], config: DataConfig) -> None:
    if config.on_bad_line == "fail":
        raise DataError(f"{error} (data.on_bad_line=skip leaves such lines out)") from None
    skipped.append(str(error))


def _note(places: Sequence[str], what: str) -> list[str]:
    return [f"{len(places):,} {what}, the first: {places[0]}"] if places else []


def _words(question: str) -> list[str]:
    return re.findall(r"\w+", question)


def _ngrams(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(NGRAM)), strict=False)


def _distinct(rows: list[_Row], config: DataConfig) -> tuple[list[_Row], list[str], list[str]]:
    """Rows to use; repetitions; conflicts.

    Rows that say the same count once. Of a question with several answers at least one is wrong, and it cannot be known
    which: none is used.
    """
    groups: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        groups[normalised(row.question)].append(row)
    out: set[str] = set()
    duplicates, conflicts = [], []
    for group in groups.values():
        first: dict[tuple[str, str | None], _Row] = {}
        for row in group:
            said = " ".join(row.truth.split()), row.response
            if said in first:
                duplicates.append(f"{row.key} repeats {first[said].key}")
                out.add(row.key)
            first.setdefault(said, row)
        if len({truth for truth, _ in first}) > 1:
            says = (f"{row.key} says {row.truth[:40]}" for row in first.values())
            conflicts.append(", ".join(says))
            out.update(row.key for row in group)
    kept = rows if config.duplicates == "keep" else [row for row in rows if row.key not in out]
    return kept, duplicates, conflicts


def _check_template(config: DataConfig, tokenizer: Tokenizer) -> None:
    if not config.chat_template:
        return
    if not tokenizer.chat_template:
        raise ConfigError("data.chat_template: got true, but the tokenizer has no chat template; set it to false")
    for name in config.chat_template_kwargs:
        # A template ignores what it does not know, a misspelt name too.
        if name not in str(tokenizer.chat_template):
            raise ConfigError(
                f"data.chat_template_kwargs: got {name}, which the tokenizer's chat template does not use"
            )


def _row(key: str, row: Any, where: Source, config: DataConfig, response_field: str | None) -> _Row:
    if isinstance(row, DataError):
        raise row
    columns = next((c for c in where.columns if isinstance(row, dict) and c.question in row), where.columns[0])
    question = _field(key, row, columns.question)
    if response_field is not None:  # the response is the answer; grading never sees it
        truth, response = "", _text(key, row, response_field)
    else:
        truth, response = _text(key, row, columns.answer), None
    suffix = f" {config.suffix}" if config.suffix else ""
    # A prompt that is already a conversation (a list of messages) keeps its own turns.
    if isinstance(question, list):
        if not all(isinstance(m, dict) and "role" in m and "content" in m for m in question):
            raise DataError(f"{key}: field {columns.question!r} is a list, but not of messages (role, content)")
        messages = [dict(m) for m in question]
        text = "\n".join(str(m["content"]) for m in messages if m["role"] != "system")
        if not text.strip():
            raise DataError(f"{key}: field {columns.question!r} has no words but the system's")
        return _Row(key, text, messages, truth, response)
    text = asked = _text(key, row, columns.question)
    try:
        if response is None and columns.wrong:
            asked, truth = lettered(text, truth, [_text(key, row, c) for c in columns.wrong])
            suffix = f"\n\n{CHOICE_SUFFIX}"
        elif response is None:
            truth = columns.final(truth)
    except DataError:
        raise
    except ValueError as e:
        raise DataError(f"{key}: {e}") from None
    return _Row(key, text, [{"role": "user", "content": asked + suffix}], truth, response)


def _text(key: str, row: Any, name: str) -> str:
    """A field as text. Some sets hold whole numbers as floats."""
    value = _field(key, row, name)
    if not isinstance(value, str | Number):
        raise DataError(f"{key}: field {name!r} is a {type(value).__name__}, takes a text or a number")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _problem(row: _Row, config: DataConfig, tokenizer: Tokenizer, encode_response: ResponseEncoder | None) -> Problem:
    key = row.key
    try:
        if config.chat_template:
            ids = tokenizer.apply_chat_template(
                row.messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **config.chat_template_kwargs,
            )
        else:
            ids = tokenizer.encode("\n".join(str(m["content"]) for m in row.messages))
    except Exception as e:  # tokenizers and templates raise all kinds
        raise DataError(f"{key}: cannot be tokenised ({brief(e)})") from None
    if len(ids) > config.max_prompt_tokens:
        raise DataError(
            f"{key}: prompt of {len(ids)} tokens, longer than data.max_prompt_tokens ({config.max_prompt_tokens})"
        )
    if not ids:
        raise DataError(f"{key}: the prompt is empty")
    prompt, response_ids = np.asarray(ids, np.int32), None
    if encode_response and row.response is not None:
        try:
            response_ids = encode_response(prompt, row.response)
        except ValueError as e:
            raise DataError(f"{key}: {e}") from None
    return Problem(key, row.question, prompt, row.truth, row.response, response_ids)


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


def _rows(where: Source) -> Iterator[tuple[str, Any]]:
    """(key, row); a line that is no row at all comes as its DataError."""
    path = Path(where.place)
    if path.suffix in (".jsonl", ".json"):
        yield from _jsonl(path)
    elif path.suffix == ".parquet":
        yield from _table(path)
    elif path.exists():
        raise DataError(f"{path}: takes a .jsonl or .parquet file, or the name of a data set on the hub")
    else:
        yield from _hub(where)


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


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowInvalid) as e:
        raise DataError(f"{path}: cannot be read ({brief(e)})") from None
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{path.name}:{number}", row


def _hub(where: Source) -> Iterator[tuple[str, Any]]:
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = where.place
    try:
        rows = _hub_rows(where)
    except Exception as e:  # the hub client raises many kinds; each means the set is not at hand
        known = "" if "/" in name else f" nor a benchmark ({', '.join(BENCHMARKS)})"
        reason = "the hub cannot be reached" if isinstance(e, LocalEntryNotFoundError) else brief(e, 200)
        raise DataError(
            f"{name}: neither a file here{known} nor to be had from the hub or its local cache ({reason}); "
            f"with a network: hf download --repo-type dataset {name}"
        ) from None
    for number, row in enumerate(rows):
        yield f"{name}:{number}", row


def _hub_rows(where: Source) -> Any:
    place = where.place
    if not hub_answers():
        from huggingface_hub import snapshot_download

        # `datasets` itself does not look into the hub's cache when offline, which is what `hf download` fills.
        place = snapshot_download(place, repo_type="dataset", local_files_only=True)
    import datasets

    return datasets.load_dataset(place, where.subset, split=where.split)


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

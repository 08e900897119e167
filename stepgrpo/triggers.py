"""Which words a model opens its steps of reasoning with: proposals for ``rollout.triggers``, from sampled thinking.

A word that opens steps of checking is said again and again, late, after the true answer was there, set off by a comma,
and what follows it repeats what was said. No list of words is built in: how far this is true of a word is compared with
the average opening of a sentence in the same texts, and "The" and "So" come out as average or less.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, NamedTuple

from stepgrpo.reward.steps import count_steps, structure_rule

WINDOW = 8
"""Words behind an opening that are looked for in the text before it."""
LEAST_RESPONSES, LEAST_COUNT = 0.25, 0.5
"""Share of responses that hold a word, and times per response, for it to stand out."""
MIN_STRUCTURE_STEPS = 1.5
"""Steps per response for the structure rule to be of use."""

_WORD = re.compile(r"\w+(?:['’]\w+)*|[-+*/=^<>]")
_SENTENCE_END = re.compile(r"[.!?]\s")
_OPENS = re.compile(r"(?:\n|[.!?…][\"')*]{0,2}\s)[\s\"'(*]*$")
_SET_OFF = re.compile(r"[,:;…—]|\.\.")  # not a full stop: "Yes." answers, it opens nothing


class Traits(NamedTuple):
    """Of one opening, or their means; shares are in [0, 1], nan is unknown."""

    place: float
    """Where in thinking it stands: 0 at the beginning, 1 at the end."""
    repeats: float
    """Share of the pairs of neighbours among the next ``WINDOW`` words that were said before."""
    after_truth: float
    """Whether the true answer had been said before; nan where it never is."""
    alone: float
    """Whether a comma or the like sets it off from what follows."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A word, or a phrase of up to three."""

    phrase: str
    responses: float
    """Share of responses that hold it."""
    per_response: float
    """Times it is said, mean over all responses."""
    traits: Traits
    mark: float
    """How much more than an average opening it looks like one of a check: the product of its traits over theirs."""
    examples: tuple[str, ...]

    @property
    def stands_out(self) -> bool:
        often = self.responses >= LEAST_RESPONSES and self.per_response >= LEAST_COUNT
        return often and self.mark > 1

    @property
    def score(self) -> float:
        return self.responses * math.log1p(self.per_response) * self.mark


@dataclass(frozen=True, slots=True)
class Survey:
    """Of a model's thinking."""

    responses: int
    candidates: tuple[Candidate, ...]
    structure_steps: float
    """Steps per response that ``rollout.step_rule: structure`` would count in thinking."""

    @property
    def triggers(self) -> list[str]:
        """Those that stand out, and not far less clearly than the best: what is no step costs probes."""
        chosen = [c for c in self.candidates if c.stands_out]
        return [c.phrase for c in chosen if c.mark >= chosen[0].mark / 4]

    @property
    def advice(self) -> list[str]:
        """Lines for a person, with the one for the config last."""
        structure = f"by structure (paragraphs and connectives) a response has {self.structure_steps:.1f} steps"
        if self.triggers:
            return [f"For comparison, {structure}.", f"rollout.triggers: {json.dumps(self.triggers)}"]
        nearest = f" (nearest: {self.candidates[0].phrase})" if self.candidates else ""
        if self.structure_steps < MIN_STRUCTURE_STEPS:
            return [f"No word stands out{nearest}, and {structure}: this model may need a step rule of your own."]
        return [f"No word stands out{nearest}; {structure}.", "rollout.step_rule: structure"]

    def as_dict(self) -> dict[str, Any]:
        """Unknown traits are null."""
        candidates = []
        for c in self.candidates:
            traits = {name: None if math.isnan(share) else share for name, share in c.traits._asdict().items()}
            candidates.append(asdict(c) | {"traits": traits, "stands_out": c.stands_out})
        return asdict(self) | {"triggers": self.triggers, "candidates": candidates}


def survey(groups: Sequence[dict[str, Any]], think_close: str) -> Survey:
    """What an evaluation's answers (``actors.describe``) say about the model's steps."""
    answers = [(t["text"].partition(think_close)[0], g["truth"]) for g in groups for t in g["trajectories"]]
    thinking, truths = zip(*answers, strict=True)
    rule = structure_rule()
    return Survey(
        responses=len(thinking),
        candidates=tuple(propose(thinking, truths)),
        structure_steps=fmean(count_steps(text, rule) for text in thinking),
    )


def propose(thinking: Sequence[str], truths: Sequence[str | None] | None = None, limit: int = 8) -> list[Candidate]:
    """The likeliest trigger words: those that stand out, then the others, both by falling ``score``.

    In texts without sentences any capitalised word is a candidate, and the average is that of all that begins with a
    capital letter.

    Args:
        thinking: what was thought before thinking was closed, one text per response.
        truths: each response's true answer.
        limit: most candidates. Of phrases that begin alike only the best is kept.
    """
    sentences = sum(len(_SENTENCE_END.findall(text)) for text in thinking) >= len(thinking)
    usual: list[Traits] = []
    said: dict[str, list[tuple[int, int, Traits]]] = defaultdict(list)
    for i, text in enumerate(thinking):
        for start, traits, phrases in _openings(text, truths[i] if truths else None, sentences):
            usual.append(traits)
            for phrase, of_phrase in phrases.items():
                said[phrase].append((i, start, of_phrase))
    average = _mean(usual)

    def candidate(phrase: str, places: list[tuple[int, int, Traits]]) -> Candidate:
        traits = _mean([t for _, _, t in places])
        # 0.1: a trait that is rare on average must not decide alone.
        ratios = [(own + 0.1) / (mean + 0.1) for own, mean in zip(traits, average, strict=True)]
        first_in = {i: start for i, start, _ in reversed(places)}
        return Candidate(
            phrase=phrase,
            responses=len(first_in) / len(thinking),
            per_response=len(places) / len(thinking),
            traits=traits,
            mark=math.prod(r for r in ratios if not math.isnan(r)),
            examples=tuple(_context(thinking[i], start) for i, start in sorted(first_in.items())[:2]),
        )

    best: list[Candidate] = []
    # A word of one response alone says nothing about the model.
    common = {p: places for p, places in said.items() if len({i for i, _, _ in places}) > 1 or len(thinking) == 1}
    found = [candidate(phrase, places) for phrase, places in common.items()]
    for c in sorted(found, key=lambda c: (c.stands_out, c.score), reverse=True):
        if not any(_begins(c.phrase, b.phrase) or _begins(b.phrase, c.phrase) for b in best):
            best.append(c)
    return best[:limit]


def _begins(phrase: str, other: str) -> bool:
    return f"{other} ".startswith(f"{phrase} ")


def _openings(text: str, truth: str | None, sentences: bool) -> Iterator[tuple[int, Traits, dict[str, Traits]]]:
    """For each opening of a sentence, or each capital where there are no sentences: its character, its traits, and the
    candidates there with theirs."""
    matches = list(_WORD.finditer(text))
    words = [m.group() for m in matches]
    pairs = list(zip(map(str.lower, words), map(str.lower, words[1:]), strict=False))
    first: dict[tuple[str, str], int] = {}
    for i, pair in enumerate(pairs):
        first.setdefault(pair, i)
    answer = re.search(rf"(?<![\w.]){re.escape(truth)}(?!\w)", text) if truth else None

    def traits(i: int, length: int) -> Traits:
        """Of the phrase that begins at word i."""
        following = pairs[i + length : i + length + WINDOW - 1]
        return Traits(
            place=i / len(words),
            repeats=fmean(first[p] < i for p in following) if following else math.nan,
            after_truth=float(answer.start() < matches[i].start()) if answer else math.nan,
            alone=float(bool(sentences and _SET_OFF.match(text, matches[i + length - 1].end()))),
        )

    for i, (match, word) in enumerate(zip(matches, words, strict=True)):
        start = match.start()
        before = "\n" + text[:start] if start < WINDOW else text[start - WINDOW : start]
        if not (_OPENS.search(before) if sentences else word[0].isupper()):
            continue
        phrases = {}
        if len(word) > 1 and word[0].isupper() and word[1:].islower():
            for length in range(1, min(3, len(words) - i) + 1):
                # As it will be looked for: with single blanks. In "Wait B" the name is no part of it.
                phrase = " ".join(words[i : i + length])
                if not text.startswith(phrase, start) or not all(len(w) > 1 and w[0].isalpha() for w in phrase.split()):
                    break
                phrases[phrase] = traits(i, length)
        yield start, traits(i, 1), phrases


def _mean(traits: Sequence[Traits]) -> Traits:
    columns = zip(*traits, strict=True) if traits else [()] * 4
    known = [[v for v in column if not math.isnan(v)] for column in columns]
    return Traits(*(fmean(values) if values else math.nan for values in known))


def _context(text: str, start: int) -> str:
    """A line around character ``start``."""
    return " ".join(text[max(0, start - 24) : start + 48].split())

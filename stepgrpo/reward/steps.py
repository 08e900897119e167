"""Where a reasoning step ends: one rule, for the rollout (where to probe) and for the reward (what to count)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from stepgrpo.config import is_own
from stepgrpo.plugin import make_own

if TYPE_CHECKING:
    from stepgrpo.config import RolloutConfig

CONNECTIVES = (
    *(
        "Wait",
        "Hmm",
        "Actually",
        "Alternatively",
        "However",
        "But",
        "Maybe",
        "Perhaps",
        "Now",
        "Next",
        "Let me",
        "Let's",
    ),
    *("Hold on", "On second thought", "Another way", "Another approach", "To double-check", "To verify"),
)
"""Sentence openings that mark a new step where no single word does. Not "So", "Then", "Therefore": these go on with the
step they stand in."""


class StepRule(Protocol):
    """Says where new steps open."""

    reach: int
    """Most characters of an opening together with what must be read behind it to know it; also the most that must be
    read before it."""

    def openings(self, text: str, *, start: int = 0, final: bool = True) -> list[tuple[int, int]]:
        """Character spans [start, end) of the openings in ``text``, in order and without overlap; the step before an
        opening is complete.

        Args:
            start: Offset to scan from; characters before it are still context. While text streams in, each call starts
                at the end of the last span found, or ``reach`` before the end of the text scanned so far, whichever is
                later.
            final: Whether ``text`` is complete. False leaves out what later text may still change, so that what is
                returned is a prefix of what any continuation of ``text`` gives.
        """
        ...


class TriggerRule:
    """A step opens with a trigger word that stands alone (Eq. 3 of arXiv 2604.16890).

    Alone means that no Unicode word character touches it: "Wait", but not "Waiting", "await" or "WaitWait". Case
    counts, and where several triggers begin at one place the longest wins.
    """

    def __init__(self, triggers: Sequence[str] = ("Wait",)) -> None:
        if not triggers or not all(triggers):
            raise ValueError(f"triggers: got {triggers!r}, takes at least one word, none of them empty")
        self.reach = max(map(len, triggers)) + 1
        self._triggers = tuple(triggers)
        words = "|".join(re.escape(t) for t in sorted(triggers, key=len, reverse=True))
        self._pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)")

    def openings(self, text: str, *, start: int = 0, final: bool = True) -> list[tuple[int, int]]:
        spans = [m.span() for m in self._pattern.finditer(text, start)]
        if spans and not final:
            # A match that touches the end may go on as another word; one before it, as part of a longer trigger.
            beginnings = (t[:n] for t in self._triggers for n in range(1, len(t) + 1))
            open_chars = max((len(b) for b in beginnings if text.endswith(b)), default=0)
            spans = [s for s in spans if s[0] < len(text) - open_chars]
        return spans


class PatternRule:
    """A step opens where a regular expression matches.

    A match counts once a character follows it, or the text is complete. So no match may become a longer one with more
    text: end the pattern in a boundary or a look-ahead of its own.

    Args:
        reach: see ``StepRule``; the pattern's quantifiers must be bounded by it.
    """

    def __init__(self, pattern: str, reach: int) -> None:
        self.reach = reach
        self._pattern = re.compile(pattern)

    def openings(self, text: str, *, start: int = 0, final: bool = True) -> list[tuple[int, int]]:
        spans = [m.span() for m in self._pattern.finditer(text, start)]
        return spans if final else [s for s in spans if s[1] < len(text)]


def structure_rule() -> PatternRule:
    """A step opens with a paragraph, or with a sentence or line that begins with one of ``CONNECTIVES``.

    For models without a word of their own for it. A paragraph opens a step where it begins with a capital letter (or
    one of a script without case) and the one before is complete: a list's items, a displayed formula, and what goes on
    after a formula, a colon or a comma belong to the step they stand in. A connective opens a step after those as well,
    but "Wait." or "Hmm." is no step of its own when another one follows. A full stop that shares a token with the blank
    line goes with it where thinking is cut there.
    """
    words = "|".join(map(re.escape, CONNECTIVES))
    blank = r"[ \t]{0,8}\n[ \t]{0,8}\n"
    paragraph = rf"(?<=[^\s:,$}}\]]){blank}(?=\s{{0,16}}(?:\*\*|\#{{1,6}} )?(?![a-z])[^\W\d_])"
    turn = rf"(?<=\S){blank}(?=\s{{0,16}}(?:{words})\W)"
    sentence = rf"(?<=[.!?] |\S\n)(?<!\bWait[.!?] )(?<!\bHmm[.!?] )(?:{words})(?!\w)"
    return PatternRule(f"{paragraph}|{turn}|{sentence}", reach=64)


def make_step_rule(config: RolloutConfig) -> StepRule:
    """The rule that ``rollout.step_rule`` names.

    Raises:
        ConfigError: the user's own cannot be imported or made.
    """
    if is_own(config.step_rule):
        rule: StepRule = make_own(config.step_rule, "rollout.step_rule", config)
        return rule
    return structure_rule() if config.step_rule == "structure" else TriggerRule(config.triggers)


def count_steps(text: str, rule: StepRule | None = None) -> int:
    """Number of reasoning steps: k = 1 + openings in the whole completion (Eq. 3 of arXiv 2604.16890); None: "Wait"."""
    return 1 + len((rule or TriggerRule()).openings(text))

"""Where a reasoning step ends: one rule, for the rollout (where to probe) and for the reward (what to count)."""

import re
from collections.abc import Sequence
from functools import lru_cache


def find_triggers(
    text: str, triggers: Sequence[str] = ("Wait",), *, start: int = 0, final: bool = True
) -> list[tuple[int, int]]:
    """Character spans [start, end) of the standalone triggers in ``text``, in order and without overlap.

    A trigger stands alone where no Unicode word character touches it: "Wait", but not "Waiting", "await" or "WaitWait".
    Case counts, and where several triggers begin at one place the longest wins.

    Args:
        start: Offset to scan from; the character before it still decides whether a trigger stands alone. While text
            streams in, the scan is linear if each call starts at the end of the last span found, or the longest
            trigger's length before the end of the text scanned so far, whichever is later.
        final: Whether ``text`` is complete. False leaves out what later text may still change: a match that touches the
            end (its right boundary is not known), or one that may become part of a longer trigger. What is returned
            is then a prefix of what any continuation of ``text`` gives.
    """
    spans = [m.span() for m in _pattern(tuple(triggers)).finditer(text, start)]
    if spans and not final:
        open_chars = max((n for t in triggers for n in range(1, len(t) + 1) if text.endswith(t[:n])), default=0)
        spans = [s for s in spans if s[0] < len(text) - open_chars]
    return spans


def count_steps(text: str, triggers: Sequence[str] = ("Wait",)) -> int:
    """Number of reasoning steps: k = 1 + standalone triggers in the whole completion (Eq. 3 of arXiv 2604.16890)."""
    return 1 + len(find_triggers(text, triggers))


@lru_cache
def _pattern(triggers: tuple[str, ...]) -> re.Pattern[str]:
    if not triggers or not all(triggers):
        raise ValueError(f"triggers: got {triggers!r}, takes at least one word, none of them empty")
    words = "|".join(re.escape(t) for t in sorted(triggers, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{words})(?!\w)")

r"""When two answers are the same: as choice letters, as words, or as mathematics.

math-verify decides about mathematics. Before it is asked, both answers are rewritten where it reads a common spelling
in another way than people do, or not at all.
"""

from __future__ import annotations

import re
import unicodedata

from math_verify import LatexExtractionConfig, parse, verify


def equal(answer: str, truth: str) -> bool | None:
    """Whether the two are equal; None where the truth cannot be read. May take any time and memory.

    A letter from A to J is a choice. It equals that letter alone, whatever stands behind it (``C``, ``(C)``,
    ``C) 12``), but a choice's text equals the text without its letter.
    """
    given, expected = _plain(answer), _plain(truth)
    given_choice, expected_choice = _CHOICE.fullmatch(_text(given)), _CHOICE.fullmatch(_text(expected))
    if given_choice and expected_choice:
        return _letter(given_choice) == _letter(expected_choice)
    if choice := given_choice or expected_choice:
        if not choice["rest"]:
            return False
        given, expected = (choice["rest"], expected) if given_choice else (given, choice["rest"])
    given_words, expected_words = _words(given), _words(expected)
    # Two letters may be a product: ab is ba. Longer words are words.
    if given_words and expected_words and max(len(given_words), len(expected_words)) > 2:
        return given_words == expected_words
    if given and given == expected:
        return True
    read = _parse(expected)
    if verify(read, _parse(given), timeout_seconds=None):
        return True
    return False if expected_words or any(not isinstance(e, str) for e in read) else None


_SUPERSCRIPT = re.compile("[⁰¹²³⁴-⁹⁺⁻ⁱⁿ]+")
_VULGAR_FRACTION = re.compile("[¼-¾⅐-⅞]")
_SIGNS = {"−": "-", "–": "-", "⁄": "/", "·": r"\cdot ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "°": r"^\circ "}
_NO_MEANING = dict.fromkeys("€£¥*\u200b\u200e\u200f\u2060\ufeff", "")
_TO_ASCII = str.maketrans(_SIGNS | _NO_MEANING)


def _plain(latex: str) -> str:
    """Without what Unicode, spacing macros and a full stop add to it."""
    latex = _SUPERSCRIPT.sub(lambda run: f"^{{{unicodedata.normalize('NFKC', run[0])}}}", latex)
    latex = _VULGAR_FRACTION.sub(
        lambda sign: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", sign[0]).split("⁄")), latex
    )
    latex = unicodedata.normalize("NFKC", latex).translate(_TO_ASCII)
    for pattern, plain in _SYNONYMS:
        latex = pattern.sub(plain, latex)
    return latex.strip()


_SYNONYMS = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\!", ""),
        (r"(?<=\d)(?:(?<!\\)\\[,;: ]|~| )(?=\d{3}(?!\d))", ""),  # thousands
        (r"(?<![\d/.])(\d+) +(\d+)/(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),
        (r"(?<=\d)[eE]([+-]?\d+)$", r" \\times 10^{\1}"),
        (r"(?<=[\d}]) *(?:\\(?:text|mathrm) *\{)? *(?:dollars?|cents?|km/h|mph|m/s) *\}?$", ""),
        (r" *\\\\ *", r" \\\\ "),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad\b", " "),
        (r"(?<!\\)\\\$", ""),
        (r"\\[bB]igg?[lrm]?\b\s*", ""),
        (r"\\(?:lbrace|lbrack)\b", r"\\{"),
        (r"\\(?:rbrace|rbrack)\b", r"\\}"),
        (r"(?:\\left)?\s*\\langle\b", "("),
        (r"(?:\\right)?\s*\\rangle\b", ")"),
        (r"\\varnothing\b", r"\\emptyset"),
        (r"\\degree\b", r"^\\circ"),
        (r"\\geqslant\b", r"\\geq"),
        (r"(?<=[\w)}\]])\s*\.\s*$", ""),
        (r"√\s*(\d+|\w)", r"\\sqrt{\1}"),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    )
]

_CHOICE = re.compile(
    r"(?i:option|choice|answer)?:?\s*(?:\((?P<in_brackets>[A-J])\)|(?P<bare>[A-J])(?:\)|[.:]?$|[.:]\s))\s*(?P<rest>.*)",
    re.DOTALL,
)

_IN_FONT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_]+(?:[\s'’-]+[^\W\d_]+)*")


def _text(latex: str) -> str:
    """Without fonts and dollars."""
    return re.sub(r"\\left(?![a-z])|\\right(?![a-z])|\$", "", _IN_FONT.sub(r"\1", latex)).strip()


def _letter(choice: re.Match[str]) -> str:
    return choice["in_brackets"] or choice["bare"]


def _words(latex: str) -> str:
    """Lower-case words with single blanks, where there are only words, of two letters or more in all; else nothing."""
    text = _text(latex).removesuffix(".")
    if len(text) < 2 or not _WORDS.fullmatch(text) or "\\" in text:
        return ""
    return " ".join(text.casefold().split())


def _parse(latex: str) -> list[object]:
    """The expression, and the text it was read from; only the text, or nothing, where it cannot be read."""
    # Nothing but the box: the default also fishes the last number out of an answer that it cannot read.
    box = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    return parse(rf"\boxed{{{latex}}}", [box], parsing_timeout=None)

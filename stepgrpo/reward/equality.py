r"""When two answers are the same: as choice letters, as words, or as mathematics.

math-verify decides about mathematics. Before it is asked, both answers are rewritten where it reads a common spelling
in another way than people do, or not at all.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import TypeAlias

from math_verify import LatexExtractionConfig, parse, verify
from math_verify.parser import NormalizationConfig
from sympy import Expr, I, Symbol

_Rule: TypeAlias = "tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]"
"""What stands for something else, and how that is spelled."""


def equal(answer: str, truth: str) -> bool | None:
    """Whether the two are equal; None where the truth cannot be read. May take any time and memory.

    A letter from A to J is a choice. It equals that letter alone, whatever stands behind it (``C``, ``(C)``,
    ``C) 12``), but a choice's text equals the text without its letter.
    """
    given, expected = _plain(answer), _plain(truth)
    given_choice, expected_choice = _choice(given), _choice(expected)
    if given_choice and expected_choice:
        return given_choice["letter"] == expected_choice["letter"]
    if choice := given_choice or expected_choice:
        if not choice["rest"]:
            return False
        given, expected = (choice["rest"], expected) if given_choice else (given, choice["rest"])
    given_words, expected_words = _words(given), _words(expected)
    if given_words and expected_words:
        if given_words == expected_words:
            return True
        if any("\\" in side or not side.isascii() for side in (given, expected)):
            return False  # plain words may still be products of variables: abc = cba
    given, expected = _apply(_READINGS, given), _apply(_READINGS, expected)
    if given and given == expected:
        return True
    read = _parse(expected)
    if verify(read, _parse(given), timeout_seconds=None):
        return True
    return False if expected_words or any(not isinstance(e, str) for e in read) else None


_SUPERSCRIPT = re.compile("[⁰¹²³⁴-⁹⁺⁻ⁱⁿ]+")
_VULGAR_FRACTION = re.compile("[¼-¾⅐-⅞]")
_SIGNS = {"−": "-", "–": "-", "⁄": "/", "·": r"\cdot ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "°": r"^\circ "}
_SILENT = "€£¥\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff"
_TO_LATEX = str.maketrans(_SIGNS | dict.fromkeys(_SILENT, ""))

_MULTIPLIER = r"(?:hundred|thousand|\w*llion|dozen)"
_FUNCTION = (
    r"(?:sin|cos|tan|log|mod|sec\s+[A-Za-z]\b"
    r"|(?:cot|csc|arc(?:sin|cos|tan)h?|exp|gcd|lcm|det|alpha|beta|gamma|delta|theta|lambda|sigma|omega|phi)\b)"
)


def _compiled(*rules: tuple[str, str | Callable[[re.Match[str]], str]]) -> list[_Rule]:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


_SPELLINGS = _compiled(
    (r"^\*\*(.*)\*\*$", r"\1"),
    (r"(?<!\\)\\!", ""),
    (r"(?<!\\)\\(?:[,;: ]|q?quad\b)|~", " "),
    (r"\\?\$", ""),
    (r"\\[bB]igg?[lrm]?(?![a-z])\s*", ""),
    (r"\\lbrace\b", r"\\{"),
    (r"\\rbrace\b", r"\\}"),
    (r"(?:\\left)?\\langle\b", "("),
    (r"(?:\\right)?\\rangle\b", ")"),
    (r"\\lbrack\b", "["),
    (r"\\rbrack\b", "]"),
    (r"\\varnothing\b", r"\\emptyset"),
    (r"\\degree\b", r"^\\circ"),
    (r"√\s*(\d+|[^\W\d])", r"\\sqrt{\1}"),
    (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<=[\w)}\]])(?<!\\right)\s*\.\s*$", ""),
)

_CHOICE = re.compile(
    r"(?i:option|choice|answer)?:?\s*(\()?(?P<letter>[A-J])(?(1)\)|(?:\)|[.:]?$|[.:]\s))\s*(?P<rest>.*)", re.DOTALL
)
_FONT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox)\s*\{([^{}]*)\}|\\(?:left|right)(?![a-z])")
_WORDS = re.compile(r"[^\W\d_]+(?:[\s'’-]+[^\W\d_]+)*")

# math-verify takes every "c", "h", "ab" or "t" at the end for a unit, and so 2ab for 2. Here a unit follows a number,
# and is either text or a longer word.
_READINGS = _compiled(
    (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)", lambda number: number[0].replace(" ", "")),
    (r"^(-?\d+) (\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
    (r"^(-?\d*\.?\d+)[eE]\+?(-?\d+)$", r"\1\\times 10^{\2}"),
    (r"(\d*)\.(\d*)\\overline\{(\d+)\}", lambda number: _repeating(*number.groups())),
    (
        rf"(?:(?<=[\d)}}\]])|(?<=\\pi))\s*\\(?:text\w*|mbox|mathrm)\s*\{{(?!\s*{_MULTIPLIER}|[ei]\}})[^{{}}]*\}}"
        r"(?:\^\{?\d\}?)?$",
        "",
    ),
    (
        rf"(?:(?<=[\d)}}\]])|(?<=\\pi))(?:\s*(?:[cmk]m|kg|ft|lbs?|mph|km/h|m/s|hrs?|min|sec|deg)"
        rf"|\s+(?!{_MULTIPLIER}|{_FUNCTION})[A-Za-z]{{3,}}(?:\s+[A-Za-z]+)*)(?:\^\{{?[23]\}}?)?$",
        "",
    ),
    (r"(?<=[)}])\s*\\?%$", ""),
)


def _plain(latex: str) -> str:
    """In LaTeX, without what fonts of Unicode, spacing macros and a full stop add to it."""
    latex = _SUPERSCRIPT.sub(lambda run: f"^{{{_compatible(run[0])}}}", latex)
    latex = _VULGAR_FRACTION.sub(lambda sign: r"\frac{{{}}}{{{}}}".format(*_compatible(sign[0]).split("⁄")), latex)
    return _apply(_SPELLINGS, _compatible(latex).translate(_TO_LATEX))


def _compatible(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _apply(rules: list[_Rule], latex: str) -> str:
    for pattern, replacement in rules:
        latex = pattern.sub(replacement, latex.strip())
    return latex.strip()


_FURTHER = re.compile(r"^\s*(?:(?:and|or|&)(?!\w)|\([A-J]\))|[,;&]\s*(?:\([A-J]\)|[A-J][):])")
"""What stands behind a first letter and names another."""


def _choice(latex: str) -> re.Match[str] | None:
    """Of one choice: several are none."""
    found = _CHOICE.fullmatch(_FONT.sub(r"\1", latex).strip())
    return None if found and _FURTHER.search(found["rest"]) else found


def _words(latex: str) -> list[str] | None:
    """The words, in small letters, of what is nothing else; None for other things, and for variables."""
    text = _FONT.sub(r"\1", latex).strip(" .")
    shortest = 2 if latex.startswith(r"\text") or not latex.isascii() else 3
    if len(text) < shortest or not _WORDS.fullmatch(text):
        return None
    return text.casefold().split()


def _repeating(whole: str, start: str, period: str) -> str:
    r"""The fraction that 0.1\overline{6} is."""
    numerator = int(whole + start + period) - int(whole + start or "0")
    return rf"\frac{{{numerator}}}{{{'9' * len(period) + '0' * len(start)}}}"


def _parse(latex: str) -> list[object]:
    """The expression, and the text it was read from; only the text, or nothing, where it cannot be read."""
    read = parse(rf"\boxed{{{latex}}}", [_BOX], parsing_timeout=None)
    return [e.subs(_LETTER_I) if isinstance(e, Expr) else e for e in read]


# Nothing but the box: the default also fishes the last number out of an answer that it cannot read.
_BOX = LatexExtractionConfig(
    boxed_match_priority=0,
    try_extract_without_anchor=False,
    normalization_config=NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True),
)
_LETTER_I = {Symbol("i", real=real): I for real in (True, False)}  # math-verify leaves it a letter of either kind

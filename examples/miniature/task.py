"""A task that needs checking: little sums, some too hard for a glance.

A problem is a list of expressions, each evaluated from left to right modulo 10; its answer is their result digits.
A trace first tries every part at a glance, then checks parts one by one, and overthinks: it checks what is sure
already, and checks it again. In words, one token each and separated by blanks (a line break is a word too)::

    prompt  := "<bos>" problem "?" "<think>"
    problem := (NAME expr)+                                     NAME = A, B, C, D
    expr    := digit (("+" | "*") digit)^n                      n = 1 is easy, n = 2 or 3 is hard
    trace   := (NAME "=" digit)^parts check* "</think>" answer
    check   := "Wait" NAME digit (op digit "=" digit)^n "so" NAME "=" digit
    answer  := "\\n" "**Final Answer**" "\\n" "\\boxed" "{" digit^parts "}" "<eos>"

Two decisions make it a test of early exit.

*The errors are intrinsic.* A model of this size learns a sum of one operation to 99 %, but it cannot compose two or
three modulo 10 in one forward pass, whereas one check gets them right. So reinforcement cannot sharpen the first try: a
hard part needs exactly one check, and every other check is waste. Wrong labels on what the model can compute would be
unlearned in a few updates, and nothing would be left to verify.

*The final answer is always the truth*, also in a trace that stopped too early. An unchecked hard part can then only be
guessed, and the model learns to spread its probability there: a tentative answer is confident when the work is done and
only then. Were it to repeat the last claim, it would be as sure of a wrong one.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

PARTS = tuple("ABCDE")
VOCABULARY = (
    *("<pad>", "<bos>", "<eos>", "<think>", "</think>", "Wait", "\n", "**Final Answer**", "\\boxed", "{", "}"),
    *("?", "=", "+", "*", "so"),
    *PARTS,
    *map(str, range(10)),
)
"""All words; a word's place is its token id."""
TOKEN_IDS = {word: i for i, word in enumerate(VOCABULARY)}

LEVELS = {1: (2, 0), 2: (2, 1), 3: (3, 1), 4: (3, 2), 5: (4, 3)}
"""Level: (parts, hard parts). The shortest way to a sure answer takes 1 + hard parts steps."""

OPERANDS = {"+": tuple(range(1, 10)), "*": (3, 7, 9, 3, 7, 9, 2, 4, 6, 8)}
"""Factors that lose no digit (3, 7, 9) come twice as often; 0, 1 and 5 would make a part easy."""

FIRST_TRY_RIGHT = {1: 0.99, 2: 0.5, 3: 0.35}
"""Share of right first tries in a trace by number of operations: the hard ones' errors must be seen to be corrected."""

ANSWER_INDUCER = ("\n", "**Final Answer**", "\n", "\\boxed")


@dataclass(frozen=True, slots=True)
class Part:
    """``first`` and then each operation, from left to right, modulo 10."""

    first: int
    operations: tuple[tuple[str, int], ...]

    @property
    def hard(self) -> bool:
        return len(self.operations) > 1

    def results(self) -> list[int]:
        """The value after each operation; the last one is the part's."""
        apply = {"+": lambda a, b: (a + b) % 10, "*": lambda a, b: a * b % 10}
        values = itertools.accumulate(self.operations, lambda v, op: apply[op[0]](v, op[1]), initial=self.first)
        return list(values)[1:]


@dataclass(frozen=True, slots=True)
class Problem:
    """
    >>> p = Problem.parse("A 8 * 3 B 4 + 3 + 7")
    >>> p.answer, [part.hard for part in p.parts]
    ('4 4', [False, True])
    """

    parts: tuple[Part, ...]

    @classmethod
    def parse(cls, text: str) -> Problem:
        """The inverse of ``text``."""
        parts: list[list[str]] = []
        for word in text.split():
            if word in PARTS:
                parts.append([])
            else:
                parts[-1].append(word)
        return cls(tuple(Part(int(w[0]), tuple(zip(w[1::2], map(int, w[2::2]), strict=True))) for w in parts))

    @property
    def text(self) -> str:
        return " ".join(
            " ".join([name, str(part.first), *(f"{op} {operand}" for op, operand in part.operations)])
            for name, part in zip(PARTS, self.parts, strict=False)
        )

    @property
    def answer(self) -> str:
        """Digits separated by blanks, what the box holds."""
        return " ".join(str(part.results()[-1]) for part in self.parts)

    @property
    def held_out(self) -> bool:
        """Whether this problem is for evaluation only: one in eight, by a hash of its text.

        The text alone decides, so no two sets from opposite sides can share a problem, whatever their seeds and sizes.
        """
        return hashlib.sha256(self.text.encode()).digest()[0] < 32


@dataclass(frozen=True, slots=True)
class Habits:
    """How the writer of a trace goes on and stops."""

    stop_early: float = 0.03
    """Probability to stop before the next step while a hard part is unchecked."""
    stop_done: float = 0.13
    """The same once all hard parts are checked."""
    aim: float = 0.45
    """Probability to pick an unchecked hard part on purpose; otherwise any part, checked or not."""
    max_steps: int = 11
    """Steps (checks plus one) after which it stops."""
    redundant: int = 0
    """Checks it always makes after all hard parts are checked."""


OVERTHINKING = Habits()
STUBBORN = Habits(stop_early=0.0, stop_done=1.0, aim=1.0, redundant=4)
BRIEF = Habits(stop_early=0.2, stop_done=0.6, aim=1.0, max_steps=4)


def sample_problem(rng: random.Random, level: int, *, held_out: bool = False) -> Problem:
    """A problem of ``level`` (1 to 5), of the training side unless ``held_out``."""
    parts, hard = LEVELS[level]

    def lengths() -> list[int]:
        drawn = [rng.choice((2, 3)) for _ in range(hard)] + [1] * (parts - hard)
        rng.shuffle(drawn)
        return drawn

    return _sample(rng, lengths, held_out)


def sample_drill(rng: random.Random) -> Problem:
    """A training problem of one or two parts of any length, to start learning on."""
    return _sample(rng, lambda: [rng.randint(1, 3) for _ in range(rng.randint(1, 2))], held_out=False)


def ask(problem: Problem) -> list[str]:
    """The words of the prompt, which the chat template makes of the problem's text."""
    return ["<bos>", *problem.text.split(), "?", "<think>"]


def think(rng: random.Random, problem: Problem, habits: Habits = OVERTHINKING) -> list[str]:
    """The words of a trace up to where thinking is closed."""
    words: list[str] = []
    for name, part in zip(PARTS, problem.parts, strict=False):
        claim = part.results()[-1]
        if rng.random() > FIRST_TRY_RIGHT[len(part.operations)]:
            claim = (claim + rng.randint(1, 9)) % 10
        words += [name, "=", str(claim)]
    open_parts = {i for i, part in enumerate(problem.parts) if part.hard}
    num_redundant = 0
    for _ in range(habits.max_steps - 1):
        may_stop = num_redundant >= habits.redundant
        if rng.random() < (habits.stop_early if open_parts else habits.stop_done if may_stop else 0.0):
            break
        num_redundant += not open_parts
        if open_parts and rng.random() < habits.aim:
            i = rng.choice(sorted(open_parts))
        else:
            i = rng.randrange(len(problem.parts))
        open_parts.discard(i)
        words += _check(PARTS[i], problem.parts[i])
    return words


def conclude(problem: Problem) -> list[str]:
    """The words of a trace after thinking is closed."""
    return [*ANSWER_INDUCER, "{", *problem.answer.split(), "}", "<eos>"]


def _check(name: str, part: Part) -> list[str]:
    words = ["Wait", name, str(part.first)]
    results = part.results()
    for (op, operand), result in zip(part.operations, results, strict=True):
        words += [op, str(operand), "=", str(result)]
    return [*words, "so", name, "=", str(results[-1])]


def _sample(rng: random.Random, lengths: Callable[[], list[int]], held_out: bool) -> Problem:
    while True:
        problem = Problem(tuple(_sample_part(rng, n) for n in lengths()))
        if problem.held_out == held_out:
            return problem


def _sample_part(rng: random.Random, length: int) -> Part:
    ops = [rng.choice("+*") for _ in range(length)]
    return Part(rng.randrange(10), tuple((op, rng.choice(OPERANDS[op])) for op in ops))

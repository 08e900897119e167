import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pairs import KNOWN_MISSES, RIGHT, WRONG

from stepgrpo.config import ConfigError, RewardConfig
from stepgrpo.reward.outcome import (
    MAX_ANSWER_CHARS,
    ExactGrader,
    MathGrader,
    Outcome,
    _default_grader,
    extract_answer,
    grade,
    make_grader,
)
from stepgrpo.reward.schemes import outcome_reward


def boxed(answer: str) -> str:
    return rf"so it goes</think> The answer is \boxed{{{answer}}}."


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    g = MathGrader()
    yield g
    g.close()


@pytest.fixture(autouse=True, scope="module")
def no_process_is_left_to_other_modules() -> Iterator[None]:
    """`grade` keeps its grader for the life of the process."""
    yield
    _default_grader().close()
    _default_grader.cache_clear()


# Extraction


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"</think>\boxed{4}", "4"),
        (r"</think>\boxed {4}, \fbox{ 5 }", "5"),
        ("</think> \n **Final Answer** \n \\boxed { 4 4 2 } <eos>", "4 4 2"),
        (r"</think>\boxed{\frac{1}{2^{3}}} and {braces}", r"\frac{1}{2^{3}}"),
        (r"</think>\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"</think>\boxed{\}\}}", r"\}\}"),
        (r"</think>\boxed{a\\} b}", r"a\\"),
        (r"</think>\\boxed{4}", "4"),
        (r"</think>\boxed{\boxed{5}}", "5"),
        (r"</think>\boxed{1} } \boxed{2} {", "2"),
        (r"</think>{ unclosed \boxed{3}", "3"),
        (r"</think>\boxed{4} then \boxed{5", "4"),
        (r"\boxed{1}</think>\boxed{2}</think>\boxed{3}", "3"),
        (r"</think>\boxed{4", None),
        (r"</think>\boxed{}", None),
        (r"</think>\boxed{ }", None),
        (r"</think>\boxed 4", None),
        (r"</think>\unboxed{4} boxed{4} \boxedx{4}", None),
        ("</think>4", None),
        (r"\boxed{4}", None),
        (r"\boxed{4}</think>", None),
        ("", None),
    ],
)
def test_the_answer_is_the_last_whole_box_after_thinking(response: str, answer: str | None) -> None:
    assert extract_answer(response) == answer


def test_the_marker_that_ends_thinking_is_a_setting() -> None:
    assert extract_answer(r"<done>\boxed{1}", "<done>") == "1"
    assert extract_answer(r"</think>\boxed{1}", "<done>") is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("{" * 100_000, None),
        ("}" * 100_000, None),
        (r"\boxed{" * 50_000, None),
        (r"\boxed{" * 50_000 + "1" + "}" * 50_000, "1"),
        (r"\boxed{" + "{}" * 50_000 + "}", "{}" * 50_000),
        (r"\boxed" + " " * 100_000, None),
        (r"\boxed " * 50_000, None),
        ("\\" * 100_001 + "boxed{7}", "7"),
        ("</think>" * 20_000 + r"\boxed{7}", "7"),
    ],
)
def test_hostile_text_is_read_in_linear_time(text: str, answer: str | None) -> None:
    # Quadratic time would be minutes here.
    assert extract_answer("</think>" + text) == answer


# What the released code got wrong


async def test_a_missing_box_is_not_formatted_and_earns_nothing(grader: MathGrader) -> None:
    (outcome,) = await grader.grade(["thought</think> The answer is 4."], "4")
    assert outcome == Outcome(correct=False, formatted=False, answer=None, error=None)
    assert outcome_reward([outcome.correct], [outcome.formatted]) == [0.0]
    # The faulty check: a missing box comes back as the string "None", which is truthy.
    assert outcome_reward([outcome.correct], [bool(str(outcome.answer))]) == pytest.approx([0.1])


async def test_a_box_inside_thinking_is_no_answer(grader: MathGrader) -> None:
    response = r"first \boxed{7}, no, \boxed{8}</think> I am done."
    assert re.findall(r"\\boxed{(\d+)}", response)[-1] == "8"  # the faulty rule: the last box anywhere
    (inside,) = await grader.grade([response], "8")
    assert (inside.correct, inside.formatted) == (False, False)
    (after,) = await grader.grade([r"first \boxed{7}</think> \boxed{8}"], "7")
    assert (after.correct, after.answer) == (False, "8")


# Equality


async def test_the_exact_grader_compares_words() -> None:
    g = ExactGrader()
    outcomes = await g.grade([boxed(" 4  4 2 "), boxed("4 4 3"), boxed("442"), "no box"], "4 4 2")
    assert [(o.correct, o.formatted) for o in outcomes] == [(True, True), (False, True), (False, True), (False, False)]
    g.close()


@pytest.mark.parametrize(
    ("answer", "truth", "correct"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\dfrac12", r"\frac{1}{2}", True),
        ("27", "27.0", True),
        ("1,000", "1000", True),
        (r"\{2, 1\}", r"\{1, 2\}", True),
        (r"(3, \frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)", True),
        ("x = 5", "5", True),
        ("(x+1)^2", "x^2+2x+1", True),
        (r"\text{east}", r"\text{ east }", True),
        ("5", "$5$", True),
        ("日本", "$日本$", True),
        ("6", "5", False),
        ("(2, 1)", "(1, 2)", False),
        (r"\frac{5} \left(", "5", False),
        ("I think 日本 is 5", "5", False),
        ("\x00", "5", False),
        ("\ud800", "5", False),
        ("5" * (MAX_ANSWER_CHARS + 1), "5", False),
    ],
)
async def test_mathematical_equality_decides(grader: MathGrader, answer: str, truth: str, correct: bool) -> None:
    (outcome,) = await grader.grade([boxed(answer)], truth)
    assert outcome == Outcome(correct, True, answer, None)


async def test_verdicts_come_in_the_order_of_the_responses(grader: MathGrader) -> None:
    responses = [boxed(str(i % 7)) for i in range(40)] + ["no box"]
    outcomes = await grader.grade(responses, "3.0")
    assert [o.correct for o in outcomes] == [i % 7 == 3 for i in range(40)] + [False]
    assert [o.answer for o in outcomes] == [str(i % 7) for i in range(40)] + [None]


@pytest.mark.parametrize("truth", ["", r"\frac{1}{"])
async def test_a_truth_that_cannot_be_read_is_a_grader_failure(grader: MathGrader, truth: str) -> None:
    (outcome,) = await grader.grade([boxed("5")], truth)
    assert (outcome.correct, outcome.formatted, outcome.error) == (False, True, "truth")


async def test_grade_answers_at_once_inside_a_running_loop_too() -> None:
    assert grade(boxed("7"), "7") == Outcome(True, True, "7")
    assert grade(boxed("8"), "7.0").correct is False


SHARED = Path(os.environ.get("STEPGRPO_SHARED", Path(__file__).parents[2] / "../shared"))


@pytest.mark.skipif(not (SHARED / "data/benchmarks").is_dir(), reason="benchmarks not found: set STEPGRPO_SHARED")
@pytest.mark.parametrize("name", ["aime", "aime25", "amc", "gsm8k", "math"])
async def test_every_benchmark_answer_equals_itself_in_a_box(grader: MathGrader, name: str) -> None:
    lines = (SHARED / f"data/benchmarks/{name}.jsonl").read_text().splitlines()
    answers = [str(json.loads(line)["answer"]) for line in lines]
    answers = random.Random(0).sample(answers, min(50, len(answers)))
    plain = [(await grader.grade([boxed(a)], a))[0] for a in answers]
    # In dollars the two strings differ, so that the comparison itself is asked.
    asked = await asyncio.gather(*(grader.grade([boxed(a)], f"${a}$") for a in answers))
    assert [a for a, o in zip(answers, plain, strict=True) if not o.correct] == []
    assert [(a, o.error) for a, (o,) in zip(answers, asked, strict=True) if not o.correct] == []


# Limits


async def test_an_answer_that_never_ends_costs_its_neighbours_nothing() -> None:
    with contextlib.closing(MathGrader(processes=2, timeout=2.0)) as g:
        deep = "(" * 490 + "1" + ")" * 490
        outcomes = await g.grade([boxed(a) for a in ["2/4", "9^{9^{9^9}}", deep, "0.7", "0.50"]], r"\frac12")
    assert [o.error for o in outcomes] == [None, "timeout", "timeout", None, None]
    assert [o.correct for o in outcomes] == [True, False, False, False, True]


async def test_an_answer_that_eats_all_memory_is_a_grader_failure_and_no_silent_zero() -> None:
    with contextlib.closing(MathGrader(processes=1, timeout=60.0, memory_mb=180)) as g:
        outcomes = await g.grade([boxed(a) for a in ["6", "2^{2^{31}}", "5.0"]], "5")
    assert [(o.correct, o.error) for o in outcomes] == [(False, None), (False, "memory"), (True, None)]


async def test_the_memory_of_the_process_that_asks_is_not_counted() -> None:
    ballast = b"\1" * (700 << 20)
    with contextlib.closing(MathGrader(processes=1, memory_mb=1024)) as g:
        outcomes = await g.grade([boxed(a) for a in ["6", "7"]], "5")
    assert len(ballast) and [(o.correct, o.error) for o in outcomes] == [(False, None)] * 2


async def test_grading_processes_that_die_idle_are_replaced() -> None:
    others = {p.pid for p in multiprocessing.active_children()}
    with contextlib.closing(MathGrader(processes=2)) as g:
        await g.grade([boxed("1/2")], "0.5")
        for pid in {p.pid for p in multiprocessing.active_children()} - others:
            os.kill(pid, signal.SIGKILL)
        outcomes = await g.grade([boxed(a) for a in ("2/4", "0.6")], "0.5")
    assert [(o.correct, o.error) for o in outcomes] == [(True, None), (False, None)]


async def test_closing_ends_what_is_being_graded() -> None:
    g = MathGrader(processes=1, timeout=60.0)
    await g.grade([boxed("1/3")], "0.5")
    grading = asyncio.create_task(g.grade([boxed("(" * 490 + "1" + ")" * 490)], "0.5"))
    await asyncio.sleep(0.5)
    g.close()
    with pytest.raises(RuntimeError, match="this grader is closed"):
        await grading
    g.close()  # twice is fine


def test_grading_processes_do_not_outlive_a_killed_owner() -> None:
    program = """
import asyncio, multiprocessing
from stepgrpo.reward.outcome import MathGrader
grader = MathGrader(processes=2, timeout=2.0)
asyncio.run(grader.grade([r"</think>\\boxed{1/2}"], "0.5"))
print(*(p.pid for p in multiprocessing.active_children()), flush=True)
asyncio.run(grader.grade([r"</think>\\boxed{9^{9^{9^9}}}"], "0.5"))
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        time.sleep(0.3)  # into the endless comparison
        owner.kill()
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while alive := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_grading_process_loads_no_heavy_library() -> None:
    heavy = {"torch", "ray", "vllm", "deepspeed", "transformers"}
    program = f"""
import sys
from stepgrpo.reward import outcome
outcome._start_process(2048, outcome._EQUAL)
assert outcome._ask_judge(r"\\frac12", "0.5", 60.0) is True
print(*({heavy} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [] and done.stderr == ""


def test_a_config_names_the_grader() -> None:
    exact, math = make_grader(RewardConfig(grader="exact"), "<done>"), make_grader(RewardConfig(), "<done>")
    assert isinstance(exact, ExactGrader) and isinstance(math, MathGrader)
    assert asyncio.run(exact.grade([r"<done>\boxed{1 2}"], "1  2")) == [Outcome(True, True, "1 2")]
    assert asyncio.run(math.grade([r"<done>\boxed{x}"], "x")) == [Outcome(True, True, "x")]  # needs no process
    math.close()


# Shapes of answers


@pytest.mark.parametrize("kind", RIGHT)
async def test_answers_that_a_person_takes_for_equal_are_right(grader: MathGrader, kind: str) -> None:
    outcomes = await asyncio.gather(*(grader.grade([boxed(answer)], truth) for answer, truth in RIGHT[kind]))
    assert [pair for pair, [o] in zip(RIGHT[kind], outcomes, strict=True) if not o.correct or o.error] == []


@pytest.mark.parametrize("kind", WRONG)
async def test_answers_that_a_person_takes_for_different_are_wrong(grader: MathGrader, kind: str) -> None:
    outcomes = await asyncio.gather(*(grader.grade([boxed(answer)], truth) for answer, truth in WRONG[kind]))
    assert [pair for pair, [o] in zip(WRONG[kind], outcomes, strict=True) if o.correct or o.error] == []


def test_the_pairs_are_many() -> None:
    assert sum(len(pairs) for kinds in (RIGHT, WRONG) for pairs in kinds.values()) >= 400


@pytest.mark.parametrize("pair", KNOWN_MISSES)
async def test_what_is_known_to_be_missed_is_not_right(grader: MathGrader, pair: tuple[str, str]) -> None:
    """One that passes here has been mended: move it to the others."""
    [outcome] = await grader.grade([boxed(pair[0])], pair[1])
    assert not outcome.correct


# Hostile answers


HOSTILE = [
    *("9^{9^{9^9}}", "9^{9^{9^{9^9}}}", "10^{10^{10}}", "((9^9)^9)^{9^9}", "2^{2^{2^{2^{2^2}}}}", "(-8)^{9^{9^9}}"),
    *("10^{9}!", "(9^9)!", "(((3!)!)!)!", "9!!!!!!", r"\binom{10^9}{5 \cdot 10^8}", r"\binom{9^{99}}{9^{98}}"),
    *(r"\sum_{n=1}^{10^{12}} \frac{1}{n}", r"\prod_{n=1}^{10^9} n", r"\sum_{i=1}^{10^6}\sum_{j=1}^{10^6} ij"),
    *(r"\int_0^\infty e^{-x^2} \sin(x^{x^x}) dx", r"\int \frac{1}{x^{99}+x+1} dx", r"\int_0^1 x^x dx"),
    *(r"\lim_{n \to \infty} (1 + 1/n)^{n^n}", r"\frac{d}{dx} x^{x^{x^{x^x}}}", r"\sqrt[10^9]{2}", r"\log_{9^{9^9}} 2"),
    *("{" * 900, "}" * 900, "{" * 450 + "1" + "}" * 450, "(" * 900, "(" * 450 + "1" + ")" * 450, "[" * 900),
    *(r"\left(" * 150, r"\frac{1}{" * 100 + "2" + "}" * 100, r"\sqrt{" * 140 + "2" + "}" * 140, "-" * 900 + "1"),
    *("x^{" * 200 + "x" + "}" * 200, "x_{" * 200 + "1" + "}" * 200, "|" * 900, r"\{" * 400, "1+" * 450 + "1"),
    *("1/" * 450 + "1", "(x+1)" * 180, "(a+b+c+d)^{99}", "(x+y)^{10^5}", "9" * 999, "0." + "1" * 990, "1e999999999"),
    *(r"\sin(" * 180 + "x" + ")" * 180, "x" * 999, "x!" * 400, "1,000" * 190, "a" * 30 + "!", ",".join(["1"] * 480)),
    r"\begin{pmatrix}" + r"1 & 2 \\ " * 90 + r"\end{pmatrix}",
    r"\det \begin{pmatrix}" + " & ".join("x" * 40) + r"\end{pmatrix}",
    *(
        r"\begin{cases}" * 60,
        r"\begin{array}{" + "c" * 900 + "}",
        r"\{1, 2, \ldots, 10^{12}\}",
        r"\bigcup_{n=1}^{10^9} \{n\}",
    ),
    *("\x00", "4\x00", "\x00" * 900, "\ud800", "4\udfff", "\ufffe\uffff", "\u202e4\u202c", "\u200f4", "\u200b" * 900),
    *(
        "٤",
        "四",
        "४",
        "𝟜",
        "４",
        "Ⅳ",
        "四分之一",
        "четыре",
        "τέσσερα",
        "אַרְבַּע",
        "أربعة",
        "🙂" * 400,
        "Z" + "\u0335\u0322" * 400,
    ),
    *(
        "__import__('os').system('touch /tmp/taken')",
        "exit()",
        "quit()",
        "os._exit(0)",
        "raise SystemExit",
        "import os",
    ),
    *(
        "lambda x: x",
        "[x for x in range(10**9)]",
        "{}.__class__.__mro__",
        "eval('1')",
        "exec('1')",
        "open('/etc/passwd')",
    ),
    *(
        "oo",
        "zoo",
        "nan",
        "inf",
        "-oo",
        "S.Infinity",
        "E",
        "I",
        "pi",
        "gamma",
        "beta",
        "Symbol('x')",
        "N",
        "Q",
        "None",
        "True",
    ),
    *(
        r"\input{/etc/passwd}",
        r"\write18{ls}",
        r"\def\x{\x\x}\x",
        r"\newcommand{\a}{\a\a}\a",
        r"\csname x\endcsname",
        "\\" * 499,
    ),
    *(
        "<script>alert(1)</script>",
        "%s%s%n",
        "{0.__class__}",
        "${7*7}",
        "' OR 1=1 --",
        "a" * 500 + "b" * 499,
        "(a+)+$",
        " " * 990,
    ),
    *(
        "=" * 900,
        "x=" * 450 + "1",
        "<" * 900,
        "1<x<" * 200,
        "\n" * 900,
        "\t4\t",
        "4\r\n",
        "NaN" * 300,
        "4" + "0" * 990,
        "^" * 900,
    ),
]


async def test_no_hostile_answer_hangs_or_takes_another_ones_verdict_with_it() -> None:
    assert len(HOSTILE) >= 100
    limited = MathGrader(processes=2, timeout=2.5, memory_mb=1024)
    try:
        # Each in one group with a right and a wrong answer, all groups at once; also some too long to be asked about.
        deep = ["{" * 100_000, r"\frac{1}{" * 5000 + "2" + "}" * 5000, "9" * 100_000, " " * 1_000_000 + "7"]
        groups = [[boxed(r"\frac{8}{2}"), boxed(h), boxed("5")] for h in (*HOSTILE, *deep)]
        outcomes = await asyncio.wait_for(asyncio.gather(*(limited.grade(g, "4") for g in groups)), 400)
    finally:
        limited.close()
    for hostile, (right, _, wrong) in zip((*HOSTILE, *deep), outcomes, strict=True):
        assert (right.correct, right.error) == (True, None), hostile[:40]
        assert (wrong.correct, wrong.error) == (False, None), hostile[:40]
    verdicts = {h: o[1] for h, o in zip((*HOSTILE, *deep), outcomes, strict=True)}
    assert {o.error for o in verdicts.values()} <= {None, "timeout", "memory", "crash"}
    fours = {"４", "𝟜", "٤", "४", "\u202e4\u202c", "\u200f4", "\t4\t", "4\r\n", "Ⅳ", "4\x00", "4\udfff"}
    assert {h[:40] for h, o in verdicts.items() if o.correct and h not in fours} == set()
    assert not os.path.exists("/tmp/taken")  # noqa: ASYNC240


@pytest.mark.parametrize("truth", ["9^{9^{9^9}}", "{" * 100_000, "\x00", "\ud800", r"\frac{1}{" * 5000, "", "exit()"])
async def test_a_hostile_truth_gives_a_verdict_or_a_reason_within_the_limit(truth: str) -> None:
    limited = MathGrader(processes=1, timeout=2.0, memory_mb=1024)
    try:
        [outcome] = await asyncio.wait_for(limited.grade([boxed("4")], truth), 30)
        assert not outcome.correct
        [after] = await asyncio.wait_for(limited.grade([boxed("4.0")], "4"), 30)
        assert after.correct
    finally:
        limited.close()


# A user's own


def shouted(response: str, truth: str) -> bool | Outcome:
    """An own grader, with faults to ask for."""
    match truth:
        case "raise":
            raise KeyError("the user's fault")
        case "hang":
            time.sleep(60)
        case "outcome":
            return Outcome(True, True, "mine")
    return response.endswith(f"{truth.upper()}!")


async def test_a_users_grader_sees_the_whole_response_and_runs_within_the_same_limits() -> None:
    own = make_grader(RewardConfig(grader="test_outcome:shouted", grade_timeout=2.0, grade_processes=1), "</think>")
    try:
        right, wrong = await own.grade([r"no thinking, FOUR!", r"</think>\boxed{four}"], "four")
        assert (right.correct, right.formatted, wrong.correct, wrong.formatted) == (True, False, False, True)
        assert await own.grade(["x"], "outcome") == [Outcome(True, True, "mine")]
        assert [o.error for o in await own.grade(["x"], "raise")] == ['KeyError: "the user\'s fault"']
        assert [o.error for o in await own.grade(["x", "FOUR!"], "hang")] == ["timeout"] * 2
        assert [o.correct for o in await own.grade(["FOUR!"], "four")] == [True]
    finally:
        own.close()


def test_a_users_grader_that_is_not_there_is_refused_before_any_process_starts() -> None:
    with pytest.raises(ConfigError, match=r"reward\.grader: got test_outcome:none, which cannot be imported"):
        make_grader(RewardConfig(grader="test_outcome:none"), "</think>")

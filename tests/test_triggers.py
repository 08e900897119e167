"""The words that `stepgrpo triggers` proposes."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence

import pytest
from typer.testing import CliRunner

from examples.miniature.task import sample_problem, think
from stepgrpo.cli import app
from stepgrpo.triggers import propose, survey

# Written after the style of R1 and Qwen3: the true answer, and what was thought.
REASONING = [
    (
        "18",
        "Okay, Janet's ducks lay 16 eggs per day. She eats 3 and bakes with 4. Let me see how many are left. "
        "So 16 - 3 - 4 = 9 eggs. The price is 2 dollars each. So she makes 9 * 2 = 18 dollars.\n\nWait, does "
        "she eat 3 eggs every day? The problem says that she eats 3 and bakes with 4. So 16 - 3 - 4 = 9 eggs "
        "again.\n\nHmm, and the price is 2 dollars each? Yes. Alternatively, 16 * 2 = 32 and 7 * 2 = 14. So 32 "
        "- 14 = 18.\n\nBut wait, she bakes with 4 and eats 3. Let me add them. The sum is 7. Wait, 16 - 7 = 9 "
        "eggs. So she makes 9 * 2 = 18 dollars. Therefore 18.",
    ),
    (
        "24",
        "The triangle has sides 6, 8 and 10. Let me recall the formula. So the perimeter is the sum of the "
        "sides. The sum is 6 + 8 + 10 = 24.\n\nWait, is the perimeter the sum of the sides? Yes. So 6 + 8 + 10 "
        "= 24. Hmm, let me check: 6 + 8 = 14 and 14 + 10 = 24.\n\nBut wait, the triangle has sides 6, 8 and "
        "10. The sides are twice 3, 4, 5. Alternatively, 3 + 4 + 5 = 12 and 2 * 12 = 24. Wait, 2 * 12 = 24. So "
        "the perimeter is the sum. Therefore 24.",
    ),
    (
        "7",
        "Let the numbers be x and y. The sum is 10 and the difference is 4. Let me add the equations. So 2 x = "
        "14. The half of 14 is 7. So x = 7.\n\nHmm, the sum is 10 and the difference is 4? Yes, so y = 3.\n\n"
        "Wait, 7 + 3 = 10. So the sum is 10. Hmm, 7 - 3 = 4. The difference is 4. Alternatively, add the "
        "equations: 2 x = 14, x = 7.\n\nWait, which number is asked for? The larger, x = 7. But wait, 2 x = "
        "14. So x = 7.",
    ),
    (
        "5",
        "The train goes 60 miles per hour. The way is 300 miles. So the time is 300 / 60. Let me divide. The "
        "time is 300 / 60 = 5 hours.\n\nWait, is the way 300 miles? The problem says that the way is 300 "
        "miles. So 300 / 60 = 5. Hmm, 60 * 5 = 300. So the time is 5 hours.\n\nAlternatively, 30 miles take "
        "half an hour. But wait, 300 / 60 = 5 hours as before. Wait, the train goes 60 miles per hour. So the "
        "time is 5 hours.",
    ),
]
TRUTHS, TEXTS = zip(*REASONING, strict=True)


def described(texts: Sequence[str], truths: Sequence[str]) -> list[dict]:
    """An evaluation's answers, which go on after thinking."""
    answers = [{"text": f"{text}</think> Wait. Nine. Wait. Ten."} for text in texts]
    return [{"truth": truth, "trajectories": [answer]} for truth, answer in zip(truths, answers, strict=True)]


def test_words_that_open_a_check_come_before_the_openings_of_any_sentence() -> None:
    ranks = [c.phrase for c in propose(TEXTS, TRUTHS, limit=20)]
    checks, others = ("Wait", "Hmm", "Alternatively", "But wait"), ("The", "So", "Let me")
    assert max(map(ranks.index, checks)) < min(map(ranks.index, others)), ranks


def test_only_words_that_open_a_check_are_advised() -> None:
    found = survey(described(TEXTS, TRUTHS), "</think>")
    assert set(found.triggers) == {"Wait", "Hmm", "Alternatively", "But wait"}


def test_the_truth_is_not_needed() -> None:
    candidates = propose(TEXTS)
    assert {c.phrase for c in candidates[:4]} == {"Wait", "Hmm", "Alternatively", "But wait"}
    assert all(math.isnan(c.traits.after_truth) for c in candidates)


def test_figures_of_a_word_are_those_counted_by_hand() -> None:
    texts = ["It is 4. Wait, 2 + 2 is 4. Good. Wait, 2 + 2 is 4.", "It is 5. It is Wait. Wait, no.", "It is 6."]
    wait = next(c for c in propose(texts, ["4", "5", "6"]) if c.phrase == "Wait")
    assert (wait.responses, wait.per_response) == (2 / 3, 3 / 3)  # one within a sentence is no opening
    # Words 3 and 10 of 16, and 6 of 8. Behind the first are the pairs from "2 +" to "wait 2", of which only "is 4" was
    # said before; behind the second the four up to "is 4", all said before; behind the third none.
    assert wait.traits.place == pytest.approx((3 / 16 + 10 / 16 + 6 / 8) / 3)
    assert wait.traits.repeats == pytest.approx((1 / 7 + 4 / 4) / 2)
    assert (wait.traits.after_truth, wait.traits.alone) == (1.0, 1.0)
    assert wait.examples == ("It is 4. Wait, 2 + 2 is 4. Good. Wait, 2 + 2 is 4.", "It is 5. It is Wait. Wait, no.")


def traces(word: str) -> tuple[list[str], list[str]]:
    rng = random.Random(0)
    problems = [sample_problem(rng, rng.randint(1, 5)) for _ in range(64)]
    texts = [" ".join(word if w == "Wait" else w for w in think(rng, p)) for p in problems]
    return texts, [p.answer for p in problems]


@pytest.mark.parametrize("word", ["Wait", "Hmm", "Zebra"])
def test_the_miniature_model_s_word_is_found_whatever_it_is(word: str) -> None:
    candidates = propose(*traces(word))
    assert candidates[0].phrase == word and candidates[0].stands_out


def test_where_no_word_stands_out_the_structure_is_advised_with_its_number_of_steps() -> None:
    texts, truths = traces("\n\n")
    found = survey(described(texts, truths), "</think>")
    assert found.triggers == [] and found.responses == 64
    assert found.structure_steps == pytest.approx(1 + sum(text.count(" \n\n ") for text in texts) / 64)
    assert found.advice[-1] == "rollout.step_rule: structure"


def test_words_that_stand_out_are_advised_as_a_line_for_the_config() -> None:
    found = survey(described(*traces("Hmm")), "</think>")
    assert found.advice[-1] == 'rollout.triggers: ["Hmm"]'
    assert found.structure_steps == 1


def test_where_neither_helps_no_line_for_the_config_is_made_up() -> None:
    found = survey(described(["so it is 4", "so it is 5"], ["4", "5"]), "</think>")
    assert found.candidates == () and "step rule of your own" in found.advice[-1]


def test_a_survey_is_valid_json_with_unknown_shares_as_null() -> None:
    record = survey(described(*traces("Wait")), "</think>").as_dict()
    assert json.loads(json.dumps(record, allow_nan=False))["triggers"] == ["Wait"]


def test_problems_must_come_from_somewhere() -> None:
    result = CliRunner().invoke(app, ["triggers", "examples/miniature/model", "data.eval=null", "eval.every=0"])
    assert result.exit_code == 2 and "error: --prompts: got none and data.eval is null" in result.output

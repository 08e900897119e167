"""The decisions of the truncated rollout, as pure functions of tokens."""

import math
import random
import re

import pytest
from scripted import piece_codec, word_codec

from stepgrpo.actors.truncation import (
    Answer,
    ConfidencePolicy,
    Preset,
    Thinking,
    Trigger,
    is_control,
    is_probed,
    seed_for,
)
from stepgrpo.config import ProbeConfig
from stepgrpo.reward.steps import TriggerRule, count_steps
from stepgrpo.types import Exit

CLOSE = "</think>"
WORDS = word_codec()
PIECES = piece_codec()
CHUNK_SIZES = range(1, 10)


def pieces(*parts):
    """Token ids of these pieces, one token each."""
    ids = {PIECES.decode([i]): i for i in range(PIECES.tokenizer.get_vocab_size())}
    return [ids[part] for part in parts]


def follow(codec, ids, chunk_size, *, triggers=("Wait",), end=True, **options):
    """Feed ``ids`` in chunks until thinking ends; return it with the positions of its triggers."""
    thinking = Thinking(codec, TriggerRule(triggers), CLOSE, **options)
    found = []
    for a in range(0, len(ids), chunk_size):
        if thinking.closed is None and thinking.forced is None:
            found += thinking.feed(ids[a : a + chunk_size])
    if end and thinking.closed is None and thinking.forced is None:
        found += thinking.finish()
    assert [t.index for t in found] == list(range(len(found)))
    return thinking, [t.position for t in found]


def positions(codec, ids, **options):
    """The triggers' positions, which must be the same for every chunk size."""
    results = {tuple(follow(codec, ids, size, **options)[1]) for size in CHUNK_SIZES}
    assert len(results) == 1
    return list(results.pop())


# ---- triggers


def test_a_trigger_lies_at_the_token_of_its_first_character():
    assert positions(WORDS, WORDS.encode("4 Wait 5 + 1 Wait 6")) == [1, 5]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["4", " Wait", ",", "5"], [1]),
        (["4", "\n\nWait", " ", "5"], [1]),
        (["4", " ", "Wa", "it", ","], [2]),
        (["4", " ", "W", "a", "i", "t", ","], [2]),
        (["4", ".\n\n", "Wait", "."], [2]),
        (["4", " Wait", "ing", " ", "5"], []),
        (["4", " Wait", "it", " Wait", "."], [3]),
        (["a", "Wait", " Wait", " Wait"], [2, 3]),
        (["Wait", "Wait", " ", "Wait"], [3]),
    ],
)
def test_spellings_of_a_trigger_in_several_tokens_and_with_blanks_inside(parts, expected):
    assert positions(PIECES, pieces(*parts)) == expected


def test_waiting_is_no_trigger():
    assert positions(WORDS, WORDS.encode("4 Waiting 5 Wait Waiting")) == [3]


def test_a_trigger_counts_once_its_right_boundary_is_known():
    thinking = Thinking(PIECES, TriggerRule(), CLOSE)
    assert thinking.feed(pieces("4", " Wait")) == []
    assert thinking.feed(pieces(",")) == [Trigger(0, 1)]
    assert thinking.feed(pieces(" Wait")) == []
    assert thinking.finish() == [Trigger(1, 3)]


def test_a_trigger_right_before_the_close_counts():
    thinking, found = follow(PIECES, pieces("4", " Wait", "</th", "ink>", "5"), 1)
    assert found == [1]
    assert thinking.closed == 4


def test_several_triggers_of_unequal_length():
    ids = WORDS.encode("4 Hmm 5 so 6 Wait so 7")
    assert positions(WORDS, ids, triggers=("Wait", "Hmm", "so", "Wait so")) == [1, 3, 5]


def test_triggers_of_random_texts_are_those_that_the_reward_counts():
    rng = random.Random(1)
    for _ in range(300):
        ids = pieces(*rng.choices(["Wait", " Wait", "Wa", "it", "ing", " ", "a", "\n\nWait", ".\n\n"], k=40))
        text = PIECES.decode(ids)
        found = positions(PIECES, ids)
        assert len(found) == count_steps(text) - 1
        for position, match in zip(found, re.finditer(r"(?<!\w)Wait(?!\w)", text), strict=True):
            assert len(PIECES.decode(ids[:position])) <= match.start() < len(PIECES.decode(ids[: position + 1]))


# ---- the end of thinking


@pytest.mark.parametrize(
    ("codec", "ids", "closed"),
    [
        (WORDS, WORDS.encode("4 Wait 5 </think> 5 Wait </think>"), 4),
        (PIECES, pieces("4", "</think>", "5"), 2),
        (PIECES, pieces("4", "<", "/", "</th", "ink>", "5"), 5),
        (PIECES, pieces("4", *CLOSE, "5"), 9),
    ],
)
def test_thinking_closes_at_the_token_that_completes_the_marker(codec, ids, closed):
    assert {follow(codec, ids, size)[0].closed for size in CHUNK_SIZES} == {closed}


def test_triggers_after_thinking_closed_are_not_reported():
    assert positions(WORDS, WORDS.encode("4 Wait 5 </think> Wait 5 Wait")) == [1]


def test_the_budget_closes_at_the_exact_token_whatever_the_chunk_size():
    ids = WORDS.encode("4 Wait 5 6 7 Wait 8 9 Wait 1 2 </think>")
    for budget in range(1, 12):
        for size in CHUNK_SIZES:
            thinking, found = follow(WORDS, ids, size, budget=budget)
            assert thinking.forced == (Exit.BUDGET, budget)
            assert found == [p for p in (1, 5, 8) if p < budget]


def test_a_close_within_the_budget_is_the_policys_own():
    ids = WORDS.encode("4 Wait 5 </think> 6 7")
    for size in CHUNK_SIZES:
        assert follow(WORDS, ids, size, budget=4)[0].closed == 4
        assert follow(WORDS, ids, size, budget=4)[0].forced is None
        assert follow(WORDS, ids, size, budget=3)[0].forced == (Exit.BUDGET, 3)


def test_a_response_that_ends_with_the_budgets_last_token_is_not_closed_by_force():
    ids = WORDS.encode("4 Wait 5 <eos>")
    for size in CHUNK_SIZES:
        thinking, found = follow(WORDS, ids, size, budget=4, eos_ids=frozenset(WORDS.encode("<eos>")))
        assert (thinking.closed, thinking.forced, found) == (None, None, [1])


# ---- repetition


def test_three_equal_consecutive_steps_close_thinking_even_with_repeated_words_in_them():
    ids = WORDS.encode("4 Wait 5 + 5 Wait 5 + 5 Wait 5 + 5 Wait 6")
    for size in CHUNK_SIZES:
        thinking, found = follow(WORDS, ids, size, repetition_limit=3)
        assert thinking.forced == (Exit.REPETITION, 13)
        assert found == [1, 5, 9]


def test_a_different_step_resets_the_count_of_equal_ones():
    ids = WORDS.encode("4 Wait 5 Wait 5 Wait 6 Wait 5 Wait 5 Wait 6 Wait 6 Wait 1")
    for size in CHUNK_SIZES:
        assert follow(WORDS, ids, size, repetition_limit=3)[0].forced is None
        assert follow(WORDS, ids, size, repetition_limit=2)[0].forced == (Exit.REPETITION, 5)


def test_a_response_that_begins_with_a_trigger_has_not_repeated_anything():
    assert follow(WORDS, WORDS.encode("Wait 5 Wait 6 Wait 7"), 3, repetition_limit=2)[0].forced is None


def test_equal_steps_go_on_where_repetition_is_off():
    assert follow(WORDS, WORDS.encode("4" + " Wait 5" * 9), 3)[0].forced is None


def test_a_close_of_the_policys_own_does_not_hide_an_earlier_repetition():
    ids = WORDS.encode("4 Wait 5 Wait 5 Wait 6 </think> 7")
    for size in CHUNK_SIZES:
        thinking, _ = follow(WORDS, ids, size, repetition_limit=2)
        assert (thinking.closed, thinking.forced) == (None, (Exit.REPETITION, 5))


# ---- presets and confidence


def test_the_deer_preset_throws_the_tentative_answer_away_and_samples():
    assert Preset.resolve(ProbeConfig(), CLOSE) == Preset(
        inducer="\n**Final Answer**\n\\boxed",
        closing="</think>\n\n",
        stop=("</think>",),
        skip_first=1,
        require_close=True,
        keep_answer=False,
        delta=0.95,
        max_tokens=20,
    )


def test_the_paper_preset_keeps_the_tentative_answer():
    assert Preset.resolve(ProbeConfig(preset="paper"), CLOSE) == Preset(
        inducer="</think> The final answer is",
        closing="</think> The final answer is",
        stop=(),
        skip_first=0,
        require_close=False,
        keep_answer=True,
        delta=0.95,
        max_tokens=20,
    )


def test_fields_override_a_preset():
    config = ProbeConfig(inducer="so", closing="</think>", stop=["}"], skip_first=0, require_close=False)
    preset = Preset.resolve(config, CLOSE)
    assert (preset.inducer, preset.closing, preset.stop) == ("so", "</think>", ("}",))
    assert (preset.skip_first, preset.require_close, preset.keep_answer) == (0, False, False)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (ProbeConfig(closing="So"), "closing"),
        (ProbeConfig(preset="paper", inducer="So"), "inducer"),
        (ProbeConfig(preset="paper", closing="</think>"), "closing"),
        (ProbeConfig(skip_first=20), "skip_first"),
        (ProbeConfig(stop=[]), "stop"),
    ],
)
def test_a_preset_that_never_closes_or_never_passes_is_refused(config, field):
    with pytest.raises(ValueError, match=f"rollout.probe.{field}: got"):
        Preset.resolve(config, CLOSE)


def test_confidence_is_the_geometric_mean_of_the_tokens_that_count():
    paper = Preset.resolve(ProbeConfig(preset="paper"), CLOSE)
    deer = Preset.resolve(ProbeConfig(), CLOSE)
    logprobs = [math.log(p) for p in (0.2, 0.9, 0.8)]
    assert paper.confidence(logprobs, closed=False) == pytest.approx((0.2 * 0.9 * 0.8) ** (1 / 3))
    assert deer.confidence(logprobs, closed=True) == pytest.approx((0.9 * 0.8) ** (1 / 2))
    assert deer.confidence(logprobs, closed=False) == 0
    assert deer.confidence(logprobs[:1], closed=True) == 0


def answer(confidence):
    return Answer(Trigger(0, 1), (), confidence)


def policy_of(**fields):
    config = ProbeConfig(inducer="so", closing="</think>", **fields)
    return ConfidencePolicy(Preset.resolve(config, CLOSE), WORDS)


def test_confidence_must_be_above_delta():
    policy = policy_of(delta=0.9)
    assert not policy.confident([answer(0.9)])
    assert policy.confident([answer(0.1), answer(0.91)])
    assert not policy.confident([answer(0.91), answer(0.1)])


def test_an_answer_is_hopeless_exactly_when_certain_tokens_to_the_limit_would_not_save_it():
    policy, rng = policy_of(delta=0.9, max_tokens=6, skip_first=1), random.Random(0)
    seen = set()
    for _ in range(500):
        logprobs = [-rng.expovariate(3) for _ in range(rng.randrange(7))]
        best = logprobs + [0.0] * (6 - len(logprobs))
        passes = math.exp(sum(best[1:]) / 5) > 0.9
        assert policy.hopeless(logprobs) == (not passes)
        seen.add(passes)
    assert seen == {True, False}


# ---- seeds


def test_seeds_differ_by_run_draw_sample_and_segment_and_fit_63_bits():
    seeds = {seed_for(r, d, s, g) for r in range(4) for d in range(50) for s in range(5) for g in range(2)}
    assert len(seeds) == 4 * 50 * 5 * 2
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_are_the_same_on_every_machine():
    assert seed_for(0, 1, 2, 0) == 2200051447210499640


def test_shares_of_controls_and_of_probed_triggers_are_kept():
    controls = [is_control(0, d, s, 0.2) for d in range(1000) for s in range(5)]
    probed = [is_probed(0, d, 0, k, 0.5) for d in range(1000) for k in range(5)]
    assert sum(controls) / 5000 == pytest.approx(0.2, abs=0.02)
    assert sum(probed) / 5000 == pytest.approx(0.5, abs=0.02)
    assert all(is_probed(0, d, 0, 0, 1.0) and not is_control(0, d, 0, 0.0) for d in range(1000))

import itertools
import random

import pytest

from stepgrpo.reward.schemes import step_aware
from stepgrpo.reward.steps import TriggerRule, count_steps


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", 1),
        ("no trigger here", 1),
        ("Wait", 2),
        ("a Wait, b. Wait! c", 3),
        ("Wait\nWait\tWait", 4),
        ('(Wait) "Wait" Wait\'s -Wait-', 5),
        ("Waiting await wait WAIT WaitWait Wait_ _Wait Wait2 4Wait", 1),
        ("Waité éWait 等Wait Wait等 Wait٣", 1),
        ("Wait… —Wait。Wait\u00a0Wait\u200bWait", 6),
        ("Wait\x00Wait", 3),
    ],
)
def test_a_step_begins_at_a_word_that_stands_alone(text: str, steps: int) -> None:
    assert count_steps(text) == steps


def test_spans_cut_out_exactly_the_triggers() -> None:
    text = "ok Wait no Alternatively so Waiting. Hmm, Wait"
    spans = TriggerRule(("Hmm,", "Wait", "Alternatively")).openings(text)
    assert [text[a:b] for a, b in spans] == ["Wait", "Alternatively", "Hmm,", "Wait"]


def test_the_longest_trigger_wins_whatever_the_order_they_are_given_in() -> None:
    for triggers in itertools.permutations(("But", "But wait", "wait")):
        assert TriggerRule(triggers).openings("But wait, But no wait") == [(0, 8), (10, 13), (17, 21)]


def test_triggers_are_words_not_patterns() -> None:
    assert TriggerRule(("W.it", "a+b")).openings("W.it Wait a+b aab") == [(0, 4), (10, 13)]


@pytest.mark.parametrize("triggers", [(), ("",), ("Wait", "")])
def test_an_empty_trigger_is_refused(triggers: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="takes at least one word"):
        TriggerRule(triggers).openings("text")


def test_a_trigger_at_the_end_counts_only_once_its_right_boundary_is_known() -> None:
    assert TriggerRule().openings("a Wait b Wait", final=False) == [(2, 6)]
    assert TriggerRule().openings("a Wait b Wait,", final=False) == [(2, 6), (9, 13)]
    assert TriggerRule().openings("a Wait b Waiting", final=False) == [(2, 6)]
    assert TriggerRule().openings("a Wait b Wait") == [(2, 6), (9, 13)]


def test_the_character_before_the_offset_still_decides_about_a_boundary() -> None:
    assert TriggerRule().openings("aWait Wait", start=1) == [(6, 10)]
    assert TriggerRule().openings(" Wait", start=1) == [(1, 5)]


TRIGGERS = ("Wait", "But", "But Wait", "But Wait a", "a")


def random_texts() -> list[str]:
    rng = random.Random(0)
    pieces = ["Wait", "But", "a", " ", " ", ",", "é", "But Wai", "t"]
    return ["".join(rng.choices(pieces, k=12)) for _ in range(300)]


def test_what_is_found_in_a_stream_is_never_taken_back() -> None:
    for text in random_texts():
        whole = TriggerRule(TRIGGERS).openings(text)
        for cut in range(len(text) + 1):
            found = TriggerRule(TRIGGERS).openings(text[:cut], final=False)
            assert found == whole[: len(found)], (text, cut)


def test_a_stream_scanned_from_where_it_was_left_gives_what_one_scan_gives() -> None:
    longest = max(map(len, TRIGGERS))
    for text in random_texts():
        found: list[tuple[int, int]] = []
        start = 0
        for cut in range(0, len(text), 3):
            found += TriggerRule(TRIGGERS).openings(text[:cut], start=start, final=False)
            start = max(0, cut - longest, found[-1][1] if found else 0)
        assert found + TriggerRule(TRIGGERS).openings(text, start=start) == TriggerRule(TRIGGERS).openings(text)


def test_doubled_triggers_invert_the_step_reward_and_single_ones_do_not() -> None:
    """Three natural responses of eight triggers against two exits at the first trigger.

    The faulty loop extends the context with a stop string's tokens and then adds its text again; at an exit it leaves
    the trigger in front of the forced closing. Its rewards are those of the released code.
    """
    step = "so x = 1. "

    def responses(natural: str, at_exit: str) -> list[str]:
        end = "</think> \\boxed{1}"
        return [natural.join([step] * 9) + end] * 3 + [step + at_exit + end] * 2

    def rewards(texts: list[str]) -> list[float]:
        return [round(r, 3) for r in step_aware([1] * 5, [1] * 5, [count_steps(t) for t in texts])]

    faulty, sound = responses("WaitWait ", "Wait"), responses("Wait ", "")
    assert [count_steps(t) for t in faulty] == [1, 1, 1, 2, 2]
    assert rewards(faulty) == [1.125] * 3 + [0.818] * 2
    assert [count_steps(t) for t in sound] == [9, 9, 9, 1, 1]
    assert rewards(sound) == [0.774] * 3 + [1.306] * 2

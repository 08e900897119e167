import itertools
import random

import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from stepgrpo.actors.truncation import Thinking
from stepgrpo.reward.schemes import step_aware
from stepgrpo.reward.steps import TriggerRule, count_steps, structure_rule
from stepgrpo.tokens import Codec


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


# ---- steps by structure


def opened(text: str) -> list[str]:
    """The first words of the steps that open in ``text``."""
    openings = structure_rule().openings(text)
    return [" ".join(text[start:].split()[:2]) for start, _ in openings]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", 1),
        ("One thought. And one more sentence of it.", 1),
        ("\n\nA blank line before everything opens nothing.", 1),
        ("One.\n\nTwo.\n \t\nThree.\n\n\n\n  Four.  \n\nFive", 5),
        ("One.\nStill one.\n", 1),
        ("One.\n\n", 1),
        ("It is 4. Wait, is it? Hmm, 5.\nAlternatively, 6.", 4),
        ("It is 4 Wait and the man said Hmm to Maybe.", 1),
        ("It is 4. Waiting helps. Buttons. Letting me.", 1),
        ("It is 4. So it is 4. Then 5. Therefore 6.", 1),
        ("It is 4.\n\nWait, is it?", 2),
        ("It is 4. Wait. Hmm. Actually, it is 5.", 2),
        ("一加一等于二。\n\n等等，再算一次。", 2),
        ("One.\n\n### Two\n\n**Three** it is", 3),
    ],
)
def test_a_step_by_structure_is_a_paragraph_or_a_sentence_that_turns(text: str, steps: int) -> None:
    assert count_steps(text, structure_rule()) == steps


def test_a_list_and_a_displayed_formula_stay_in_the_step_they_belong_to() -> None:
    text = (
        "There are three cases:\n\n1. The first is easy.\n\n2. The second is not.\n\n- And a third.\n\n"
        "This gives\n\n\\[ x^2 = 4 \\]\n\nSo x is 2 or -2:\n\n$$x = \\pm 2$$\n\nand nothing else.\n\n"
        "Both are whole,\n\nWait, are they? The sum is\n\n\\begin{align}0\\end{align}\n\nBut that is fine."
    )
    assert opened(text) == ["This gives", "Both are", "Wait, are", "But that"]


# Written after the style of R1 and Qwen3; "|" stands where a person sees a new step.
REASONING = [
    "Okay, so I need to find how much Janet makes. She has 16 eggs, eats 3 and bakes with 4.\n\n"
    "|First, the eggs left: 16 - 3 - 4 = 9. She sells them for $2 each, so 9 * 2 = 18 dollars.\n\n"
    "|Wait, does she bake for her friends every day? The problem says every day, so yes.\n\n"
    "|Let me check the sum again: 3 + 4 = 7, and 16 - 7 = 9. Then 9 * 2 = 18.\n\n"
    "|Therefore, she makes 18 dollars.\n",
    "Hmm, the triangle has sides 3, 4 and 5. So it is a right one, and its area is 3 * 4 / 2 = 6. |But the question "
    "asks for the perimeter. Then it is 3 + 4 + 5 = 12. |Wait. Hmm, the scale is 2, so 24. |Alternatively, scale each "
    "side: 6 + 8 + 10 = 24. So both ways agree.",
    "We are asked for the roots.\n\n|The quadratic formula gives\n\n\\[ x = \\frac{5 \\pm 1}{2} \\]\n\nso x = 3 or "
    "x = 2.\n\n|Let's verify by substitution:\n\n- For x = 3: 9 - 15 + 6 = 0.\n- For x = 2: 4 - 10 + 6 = 0.\n\n"
    "|Both work. |Maybe there is a third? No, the degree is two.\n\n|**Final check** The sum is 5, as it must be.",
]


@pytest.mark.parametrize("text", REASONING)
def test_steps_open_where_a_person_sees_them(text: str) -> None:
    plain = text.replace("|", "")
    expected = [" ".join(part.split()[:2]) for part in text.split("|")[1:]]
    assert opened(plain) == expected
    assert count_steps(plain, structure_rule()) == 1 + text.count("|")


def reasoning_texts() -> list[str]:
    rng = random.Random(1)
    pieces = [
        "\n",
        "\n",
        "\n\n",
        " ",
        "\t",
        ". ",
        "?",
        ":",
        "$",
        "}",
        "**",
        "## ",
        "- ",
        "1",
        "a",
        "B",
        "é",
        "等",
        "Wait",
    ]
    pieces += ["Wait. ", "Hmm", "But", "Let", " me", "Let's", "ing", "To double-check", "*", "#"]
    lengths = [
        *(rng.randrange(1, 24) for _ in range(800)),
        *[300] * 8,
    ]  # the rollout keeps no more than a long one's end
    return ["".join(rng.choices(pieces, k=k)) for k in lengths]


def test_structure_found_in_a_stream_is_never_taken_back() -> None:
    rule = structure_rule()
    for text in reasoning_texts():
        whole = rule.openings(text)
        for cut in range(len(text) + 1):
            found = rule.openings(text[:cut], final=False)
            assert found == whole[: len(found)], (text, cut)


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_structure_scanned_in_pieces_gives_what_one_scan_gives(chunk: int) -> None:
    rule = structure_rule()
    num_openings = 0
    for text in [
        *reasoning_texts(),
        *(t.replace("|", "") for t in REASONING),
        "a.        \n        \n" + " " * 16 + "###### B",
    ]:
        found: list[tuple[int, int]] = []
        start = 0
        for cut in range(0, len(text), chunk):
            found += rule.openings(text[:cut], start=start, final=False)
            start = max(0, cut - rule.reach, found[-1][1] if found else 0)
        assert found + rule.openings(text, start=start) == rule.openings(text)
        num_openings += len(rule.openings(text))
    assert num_openings > 200


def characters() -> Codec:
    """One token per character, and some of several."""
    spelt = {c: None for text in [*reasoning_texts(), *REASONING] for c in text}
    vocab = {piece: i for i, piece in enumerate([*spelt, ".\n\n", "\n\n", " Wait", "</think>"])}
    tokenizer = Tokenizer(WordLevel(vocab))
    pattern = Regex(r"\.\n\n|\n\n| Wait|</think>|[\s\S]")
    tokenizer.pre_tokenizer = Split(pattern, "isolated")
    tokenizer.decoder = Fuse()
    return Codec(tokenizer)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_the_rollout_probes_where_the_reward_counts(chunk: int) -> None:
    codec, rule = characters(), structure_rule()
    for text in [*reasoning_texts(), *(t.replace("|", "") for t in REASONING)]:
        ids = codec.encode(text)
        thinking = Thinking(codec, rule, "</think>")
        found = [t for i in range(0, len(ids), chunk) for t in thinking.feed(ids[i : i + chunk])]
        found += thinking.finish()
        assert [t.index for t in found] == list(range(count_steps(text, rule) - 1))
        starts = [len(codec.decode(ids[: t.position])) for t in found]
        for start, (begin, _) in zip(starts, rule.openings(text), strict=True):
            assert start in (begin, begin - 1)  # before it at most the full stop that shares its token

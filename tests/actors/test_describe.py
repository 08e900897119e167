"""What people are shown of a group: places in its texts, probes with their answers, cuts."""

import dataclasses
import json
import math

import pytest
from scripted import Reply, ScriptedEngine, piece_codec, prompt_of, word_codec

from stepgrpo.actors.describe import describe
from stepgrpo.actors.rollout import Rollout
from stepgrpo.config import EvalConfig, ProbeConfig, RolloutConfig
from stepgrpo.reward.graded import grade_group
from stepgrpo.reward.outcome import ExactGrader

CLOSE = "</think>"
WORDS = word_codec()
SURE, UNSURE = -0.001, -0.4


def pieces(codec, *parts):
    ids = {codec.decode([i]): i for i in range(codec.tokenizer.get_vocab_size())}
    return [i for part in parts for i in ([ids[part]] if part in ids else codec.encode(part))]


async def described(engine, codec, prompt, probe, *, plain=None, size=1, truth="5", **fields):
    prompt = dataclasses.replace(prompt, truth=truth)
    config = RolloutConfig(**{"probe": probe, "max_response_tokens": 60, "think_ratio": None} | fields)
    rollout = Rollout(engine, codec, config, CLOSE, pieces(codec, "<eos>"), 0)
    group = await rollout.group(prompt, size, plain=plain)
    graded = await grade_group(group, ExactGrader(CLOSE), rollout.step_rule, CLOSE)
    line = describe(group, graded, codec, rollout.step_rule, CLOSE)
    assert json.loads(json.dumps(line)) == line
    return line, group


PROBE = ProbeConfig(inducer="\n Final \n \\boxed", closing=CLOSE, stop=["}"], require_close=False)
PROMPT = prompt_of(WORDS.encode("<bos> 4 + 5 = <think>"), 3)


def words(thinking, answers, final="\n Final \n \\boxed { 7 } <eos>"):
    """An engine that thinks so, and answers the probe at each place so."""

    def reply(request):
        if request.is_probe:
            text, *rest = answers[len(request.prompt) - PROMPT.num_tokens - len(WORDS.encode(PROBE.inducer))]
            return Reply(WORDS.encode(text), *rest)
        return Reply(WORDS.encode(thinking if len(request.prompt) == PROMPT.num_tokens else final))

    return ScriptedEngine(reply)


async def test_places_are_offsets_into_the_text_of_a_trajectory_that_was_cut():
    engine = words("4 Wait 5 Wait 6 </think> <eos>", {1: ("{ 4 }", UNSURE), 3: ("{ 5 }", SURE)})
    line, _ = await described(engine, WORDS, PROMPT, PROBE)
    assert (line["draw"], line["key"], line["truth"]) == (3, "test:3", "5")
    assert line["prompt"] == "<bos> 4 + 5 = <think>"
    (t,) = line["trajectories"]
    text = "4 Wait 5 </think> \n Final \n \\boxed { 7 } <eos>"
    assert t["text"] == text
    assert t["steps"] == [text.index("Wait")]
    assert (text[: t["cut"]], text[t["cut"] : t["closed"]]) == ("4 Wait 5", " </think>")
    assert t["probes"] == [
        {
            "at": len("4"),
            "confidence": round(math.exp(UNSURE), 4),
            "answer": "{ 4 }",
            "verdict": "declined",
            "correct": False,
        },
        {
            "at": len("4 Wait 5"),
            "confidence": round(math.exp(SURE), 4),
            "answer": "{ 5 }",
            "verdict": "confident",
            "correct": True,
        },
    ]
    assert (t["exit"], t["complete"], t["control"], t["correct"], t["answer"]) == ("confident", True, False, False, "7")
    assert (t["num_steps"], t["num_tokens"], t["reward"], t["advantage"]) == (2, 12, None, None)


async def test_a_trajectory_that_ended_by_itself_has_no_cut_and_a_budget_has_one_without_a_probe():
    engine = words("4 5 6 </think> \\boxed { 5 } <eos>", {})
    line, _ = await described(engine, WORDS, PROMPT, PROBE, size=2)
    for t in line["trajectories"]:
        assert (t["cut"], t["closed"], t["probes"], t["steps"]) == (None, None, [], [])
        assert (t["exit"], t["correct"], t["answer"]) == ("natural", True, "5")
    engine = words("4 5 6 7 8 9 " * 4, {})
    line, _ = await described(engine, WORDS, PROMPT, PROBE, max_response_tokens=20, think_ratio=0.2)
    (t,) = line["trajectories"]
    assert (t["exit"], t["text"][: t["cut"]], t["text"][t["cut"] : t["closed"]]) == ("budget", "4 5 6 7", " </think>")


async def test_probes_without_a_confidence_show_what_they_said_and_overtaken_ones_are_left_out():
    answers = {
        1: ("{ " + "4 " * 19, [SURE, *[-0.6] * 19]),  # hopeless
        3: ("{ 5 }", SURE, 1),  # stale
        5: ("{ 6 }", SURE),
        7: ("{ 7 }", SURE),
    }
    engine = words("4 Wait 5 Wait 6 Wait 7 Wait 8 </think> <eos>", answers)
    line, group = await described(engine, WORDS, PROMPT, PROBE)
    assert len(group.trajectories[0].probes) == 4, "the last one was asked too"
    shown = [(p["confidence"], p["answer"], p["verdict"], p["correct"]) for p in line["trajectories"][0]["probes"]]
    assert shown[:2] == [(None, "{ 4 4", "declined", None), (None, "{", "stale", None)]
    assert shown[2:] == [(round(math.exp(SURE), 4), "{ 6 }", "confident", False)]


async def test_a_control_sample_and_a_response_without_an_end_are_told_apart():
    engine = words("4 Wait 5 Wait 6", {})
    line, _ = await described(engine, WORDS, PROMPT, PROBE, control_fraction=1.0, max_response_tokens=5)
    (t,) = line["trajectories"]
    assert (t["control"], t["complete"], t["exit"], t["answer"], t["correct"]) == (True, False, "eos", None, False)
    assert t["steps"] == [i for i in range(len(t["text"])) if t["text"].startswith("Wait", i)]


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
async def test_places_are_characters_also_where_one_takes_several_tokens(chunk_size):
    codec = piece_codec()
    thinking, final = pieces(codec, "é→𝟝", ".\n\n", "Wait", " 中文", " Wait", " 5", "<eos>"), "é\\boxed{𝟝}"
    prompt = prompt_of(pieces(codec, "¿5?"))

    def reply(request):
        if request.is_probe:
            second = codec.decode(request.prompt).count("Wait") == 1
            return Reply(pieces(codec, "𝟝}", "<eos>"), SURE if second else -0.06)
        return Reply(thinking if len(request.prompt) == prompt.num_tokens else pieces(codec, final, "<eos>"))

    probe = ProbeConfig(inducer="\\boxed{", stop=["}"], closing=f"→{CLOSE}", require_close=False, skip_first=0)
    engine = ScriptedEngine(reply, chunk_size=chunk_size)
    fields = {"plain": EvalConfig(max_response_tokens=200, early_exit=True), "truth": "𝟝"}
    line, _ = await described(engine, codec, prompt, probe, **fields)
    assert line["prompt"] == "¿5?"
    (t,) = line["trajectories"]
    text = f"é→𝟝.\n\nWait 中文→{CLOSE}{final}<eos>"
    assert t["text"] == text
    assert t["steps"] == [text.index("Wait")]
    assert (text[: t["cut"]], text[t["cut"] : t["closed"]]) == ("é→𝟝.\n\nWait 中文", f"→{CLOSE}")
    assert [text[: p["at"]] for p in t["probes"]] == ["é→𝟝.\n\n", "é→𝟝.\n\nWait 中文"]
    assert [(p["answer"], p["correct"]) for p in t["probes"]] == [("𝟝}", True)] * 2
    assert (t["correct"], t["answer"]) == (True, "𝟝")

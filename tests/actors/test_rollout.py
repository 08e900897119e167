"""The rollout loop, over a scripted engine: every decision, and that none of them depends on timing."""

import asyncio
import math
import random

import numpy as np
import pytest
from scripted import Reply, ScriptedEngine, at_random, piece_codec, prompt_of, word_codec

from stepgrpo.actors.rollout import FIRST, LATER, Places, Rollout
from stepgrpo.actors.truncation import is_control, is_probed, seed_for
from stepgrpo.config import EvalConfig, ProbeConfig, RolloutConfig
from stepgrpo.reward.steps import count_steps
from stepgrpo.types import Exit, Verdict

CLOSE = "</think>"
WORDS = word_codec()
EOS = WORDS.encode("<eos>")[0]
PROMPT = prompt_of(WORDS.encode("<bos> 4 + 5 = <think>"))
INDUCER = "\n Final \n \\boxed"
CHUNK_SIZES = range(1, 10)
SURE, UNSURE = -0.001, -0.4


def settings(*, probe=True, **fields):
    """A configuration for the word tokenizer; fields of ``ProbeConfig`` by their own name."""
    names = [f for f in fields if f in ProbeConfig.model_fields]
    own = {"inducer": INDUCER, "closing": CLOSE, "stop": ["}"], "require_close": False}
    if fields.get("preset") == "paper":
        own = {"inducer": f"{CLOSE} {INDUCER}", "stop": ["}"]}
    config = ProbeConfig(**own | {name: fields.pop(name) for name in names}) if probe else None
    return RolloutConfig(**{"max_response_tokens": 40, "think_ratio": None, "probe": config} | fields)


def rollout(engine, *, run_seed=0, **fields):
    return Rollout(engine, WORDS, settings(**fields), CLOSE, [EOS], run_seed)


def asked_at(request, inducer=INDUCER):
    """The position a probe was asked at."""
    question = WORDS.encode(inducer)
    assert list(request.prompt[-len(question) :]) == question
    return len(request.prompt) - PROMPT.num_tokens - len(question)


def script(thinking, answers=None, final="\n Final \n \\boxed { 7 } <eos>", inducer=INDUCER):
    """Thinking as given; at each position a tentative answer with its log-probabilities (default: an unsure one)."""

    def reply(request):
        if request.is_probe:
            text, logprobs = (answers or {}).get(asked_at(request, inducer), ("{ 1 } <eos>", UNSURE))
            return Reply(WORDS.encode(text), logprobs)
        return Reply(WORDS.encode(thinking if len(request.prompt) == PROMPT.num_tokens else final))

    return reply


def response(trajectory):
    return WORDS.decode(trajectory.token_ids[trajectory.prompt_len :].tolist())


async def turns(num):
    for _ in range(num):
        await asyncio.sleep(0)


def probe_facts(trajectory):
    return [(p.trigger, p.position, p.verdict) for p in trajectory.probes]


# ---- one trajectory


NATURAL = "4 Wait 5 Wait 6 </think> \n Final \n \\boxed { 6 } <eos>"


async def test_a_natural_trajectory_is_one_request_and_its_probes():
    engine = ScriptedEngine(script("4 5 6 </think> \\boxed { 6 } <eos>"))
    t = await rollout(engine).trajectory(PROMPT, 0)
    assert (t.exit, t.complete, t.closing, t.probes, t.discarded_tokens) == (Exit.NATURAL, True, None, (), 0)
    assert response(t) == t.text == "4 5 6 </think> \\boxed { 6 } <eos>"
    assert [r.state for r in engine.requests] == ["finished"]


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
async def test_a_declined_probe_leaves_the_trajectory_as_sampled(chunk_size):
    engine = ScriptedEngine(script(NATURAL), chunk_size=chunk_size)
    t = await rollout(engine).trajectory(PROMPT, 0)
    assert response(t) == NATURAL
    assert t.sampled[t.prompt_len :].all()
    assert len(engine.others) == 1
    assert probe_facts(t) == [(0, 1, Verdict.DECLINED), (1, 3, Verdict.DECLINED)]


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
async def test_a_confident_probe_cuts_before_the_trigger_closes_and_samples_the_answer(chunk_size):
    engine = ScriptedEngine(script(NATURAL, {3: ("{ 5 }", SURE)}), chunk_size=chunk_size)
    t = await rollout(engine).trajectory(PROMPT, 0)
    assert response(t) == "4 Wait 5 </think> \n Final \n \\boxed { 7 } <eos>"
    assert (t.exit, t.complete) == (Exit.CONFIDENT, True)
    n = t.prompt_len
    assert t.closing == (n + 3, n + 4)
    assert np.flatnonzero(~t.sampled[n:]).tolist() == [3]
    assert [p.confidence for p in t.probes] == pytest.approx([math.exp(UNSURE), math.exp(SURE)])
    assert probe_facts(t)[:2] == [(0, 1, Verdict.DECLINED), (1, 3, Verdict.CONFIDENT)]
    assert t.probes[1].token_ids == tuple(WORDS.encode("{ 5 }"))
    answer = engine.others[1]
    assert list(answer.prompt) == WORDS.encode("<bos> 4 + 5 = <think> 4 Wait 5 </think>")
    assert answer.sampling.max_tokens == 40 - 4
    assert t.discarded_tokens == len(engine.others[0].sent) - 3


async def test_probes_and_answers_go_before_thinking_and_only_probes_are_greedy():
    engine = ScriptedEngine(script(NATURAL, {3: ("{ 5 }", SURE)}))
    await rollout(engine, temperature=0.7, top_p=0.9, run_seed=3).trajectory(PROMPT, 2)
    thinking, answer = engine.others
    assert (thinking.sampling.priority, answer.sampling.priority) == (LATER, FIRST)
    assert thinking.sampling.max_tokens == 40
    for request, segment in ((thinking, 0), (answer, 1)):
        assert (request.sampling.temperature, request.sampling.top_p) == (0.7, 0.9)
        assert request.sampling.seed == seed_for(3, PROMPT.draw, 2, segment)
        assert request.sampling.stop_token_ids == (EOS,)
    for probe in engine.probes:
        assert (probe.sampling.priority, probe.sampling.seed, probe.sampling.max_tokens) == (FIRST, None, 20)
        assert set(probe.sampling.stop_token_ids) == {EOS, *WORDS.encode("}")}


# ---- order


async def test_the_earlier_confident_probe_wins_though_the_later_answers_first():
    later_answered = asyncio.Event()

    async def pace(request):
        if request.is_probe and asked_at(request) == 1:
            await later_answered.wait()
        elif request.is_probe and len(request.sent) == 2:
            later_answered.set()
        await asyncio.sleep(0)

    engine = ScriptedEngine(script(NATURAL, {1: ("{ 4 }", SURE), 3: ("{ 5 }", SURE)}), pace=pace)
    t = await rollout(engine).trajectory(PROMPT, 0)
    assert later_answered.is_set()
    assert response(t).startswith("4 </think>")
    assert probe_facts(t) == [(0, 1, Verdict.CONFIDENT), (1, 3, Verdict.UNUSED)]
    assert math.isnan(t.probes[1].confidence) and t.probes[1].token_ids == ()


@pytest.mark.parametrize("thinking", [NATURAL, "4 Wait 5 <eos>", "4 Wait 5 Wait 6 7 8 9 " * 5])
async def test_a_thinking_that_ended_waits_for_its_earlier_probes(thinking):
    ended = asyncio.Event()

    async def pace(request):
        if request.is_probe:
            await ended.wait()
        await asyncio.sleep(0)

    engine = ScriptedEngine(script(thinking, {1: ("{ 4 }", SURE)}), pace=pace)
    task = asyncio.create_task(rollout(engine, think_ratio=0.5).trajectory(PROMPT, 0))
    await turns(200)
    assert engine.others[0].state != "open"
    assert not task.done()
    ended.set()
    t = await task
    assert (t.exit, t.text.split()[:2]) == (Exit.CONFIDENT, ["4", CLOSE])


async def test_probes_that_are_open_at_a_decision_are_aborted_and_so_is_thinking():
    both_open = asyncio.Event()

    async def pace(request):
        if request.is_probe and asked_at(request) == 3:
            both_open.set()
            await asyncio.Event().wait()
        elif request.is_probe:
            await both_open.wait()
        await asyncio.sleep(0)

    engine = ScriptedEngine(script("4 Wait 5 Wait 6 " * 8, {1: ("{ 4 }", SURE)}), pace=pace)
    t = await rollout(engine).trajectory(PROMPT, 0)
    thinking, answer = engine.others
    assert (thinking.state, answer.state) == ("aborted", "finished")
    assert [(asked_at(p), p.state) for p in engine.probes][:2] == [(1, "finished"), (3, "aborted")]
    assert t.probe_tokens == len(engine.probes[0].sent), "the probe that decided"
    assert t.discarded_tokens == len(thinking.sent) - 1 + sum(len(p.sent) for p in engine.probes[1:])


# ---- budgets


@pytest.mark.parametrize("probe", [True, False])
async def test_the_budget_cut_is_exact_for_every_chunk_size(probe):
    for chunk_size in CHUNK_SIZES:
        engine = ScriptedEngine(script("4 5 6 7 8 9 Wait 1 " * 5), chunk_size=chunk_size)
        t = await rollout(engine, probe=probe, max_response_tokens=20, think_ratio=0.5).trajectory(PROMPT, 0)
        assert response(t) == "4 5 6 7 8 9 Wait 1 4 5 </think> \n Final \n \\boxed { 7 } <eos>"
        assert (t.exit, t.complete) == (Exit.BUDGET, True)
        assert t.closing == (t.prompt_len + 10, t.prompt_len + 11)
        assert t.discarded_tokens == len(engine.others[0].sent) - 10
        assert engine.others[0].state == "aborted"


async def test_the_response_never_exceeds_its_limit_and_then_is_not_complete():
    for limit in range(2, 16):
        engine = ScriptedEngine(script("4 5 6 7 8 9 " * 4, final="1 " * 20))
        t = await rollout(engine, max_response_tokens=limit, think_ratio=0.9).trajectory(PROMPT, 0)
        assert t.num_tokens == limit
        assert (t.exit, t.complete) == (Exit.BUDGET, False)
        assert t.closing == (t.prompt_len + min(int(0.9 * limit), limit - 1), t.closing[1])


async def test_without_room_for_an_answer_none_is_requested():
    engine = ScriptedEngine(script("4 5 6 7 8 9 " * 4))
    t = await rollout(engine, max_response_tokens=10).trajectory(PROMPT, 0)
    assert (t.exit, t.complete, t.num_tokens) == (Exit.EOS, False, 10)
    engine = ScriptedEngine(script("4 5 6 7 8 9 " * 4))
    t = await rollout(engine, max_response_tokens=10, think_ratio=1.0).trajectory(PROMPT, 0)
    assert (t.exit, t.complete, t.num_tokens, len(engine.requests)) == (Exit.BUDGET, False, 10, 1)


def test_a_limit_that_leaves_no_token_to_think_is_refused():
    with pytest.raises(ValueError, match=r"rollout\.max_response_tokens: got 1"):
        rollout(ScriptedEngine(script("")), max_response_tokens=1, think_ratio=0.9)


async def test_an_exit_whose_closing_does_not_fit_is_declined():
    engine = ScriptedEngine(script("4 5 6 Wait 1 2", {3: ("{ 5 }", SURE)}))
    t = await rollout(engine, max_response_tokens=6, closing=f"{CLOSE} \n Final \n").trajectory(PROMPT, 0)
    assert (t.exit, response(t)) == (Exit.EOS, "4 5 6 Wait 1 2")
    assert probe_facts(t) == [(0, 3, Verdict.DECLINED)]


async def test_eos_inside_thinking_ends_the_response():
    t = await rollout(ScriptedEngine(script("4 Wait 5 <eos>"))).trajectory(PROMPT, 0)
    assert (t.exit, t.complete, t.closing, response(t)) == (Exit.EOS, True, None, "4 Wait 5 <eos>")


async def test_equal_steps_close_thinking_where_that_is_on():
    thinking = "4 Wait 5 + 5 Wait 5 + 5 Wait 5 + 5 Wait 6 " * 3
    for chunk_size in CHUNK_SIZES:
        engine = ScriptedEngine(script(thinking), chunk_size=chunk_size)
        t = await rollout(engine, repetition_limit=3).trajectory(PROMPT, 0)
        assert t.exit is Exit.REPETITION
        assert response(t) == "4 Wait 5 + 5 Wait 5 + 5 Wait 5 + 5 </think> \n Final \n \\boxed { 7 } <eos>"


# ---- which triggers are probed


async def test_control_samples_are_never_probed_and_are_told_apart():
    engine = ScriptedEngine(script(NATURAL, {1: ("{ 4 }", SURE)}))
    group = await rollout(engine, control_fraction=0.5).group(PROMPT, 12)
    controls = [is_control(0, PROMPT.draw, i, 0.5) for i in range(12)]
    assert {True, False} == set(controls)
    assert [t.control for t in group.trajectories] == controls
    assert [t.exit is Exit.NATURAL for t in group.trajectories] == controls
    assert all(not t.probes for t in group.trajectories if t.control)


async def test_each_trigger_is_probed_or_not_by_its_index_and_the_seed():
    thinking = "4 " + "Wait 5 " * 12 + "</think> <eos>"
    engine = ScriptedEngine(script(thinking), pace=at_random(0))
    for sample in range(5):
        t = await rollout(engine, probability=0.5, max_probes=99).trajectory(PROMPT, sample)
        assert [p.trigger for p in t.probes] == [k for k in range(12) if is_probed(0, 0, sample, k, 0.5)]


async def test_a_trigger_that_is_the_last_token_is_probed_too():
    engine = ScriptedEngine(script("4 5 Wait", {2: ("{ 9 }", SURE)}))
    t = await rollout(engine, max_response_tokens=3).trajectory(PROMPT, 0)
    assert (t.exit, t.complete, response(t)) == (Exit.CONFIDENT, False, "4 5 </think>")


async def test_at_most_max_probes_triggers_are_probed_the_first_ones():
    engine = ScriptedEngine(script("4 " + "Wait 5 " * 12 + "</think> <eos>"))
    t = await rollout(engine, max_probes=3).trajectory(PROMPT, 0)
    assert [p.trigger for p in t.probes] == [0, 1, 2]
    assert len(engine.probes) == 3


async def test_triggers_after_thinking_closed_are_not_probed():
    engine = ScriptedEngine(script("4 </think> 5 Wait 6 </think> Wait <eos>", {3: ("{ 5 }", SURE)}), chunk_size=4)
    t = await rollout(engine).trajectory(PROMPT, 0)
    assert (t.exit, t.probes) == (Exit.NATURAL, ())


async def test_an_answers_own_triggers_and_closes_change_nothing():
    final = "5 Wait 6 Wait 6 Wait 6 Wait </think> 6 <eos>"
    engine = ScriptedEngine(script(NATURAL, {1: ("{ 4 }", SURE)}, final=final))
    t = await rollout(engine, think_ratio=0.2, repetition_limit=2).trajectory(PROMPT, 0)
    assert response(t) == "4 </think> " + final
    assert (t.exit, t.closing) == (Exit.CONFIDENT, (t.prompt_len + 1, t.prompt_len + 2))


# ---- what a probe's answer means


@pytest.mark.parametrize("versions", [[1, 1, 1], [0, 0, 1]])
async def test_a_probe_of_other_weights_than_its_triggers_is_declined_as_stale(versions):
    def reply(request):
        if request.is_probe:
            return Reply(WORDS.encode("{ 4 }"), SURE, versions)
        return Reply(WORDS.encode(NATURAL), SURE, [0, 0, 0, 1, *[1] * 20][: len(WORDS.encode(NATURAL))])

    t = await rollout(ScriptedEngine(reply)).trajectory(PROMPT, 0)
    assert probe_facts(t)[0] == (0, 1, Verdict.STALE)
    assert t.probes[1].verdict is (Verdict.CONFIDENT if versions[0] else Verdict.STALE)
    assert math.isnan(t.probes[0].confidence)


async def test_spans_follow_the_versions_and_a_closing_counts_with_what_it_closes():
    def reply(request):
        if request.is_probe:
            return Reply(WORDS.encode("{ 4 }"), SURE if asked_at(request) == 3 else UNSURE, 2)
        if len(request.prompt) == PROMPT.num_tokens:
            ids = WORDS.encode(NATURAL)
            return Reply(ids, SURE, [1, 2, *[2] * (len(ids) - 2)])
        return Reply(WORDS.encode("6 <eos>"), SURE, 3)

    t = await rollout(ScriptedEngine(reply)).trajectory(PROMPT, 0)
    assert [(s.version, s.start, s.end) for s in t.spans] == [(1, 0, 1), (2, 1, 4), (3, 4, 6)]


async def test_the_first_token_does_not_count_where_the_preset_skips_it():
    engine = ScriptedEngine(script(NATURAL, {1: ("{ 4 }", [UNSURE, SURE, SURE])}))
    assert (await rollout(engine).trajectory(PROMPT, 0)).exit is Exit.CONFIDENT
    assert (await rollout(engine, skip_first=0).trajectory(PROMPT, 0)).exit is Exit.NATURAL


async def test_an_answer_that_must_close_and_does_not_has_no_confidence():
    engine = ScriptedEngine(script(NATURAL, {1: ("{ 4 5 6", SURE), 3: ("{ 4 }", SURE)}))
    t = await rollout(engine, require_close=True, max_tokens=4).trajectory(PROMPT, 0)
    assert [(p.verdict, p.confidence) for p in t.probes[:2]] == [
        (Verdict.DECLINED, 0.0),
        (Verdict.CONFIDENT, pytest.approx(math.exp(SURE))),
    ]


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
async def test_a_hopeless_probe_stops_at_the_token_that_makes_it_so(chunk_size):
    thinking = "4 Wait " + "5 " * 30 + "</think> <eos>"
    engine = ScriptedEngine(script(thinking, {1: ("{ " + "4 " * 19, [SURE, *[-0.3] * 19])}), chunk_size=chunk_size)
    t = await rollout(engine, delta=0.95).trajectory(PROMPT, 0)
    # 19 tokens may count and 19 * ln 0.95 is -0.97: the fourth of -0.3 is one too many.
    assert t.probes[0].token_ids == tuple(WORDS.encode("{ 4 4 4 4"))
    assert math.isnan(t.probes[0].confidence)
    assert t.probes[0].verdict is Verdict.DECLINED
    assert len(engine.probes[0].sent) < 5 + chunk_size
    assert engine.probes[0].state == "aborted"


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
async def test_an_answer_decoded_to_its_end_has_its_confidence_though_it_was_lost_at_the_last_token(chunk_size):
    engine = ScriptedEngine(script(NATURAL, {1: ("{ 4 5", [SURE, -0.05, -0.06])}), chunk_size=chunk_size)
    t = await rollout(engine, max_tokens=3).trajectory(PROMPT, 0)
    assert t.probes[0].verdict is Verdict.DECLINED
    assert t.probes[0].confidence == pytest.approx(math.exp(-0.055))


async def test_a_stop_text_in_several_tokens_or_inside_one_ends_a_probe():
    codec = piece_codec()
    piece = {codec.decode([i]): i for i in range(codec.tokenizer.get_vocab_size())}
    prompt = prompt_of([piece["x"]])

    def reply(request):
        if request.is_probe:
            return Reply([piece[p] for p in tail], SURE)
        thinking = ["4", " Wait", " ", "5"] if len(request.prompt) == 1 else []
        return Reply([piece[p] for p in [*thinking, "<eos>"]], SURE)

    for tail in (["{", "4", "}.", "4", "4"], ["{", "4", "</th", "ink>", "}", "4"]):
        for chunk_size in CHUNK_SIZES:
            config = RolloutConfig(probe=ProbeConfig(stop=["}", CLOSE], max_tokens=len(tail)), max_response_tokens=99)
            engine = ScriptedEngine(reply, chunk_size=chunk_size)
            t = await Rollout(engine, codec, config, CLOSE, [piece["<eos>"]], 0).trajectory(prompt, 0)
            assert t.exit is Exit.CONFIDENT
            assert codec.decode(t.probes[0].token_ids) == ("{4}." if "}." in tail else f"{{4{CLOSE}")
            assert t.text == f"4{CLOSE}\n\n<eos>"


# ---- presets


async def test_deer_samples_the_answer_anew():
    engine = ScriptedEngine(script(NATURAL, {1: ("{ 4 }", SURE)}))
    t = await rollout(engine, preset="deer").trajectory(PROMPT, 0)
    assert response(t) == "4 </think> \n Final \n \\boxed { 7 } <eos>"


async def test_paper_keeps_the_tentative_answer_and_goes_on_from_it():
    inducer = f"{CLOSE} {INDUCER}"
    engine = ScriptedEngine(script(NATURAL, {1: ("{ 4 }", SURE)}, final="<eos>", inducer=inducer))
    t = await rollout(engine, preset="paper").trajectory(PROMPT, 0)
    assert response(t) == "4 </think> \n Final \n \\boxed { 4 } <eos>"
    assert t.closing == (t.prompt_len + 1, t.prompt_len + 9)
    assert (t.complete, len(engine.others)) == (True, 2)


async def test_paper_needs_no_answer_request_where_the_tentative_answer_ended_with_eos():
    inducer = f"{CLOSE} {INDUCER}"
    engine = ScriptedEngine(script(NATURAL, {1: ("{ 4 } <eos>", SURE)}, inducer=inducer))
    t = await rollout(engine, preset="paper", stop=[]).trajectory(PROMPT, 0)
    assert response(t) == "4 </think> \n Final \n \\boxed { 4 } <eos>"
    assert (t.complete, len(engine.others)) == (True, 1)


@pytest.mark.parametrize(
    ("fields", "named"), [({"inducer": "Final Answer"}, "Answer"), ({"stop": ["]"]}, "]"), ({"closing": None}, "think")]
)
def test_forced_text_that_the_tokenizer_cannot_spell_is_refused_at_the_start(fields, named):
    with pytest.raises(ValueError, match="cannot encode") as refused:
        rollout(ScriptedEngine(script("")), **fields)
    assert named in str(refused.value)


# ---- other policies through the same loop


async def test_a_fixed_budget_policy_exits_without_asking():
    for chunk_size in CHUNK_SIZES:
        engine = ScriptedEngine(script("4 Wait 5 Wait 6 Wait 7 </think> <eos>"), chunk_size=chunk_size)
        sampler = rollout(engine, policy="examples.own:FixedBudget", options={"steps": 2}, max_probes=1)
        t = await sampler.trajectory(PROMPT, 0)
        assert response(t) == "4 Wait 5 </think> \n Final \n \\boxed { 7 } <eos>"
        assert engine.probes == []
        assert probe_facts(t) == [(0, 1, Verdict.DECLINED), (1, 3, Verdict.CONFIDENT)]


async def test_a_consistency_policy_sees_the_answers_in_token_order():
    answers = {p: (f"{{ {d} }}", UNSURE) for p, d in ((1, 4), (3, 5), (5, 5), (7, 4), (9, 4), (11, 4))}
    for seed in range(20):
        engine = ScriptedEngine(script("4 " + "Wait 5 " * 6 + "</think> <eos>", answers), pace=at_random(seed))
        t = await rollout(engine, policy="examples.own:Consistency", options={"times": 3}).trajectory(PROMPT, 0)
        assert (t.exit, t.closing) == (Exit.CONFIDENT, (t.prompt_len + 11, t.prompt_len + 12))


# ---- plain decoding


async def test_plain_decoding_is_one_request_with_the_evaluations_sampling():
    engine = ScriptedEngine(script(NATURAL, {1: ("{ 4 }", SURE)}))
    plain = EvalConfig(temperature=0.6, top_p=0.95, max_response_tokens=100)
    sampler = rollout(engine, think_ratio=0.01, max_response_tokens=200, repetition_limit=2, control_fraction=1.0)
    group = await sampler.group(PROMPT, 3, plain=plain)
    assert [response(t) for t in group.trajectories] == [NATURAL] * 3
    assert all((t.exit, t.probes, t.control) == (Exit.NATURAL, (), False) for t in group.trajectories)
    assert len(engine.requests) == 3
    for request in engine.requests:
        s = request.sampling
        assert (s.temperature, s.top_p, s.max_tokens) == (0.6, 0.95, 100)


EARLY_EXIT = EvalConfig(temperature=0.6, top_p=0.95, max_response_tokens=100, early_exit=True)


async def test_plain_decoding_with_early_exit_ends_thinking_at_a_confident_probe_and_has_no_control_samples():
    engine = ScriptedEngine(script(NATURAL, {3: ("{ 5 }", SURE)}))
    group = await rollout(engine, control_fraction=1.0, temperature=0.9).group(PROMPT, 3, plain=EARLY_EXIT)
    assert {response(t) for t in group.trajectories} == {"4 Wait 5 </think> \n Final \n \\boxed { 7 } <eos>"}
    for t in group.trajectories:
        assert (t.exit, t.control) == (Exit.CONFIDENT, False)
        assert probe_facts(t)[:2] == [(0, 1, Verdict.DECLINED), (1, 3, Verdict.CONFIDENT)]
    thinking_and_answers = [(r.sampling.temperature, r.sampling.top_p) for r in engine.others]
    assert thinking_and_answers == [(0.6, 0.95)] * 6
    assert sorted(r.sampling.max_tokens for r in engine.others) == [96] * 3 + [100] * 3


async def test_plain_decoding_with_early_exit_forces_nothing_else():
    thinking = "4 " + "Wait 5 5 5 " * 20 + "</think> <eos>"
    sampler = rollout(ScriptedEngine(script(thinking)), think_ratio=0.1, repetition_limit=2, max_probes=5)
    plain = await sampler.trajectory(PROMPT, 0, plain=EARLY_EXIT)
    assert (plain.exit, plain.closing, response(plain)) == (Exit.NATURAL, None, thinking)
    assert [p.verdict for p in plain.probes] == [Verdict.DECLINED] * 5
    training = await sampler.trajectory(PROMPT, 0)
    assert training.exit is Exit.BUDGET, "what is off here would have forced it"


# ---- the released code's faults (method.md, section 6)


async def test_fault_1_a_trigger_is_in_the_context_once_and_never_before_a_forced_close():
    """Eight triggers are eight triggers, and an exit at the first leaves none, so that the step reward points right."""
    natural = "4 " + "Wait 5 " * 8 + "</think> <eos>"
    t = await rollout(ScriptedEngine(script(natural))).trajectory(PROMPT, 0)
    assert count_steps(t.text) == 1 + 8
    t = await rollout(ScriptedEngine(script(natural, {1: ("{ 4 }", SURE)}, final="5 <eos>"))).trajectory(PROMPT, 0)
    assert t.text == "4 </think> 5 <eos>"
    assert count_steps(t.text) == 1


async def test_fault_4_equal_steps_with_repeated_words_are_found_and_different_ones_reset_the_count():
    loop = "4 Wait 5 5 Wait 6 Wait 5 5 Wait 5 5 Wait 5 5 Wait 1 </think> <eos>"
    t = await rollout(ScriptedEngine(script(loop)), repetition_limit=3).trajectory(PROMPT, 0)
    assert (t.exit, t.closing) == (Exit.REPETITION, (t.prompt_len + 15, t.prompt_len + 16))


async def test_fault_5_no_eos_is_appended_that_was_not_sampled():
    for thinking, final in (("4 5 " * 20, "1 " * 40), ("4 5 6 </think> " + "7 " * 36, "")):
        t = await rollout(ScriptedEngine(script(thinking, final=final)), think_ratio=0.5).trajectory(PROMPT, 0)
        assert EOS not in t.token_ids
        assert (t.complete, t.num_tokens) == (False, 40)


async def test_fault_6_sampled_ids_are_never_encoded_again():
    """The pieces " Wa" "it" and "</th" "ink>" would come back as other ids if their text were encoded."""
    codec = piece_codec()
    piece = {codec.decode([i]): i for i in range(codec.tokenizer.get_vocab_size())}
    sampled = [piece[p] for p in ("4", " ", "Wa", "it", " Wait", ".\n\n", "Wait", " ", "5")]
    answer = [piece[p] for p in ("Wa", "it", "<eos>")]
    assert codec.encode(codec.decode(sampled)) != sampled
    prompt = prompt_of(sampled)  # whose text would change as well

    def reply(request):
        if request.is_probe:
            return Reply([piece["4"], piece["}"]], SURE if codec.decode(request.prompt).count("Wait") == 5 else UNSURE)
        return Reply([*sampled, piece["<eos>"]] if len(request.prompt) == len(sampled) else answer)

    engine = ScriptedEngine(reply, chunk_size=2)
    config = RolloutConfig(probe=ProbeConfig(stop=["}"]))
    t = await Rollout(engine, codec, config, CLOSE, [piece["<eos>"]], 0).trajectory(prompt, 0)
    assert t.exit is Exit.CONFIDENT
    closing = codec.encode(f"{CLOSE}\n\n")
    assert t.token_ids.tolist() == sampled + sampled[:6] + closing + answer
    assert all(list(r.prompt[: len(sampled)]) == sampled for r in engine.requests)
    assert list(engine.others[1].prompt) == sampled + sampled[:6] + closing


async def test_fault_7_a_group_of_several_samples_is_probed_only_where_it_is_not_plain():
    engine = ScriptedEngine(script(NATURAL, {1: ("{ 4 }", SURE)}))
    training = await rollout(engine).group(PROMPT, 4)
    assert {t.exit for t in training.trajectories} == {Exit.CONFIDENT}
    validation = await rollout(engine).group(PROMPT, 4, plain=EvalConfig(max_response_tokens=40))
    assert {t.exit for t in validation.trajectories} == {Exit.NATURAL}


async def test_fault_8_the_budget_closes_alike_with_and_without_probing():
    def run(**fields):
        engine = ScriptedEngine(script("4 Wait 5 6 7 8 9 Wait 1 2 " * 4))
        return rollout(engine, think_ratio=0.5, max_response_tokens=20, **fields).trajectory(PROMPT, 0)

    trajectories = [
        await run(),
        await run(probe=False),
        await run(control_fraction=1.0),
        await run(preset="paper"),
        await run(closing=f"{CLOSE} \n"),
    ]
    assert {t.exit for t in trajectories} == {Exit.BUDGET}
    assert len({response(t) for t in trajectories}) == 1


# ---- failures


async def test_cancelling_a_group_closes_all_its_requests():
    async def pace(request):
        if request.is_probe:
            await asyncio.Event().wait()
        await asyncio.sleep(0)

    engine = ScriptedEngine(script("4 Wait 5 Wait 6 " * 200), pace=pace)
    task = asyncio.create_task(rollout(engine, max_response_tokens=900).group(PROMPT, 4))
    await turns(50)
    assert len(engine.probes) > 8
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert {r.state for r in engine.requests} == {"aborted"}


@pytest.mark.parametrize("where", ["thinking", "probe", "answer"])
async def test_the_first_failure_is_raised_once_all_requests_are_closed(where):
    class Broken(Exception):
        pass

    lines = script("4 Wait 5 Wait 6 " * 100, {3: ("{ 5 }", SURE)})
    failed = False

    async def pace(request):
        nonlocal failed
        segment = "probe" if request.is_probe else "thinking" if len(request.prompt) == PROMPT.num_tokens else "answer"
        if segment == where and len(request.sent) == 2 and not failed:
            failed = True
            raise Broken("first")
        await asyncio.sleep(0)

    engine = ScriptedEngine(lines, pace=pace)
    with pytest.raises(Broken, match="first"):
        await rollout(engine, max_response_tokens=300).group(PROMPT, 4)
    assert [r.state for r in engine.requests].count("failed") == 1
    assert "open" not in {r.state for r in engine.requests}


# ---- places


async def test_trajectories_take_places_in_the_order_of_their_draws_and_leave_them_before_their_groups_end():
    most = 0

    def thinking(request):
        nonlocal most
        most = max(most, [r.state for r in engine.requests].count("open"))
        long = request.sampling.seed == seed_for(0, 0, 0, 0)
        return Reply(WORDS.encode("4 " * (30 if long else 3) + "<eos>"))

    engine = ScriptedEngine(thinking)
    one = rollout(engine, probe=False)
    one.places = Places(3)
    groups = [asyncio.create_task(one.group(prompt_of(PROMPT.token_ids, draw), 2)) for draw in (0, 9, 5, 3)]
    done, _ = await asyncio.wait(groups, return_when=asyncio.FIRST_COMPLETED)
    assert most == 3 and groups[0] not in done, "the first group's long trajectory outlasts others"
    await asyncio.gather(*groups)
    begun = [r.sampling.seed for r in engine.requests]
    assert begun == [
        seed_for(0, draw, i, 0) for draw, i in ((0, 0), (0, 1), (9, 0), (3, 0), (3, 1), (5, 0), (5, 1), (9, 1))
    ]
    assert most == 3


async def test_a_group_that_is_cancelled_gives_back_its_places_and_those_it_waited_for():
    engine = ScriptedEngine(script("4 " * 20 + "<eos>"))
    one = rollout(engine, probe=False)
    one.places = Places(3)
    for turn in range(30):  # at whatever it is just then
        cancelled = asyncio.create_task(one.group(PROMPT, 5))
        other = asyncio.create_task(one.group(PROMPT, 5))
        await turns(turn)
        cancelled.cancel()
        assert len((await other).trajectories) == 5
        assert one.places._free == 3
        assert not [r for r in engine.requests if r.state == "open"]


async def test_an_evaluation_has_the_next_places():
    engine = ScriptedEngine(script(NATURAL))
    one = rollout(engine, probe=False)
    one.places = Places(1)
    plain = EvalConfig(max_response_tokens=40)
    draws = [asyncio.create_task(one.trajectory(PROMPT, i)) for i in range(3)]
    await turns(3)
    held_out = await one.trajectory(PROMPT, 0, plain=plain)
    assert held_out.text == NATURAL and [d.done() for d in draws] == [True, False, False]
    await asyncio.gather(*draws)


async def test_places_are_emptied_before_weights_change_and_nobody_begins_until_they_have():
    engine = ScriptedEngine(script("4 " * 20 + "<eos>"))
    one = rollout(engine, probe=False)
    one.places = Places(3)
    groups = [asyncio.create_task(one.group(prompt_of(PROMPT.token_ids, draw), 2)) for draw in range(4)]
    await turns(4)
    assert [r.state for r in engine.requests] == ["open"] * 3
    async with one.places.empty():
        assert len(engine.requests) == 3 and not [r for r in engine.requests if r.state == "open"]
        groups.append(asyncio.create_task(one.group(prompt_of(PROMPT.token_ids, 4), 2)))
        await turns(20)
        assert len(engine.requests) == 3 and not any(g.done() for g in groups[1:])
    await asyncio.gather(*groups)
    async with one.places.empty():  # at once: nobody has one
        assert len(engine.requests) == 10


async def test_a_change_of_weights_that_is_given_up_leaves_the_places_open():
    engine = ScriptedEngine(script("4 " * 20 + "<eos>"))
    one = rollout(engine, probe=False)
    one.places = Places(1)
    group = asyncio.create_task(one.group(PROMPT, 2))
    await turns(3)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0), one.places.empty():
            pytest.fail("the places were not empty")
    assert len((await group).trajectories) == 2


# ---- nothing depends on timing


def random_lines(codec, tokens, weights, answers, eos):
    """A policy that samples words at random, by its prompt and seed; probes are often sure, and some of them stale."""

    def reply(request):
        rng = random.Random(repr((request.prompt, request.sampling.seed)))
        n = request.sampling.max_tokens
        if request.is_probe:
            ids = rng.choice(answers)
            logprob = rng.choice((SURE, -0.04, -0.06, UNSURE, UNSURE, UNSURE))
            return Reply([*ids, *[eos] * (n - len(ids))][:n], [logprob * rng.uniform(0.5, 1.5) for _ in range(n)], 0)
        ids = rng.choices(tokens, weights, k=n)
        versions = [int(rng.random() < 0.1) if i > 30 else 0 for i in range(n)]
        return Reply(ids, [-rng.random() for _ in range(n)], versions)

    return reply


def decided(trajectory):
    """Everything but what was thrown away."""
    t = trajectory
    probes = tuple(
        (p.trigger, p.position, repr(p.confidence), p.token_ids, p.verdict)
        for p in t.probes
        if p.verdict is not Verdict.UNUSED
    )
    arrays = (t.token_ids.tobytes(), t.logprobs.tobytes(), t.sampled.tobytes())
    return (*arrays, t.text, t.exit, t.closing, t.complete, t.control, t.spans, probes)


def word_case():
    def ids(text):
        return WORDS.encode(text)

    weights = {"Wait": 8, "Waiting": 2, "4": 16, "so": 2, CLOSE: 0.4, "<eos>": 0.3}
    answers = [ids(a) for a in ("{ 4 }", "{ 4 5 }", "{ 4 5 6 7 8 9", "}", "<eos>")]
    tokens = [ids(w)[0] for w in weights]
    config = {"inducer": INDUCER, "stop": ["}"], "closing": CLOSE, "require_close": False, "max_tokens": 6}
    return WORDS, tokens, list(weights.values()), answers, ids("<eos>")[0], ProbeConfig(**config)


def piece_case():
    codec = piece_codec()
    piece = {codec.decode([i]): i for i in range(codec.tokenizer.get_vocab_size())}
    weights = {
        " Wait": 5,
        "Wa": 5,
        "it": 4,
        "ing": 2,
        "\n\nWait": 2,
        " ": 5,
        "4": 9,
        "</th": 2,
        "ink>": 2,
        "<eos>": 0.5,
    }
    answers = [[piece[p] for p in a] for a in (["{", "4", "}."], ["4", "</th", "ink>"], [*"{45678"], ["<eos>"])]
    tokens = [piece[p] for p in weights]
    config = ProbeConfig(stop=["}", CLOSE], max_tokens=6)
    return codec, tokens, list(weights.values()), answers, piece["<eos>"], config


@pytest.mark.parametrize("preset", ["deer", "paper"])
@pytest.mark.parametrize("case", [word_case, piece_case])
async def test_results_do_not_depend_on_chunk_sizes_or_on_the_order_of_arrival(case, preset):
    codec, tokens, weights, answers, eos, probe = case()
    if preset == "paper":
        question = CLOSE if case is piece_case else f"{CLOSE} {INDUCER}"
        probe = probe.model_copy(update={"preset": "paper", "inducer": question, "closing": None})
    config = RolloutConfig(
        probe=probe.model_copy(update={"probability": 0.7, "max_probes": 5}),
        max_response_tokens=60,
        think_ratio=0.7,
        control_fraction=0.2,
        repetition_limit=2,
    )
    exits = set()
    for draw in range(16):
        prompt = prompt_of(tokens[:3], draw)
        results = []
        for chunk_size in CHUNK_SIZES:
            lines = random_lines(codec, tokens, weights, answers, eos)
            engine = ScriptedEngine(lines, chunk_size=chunk_size, pace=at_random(draw * 10 + chunk_size))
            places = Places(chunk_size)
            group = await Rollout(engine, codec, config, CLOSE, [eos], run_seed=5, places=places).group(prompt, 5)
            results.append([decided(t) for t in group.trajectories])
            assert "open" not in {r.state for r in engine.requests}
            for t in group.trajectories:
                exits.add(t.exit)
                check_against_requests(t, engine, codec, config)
        assert all(r == results[0] for r in results)
    assert exits == set(Exit)


def check_against_requests(t, engine, codec, config):
    """Sampled tokens are those that thinking and answer requests sent; nothing of a probe is among them."""
    ids, n = t.token_ids.tolist(), t.prompt_len
    assert t.num_tokens <= config.max_response_tokens
    start = t.closing[0] if t.closing else len(ids)
    assert any(r.sent[: start - n] == ids[n:start] for r in engine.others if len(r.prompt) == n)
    if t.closing and t.closing[1] < len(ids):
        assert any(list(r.prompt) == ids[: t.closing[1]] and r.sent == ids[t.closing[1] :] for r in engine.others)
    if t.exit is Exit.BUDGET:
        assert t.closing[0] - n == int(0.7 * config.max_response_tokens)
    if t.control:
        assert not t.probes
        assert t.exit is not Exit.CONFIDENT


async def test_a_natural_trajectory_shows_the_rollout_as_many_triggers_as_the_reward_counts():
    codec, tokens, weights, _, eos, probe = piece_case()
    config = RolloutConfig(probe=probe.model_copy(update={"max_probes": 999, "delta": 0.9999}), max_response_tokens=80)
    close = codec.encode(CLOSE)
    counted = []
    for draw in range(40):
        rng = random.Random(draw)
        thinking = [i for i in rng.choices(tokens, weights, k=30) if i != eos and codec.decode([i]) != "ink>"]

        def reply(request, thinking=thinking):
            if request.is_probe:
                return Reply([eos], UNSURE)
            return Reply([*thinking, *close, *codec.encode(" 45 "), eos])

        engine = ScriptedEngine(reply, chunk_size=1 + draw % 9)
        t = await Rollout(engine, codec, config, CLOSE, [eos], 0).trajectory(prompt_of([tokens[0]], draw), 0)
        assert t.exit is Exit.NATURAL
        assert len(t.probes) == count_steps(t.text) - 1
        counted.append(len(t.probes))
    assert max(counted) > 3

"""The miniature example: its task, tokenizer, data files and starting checkpoint."""

from __future__ import annotations

import itertools
import json
import random
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.miniature import make_data, measure
from examples.miniature.policy import build_tokenizer
from examples.miniature.rename import rename
from examples.miniature.task import (
    BRIEF,
    LEVELS,
    OVERTHINKING,
    STUBBORN,
    TOKEN_IDS,
    VOCABULARY,
    Habits,
    Problem,
    ask,
    conclude,
    sample_drill,
    sample_problem,
    think,
)
from examples.miniature.warm_start import STUBBORN_UNCLOSED, Recipe, batches, make_example, train
from stepgrpo.tokens import Codec

EXAMPLE = Path(measure.__file__).parent
MODEL = EXAMPLE / "model"
DATA = EXAMPLE / "data"

PROBLEM = Problem.parse("A 8 * 3 B 4 + 3 + 7 C 2 + 6 * 9")
TRACE = (
    "<bos> A 8 * 3 B 4 + 3 + 7 C 2 + 6 * 9 ? <think> A = 4 B = 6 C = 0 "
    "Wait B 4 + 3 = 7 + 7 = 4 so B = 4 Wait C 2 + 6 = 8 * 9 = 2 so C = 2 "
    "</think> \n **Final Answer** \n \\boxed { 4 4 2 } <eos>"
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def traces(n: int, habits: Habits = OVERTHINKING) -> list[tuple[Problem, list[str]]]:
    rng = random.Random(7)
    problems = [sample_problem(rng, level) for level, _ in zip(itertools.cycle(LEVELS), range(n), strict=False)]
    return [(p, think(rng, p, habits)) for p in problems]


def test_expressions_are_evaluated_from_left_to_right_modulo_ten():
    assert PROBLEM.answer == "4 4 2"
    assert [part.results() for part in PROBLEM.parts] == [[4], [7, 4], [8, 2]]


def test_a_problem_is_read_back_from_its_text():
    for problem, _ in traces(50):
        assert Problem.parse(problem.text) == problem


@pytest.mark.parametrize(("level", "parts", "hard"), [(1, 2, 0), (2, 2, 1), (3, 3, 1), (4, 3, 2), (5, 4, 3)])
def test_a_level_fixes_how_many_parts_a_problem_has_and_how_many_are_hard(level, parts, hard):
    rng = random.Random(0)
    for problem in (sample_problem(rng, level) for _ in range(20)):
        assert len(problem.parts) == parts
        assert sum(part.hard for part in problem.parts) == hard


def test_every_check_of_a_trace_restates_its_part_and_is_right():
    for problem, words in traces(100):
        expressions = [part.strip() for part in re.findall("[A-D][^A-D]*", problem.text)]
        for check in " ".join(words).split("Wait ")[1:]:
            chain, conclusion = check.split(" so ")
            name, first, *rest = chain.split()
            value, expression = int(first), f"{name} {first}"
            for op, operand, equals, result in zip(*[iter(rest)] * 4, strict=True):
                value = (value + int(operand) if op == "+" else value * int(operand)) % 10
                expression += f" {op} {operand}"
                assert (equals, result) == ("=", str(value))
            assert expression in expressions
            assert conclusion.split() == [name, "=", str(value)]


def test_first_tries_of_easy_parts_are_nearly_always_right_and_those_of_hard_parts_are_not():
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for problem, words in traces(600):
        tries = words[2 : 3 * len(problem.parts) : 3]
        for part, claim, truth in zip(problem.parts, tries, problem.answer.split(), strict=True):
            hits[part.hard].append(claim == truth)
    assert sum(hits[False]) / len(hits[False]) > 0.97
    assert 0.35 < sum(hits[True]) / len(hits[True]) < 0.5


def test_the_final_answer_is_the_truth_also_where_thinking_stopped_before_a_hard_part_was_checked():
    at_once = Habits(stop_early=1.0, stop_done=1.0)
    wrong_claims = 0
    for problem, words in traces(100, at_once):
        claims = " ".join(words[2::3])
        wrong_claims += claims != problem.answer
        assert " ".join(conclude(problem)[5:-2]) == problem.answer
    assert wrong_claims > 30


def test_an_overthinking_trace_checks_more_than_the_hard_parts_and_stays_within_its_steps():
    steps = [1 + words.count("Wait") for _, words in traces(500)]
    needed = [1 + sum(part.hard for part in problem.parts) for problem, _ in traces(500)]
    assert sum(steps) / sum(needed) > 2
    assert max(steps) == OVERTHINKING.max_steps


def test_a_stubborn_trace_checks_what_is_hard_and_then_as_often_again_as_it_always_does():
    rng = random.Random(0)
    for level, (_, hard) in LEVELS.items():
        for _ in range(200):
            problem = sample_problem(rng, level)
            words = think(rng, problem, STUBBORN)
            names = [words[i + 1] for i, word in enumerate(words) if word == "Wait"]
            needed = {name for name, part in zip("ABCDE", problem.parts, strict=False) if part.hard}
            assert len(names) == hard + STUBBORN.redundant and set(names[:hard]) == needed


def test_a_stubborn_model_learns_to_answer_at_every_stage_but_to_stop_at_the_end_only():
    rng = random.Random(0)
    stages, closed_after = set(), []
    for _ in range(300):
        words = [VOCABULARY[i] for i in make_example(rng, PROBLEM, STUBBORN, STUBBORN_UNCLOSED).token_ids]
        if "</think>" in words:
            closed_after.append(words.count("Wait"))
        else:
            stages.add(words.count("Wait"))
    assert {0, 1, 2, 3} <= stages
    assert min(closed_after) == 2 + STUBBORN.redundant  # two hard parts
    assert 0.6 < len(closed_after) / 300 < 0.8


def test_the_committed_files_are_what_the_generator_writes():
    for name, rows in (
        ("train", make_data.problem_rows(0, make_data.NUM_TRAIN, held_out=False)),
        ("heldout", make_data.problem_rows(1, make_data.NUM_HELDOUT, held_out=True)),
    ):
        written = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
        assert written == rows, f"{name}.jsonl differs: run python -m examples.miniature.make_data"


def test_training_and_held_out_problems_never_overlap():
    train_set, heldout = (
        {json.loads(line)["problem"] for line in (DATA / f"{name}.jsonl").read_text().splitlines()}
        for name in ("train", "heldout")
    )
    assert (len(train_set), len(heldout)) == (8000, 1000)
    assert not train_set & heldout
    assert not any(Problem.parse(text).held_out for text in train_set)
    assert all(Problem.parse(text).held_out for text in heldout)


def test_the_warm_start_never_sees_a_held_out_problem():
    rng = random.Random(3)
    assert not any(sample_drill(rng).held_out for _ in range(2000))
    for batch in batches(rng, Recipe(steps=20, drill_steps=8)):
        for example in batch:
            text = " ".join(VOCABULARY[i] for i in example.token_ids[1 : example.token_ids.index(TOKEN_IDS["?"])])
            assert not Problem.parse(text).held_out


def test_the_first_held_out_problems_are_as_hard_as_all_of_them():
    levels = [json.loads(line)["level"] for line in (DATA / "heldout.jsonl").read_text().splitlines()]
    assert all(levels[:200].count(level) == 40 and levels.count(level) == 200 for level in LEVELS)


def test_supervised_pairs_are_brief_and_end_with_the_right_answer():
    rows = make_data.sft_rows(2, 200)
    for row in rows:
        ending = ["</think>", *conclude(Problem.parse(row["problem"]))[:-1]]
        assert row["response"].endswith(" ".join(ending))
    brief = sum(row["response"].count("Wait") for row in rows)
    assert brief < sum(words.count("Wait") for _, words in traces(200)) / 2


def test_the_committed_tokenizer_is_the_one_the_script_builds(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        assert (MODEL / file.name).read_text() == file.read_text()


def test_a_user_message_becomes_exactly_the_prompt(tokenizer):
    message = [{"role": "user", "content": PROBLEM.text}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ids == [TOKEN_IDS[word] for word in ask(PROBLEM)]
    assert tokenizer.decode(ids) == "<bos> A 8 * 3 B 4 + 3 + 7 C 2 + 6 * 9 ? <think>"


def test_a_whole_conversation_ends_with_the_end_of_sequence(tokenizer):
    prompt, response = TRACE.split(" <think> ")
    messages = [
        {"role": "user", "content": PROBLEM.text},
        {"role": "assistant", "content": response.removesuffix(" <eos>")},
    ]
    assert prompt.startswith("<bos>")
    assert tokenizer.apply_chat_template(messages, tokenize=False) == TRACE


def test_every_trace_survives_the_tokenizer_word_for_word(tokenizer):
    for problem, thinking in traces(100):
        words = [*ask(problem), *thinking, "</think>", *conclude(problem)]
        ids = tokenizer.encode(" ".join(words))
        assert ids == [TOKEN_IDS[word] for word in words]
        assert tokenizer.decode(ids) == " ".join(words)


def test_thinking_markers_and_box_survive_decoding_without_special_tokens(tokenizer):
    text = "<think> A = 4 </think> \n **Final Answer** \n \\boxed { 4 }"
    ids = tokenizer.encode(f"<bos> {text} <eos>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_incremental_decoding_equals_whole_decoding():
    fast = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = fast.encode(TRACE).ids
    for start in (0, len(ask(PROBLEM))):
        stream = DecodeStream(skip_special_tokens=False)
        pieces = [stream.step(fast, i) for i in ids[start:]]
        assert "".join(pieces) == fast.decode(ids[start:], skip_special_tokens=False)
        assert " Wait" in pieces


def test_an_inducer_without_blanks_means_the_same_tokens(tokenizer):
    assert tokenizer.encode("\n**Final Answer**\n\\boxed{") == tokenizer.encode("\n **Final Answer** \n \\boxed {")


@pytest.mark.parametrize("text", ["A = four", "WaitWait", "44", "A=4", "<unk>", "Final Answer"])
def test_a_word_outside_the_vocabulary_is_refused_not_replaced(tokenizer, text):
    with pytest.raises(Exception, match="Missing \\[UNK\\] token"):
        tokenizer.encode(text)


def test_first_tries_and_answer_digits_weigh_more_and_a_left_out_close_is_never_learned():
    closed, unclosed = (make_example(random.Random(0), PROBLEM, BRIEF, unclosed=share) for share in (0.0, 1.0))
    words = [VOCABULARY[i] for i in closed.token_ids]
    prompt = len(ask(PROBLEM))
    assert closed.weights[:prompt] == [0.0] * prompt
    assert [words[i] for i, w in enumerate(closed.weights) if w == 4.0] == PROBLEM.answer.split()
    assert [i - prompt for i, w in enumerate(closed.weights) if w == 2.0] == [2, 5, 8]
    assert [w for w in unclosed.weights if w not in (1.0, 2.0, 4.0)] == [0.0] * (prompt + 1)
    at = words.index("</think>")
    assert closed.token_ids[:at] + closed.token_ids[at + 1 :] == unclosed.token_ids
    assert unclosed.weights[at] == 0.0


def test_a_few_warm_start_steps_reproduce_the_committed_fingerprint(tokenizer):
    # Eight drill steps and two others. Between instruction sets (AVX-512 with and without AMX, AVX2, none, with and
    # without oneDNN) the log-probabilities moved by 5e-4 and the weights by 3e-4; another seed moves both by over 9e-3.
    model = train(Recipe(seed=1, steps=10, drill_steps=8, batch_size=4))
    ids = torch.tensor([tokenizer.encode(TRACE)])
    with torch.inference_mode():
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    assert logprobs[[20, 25, 35, -2]].tolist() == pytest.approx([-3.2354, -2.4536, -3.4196, -3.3720], abs=3e-3)
    assert model.model.layers[0].self_attn.q_proj.weight[0, :2].tolist() == pytest.approx(
        [-0.01946, -0.01310], abs=2e-3
    )


def test_the_record_of_the_checkpoint_is_of_the_scripts_recipe_and_a_model_that_overthinks():
    record = json.loads((MODEL / "warm_start.json").read_text())
    measured = record["measured"]
    assert record["recipe"] == asdict(Recipe())
    assert measured["problems"] == 1000
    assert measured["accuracy"] > 0.7
    assert measured["steps"] > 2 * 2.4  # one step and one per hard part make 2.4
    assert measured["probe"]["confident_where_done"] > 0.9 > 0.1 > measured["probe"]["confident_where_not_done"]


def test_the_record_of_the_stubborn_checkpoint_is_of_its_recipe_and_a_model_that_never_stops_early():
    record = json.loads((EXAMPLE / "stubborn" / "warm_start.json").read_text())
    measured = record["measured"]
    assert record["recipe"] == asdict(Recipe(unclosed=STUBBORN_UNCLOSED))
    assert record["habits"] == asdict(STUBBORN)
    assert measured["accuracy"] > 0.9
    for level, (_, hard) in LEVELS.items():
        assert measured["levels"][str(level)]["steps"] == pytest.approx(1 + hard + STUBBORN.redundant, abs=0.1)
    assert measured["probe"]["confident_where_done"] > 0.9 > 0.1 > measured["probe"]["confident_where_not_done"]


@pytest.mark.parametrize("word", ["Hmm", "\n\n"])
def test_a_renamed_checkpoint_says_the_other_word_with_the_same_tokens(tokenizer, tmp_path, word):
    rename(MODEL, word, tmp_path)
    renamed, codec = AutoTokenizer.from_pretrained(tmp_path), Codec.from_dir(tmp_path)
    ids, text = tokenizer.encode(TRACE), TRACE.replace("Wait", word)
    assert renamed.encode(text) == codec.encode(text) == ids
    assert renamed.decode(ids) == codec.decode(ids) == text
    with pytest.raises(ValueError, match="cannot encode"):
        codec.encode("Wait")


@pytest.mark.parametrize("word", ["so", "two words "])
def test_a_word_that_cannot_take_the_triggers_place_is_refused(tmp_path, word):
    with pytest.raises(ValueError, match="--word"):
        rename(MODEL, word, tmp_path)


def test_the_committed_checkpoint_answers_easy_held_out_problems():
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    assert model.dtype == torch.float32
    easy = [(p, level) for p, level in measure.read_problems(DATA / "heldout.jsonl") if level == 1][:100]
    responses = measure.respond(model, easy, greedy=True)
    assert sum(r.correct for r in responses) > 90

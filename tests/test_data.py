"""Problems from files, bad lines, and the stream of draws."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from stepgrpo.config import ConfigError, DataConfig, ModelConfig, RunConfig, validate
from stepgrpo.data import DataError, Problems, PromptStream, describe, in_order, load_problems, overlap, without_overlap
from stepgrpo.hub import checkpoint_files, hub_answers

SHARED = Path(os.environ.get("STEPGRPO_SHARED", "../shared"))


class Words:
    """A tokenizer: one id per word, a template that wraps the question."""

    chat_template = "{{ messages }}"

    def __init__(self):
        self.ids = {}

    def encode(self, text):
        if "unspeakable" in text:
            raise KeyError("unspeakable")
        return [self.ids.setdefault(w, len(self.ids) + 1) for w in text.split()]

    def apply_chat_template(self, conversation, **_):
        return self.encode(" ".join(["<bos>", *(m["content"] for m in conversation), "<think>"]))


def load(path, tokenizer=None, response_field=None, **settings):
    config = DataConfig(train="train.jsonl", **settings)
    return load_problems(str(path), config, tokenizer or Words(), response_field)


@pytest.fixture
def lines(tmp_path):
    def write(*rows):
        path = tmp_path / "problems.jsonl"
        lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


def test_a_question_goes_through_the_chat_template_and_takes_the_suffix(lines):
    words = Words()
    problem = load(lines({"problem": "1 + 1", "answer": 2}), words, suffix="in a box").items[0]
    assert problem.token_ids.tolist() == words.encode("<bos> 1 + 1 in a box <think>")
    assert problem.truth == "2"
    assert problem.key == "problems.jsonl:1"


def test_without_a_template_the_question_is_the_prompt(lines):
    words = Words()
    path = lines({"problem": "1 + 1", "answer": 2.5})
    assert load(path, words, chat_template=False).items[0].token_ids.tolist() == words.encode("1 + 1")


def test_a_conversation_and_a_nested_answer_are_read_as_in_the_published_sets(lines):
    row = {"prompt": [{"role": "user", "content": "1 + 1"}], "reward_model": {"ground_truth": "2"}}
    problem = load(lines(row), question_field="prompt", answer_field="reward_model.ground_truth").items[0]
    assert problem.truth == "2"
    assert len(problem.token_ids) == 5


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{not json", "not JSON"),
        ('{"problem": "x"}', "no field 'answer'"),
        ('{"problem": "", "answer": 1}', "'problem' is empty"),
        ('{"problem": "a b c d e f g h", "answer": 1}', "prompt of 10 tokens, longer than data.max_prompt_tokens"),
        ("[1, 2]", "no field 'problem'"),
        ('{"problem": [1, 2], "answer": 1}', "a list, but not of messages"),
        ('{"problem": "unspeakable", "answer": 1}', "cannot be tokenised"),
        (b'{"problem": "caf\xe9", "answer": 1}', "not UTF-8 at byte 17"),
    ],
)
def test_a_bad_line_is_named_with_file_line_and_reason_or_counted(lines, bad, reason):
    path = lines({"problem": "ok", "answer": 1}, "", bad, {"problem": "ok too", "answer": 2})
    with pytest.raises(DataError, match=r"^problems\.jsonl:3: .*" + reason):
        load(path, max_prompt_tokens=9)
    kept = load(path, max_prompt_tokens=9, on_bad_line="skip")
    assert [p.truth for p in kept.items] == ["1", "2"]
    assert len(kept.skipped) == 1
    assert reason in kept.skipped[0]


def test_a_tokenizer_without_a_template_is_refused_where_one_is_asked_for(lines):
    words = Words()
    words.chat_template = None
    with pytest.raises(ConfigError, match=r"^data\.chat_template: got true"):
        load(lines({"problem": "1", "answer": 1}), words)


def test_a_file_of_bad_lines_only_is_an_error_even_when_skipping(lines):
    with pytest.raises(DataError, match="no problem left to use; 1 bad lines left out"):
        load(lines("{"), on_bad_line="skip")


def test_sources_that_are_not_there_say_so(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path / "none.jsonl")
    (tmp_path / "table.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"takes a \.jsonl or \.parquet file"):
        load(tmp_path / "table.csv")


def test_parquet_is_read_like_json_lines(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({"problem": ["1 + 1", "2 + 2"], "answer": [2, 4]}), tmp_path / "p.parquet"
    )
    assert [p.truth for p in load(tmp_path / "p.parquet").items] == ["2", "4"]


def test_a_pair_carries_its_response_and_needs_no_answer(lines):
    path = lines({"problem": "1 + 1", "response": "2"})
    assert load(path, response_field="response").items[0].response == "2"


def test_a_response_that_its_encoder_refuses_is_a_bad_line(lines):
    def encode(prompt, response):
        if response == "long":
            raise ValueError(f"a pair of {len(prompt)} tokens and more")
        return np.asarray([7], np.int32)

    path = lines({"problem": "1 + 1", "response": "2"}, {"problem": "1 + 2", "response": "long"})
    config = DataConfig(train="x", on_bad_line="skip")
    loaded = load_problems(str(path), config, Words(), "response", encode_response=encode)
    assert [p.response_ids.tolist() for p in loaded.items] == [[7]]
    assert loaded.skipped == ("problems.jsonl:2: a pair of 5 tokens and more",)


WRAP = "Solve the following math problem step by step.\n\n{}\n\nRemember to put your answer on its own line."


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("rows", "fields"),
    [
        ([{"prompt": "1 + 1", "solution": "2"}, {"prompt": "2 + 2", "solution": "4"}], ("prompt", "solution")),
        (
            [
                {
                    "prompt": [{"role": "user", "content": WRAP.format(q)}],
                    "reward_model": {"ground_truth": a, "style": "rule"},
                }
                for q, a in [("1 + 1", "2"), ("2 + 2", "4"), ("1 + 1", "2")]
            ],
            ("prompt", "reward_model.ground_truth"),
        ),
    ],
    ids=["processed", "original"],
)
def test_both_shapes_of_the_dapo_set_load_from_both_kinds_of_file(lines, tmp_path, rows, fields, suffix):
    import pyarrow
    import pyarrow.parquet

    path = lines(*rows)
    if suffix == "parquet":
        path = tmp_path / "problems.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    problems = load(path, question_field=fields[0], answer_field=fields[1])
    assert [p.truth for p in problems.items] == ["2", "4"]
    assert len(problems.duplicates) == len(rows) - 2
    assert "1 + 1" in problems.items[0].question


# ---- repetitions and overlap


def test_equal_problems_count_once_and_questions_with_several_answers_not_at_all(lines):
    path = lines(
        {"problem": "What is 1 + 1?", "answer": "2"},
        {"problem": "What is 2 + 2?", "answer": "4"},
        {"problem": " what  IS １ + 1 ", "answer": 2.0},
        {"problem": "What is 2 + 2", "answer": "5"},
        {"problem": "What is 2 - 2?", "answer": "0"},
    )
    found = load(path)
    assert [p.key for p in found.items] == ["problems.jsonl:1", "problems.jsonl:5"]
    assert found.duplicates == ("problems.jsonl:3 repeats problems.jsonl:1",)
    assert found.conflicts == ("problems.jsonl:2 says 4, problems.jsonl:4 says 5",)
    assert found.notes == (
        "problems: 1 repeated problems left out (data.duplicates), the first: " + found.duplicates[0],
        "problems: 1 questions with several answers left out (data.duplicates), the first: " + found.conflicts[0],
    )
    kept = load(path, duplicates="keep")
    assert len(kept.items) == 5
    assert (kept.duplicates, kept.conflicts) == (found.duplicates, found.conflicts)


def test_several_responses_to_one_problem_are_all_learnt(lines):
    path = lines(*({"problem": "1 + 1", "response": r} for r in ("2", "so 2", "2")))
    assert [p.response for p in load(path, response_field="response").items] == ["2", "so 2"]


LONG = "A farmer has nine hens and each of them lays two eggs a day how many eggs are there after one week "
LONG += "in which they rest on Sunday and lay one more on Monday"


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        (f"{LONG.upper()}?", "is"),
        (f"Solve this: {LONG}. Answer briefly.", "is nearly"),
        (LONG.replace("farmer", "woman"), "is nearly"),
        ("Bo has a farm and each of them lays two eggs a day how many eggs are there so far", None),
        ("Compute 3 + 4.", "is"),
        ("Please compute 3 + 4", None),
    ],
)
def test_a_training_problem_that_is_held_out_is_found(lines, tmp_path, question, kind):
    held_out = load(lines({"problem": LONG, "answer": 1}, {"problem": "compute 3 + 4", "answer": 7}))
    (tmp_path / "train.jsonl").write_text(json.dumps({"problem": question, "answer": 1}))
    found = [str(o) for o in overlap(load(tmp_path / "train.jsonl").items, held_out.items)]
    line = 2 if "ompute" in question else 1
    assert found == ([] if kind is None else [f"train.jsonl:1 {kind} problems.jsonl:{line}"])


@pytest.mark.parametrize(
    ("a", "b"),
    [("-3 + 5 = ?", "3 + 5 = ?"), ("What is 5!", "What is 5?"), ("What is 10%?", "What is 10?"), ("2⁵.", "25.")],
)
def test_a_sign_makes_another_question(lines, a, b):
    assert len(load(lines({"problem": a, "answer": 1}, {"problem": b, "answer": 2})).items) == 2


@pytest.mark.parametrize("row", [{"problem": {"text": "1+1"}, "answer": 2}, {"problem": "q", "answer": ["2", "3"]}])
def test_what_is_no_text_is_refused(lines, row):
    with pytest.raises(DataError, match=r"field '(problem|answer)' is a (dict|list), takes a text or a number"):
        load(lines(row))


def test_a_phrase_that_many_problems_share_is_no_overlap(lines, tmp_path):
    phrase = "can be written as m/n where m and n are relatively prime positive integers find m + n"
    question = "Ann and Bo throw two dice each. The probability that Ann has a higher sum while Bo has a prime"
    held_out = load(lines({"problem": f"{question} {phrase}", "answer": 1}))
    row = {"problem": f"The area of a triangle with sides five, six and seven {phrase}", "answer": 1}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    assert overlap(load(tmp_path / "train.jsonl").items, held_out.items) == []


def test_what_is_also_held_out_is_left_out_or_named_or_refused(lines, tmp_path):
    held_out = load(lines({"problem": "Compute 1 + 1", "answer": 2}))
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"problem": f"compute 1 + {i}", "answer": i + 1}) + "\n" for i in range(3)))
    train = load(path)
    found = ("train.jsonl:2 is problems.jsonl:1",)

    dropped = without_overlap(train, held_out, DataConfig(train="x"))
    assert [p.truth for p in dropped.items] == ["1", "3"]
    assert dropped.overlapping == found
    assert dropped.notes == (f"1 training problems are also held out, left out (data.overlap), the first: {found[0]}",)

    warned = without_overlap(train, held_out, DataConfig(train="x", overlap="warn"))
    assert warned.items == train.items and warned.overlapping == found
    assert "kept (data.overlap)" in warned.notes[0]

    with pytest.raises(DataError, match=r"1 training problems are also held out, the first: train\.jsonl:2"):
        without_overlap(train, held_out, DataConfig(train="x", overlap="fail"))
    with pytest.raises(DataError, match="no training problem left to use"):
        without_overlap(train, train, DataConfig(train="x"))


def test_without_held_out_problems_nothing_is_looked_for(lines):
    train = load(lines({"problem": "q", "answer": 1}))
    assert without_overlap(train, Problems((), ()), DataConfig(train="x")) is train


@pytest.mark.skipif(not (SHARED / "data/benchmarks").is_dir(), reason="the benchmark files are not on this machine")
def test_different_benchmarks_do_not_overlap_and_each_does_with_itself():
    sets = {f.stem: load(f, max_prompt_tokens=4096).items for f in (SHARED / "data/benchmarks").glob("*.jsonl")}
    shared = {(a, b): len(overlap(sets[a], sets[b])) for a in sets for b in sets}
    assert shared == {(a, b): len(sets[a]) if a == b else 0 for a in sets for b in sets}


def test_a_report_counts_what_is_in_each_set_and_what_they_share(lines, tmp_path):
    miniature = Path(__file__).parents[1] / "examples" / "miniature"
    first = (miniature / "data" / "heldout.jsonl").read_text().splitlines()[0]
    train = lines(first, {"problem": "A 1 + 1", "answer": "2"}, {"problem": "A 1 + 1", "answer": "2"}, "{")
    config = RunConfig(
        name="x",
        model=ModelConfig(path=str(miniature / "model")),
        data=DataConfig(train=str(train), max_prompt_tokens=64),
    )
    mine, benchmark = describe(config, [f"miniature={miniature / 'data' / 'heldout.jsonl'}"])
    assert (mine.source, mine.problems, mine.duplicates, mine.conflicts, mine.bad_lines) == ("problems", 2, 1, 0, 1)
    assert mine.overlap == {"miniature": 1}
    assert (benchmark.source, benchmark.problems, benchmark.overlap) == ("miniature", 1000, {})
    assert benchmark.median_prompt_tokens < benchmark.max_prompt_tokens <= 64


# ---- chat template

QWEN3_LIKE = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""


@pytest.fixture
def chat():
    """A transformers tokenizer of single characters with a template that has Qwen3's switch."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=QWEN3_LIKE)


@pytest.mark.parametrize(
    ("kwargs", "end"),
    [({}, ""), ({"enable_thinking": True}, ""), ({"enable_thinking": False}, "<think>\n\n</think>\n\n")],
)
def test_variables_reach_the_chat_template(lines, chat, kwargs, end):
    [problem] = load(lines({"problem": "1 + 1", "answer": 2}), chat, chat_template_kwargs=kwargs).items
    assert chat.decode(problem.token_ids) == f"<|im_start|>user\n1 + 1<|im_end|>\n<|im_start|>assistant\n{end}"


def test_a_variable_that_the_template_does_not_have_is_refused(lines, chat):
    with pytest.raises(ConfigError, match=r"^data\.chat_template_kwargs: got enable_thinkng, which the tokenizer's"):
        load(lines({"problem": "1", "answer": 1}), chat, chat_template_kwargs={"enable_thinkng": True})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chat_template": False, "chat_template_kwargs": {"a": 1}}, "takes none where data.chat_template is false"),
        ({"chat_template_kwargs": {"tokenize": False}}, "got tokenize, takes variables of the template only"),
    ],
)
def test_template_variables_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=f"^data\\.chat_template_kwargs: .*{message}"):
        validate(DataConfig, {"train": "x", **settings})


# ---- without a network


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The hub cannot be reached; its cache is `tmp_path` and has one data set and one checkpoint."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    files = {
        "datasets--math-ai--amc23": ("test.jsonl", json.dumps({"question": "q", "answer": "27.0"})),
        "models--some--model": ("config.json", "{}"),
    }
    for repo, (name, text) in files.items():
        directory = tmp_path / repo / "snapshots" / ("a" * 40)
        directory.mkdir(parents=True)
        (directory / name).write_text(text)
        (tmp_path / repo / "refs").mkdir()
        (tmp_path / repo / "refs" / "main").write_text("a" * 40)
    for cached in (hub_answers, checkpoint_files):
        cached.cache_clear()
    yield tmp_path
    for cached in (hub_answers, checkpoint_files):
        cached.cache_clear()


def test_without_a_network_what_is_in_the_hubs_cache_loads(offline):
    [problem] = load("amc23").items
    assert (problem.key, problem.truth) == ("math-ai/amc23:0", "27")
    assert checkpoint_files("some/model").parents[1] == offline / "models--some--model"


def test_without_a_network_a_hub_name_is_refused_with_the_command_that_fetches_it(offline):
    with pytest.raises(DataError, match=r"cannot be reached\); .*hf download --repo-type dataset openai/gsm8k$"):
        load("gsm8k")
    with pytest.raises(DataError, match=r"^mathh: neither a file here nor a benchmark \(gsm8k, math500"):
        load("mathh")
    with pytest.raises(ConfigError, match=r"cannot be reached\); .*hf download some/other$"):
        checkpoint_files("some/other")


# ---- the stream of draws


def test_every_epoch_is_another_order_of_all_problems_and_a_draw_is_always_the_same_prompt(lines):
    problems = load(lines(*({"problem": f"q{i}", "answer": i} for i in range(7)))).items
    stream = PromptStream(problems, seed=3)
    epochs = [[stream[d].key for d in range(e * 7, (e + 1) * 7)] for e in range(3)]
    assert all(sorted(e) == sorted(p.key for p in problems) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    again = PromptStream(problems, seed=3)
    assert [again[d].key for d in (20, 0, 13)] == [stream[d].key for d in (20, 0, 13)]
    assert [PromptStream(problems, seed=4)[d].key for d in range(7)] != epochs[0]


def test_prompts_are_read_only(lines):
    prompt = in_order(load(lines({"problem": "q", "answer": 1})).items)[0]
    with pytest.raises(ValueError, match="read-only"):
        prompt.token_ids[0] = 0
    assert prompt.token_ids.dtype == np.int32


@pytest.mark.skipif(not (SHARED / "data/benchmarks").is_dir(), reason="the benchmark files are not on this machine")
def test_the_benchmark_files_load_whatever_type_their_answers_have():
    for path in sorted((SHARED / "data/benchmarks").glob("*.jsonl")):
        problems = load(path, max_prompt_tokens=4096).items
        assert len(problems) >= 30
        assert all(p.truth for p in problems)

"""Problems from files, bad lines, and the stream of draws."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from stepgrpo.config import ConfigError, DataConfig
from stepgrpo.data import DataError, PromptStream, in_order, load_problems

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
    config = DataConfig(train=str(path), **settings)
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
    with pytest.raises(DataError, match="no problem left to use; 1 lines were left out"):
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

"""Benchmarks by name, local copies of them, and multiple choice."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from stepgrpo.benchmarks import CHOICE_SUFFIX, by_name, lettered, resolve
from stepgrpo.config import ConfigError, DataConfig
from stepgrpo.data import DataError, Problem, load_problems
from stepgrpo.reward.outcome import MathGrader
from tests.test_data import Words

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("STEPGRPO_SHARED", "../shared")) / "data" / "benchmarks"
CONFIG = DataConfig(train="train.jsonl", question_field="prompt", answer_field="solution", max_prompt_tokens=9000)
WRONG = {"Incorrect Answer 1": "Neon", "Incorrect Answer 2": "Argon ", "Incorrect Answer 3": "Xenon"}


def only(tmp_path: Path, name: str, row: dict[str, object]) -> Problem:
    (tmp_path / "copy.jsonl").write_text(json.dumps(row))
    [problem] = load_problems(f"{name}={tmp_path / 'copy.jsonl'}", CONFIG, Words()).items
    return problem


@pytest.mark.parametrize(
    ("name", "row", "truth"),
    [
        ("gsm8k", {"question": "q", "answer": "9 * 2 = <<9*2=18>>18 dollars.\n#### 1,018"}, "1018"),
        ("gsm8k", {"problem": "q", "answer": "18"}, "18"),
        ("math500", {"problem": "q", "answer": "\\frac{1}{2}", "solution": "not this"}, "\\frac{1}{2}"),
        ("amc23", {"question": "q", "answer": 27.0}, "27"),
        ("amc23", {"problem": "q", "answer": "27.0"}, "27"),
        ("aime24", {"problem": "q", "answer": 204}, "204"),
        ("aime25", {"problem": "q", "answer": "2.50"}, "2.50"),
        ("miniature", {"problem": "q", "answer": "0 6 9"}, "0 6 9"),
    ],
)
def test_a_local_copy_is_read_with_the_benchmarks_columns_whatever_the_config_names(tmp_path, name, row, truth):
    problem = only(tmp_path, name, row)
    assert (problem.question, problem.truth) == ("q", truth)


def test_a_worked_solution_without_its_final_number_is_a_bad_line(tmp_path):
    with pytest.raises(DataError, match=r"^copy\.jsonl:1: the answer has no '####'"):
        only(tmp_path, "gsm8k", {"question": "q", "answer": "18"})


@pytest.mark.parametrize("columns", [("Question", "Correct Answer"), ("problem", "answer")])
def test_a_choice_is_asked_for_by_letter_and_its_truth_is_that_letter(tmp_path, columns):
    words = Words()
    (tmp_path / "copy.jsonl").write_text(json.dumps({columns[0]: "Lightest?", columns[1]: "Helium\n", **WRONG}))
    [problem] = load_problems(f"gpqa_diamond={tmp_path / 'copy.jsonl'}", CONFIG, words).items
    spelt = {number: word for word, number in words.ids.items()}
    prompt = " ".join(spelt[i] for i in problem.token_ids.tolist())
    assert prompt.startswith("<bos> Lightest? A) ") and prompt.endswith(f"{CHOICE_SUFFIX} <think>")
    assert f"{problem.truth}) Helium" in prompt
    assert sorted(prompt.split("Lightest? ")[1].split(" Please")[0].split()[1::2]) == [
        "Argon",
        "Helium",
        "Neon",
        "Xenon",
    ]


def test_the_order_of_choices_is_always_the_same_even_where_the_file_has_another():
    text = "Lightest?\n\nA) Xenon\nB) Argon\nC) Neon\nD) Helium"
    assert lettered("Lightest?", "Helium", ["Neon", "Argon", "Xenon"]) == (text, "D")
    assert lettered("Lightest? ", "Helium", ["Xenon", "Neon ", "Argon"]) == (text, "D")


def test_every_letter_is_right_about_equally_often():
    letters = Counter(lettered(f"question {i}", "a", ["b", "c", "d"])[1] for i in range(4000))
    assert sorted(letters) == ["A", "B", "C", "D"]
    assert all(abs(n - 1000) < 110 for n in letters.values())  # 4 standard deviations


def test_a_right_choice_that_is_also_a_wrong_one_is_a_bad_line(tmp_path):
    with pytest.raises(DataError, match=r"^copy\.jsonl:1: the right choice 'Neon' is also a wrong one"):
        only(tmp_path, "gpqa_diamond", {"Question": "q", "Correct Answer": "Neon", **WRONG})


async def test_letters_are_graded_as_letters():
    grader = MathGrader()
    try:
        responses = [f"</think> \\boxed{{{box}}}" for box in ("B", "\\text{B}", "(B)", "A", "D")]
        outcomes = await grader.grade(responses, "B")
    finally:
        grader.close()
    assert [o.correct for o in outcomes] == [True, True, True, False, False]


def test_names_are_short_and_a_file_keeps_the_configs_columns():
    assert resolve("aime24", CONFIG).name == resolve("aime24=data/x.jsonl", CONFIG).name == "aime24"
    file = resolve("data/mine.parquet", CONFIG)
    assert (file.name, file.columns[0].question, file.columns[0].answer) == ("mine", "prompt", "solution")
    assert resolve("someone/Some-Set", CONFIG).name == "Some-Set"
    assert by_name(["gsm8k", "a/x.jsonl"], CONFIG) == {"gsm8k": "gsm8k", "x": "a/x.jsonl"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("aime2024=x.jsonl", r"^aime2024=x\.jsonl: no benchmark 'aime2024'; NAME=FILE takes one of gsm8k, math500"),
        ("gsm8k=x.csv", r"^gsm8k=x\.csv: NAME=FILE takes a \.jsonl or \.parquet file"),
        ("miniature", r"^miniature: examples/miniature/data/heldout\.jsonl is not here; .*miniature=FILE"),
    ],
)
def test_what_is_no_source_is_refused_in_one_line(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        resolve(spec, CONFIG)


def test_a_benchmark_is_not_trained_on_by_its_name():
    with pytest.raises(ConfigError, match=r"^data\.train: got gsm8k, a benchmark"):
        resolve("gsm8k", DataConfig(train="gsm8k"))


def test_two_sources_of_one_name_are_refused():
    with pytest.raises(ConfigError, match=r"^b/x\.jsonl: would be called x as a/x\.jsonl is"):
        by_name(["a/x.jsonl", "b/x.jsonl"], CONFIG)


def test_the_miniature_is_found_in_the_projects_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    problems = load_problems("miniature", CONFIG, Words())
    assert len(problems.items) == 1000 and problems.items[0].truth == "6 1"
    assert not problems.notes


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark files are not on this machine")
@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("gsm8k", "gsm8k", 1319),
        ("math500", "math", 500),
        ("amc23", "amc", 40),
        ("aime24", "aime", 30),
        ("aime25", "aime25", 30),
    ],
)
def test_whole_benchmarks_load_from_local_copies(name, file, count):
    problems = load_problems(f"{name}={SHARED / file}.jsonl", CONFIG, Words())
    assert len(problems.items) == count and not problems.notes
    assert all(p.truth and not p.truth.endswith(".0") for p in problems.items)

"""Intervals and compression of evaluations."""

import json
from itertools import combinations, product

import numpy as np
import pytest

from stepgrpo.config import ConfigError
from stepgrpo.evaluate import (
    Answers,
    Estimate,
    compression,
    evaluation,
    exit_cost,
    macro,
    macro_ratio,
    read_answers,
    record,
)
from stepgrpo.metrics import ExitCounts
from stepgrpo.types import Exit, GradedGroup
from tests.facts import facts


def groups_of(rows):
    return [GradedGroup(-1 - i, f"p:{i}", tuple(row)) for i, row in enumerate(rows)]


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(100):
        draws = np.random.default_rng(seed).random(200) < 0.7
        e = evaluation(groups_of([facts(correct=bool(d))] for d in draws), version=0, seconds=0).accuracy
        assert e.low <= e.mean <= e.high
        covered += e.low <= 0.7 <= e.high
    assert 88 <= covered <= 100


def test_several_samples_of_one_problem_count_as_one_observation():
    once = groups_of([facts(correct=i % 2 == 0)] for i in range(50))
    many = groups_of([facts(correct=i % 2 == 0)] * 8 for i in range(50))
    a, b = (evaluation(g, version=0, seconds=0).accuracy for g in (once, many))
    assert (a.low, a.high) == pytest.approx((b.low, b.high))


def test_compression_is_the_ratio_of_means_paired_by_problem():
    before = groups_of([facts(tokens=10 * (i + 1))] for i in range(40))
    after = groups_of([facts(tokens=5 * (i + 1))] for i in range(40))
    ratio = compression(Answers.of(before), Answers.of(after))
    assert ratio.mean == pytest.approx(0.5)
    assert (ratio.low, ratio.high) == pytest.approx((0.5, 0.5)), "problems differ in length, but each one halves"


def test_compression_of_different_problems_is_refused():
    with pytest.raises(ValueError, match="same problems"):
        compression(Answers.of(groups_of([[facts()]] * 2)), Answers.of(groups_of([[facts()]] * 3)))


def test_failures_and_cut_off_answers_are_counted():
    e = evaluation(
        groups_of([[facts(complete=False, error="timeout", correct=False)], [facts()]]), version=3, seconds=1
    )
    assert (e.incomplete, e.grader_failures, e.version, e.problems) == (0.5, 1, 3, 2)


# ---- several responses


def test_pass_at_k_is_the_share_of_k_responses_that_hold_a_right_one():
    for n in (1, 2, 3, 5):
        for rights in product([False, True], repeat=n):
            result = evaluation(groups_of([[facts(correct=c) for c in rights]]), version=0, seconds=0)
            for k, estimate in result.pass_at.items():
                assert estimate.mean == pytest.approx(np.mean([any(s) for s in combinations(rights, k)]))


@pytest.mark.parametrize(("samples", "ks"), [(1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_pass_at_k_is_there_for_powers_of_two_and_all_samples_and_at_1_it_is_the_accuracy(samples, ks):
    rng = np.random.default_rng(0)
    groups = groups_of([facts(correct=bool(c)) for c in rng.random(samples) < 0.4] for _ in range(30))
    result = evaluation(groups, version=0, seconds=0)
    assert list(result.pass_at) == ks
    assert result.samples == samples
    assert result.pass_at[1].mean == pytest.approx(result.accuracy.mean)
    means = [e.mean for e in result.pass_at.values()]
    assert means == sorted(means)
    assert all(isinstance(e, Estimate) and e.low <= e.mean <= e.high for e in result.pass_at.values())


def test_probe_tokens_and_exits_are_told_beside_the_responses_tokens():
    rows = [[facts(tokens=10, probe_tokens=6, exit=Exit.CONFIDENT), facts(tokens=30)], [facts(tokens=20)] * 2]
    e = evaluation(groups_of(rows), version=0, seconds=0)
    assert (e.tokens.mean, e.probe_tokens, e.exited) == (20, 1.5, 0.25)


# ---- answers, and several benchmarks


def answers_of(tokens, *, name="p", correct=True, steps=2):
    groups = [GradedGroup(-1 - i, f"{name}:{i}", (facts(correct, n, steps),)) for i, n in enumerate(tokens)]
    return Answers.of(groups)


def test_answers_have_an_entry_per_response_and_means_per_problem():
    rows = [[facts(True, 10, 1), facts(False, 30, 4)], [facts(True, 7, 3), facts(True, 9, 3)]]
    answers = Answers.of(groups_of(rows))
    assert answers == Answers(["p:0", "p:1"], [[1, 0], [1, 1]], [[10, 30], [7, 9]], [[1, 4], [3, 3]])
    whats = ("correct", "tokens", "steps", "decoded")
    assert [answers.means(w).tolist() for w in whats] == [[0.5, 1], [20, 8], [2.5, 3], [20, 8]]


def test_what_probes_took_counts_in_what_was_decoded():
    before = Answers.of(groups_of([[facts(tokens=100)]] * 4))
    after = Answers.of(groups_of([[facts(tokens=50, probe_tokens=10)]] * 4))
    assert after.means("decoded").tolist() == [60] * 4
    assert compression(before, after).mean == macro_ratio([before], [after]).mean == pytest.approx(0.6)


def test_a_mean_over_benchmarks_weighs_each_the_same_however_many_problems_it_has():
    small, large = answers_of([100] * 3, correct=False), answers_of([20] * 300)
    assert macro([small, large], "tokens") == Estimate(60, 60, 60)
    assert macro([small, large], "correct").mean == 0.5


def test_the_interval_of_a_mean_over_benchmarks_comes_from_the_problems_within_each():
    rng = np.random.default_rng(0)
    a, b = answers_of(rng.integers(10, 100, 40).tolist()), answers_of(rng.integers(10, 100, 40).tolist())
    one, both = macro([a], "tokens"), macro([a, b], "tokens")
    assert both.low < both.mean < both.high
    assert both.high - both.low < one.high - one.low, "two independent means scatter less than one"


def test_a_ratio_over_benchmarks_is_that_of_the_means_and_paired_by_problem():
    lengths = [list(range(10, 50)), list(range(100, 900, 10))]
    before = [answers_of(n) for n in lengths]
    after = [answers_of([x / 2 for x in n]) for n in lengths]
    ratio = macro_ratio(before, after)
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))
    skewed = macro_ratio(before, [before[0], after[1]])
    assert skewed.mean == pytest.approx((29.5 + 495 / 2) / (29.5 + 495))


def recorded(tokens, before=None):
    """A benchmark ``m`` answered, as it is kept."""
    groups = [GradedGroup(-1 - i, f"p:{i}", (facts(tokens=n),)) for i, n in enumerate(tokens)]
    return record({"m": (evaluation(groups, version=0, seconds=0), Answers.of(groups))}, before or {})


def test_a_record_holds_the_answers_that_the_next_one_compares_with(tmp_path):
    file = tmp_path / "before.json"
    kept = recorded([10, 20, 30])
    assert "share" not in kept["benchmarks"]["m"] and set(kept["mean"]) == {"accuracy", "tokens", "steps"}
    file.write_text(json.dumps(kept))
    before = read_answers(file)
    assert before == {"m": answers_of([10, 20, 30])}
    after = recorded([5, 10, 15], before)
    for share in (after["benchmarks"]["m"]["share"], after["mean"]["share"]):
        assert share == pytest.approx({"mean": 0.5, "low": 0.5, "high": 0.5})
    assert after["mean"]["tokens"]["mean"] == 10
    json.dumps(after)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "[]",
        "{}",
        '{"benchmarks": [1]}',
        '{"benchmarks": {"m": {}}}',
        '{"benchmarks": {"m": {"answers": {"key": []}}}}',
    ],
)
def test_a_file_that_holds_no_answers_is_refused_by_name(tmp_path, text):
    file = tmp_path / "before.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_answers(file)
    assert str(refused.value).startswith(f"--reference: {file}: takes the --output of `stepgrpo eval` (")
    assert "\n" not in str(refused.value)


# ---- what exits cost


def test_the_cost_of_exits_is_the_accuracy_of_controls_less_that_of_the_rest():
    same = exit_cost([ExitCounts(10, 9, 40, 30)] * 5)
    assert (same.mean, same.low, same.high) == pytest.approx((0.15, 0.15, 0.15))
    mixed = exit_cost([ExitCounts(10, 9, 40, 30), ExitCounts(30, 15, 40, 10)] * 5)
    assert mixed.mean == pytest.approx(24 / 40 - 40 / 80), "counts are summed over batches, not accuracies averaged"
    assert mixed.low < mixed.mean < mixed.high


@pytest.mark.parametrize("counts", [[], [ExitCounts(0, 0, 8, 4)] * 3, [ExitCounts(8, 4, 0, 0)] * 3])
def test_without_control_samples_the_cost_of_exits_is_not_known(counts):
    assert exit_cost(counts) is None

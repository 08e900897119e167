"""Intervals and compression of evaluations."""

import numpy as np
import pytest

from stepgrpo.evaluate import compression, evaluation
from stepgrpo.types import GradedGroup
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
    ratio = compression(before, after)
    assert ratio.mean == pytest.approx(0.5)
    assert (ratio.low, ratio.high) == pytest.approx((0.5, 0.5)), "problems differ in length, but each one halves"


def test_compression_of_different_problems_is_refused():
    with pytest.raises(ValueError, match="same problems"):
        compression(groups_of([[facts()]] * 2), groups_of([[facts()]] * 3))


def test_failures_and_cut_off_answers_are_counted():
    e = evaluation(
        groups_of([[facts(complete=False, error="timeout", correct=False)], [facts()]]), version=3, seconds=1
    )
    assert (e.incomplete, e.grader_failures, e.version, e.problems) == (0.5, 1, 3, 2)

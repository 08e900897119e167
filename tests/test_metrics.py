"""Metrics of a batch by hand, and the file they are written to."""

import json
import math

import numpy as np
import pytest

from stepgrpo.metrics import METRICS, ExitCounts, RunLog, TriggerWatch, exit_counts, of_groups, probes_of
from stepgrpo.types import Exit, GradedGroup, Verdict
from tests.facts import facts

NAN = float("nan")


def batch():
    a = (
        facts(
            tokens=10,
            steps=1,
            exit=Exit.CONFIDENT,
            probe_confidences=(0.5, 0.99),
            probe_verdicts=(Verdict.DECLINED, Verdict.CONFIDENT),
            probe_tokens=6,
            discarded_tokens=7,
            oldest_version=3,
        ),
        facts(tokens=40, steps=4, control=True, oldest_version=4),
    )
    b = (
        facts(correct=False, tokens=20, steps=2, exit=Exit.EOS, complete=False, error="timeout", oldest_version=4),
        facts(
            tokens=30,
            steps=3,
            probe_confidences=(NAN, NAN),
            probe_verdicts=(Verdict.STALE, Verdict.UNUSED),
            probe_tokens=2,
            oldest_version=2,
            newest_version=3,
        ),
    )
    return [GradedGroup(7, "p:1", a), GradedGroup(9, "p:2", b)]


def test_every_figure_of_a_small_batch_is_what_one_computes_by_hand():
    m = of_groups(batch(), [np.array([1.3, 0.7]), np.array([0.1, 1.0])], version=4, alpha=0.9)
    expected = {
        "reward/mean": 0.775,
        "reward/accuracy": 0.75,
        "reward/format": 1.0,
        "reward/signal": 1.0,
        "reward/grader_failures": 1,
        "reward/step_factor": (1.2 + 0.6 + 0.9) / 2.7,
        "accuracy/exited": 1.0,
        "accuracy/natural": 1.0,
        "accuracy/control": 1.0,
        "accuracy/treated": 2 / 3,
        "rollout/steps": 2.5,
        "rollout/tokens": 25,
        "rollout/tokens_per_step": 10,
        "rollout/tokens_max": 40,
        "rollout/incomplete": 0.25,
        "rollout/tokens_saved": 40 - (16 + 20 + 32) / 3,
        "exit/confident": 0.25,
        "exit/natural": 0.5,
        "exit/eos": 0.25,
        "exit/budget": 0.0,
        "probe/per_trajectory": 0.75,
        "probe/tokens": 2.0,
        "probe/confident": 1 / 3,
        "probe/stale": 1 / 3,
        "probe/confidence_p50": 0.745,
        "staleness/mean": 0.75,
        "staleness/max": 2,
        "staleness/mixed": 0.25,
        "discarded/tokens": 7,
    }
    assert {k: m[k] for k in expected} == pytest.approx(expected)
    assert set(m) <= set(METRICS)


def test_what_does_not_exist_in_a_batch_is_nan_and_null_in_the_file(tmp_path):
    groups = [GradedGroup(0, "p:1", (facts(), facts(correct=False)))]
    m = of_groups(groups, [np.array([1.0, 0.1])], version=0, alpha=0.9)
    assert math.isnan(m["accuracy/control"])
    assert math.isnan(m["rollout/tokens_saved"])
    with RunLog(tmp_path) as log:
        log.write({"update": 1, **m})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["accuracy/control"] is None
    assert line["reward/accuracy"] == 0.5


def test_a_metric_nobody_described_is_refused(tmp_path):
    with RunLog(tmp_path) as log, pytest.raises(AssertionError, match="without a description"):
        log.write({"update": 1, "reward/vibes": 1.0})


def test_probes_read_to_their_end_are_kept_with_what_their_answer_was_worth():
    read = facts(
        probe_confidences=(0.123456, NAN, 0.99, NAN),
        probe_verdicts=(Verdict.DECLINED, Verdict.STALE, Verdict.CONFIDENT, Verdict.UNUSED),
        probe_correct=(False, None, True, None),
    )
    unasked = facts(probe_confidences=(NAN,), probe_verdicts=(Verdict.CONFIDENT,), probe_correct=(None,))
    groups = [GradedGroup(0, "p:1", (read, unasked)), GradedGroup(1, "p:2", (facts(),))]
    assert probes_of(groups) == {
        "confidence": [0.1235, 0.99],
        "verdict": ["declined", "confident"],
        "correct": [0, 1],
    }


def test_exit_counts_tell_control_samples_from_those_that_may_be_cut():
    assert exit_counts(batch()) == ExitCounts(control=1, control_right=1, treated=3, treated_right=2)
    assert exit_counts([GradedGroup(0, "p:1", (facts(),))]) == ExitCounts(0, 0, 1, 1)


def told(watch, *seen):
    """At which of these observations the watch says something."""
    return [i for i, (steps, tokens) in enumerate(seen) if watch.see(steps, tokens)]


def test_the_watch_tells_once_of_steps_that_fall_while_tokens_stay():
    watch = TriggerWatch(window=2)
    assert told(watch, (6, 100), (6, 100), (5, 99), (5, 99), (2, 99), (2, 99)) == [3]
    message = TriggerWatch(window=1)
    assert message.see(6, 100) is None
    assert message.see(3, 95).startswith("steps fell by 50%, tokens by 5%: ")


@pytest.mark.parametrize(
    ("last", "tells"),
    [
        ((8.6, 100), False),  # steps fell by less than 15 %
        ((8.4, 100), True),
        ((8.4, 106), True),
        ((5, 82), False),  # tokens fell along, by more than a third of what steps did
        ((5, 84), True),
        ((12, 140), False),
    ],
)
def test_the_watch_is_silent_where_tokens_fall_along_or_steps_stay(last, tells):
    assert told(TriggerWatch(window=1), (10, 100), last) == [1] * tells


def test_the_watch_waits_for_two_windows_and_compares_the_first_with_the_last():
    falling = [(10, 100)] * 3 + [(1, 100)] * 3
    assert told(TriggerWatch(window=3), *falling) == [5]
    assert told(TriggerWatch(window=4), *falling) == []
    assert told(TriggerWatch(window=2), (10, 100), (10, 100), *[(9, 100)] * 9, (7, 100), (7, 100)) == [11]

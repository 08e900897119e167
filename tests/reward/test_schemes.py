from collections.abc import Sequence

import numpy as np
import pytest

from stepgrpo.config import RewardConfig
from stepgrpo.reward.schemes import make_scheme, outcome_reward, step_aware
from stepgrpo.types import GradedGroup
from tests.facts import facts


@pytest.mark.parametrize(
    ("steps", "correct", "baseline", "rewards"),
    [
        ((2, 6, 8), (1, 1, 0), "correct", (1.207953, 0.792047, 0.1)),
        ((2, 6, 8), (1, 1, 0), "all", (1.249570, 0.944041, 0.1)),
        ((1, 3, 5, 7, 9), (1,) * 5, "correct", (1.298817, 1.170977, 1.0, 0.829023, 0.701183)),
        ((1, 3, 5, 7, 9), (1,) * 5, "all", (1.298817, 1.170977, 1.0, 0.829023, 0.701183)),
        ((4,) * 5, (1,) * 5, "correct", (1.0,) * 5),
        ((3, 20, 6, 5, 40), (1, 0, 1, 0, 0), "correct", (1.144681, 0.1, 0.855319, 0.1, 0.1)),
        ((3, 20, 6, 5, 40), (1, 0, 1, 0, 0), "all", (1.298135, 0.1, 1.239936, 0.1, 0.1)),
        ((3, 20), (0, 0), "correct", (0.1, 0.1)),
    ],
)
def test_the_step_aware_reward_has_the_papers_values(steps, correct, baseline, rewards) -> None:
    found = step_aware(correct, np.ones(len(steps)), steps, baseline=baseline)
    np.testing.assert_allclose(found, rewards, atol=1e-6, rtol=0)


def test_a_wrong_answer_earns_its_format_alone_whatever_its_steps() -> None:
    found = step_aware([0, 0, 1], [1, 0, 1], [1, 1, 50])
    np.testing.assert_allclose(found, [0.1, 0.0, 1.0], atol=1e-12)


def test_without_the_step_term_the_reward_is_the_outcome() -> None:
    correct, formatted = [1, 1, 0, 0], [1, 0, 1, 0]
    np.testing.assert_allclose(outcome_reward(correct, formatted), [1.0, 0.9, 0.1, 0.0], atol=1e-12)
    np.testing.assert_allclose(outcome_reward(correct, formatted, alpha=0.5), [1.0, 0.5, 0.5, 0.0], atol=1e-12)
    flat = step_aware(correct, formatted, [1, 9, 2, 3], beta=0.0)
    np.testing.assert_allclose(flat, outcome_reward(correct, formatted), atol=1e-12)


def test_equal_steps_give_bit_equal_rewards() -> None:
    for k in range(1, 60):
        assert len(set(step_aware([1] * 7, [1] * 7, [k] * 7).tolist())) == 1


@pytest.mark.parametrize(("correct", "steps"), [([1, 1], [1, 2, 3]), ([1], [0]), ([[1]], [[1]])])
def test_facts_that_do_not_fit_together_are_refused(correct, steps) -> None:
    with pytest.raises(ValueError, match="takes one of each per response"):
        step_aware(correct, correct, steps)


def graded(draw: int, correct: Sequence[int], steps: Sequence[int]) -> GradedGroup:
    members = tuple(facts(correct=bool(c), steps=k, tokens=10 * k) for c, k in zip(correct, steps, strict=True))
    return GradedGroup(draw, f"problem-{draw}", members)


BATCH = [graded(0, (1, 1, 0), (2, 6, 8)), graded(1, (0, 1), (3, 4)), graded(2, (0, 0), (1, 2))]


def test_a_scheme_rewards_each_group_by_its_own_yardstick_in_order() -> None:
    rewards = make_scheme(RewardConfig(alpha=0.8, beta=0.3, baseline="all"))(BATCH)
    assert [len(r) for r in rewards] == [3, 2, 2]
    for group, found in zip(BATCH, rewards, strict=True):
        alone = step_aware(group.correct, group.formatted, group.num_steps, alpha=0.8, beta=0.3, baseline="all")
        np.testing.assert_array_equal(found, alone)


def test_the_outcome_scheme_does_not_look_at_steps() -> None:
    rewards = make_scheme(RewardConfig(scheme="outcome", alpha=0.7))(BATCH)
    expected = [[1.0, 1.0, 0.3], [0.3, 1.0], [0.3, 0.3]]
    for found, wanted in zip(rewards, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_every_scheme_a_config_may_name_exists() -> None:
    for name in RewardConfig.model_fields["scheme"].annotation.__args__:
        assert len(make_scheme(RewardConfig(scheme=name))(BATCH)) == len(BATCH)

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from stepgrpo.config import SCHEMES, ConfigError, RewardConfig
from stepgrpo.reward.schemes import (
    easy_length_penalty,
    length_penalty,
    make_scheme,
    outcome_reward,
    overlong,
    step_aware,
)
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


def test_the_length_penalty_compares_correct_responses_with_each_other_alone() -> None:
    # Lengths 10 and 30 lie one standard deviation from their mean: sigmoid(-1) = 0.268941, sigmoid(1) = 0.731059.
    found = length_penalty([1, 1, 0, 0], [10, 30, 999, 1], alpha=0.4)
    np.testing.assert_allclose(found, [0.892423, 0.707577, 0, 0], atol=1e-6, rtol=0)


def test_the_only_correct_response_pays_half_of_the_length_penalty_and_without_one_nobody_earns() -> None:
    np.testing.assert_allclose(length_penalty([0, 1, 0], [5, 700, 9], alpha=0.4), [0, 0.8, 0], atol=1e-12)
    np.testing.assert_array_equal(length_penalty([0, 0], [5, 700]), [0, 0])


def test_the_overlong_ramp_goes_from_its_start_to_the_limit_for_right_and_wrong_alike() -> None:
    tokens = [1, 80, 81, 90, 100]
    lost = np.array([0, 0, 0.05, 0.5, 1])
    np.testing.assert_allclose(overlong([1] * 5, tokens, max_tokens=100, share=0.2), 1 - lost, atol=1e-12)
    np.testing.assert_allclose(overlong([0] * 5, tokens, max_tokens=100, share=0.2), -lost, atol=1e-12)


def easy_groups(accuracies: Sequence[int], share: float) -> list[int]:
    """Which groups of four, with so many right, are penalised for length."""
    correct = [[1] * n + [0] * (4 - n) for n in accuracies]
    tokens = [[10, 20, 30, 40]] * len(correct)
    rewards = easy_length_penalty(correct, tokens, share=share)
    for c, r in zip(correct, rewards, strict=True):
        assert r.tolist() in (c, length_penalty(c, [10, 20, 30, 40]).tolist())
    return [i for i, (c, r) in enumerate(zip(correct, rewards, strict=True)) if r.tolist() != c]


@pytest.mark.parametrize(
    ("accuracies", "share", "easy"),
    [
        ((1, 4, 2, 3, 1), 0.2, [1]),
        ((1, 4, 2, 3, 1), 0.4, [1, 3]),
        ((1, 4, 2, 3, 1), 1.0, [0, 1, 2, 3, 4]),
        ((2, 3, 3, 3), 0.5, [1, 2]),  # equally accurate: the earlier
        ((1,), 0.2, [0]),
        ((2, 4), 0.0, [1]),
    ],
)
def test_the_length_penalty_of_easy_problems_falls_on_the_batchs_most_accurate_groups(accuracies, share, easy) -> None:
    assert easy_groups(accuracies, share) == easy


def graded(draw: int, correct: Sequence[int], steps: Sequence[int]) -> GradedGroup:
    members = tuple(facts(correct=bool(c), steps=k, tokens=10 * k) for c, k in zip(correct, steps, strict=True))
    return GradedGroup(draw, f"problem-{draw}", members)


MAX_TOKENS = 100
BATCH = [graded(0, (1, 1, 0), (2, 6, 8)), graded(1, (0, 1), (3, 4)), graded(2, (0, 0), (1, 2))]


def test_a_scheme_rewards_each_group_by_its_own_yardstick_in_order() -> None:
    rewards = make_scheme(RewardConfig(alpha=0.8, beta=0.3, baseline="all"), MAX_TOKENS)(BATCH)
    assert [len(r) for r in rewards] == [3, 2, 2]
    for group, found in zip(BATCH, rewards, strict=True):
        alone = step_aware(group.correct, group.formatted, group.num_steps, alpha=0.8, beta=0.3, baseline="all")
        np.testing.assert_array_equal(found, alone)


def test_the_outcome_scheme_does_not_look_at_steps() -> None:
    rewards = make_scheme(RewardConfig(scheme="outcome", alpha=0.7), MAX_TOKENS)(BATCH)
    expected = [[1.0, 1.0, 0.3], [0.3, 1.0], [0.3, 0.3]]
    for found, wanted in zip(rewards, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_every_scheme_a_config_may_name_exists() -> None:
    for name in SCHEMES:
        rewards = make_scheme(RewardConfig(scheme=name), MAX_TOKENS)(BATCH)
        assert [r.shape for r in rewards] == [(3,), (2,), (2,)]


def test_a_scheme_has_the_settings_of_its_own() -> None:
    """Tokens of the batch: 20, 60, 80 with the last one wrong; 30 wrong, 40; 10 and 20 wrong."""

    def first(**settings: object) -> list[float]:
        return make_scheme(RewardConfig(**settings), MAX_TOKENS)(BATCH)[0].tolist()

    assert first(scheme="length_penalty", length_alpha=0.2) == pytest.approx([0.946212, 0.853788, 0], abs=1e-6)
    assert first(scheme="overlong", overlong_share=0.5) == pytest.approx([1, 0.8, -0.6])
    easy = make_scheme(RewardConfig(scheme="easy_length_penalty", length_alpha=0.2, easy_share=0.4), MAX_TOKENS)(BATCH)
    assert easy[0] == pytest.approx([0.946212, 0.853788, 0], abs=1e-6)
    assert (easy[1].tolist(), easy[2].tolist()) == ([0, 1], [0, 0])


# ---- one's own


def test_the_step_price_does_not_ask_what_others_took() -> None:
    config = RewardConfig(scheme="examples.own:step_price", options={"price": 0.2}, alpha=0.9)
    rewards = make_scheme(config, MAX_TOKENS)(BATCH)
    for found, wanted in zip(rewards, [[0.82, 0.1, 0.1], [0.1, 0.46], [0.1, 0.1]], strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        ("[np.ones(len(g.facts) + 1) for g in groups]", "[(4,), (3,), (3,)]"),
        ("[np.ones(len(g.facts)) for g in groups[1:]]", "[(2,), (2,)]"),
        ("[1.0 for g in groups]", "[(), (), ()]"),
        ("[np.full(len(g.facts), np.nan) for g in groups]", "[(3,), (2,), (2,)]"),
        ("[np.full(len(g.facts), np.inf) for g in groups]", "[(3,), (2,), (2,)]"),
    ],
)
def test_rewards_of_another_shape_or_not_finite_are_refused_with_the_schemes_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, returned: str, shown: str
) -> None:
    (tmp_path / "own_scheme.py").write_text(f"import numpy as np\n\n\ndef fn(groups, config):\n    return {returned}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_scheme", raising=False)
    scheme = make_scheme(RewardConfig(scheme="own_scheme:fn"), MAX_TOKENS)
    with pytest.raises(ConfigError) as refused:
        scheme(BATCH)
    message = str(refused.value)
    assert message.startswith(
        f"reward.scheme: own_scheme:fn returned arrays of shapes {shown}; takes one finite reward"
    )
    assert "[(3,), (2,), (2,)]" in message
    sys.modules.pop("own_scheme")


def test_an_own_scheme_that_is_not_there_is_refused_when_it_is_made() -> None:
    with pytest.raises(ConfigError, match=r"^reward\.scheme: got examples\.own:step_prise, which cannot be imported"):
        make_scheme(RewardConfig(scheme="examples.own:step_prise"), MAX_TOKENS)

import numpy as np
import pytest

from stepgrpo.reward.credit import advantages, has_signal
from stepgrpo.reward.schemes import step_aware


def test_std_divides_by_each_groups_sample_deviation() -> None:
    r = np.array([1.2, 0.8, 0.1])
    (found,) = advantages([r], "std")
    np.testing.assert_allclose(found, (r - r.mean()) / (r.std(ddof=1) + 1e-6), rtol=1e-12)


def test_with_std_an_all_correct_groups_advantages_hardly_depend_on_beta() -> None:
    steps = [2, 4, 9, 9, 12]
    for beta in (0.05, 0.5, 1.0):
        (found,) = advantages([step_aware([1] * 5, [1] * 5, steps, beta=beta)], "std")
        np.testing.assert_allclose(found, [1.242, 0.843, -0.471, -0.471, -1.142], atol=1e-3)


def test_none_keeps_the_rewards_scale() -> None:
    found = advantages([[1.0, 0.0], [0.5, 0.4, 0.3]], "none")
    np.testing.assert_allclose(found[0], [0.5, -0.5])
    np.testing.assert_allclose(found[1], [0.1, 0.0, -0.1], atol=1e-15)


def test_batch_divides_every_group_by_one_pooled_deviation() -> None:
    groups = [np.array([1.0, 0.0, 0.0]), np.array([0.51, 0.5]), np.array([0.3, 0.3, 0.3, 0.3])]
    centred = [g - g.mean() for g in groups]
    pooled = np.sqrt(sum((c**2).sum() for c in centred) / (9 - 3))
    for found, c in zip(advantages(groups, "batch"), centred, strict=True):
        np.testing.assert_allclose(found, c / (pooled + 1e-6), rtol=1e-12, atol=1e-12)


def test_batch_keeps_a_group_that_nearly_agrees_small_where_std_blows_it_up() -> None:
    groups = [[1.0, 0.0], [0.51, 0.50]]
    assert np.ptp(advantages(groups, "batch")[1]) < 0.05 * np.ptp(advantages(groups, "batch")[0])
    np.testing.assert_allclose(*advantages(groups, "std"), rtol=1e-3)


def test_one_group_alone_gets_from_batch_what_it_gets_from_std() -> None:
    r = [[1.2, 0.8, 0.1, 0.1]]
    np.testing.assert_array_equal(advantages(r, "batch")[0], advantages(r, "std")[0])


@pytest.mark.parametrize("normalization", ["std", "none", "batch"])
def test_equal_rewards_give_exactly_zero(normalization) -> None:
    values = [0.1, 1 / 3, 0.9 * 1.1 + 0.1, 1.2079531]
    assert any(np.any(np.full(n, v) - np.full(n, v).mean()) for v in values for n in range(2, 20)), (
        "these values show no rounding residue: the test below would prove nothing"
    )
    groups = [np.full(n, v) for v in values for n in range(2, 20)]
    for found in [*advantages(groups, normalization), *advantages([*groups, [1.0, 0.0]], normalization)[:-1]]:
        assert not found.any()


def test_a_group_has_signal_when_any_reward_differs() -> None:
    assert has_signal([0.1, 0.1, 0.1 + 1e-12])
    assert not has_signal([0.1] * 7)
    assert not has_signal(np.zeros(3))


@pytest.mark.parametrize("group", [[1.0], [], [[1.0, 2.0]]])
def test_a_group_without_siblings_is_refused(group) -> None:
    with pytest.raises(ValueError, match="takes at least 2 responses per group"):
        advantages([[1.0, 0.0], group], "std")


def test_an_unknown_normalization_is_refused() -> None:
    with pytest.raises(ValueError, match="takes std, none or batch"):
        advantages([[1.0, 0.0]], "max")  # type: ignore[arg-type]


def test_a_batch_without_groups_has_no_advantages() -> None:
    assert advantages([], "batch") == []

import math
from typing import Any

import pytest
import torch

from stepgrpo.learner import loss as loss_module
from stepgrpo.learner.loss import LossTokens, nll_loss, policy_loss

PAPER: dict[str, Any] = {
    "clip_low": 0.2,
    "clip_high": 0.3,
    "dual_clip": 3.0,
    "importance_cap": 2.0,
    "kl_coef": 0.01,
    "scale": 1.0,
}


def tokens(
    advantage: list[float],
    *,
    old: list[float] | None = None,
    behaviour: list[float] | None = None,
    forced: list[bool] | None = None,
    own: list[bool] | None = None,
    reference: list[float] | None = None,
) -> LossTokens:
    n = len(advantage)
    return LossTokens(
        advantage=torch.tensor(advantage),
        behaviour=torch.tensor(behaviour or old or [0.0] * n),
        forced=torch.tensor(forced or [False] * n, dtype=torch.bool),
        own=torch.tensor(own or [True] * n, dtype=torch.bool),
        old=None if old is None else torch.tensor(old),
        reference=None if reference is None else torch.tensor(reference),
    )


def value_and_gradient(ratio: float, advantage: float, **changes: Any) -> tuple[float, float]:
    """Loss of one token and its derivative by the log-probability, at the given ratio current/old."""
    logp = torch.tensor([math.log(ratio) - 1.0], requires_grad=True)
    loss, _ = policy_loss(logp, tokens([advantage], old=[-1.0]), **(PAPER | changes))
    loss.backward()
    assert logp.grad is not None
    return loss.item(), logp.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside the clip: -A r, and d/dlogp = -A r
        (1.5, 2.0, -2.6, 0.0),  # above 1 + clip_high: bounded, no pull
        (0.5, 2.0, -1.0, -1.0),  # below, but improvement is wanted: not clipped
        (0.5, -2.0, 1.6, 0.0),  # below 1 - clip_low: bounded
        (1.5, -2.0, 3.0, 3.0),  # above, and being pushed down: not clipped
        (4.0, -2.0, 6.0, 0.0),  # dual clip: at most -A * 3
    ],
)
def test_the_clipped_loss_has_the_hand_computed_value_and_gradient(ratio, advantage, value, gradient):
    assert value_and_gradient(ratio, advantage) == pytest.approx((value, gradient), abs=1e-5)


def test_without_dual_clip_a_negative_advantage_is_unbounded():
    assert value_and_gradient(4.0, -2.0, dual_clip=None) == pytest.approx((8.0, 8.0), abs=1e-5)


def test_the_clip_fractions_count_what_was_clipped():
    ratio = torch.tensor([1.1, 1.5, 0.5, 0.5, 1.5, 4.0])
    advantage = [2.0, 2.0, 2.0, -2.0, -2.0, -2.0]
    _, sums = policy_loss(ratio.log() - 1, tokens(advantage, old=[-1.0] * 6), **PAPER)
    assert [sums[f"policy/{n}"][0].item() for n in ("clipped_low", "clipped_high", "dual_clipped")] == [1, 1, 1]
    assert sums["policy/clipped_low"][1] == 6


def test_with_one_update_the_old_policy_is_the_current_one_and_the_gradient_is_minus_the_advantage():
    logp = torch.tensor([-0.3, -2.0], requires_grad=True)
    loss, _ = policy_loss(logp, tokens([1.5, -0.5], behaviour=[-0.3, -2.0]), **PAPER)
    loss.backward()
    assert loss.item() == pytest.approx(-1.0)
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([-1.5, 0.5])


def test_the_importance_weight_is_truncated_detached_and_one_where_forced():
    # exp(old - behaviour): 1.5, 4 (capped at 2), and a forced token without a behaviour.
    old = [-1.0, -1.0, -1.0]
    behaviour = [-1.0 - math.log(1.5), -1.0 - math.log(4.0), 0.0]
    logp = torch.tensor(old, requires_grad=True)
    batch = tokens([1.0, 1.0, 1.0], old=old, behaviour=behaviour, forced=[False, False, True])
    loss, sums = policy_loss(logp, batch, **PAPER)
    loss.backward()
    assert loss.item() == pytest.approx(-(1.5 + 2.0 + 1.0))
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([-1.5, -2.0, -1.0])
    assert [v.item() for v in sums["importance/mean"]] == pytest.approx([1.5 + 4.0, 2])
    assert [v.item() for v in sums["importance/capped"]] == [1, 2]

    loss, _ = policy_loss(logp, batch, **(PAPER | {"importance_cap": None}))
    assert loss.item() == pytest.approx(-3.0)


def test_the_kl_term_is_k3_and_pulls_towards_the_reference():
    logp = torch.tensor([-1.0, -1.0], requires_grad=True)
    batch = tokens([0.0, 0.0], old=[-1.0, -1.0], reference=[-1.0 + math.log(2.0), -1.0])
    loss, sums = policy_loss(logp, batch, **(PAPER | {"kl_coef": 0.1}))
    loss.backward()
    k3 = 2.0 - math.log(2.0) - 1.0
    assert loss.item() == pytest.approx(0.1 * k3, rel=1e-5)
    assert [v.item() for v in sums["policy/kl"]] == pytest.approx([k3, 2])
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([0.1 * (1 - 2.0), 0.0], abs=1e-7)  # d k3 / d current = 1 - r


def test_the_mismatch_reads_sampled_tokens_of_the_learners_own_version_only():
    old = [-1.0, -1.0, -1.0, -1.0]
    batch = tokens(
        [1.0] * 4,
        old=old,
        behaviour=[-1.1, -1.3, -5.0, 0.0],
        own=[True, True, False, True],
        forced=[False, False, False, True],
    )
    _, sums = policy_loss(torch.tensor(old), batch, **PAPER)
    assert [v.item() for v in sums["mismatch/mean"]] == pytest.approx([0.4, 2])
    assert sums["mismatch/max"][0].item() == pytest.approx(0.3)


def test_the_closings_log_probability_is_split_by_the_sign_of_its_advantage():
    logp = torch.tensor([-0.1, -2.0, -3.0, -7.0])
    _, sums = policy_loss(logp, tokens([1.0, -1.0, 0.0, 1.0], forced=[True, True, True, False]), **PAPER)
    assert [v.item() for v in sums["closing/logprob"]] == pytest.approx([-5.1, 3])
    assert [v.item() for v in sums["closing/logprob_rewarded"]] == pytest.approx([-0.1, 1])
    assert [v.item() for v in sums["closing/logprob_punished"]] == pytest.approx([-2.0, 1])


def test_an_unlikely_token_gives_finite_numbers():
    logp = torch.tensor([-200.0, -200.0], requires_grad=True)
    batch = tokens([1.0, -1.0], old=[-1.0, -300.0], behaviour=[-1.0, -1.0], reference=[-1.0, -1.0])
    loss, sums = policy_loss(logp, batch, **PAPER)
    loss.backward()
    assert logp.grad is not None
    assert logp.grad.isfinite().all()
    assert all(v.isfinite() for pair in sums.values() for v in pair)


def test_no_loss_tokens_give_a_zero_loss_that_can_be_differentiated():
    logp = torch.zeros(0, requires_grad=True)
    loss, sums = policy_loss(logp, tokens([]), **PAPER)
    loss.backward()
    assert loss.item() == 0
    assert all(count == 0 for _, count in sums.values())


def test_micro_batches_add_up_to_the_whole():
    torch.manual_seed(0)
    logp, old, behaviour, reference = (-torch.rand(12) for _ in range(4))
    advantage, forced = torch.randn(12), torch.rand(12) < 0.3

    def part(s: slice) -> tuple[torch.Tensor, loss_module.Sums]:
        batch = LossTokens(advantage[s], behaviour[s], forced[s], ~forced[s], old[s], reference[s])
        return policy_loss(logp[s], batch, **(PAPER | {"scale": 1 / 12}))

    whole, parts = part(slice(0, 12)), [part(slice(0, 5)), part(slice(5, 12))]
    assert sum(p[0].item() for p in parts) == pytest.approx(whole[0].item(), abs=1e-6)
    for name, (value, count) in whole[1].items():
        combine = max if name.endswith("/max") else sum
        assert combine(p[1][name][0].item() for p in parts) == pytest.approx(value.item(), abs=1e-5)
        assert sum(p[1][name][1].item() for p in parts) == count


def test_nll_is_the_weighted_mean_over_tokens():
    loss, sums = nll_loss(torch.tensor([-1.0, -3.0]), tokens([1.0, 2.0]), scale=0.5)
    assert loss.item() == pytest.approx(3.5)
    assert [v.item() for v in sums["policy/loss"]] == pytest.approx([7.0, 2])


def test_the_loss_does_not_know_what_it_is_used_for():
    from pathlib import Path

    assert loss_module.__file__ is not None
    assert "step" not in Path(loss_module.__file__).read_text().replace("stepgrpo", "").lower()

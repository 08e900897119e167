"""Clipped policy loss per token; knows nothing of where advantages come from.

Everything is flat: [N] loss tokens of one micro-batch. A loss returns what to differentiate and, for each metric, a sum
and a count, which add up over micro-batches and ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Sums = dict[str, tuple[Tensor, Tensor]]
"""Metric -> (sum over tokens, number of those tokens); a name that ends in ``/max`` has the maximum for a sum."""

_LOG_RATIO_LIMIT = 20.0
"""exp() of more is no longer a number to learn from, and soon no number at all."""


@dataclass(frozen=True, slots=True)
class LossTokens:
    """What a loss reads about its [N] tokens, apart from the policy's own log-probabilities."""

    advantage: Tensor
    """float32; in supervised training the weight."""
    behaviour: Tensor
    """float32 log-probabilities at sampling; read only where not ``forced``."""
    forced: Tensor
    """bool: trained on but not sampled, so there is no behaviour to correct for."""
    own: Tensor
    """bool: sampled by the weights the learner has at the rollout batch's first update."""
    old: Tensor | None
    """float32 log-probabilities before the rollout batch's first update; None: equal to the current ones."""
    reference: Tensor | None
    """float32 log-probabilities of the reference policy; None: no KL term."""


def policy_loss(
    logprobs: Tensor,
    tokens: LossTokens,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    importance_cap: float | None,
    kl_coef: float,
    scale: float,
) -> tuple[Tensor, Sums]:
    """PPO's clipped loss with dual clip, truncated importance sampling and a KL penalty, summed and scaled.

        r = exp(current - old)
        L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),  for A < 0 at most -A dual_clip
        w = min(exp(old - behaviour), importance_cap), detached, 1 where forced
        loss = scale * sum(w L + kl_coef * k3),  k3 = exp(reference - current) - (reference - current) - 1

    Sources: clip Schulman et al. 1707.06347, asymmetric bounds 2503.14476, dual clip 1912.09729, k3
    joschu.net/blog/kl-approx.html, behaviour and old policy kept apart 2505.24298.

    Args:
        logprobs: [N] float32, of the current policy, with gradient.
        dual_clip: bound on the ratio for negative advantages; None: none.
        importance_cap: None: weights are 1.
        scale: what one token's loss counts, 1 / loss tokens of all ranks for the global token mean.

    Returns:
        The scalar loss and the sums.
    """
    current = logprobs.detach()
    old = current if tokens.old is None else tokens.old
    advantage, sampled = tokens.advantage, ~tokens.forced
    negative = advantage < 0

    ratio = _exp(logprobs - old)
    unclipped = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    policy = torch.maximum(unclipped, clipped)
    beyond_dual = torch.zeros_like(negative)
    if dual_clip is not None:
        policy = torch.where(negative, torch.minimum(policy, -advantage * dual_clip), policy)
        beyond_dual = negative & (ratio > dual_clip)

    off_policy = torch.where(sampled, old - tokens.behaviour, 0.0)
    importance = _exp(off_policy)
    capped = torch.zeros_like(sampled)
    if importance_cap is not None:
        capped = importance > importance_cap
        policy = policy * importance.clamp(max=importance_cap)

    loss = policy
    kl = torch.zeros_like(policy)
    if tokens.reference is not None:
        log_ratio = (tokens.reference - logprobs).clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
        kl = log_ratio.exp() - log_ratio - 1
        loss = policy + kl_coef * kl

    everywhere = torch.ones_like(sampled)
    own = tokens.own & sampled
    mismatch = torch.where(own, off_policy.abs(), 0.0)
    sums = {
        "policy/loss": _sum(loss, everywhere),
        "policy/kl": _sum(kl, everywhere),
        "policy/clipped_low": _sum(negative & (ratio < 1 - clip_low), everywhere),
        "policy/clipped_high": _sum((advantage > 0) & (ratio > 1 + clip_high), everywhere),
        "policy/dual_clipped": _sum(beyond_dual, everywhere),
        "importance/mean": _sum(importance, sampled),
        "importance/capped": _sum(capped, sampled),
        "mismatch/mean": _sum(mismatch, own),
        "mismatch/max": (torch.cat([mismatch, mismatch.new_zeros(1)]).max(), own.sum()),
        "closing/logprob": _sum(current, tokens.forced),
        "closing/logprob_rewarded": _sum(current, tokens.forced & (advantage > 0)),
        "closing/logprob_punished": _sum(current, tokens.forced & negative),
    }
    return loss.sum() * scale, sums


def nll_loss(logprobs: Tensor, tokens: LossTokens, *, scale: float) -> tuple[Tensor, Sums]:
    """Weighted negative log-likelihood, summed and scaled.

    Args:
        logprobs: [N] float32, with gradient.
        scale: what one token's loss counts.
    """
    loss = -tokens.advantage * logprobs
    return loss.sum() * scale, {"policy/loss": _sum(loss, torch.ones_like(tokens.forced))}


def _sum(values: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(where, values.detach().float(), 0.0).sum(), where.sum()


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT).exp()

"""Log-probabilities of a head and their gradients, by chunks or from whole logits: head.py TOKENS HIDDEN VOCABULARY."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from answering import Meter, answer, asked, resident
from torch import Tensor

from stepgrpo.config import LearnerConfig
from stepgrpo.learner.engine import LogProbHead

num_tokens, width, vocabulary = map(int, sys.argv[1:])
torch.manual_seed(0)
hidden = torch.randn(num_tokens, width, requires_grad=True)
weight = torch.nn.Parameter(torch.randn(vocabulary, width) * 0.02)
targets, upstream = torch.randint(0, vocabulary, (num_tokens,)), torch.randn(num_tokens)


def chunked(chunk_tokens: int) -> Callable[[], Tensor]:
    head = LogProbHead(weight, chunk_tokens, 1.0)
    return lambda: head(hidden, targets)[0]


def full() -> Tensor:
    """What a plain trainer does, entropy included, which both report."""
    logp = (hidden @ weight.T).log_softmax(-1)
    with torch.no_grad():
        (logp.exp() * logp).sum(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1)


WAYS: dict[str, Callable[[], Tensor]] = {
    "full": full,
    "chunked": chunked(LearnerConfig().logprob_chunk_tokens),
    "quarter": chunked(LearnerConfig().logprob_chunk_tokens // 4),
}
at_rest = resident()
last: list[Tensor] = []
while way := asked():
    meter = Meter()
    logprobs = WAYS[way]()
    grads = torch.autograd.grad((logprobs * upstream).sum(), (hidden, weight))
    taken = meter.read()
    new = [logprobs.detach(), *grads]
    apart = max((float((a - b).abs().max() / b.abs().max()) for a, b in zip(new, last, strict=False)), default=0.0)
    last = new if way == "full" else last
    answer(**taken, at_rest=at_rest, apart=apart)

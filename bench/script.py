"""A model whose trajectories have the lengths of a script: vLLM's own, steered through its logits.

What is forced follows from the tokens before it alone, so it does not matter in how many requests a trajectory is
sampled, or what is asked in between: the first `NAME` tokens of a response, sampled as its seed wants, name it, and
prompt and name seed its script. What stands between the forced tokens is sampled freely, of the other words.

    thinking   name 3 4 = ... Wait 5 + 1 ... Wait ... </think> 3 ... <eos>
    probe j    (the tokens before trigger j) inducer -> { 3 ... }   with the log-probabilities of its confidence

Lengths in tokens; log-normal ones are given by median and sigma:

    natural    650, 0.6, within 200 and 2,000: a response that nothing cuts
    step       85, 0.45, at least 16: three of four within 50 and 150
    answer     uniform in 30 to 60, after thinking, however that ended
    probe      uniform in 4 to 12, until its "}"; confident with probability 0.1, else its confidence is uniform in
               0.3 to 0.94
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.sample.logits_processor.interface import LogitsProcessor, MoveDirectionality

NAME = 4
EOS, THINK, CLOSE, TRIGGER, BOXED, OPEN_BRACE, END_BRACE = 2, 3, 4, 5, 8, 9, 10
STARTER = 6
"""As a prompt's second token: the trajectory is under way already, and only the rest of it is sampled."""
WORDS = range(11, 31)
SHORTEST, LONGEST = 200, 2000
CONFIDENT = 0.995


@dataclass(frozen=True, slots=True)
class Script:
    triggers: list[int]
    """Where they stand, counted from the response's start."""
    probes: list[tuple[int, float]]
    """Of each trigger: tokens of the tentative answer, and each one's probability."""
    close: int
    """Where thinking closes if nothing closes it before."""
    answer: int
    """Tokens after the close."""

    @property
    def exit(self) -> int:
        """Where thinking closes if the first confident probe closes it."""
        asked = zip(self.triggers, self.probes, strict=True)
        return next((t for t, (_, p) in asked if p == CONFIDENT), self.close)


def script_for(prompt: Sequence[int], name: Sequence[int], max_probes: int = 10) -> Script:
    rng = random.Random(repr((list(prompt), list(name))))
    starter = prompt[1] == STARTER
    while True:
        natural = rng.lognormvariate(math.log(650), 0.6)
        # Of those under way the longer are met more often.
        if SHORTEST <= natural <= LONGEST and (not starter or rng.random() < natural / LONGEST):
            break
    answer = rng.randint(30, 60)
    close = int(natural) - answer
    triggers: list[int] = []
    probes: list[tuple[int, float]] = []
    position = NAME
    while (position := position + max(16, int(rng.lognormvariate(math.log(85), 0.45)))) < close - 16:
        confident = len(triggers) < max_probes and rng.random() < 0.1
        triggers.append(position)
        probes.append((rng.randint(4, 12), CONFIDENT if confident else rng.uniform(0.3, 0.94)))
    script = Script(triggers, probes, close, answer)
    if not starter:
        return script
    age = int(rng.random() * (script.exit - NAME - 1))
    gone = sum(t - age <= NAME for t in triggers)
    return Script([t - age for t in triggers[gone:]], probes[gone:], close - age, answer)


class _Row:
    """A request in the batch: what is due next, and in how many tokens."""

    def __init__(self, prompt: Sequence[int], output: list[int], exits: bool) -> None:
        self.start = prompt.index(THINK) + 1
        self.prompt, self.output, self.exits = list(prompt), output, exits
        self.script: Script | None = None

    @property
    def response(self) -> list[int]:
        return self.prompt[self.start :] + self.output

    def due(self) -> tuple[int, int, float]:
        """How many tokens are free, which one follows, and its probability; a free one named -1: look again there."""
        response = self.response
        here = len(response)
        if here < NAME:
            return 0, -1, 0.0
        script = self.script = self.script or script_for(self.prompt[: self.start], response[:NAME])
        if BOXED in response:
            probe, asked = response[: (at := response.index(BOXED))], here - at - 1
            tokens, p = script.probes[probe.count(TRIGGER)]
            token = OPEN_BRACE if not asked else END_BRACE if asked == tokens - 1 else WORDS[asked]
            return 0, token, CONFIDENT if not asked else p
        if CLOSE in response:
            return max(0, response.index(CLOSE) + script.answer - here), EOS, 1.0
        close = script.exit if self.exits else script.close
        trigger = next((t for t in script.triggers if here <= t < close), close)
        return trigger - here, TRIGGER if trigger < close else CLOSE, 1.0


class Scripted(LogitsProcessor):
    """``extra_args={"exits": True}``: the script itself exits where a probe would, for sampling without probes."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        size = vllm_config.scheduler_config.max_num_seqs
        self.rows: dict[int, _Row] = {}
        if device.type == "cuda":
            _sample_all_at_once(device)
        self.free = np.full(size, 1 << 30)
        self.next = np.full(size, -1)
        self.p = np.zeros(size)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.rows.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            row = self.rows[index] = _Row(prompt, output, bool((params.extra_args or {}).get("exits")))
            self.free[index], self.next[index], self.p[index] = row.due()
        for a, b, how in batch_update.moved:
            if how == MoveDirectionality.SWAP:
                self.rows[a], self.rows[b] = self.rows[b], self.rows[a]
                for column in (self.free, self.next, self.p):
                    column[[a, b]] = column[[b, a]]
            else:
                self.rows[b] = self.rows.pop(a)
                for column in (self.free, self.next, self.p):
                    column[b] = column[a]

    def apply(self, logits: Any) -> Any:
        num = len(logits)
        free = self.free[:num]
        for index in np.flatnonzero(free == 0).tolist():
            row = self.rows[index]
            self.free[index], self.next[index], self.p[index] = row.due()
        due = np.flatnonzero(free == 0)
        token, p = self.next[due], self.p[due]
        named, certain = token >= 0, p == 1
        odds = np.divide(p, 1 - p, out=np.ones_like(p), where=~certain)
        values = np.where(certain, 0.0, np.log(np.maximum(odds, 1e-9) * (WORDS.stop - 1)))

        def sent(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(logits.device, non_blocking=True)

        logits[:, : WORDS.start] = logits[:, WORDS.stop :] = -math.inf
        if logits.is_cuda:  # whose matrix products depend on how many there are, by which the loops differ
            logits[:, WORDS.start : WORDS.stop] = 0.0
        logits[sent(due[~named]), WORDS.start : WORDS.stop] = 0.0
        rows, columns = sent(due[named]), sent(token[named])
        logits[rows, : WORDS.stop] = sent(np.where(certain, -math.inf, 0.0)[named]).to(logits.dtype)[:, None]
        logits[rows, columns] = sent(values[named]).to(logits.dtype)
        free -= free > 0
        return logits


def _sample_all_at_once(device: torch.device) -> None:
    """Have seeded requests sampled together, as by the sampler that vLLM takes where no logits are steered.

    That one takes no logits processors; the one that does launches a kernel for each seeded request, for milliseconds.
    """
    from vllm.v1.sample.ops import topk_topp_sampler

    columns = torch.arange(1, WORDS.stop + 1, device=device) * 0x9E3779B1

    def random_sample(probs: torch.Tensor, generators: dict[int, torch.Generator], *_: Any) -> torch.Tensor:
        keys = np.zeros(len(probs), np.int64)
        for row, generator in generators.items():
            sampled = generator.get_offset()  # which is a multiple of 4
            generator.set_offset(sampled + 4)
            keys[row] = hash((generator.initial_seed(), sampled)) & 0x7FFFFFFF
        x = (torch.from_numpy(keys).to(device, non_blocking=True)[:, None] ^ columns) & 0xFFFFFFFF
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # the end of MurmurHash3
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        noise = -((x.float() + 0.5) / 2**32).clamp(max=1 - 1e-7).log()
        return (probs[:, : WORDS.stop] / noise).argmax(-1).view(-1)

    topk_topp_sampler.random_sample = random_sample

"""What a stream of tokens and a probe's answer mean: the decisions of the dynamic truncated rollout, without any IO.

Everything here is decided by token index, never by arrival: the same tokens give the same decisions however they are
cut into chunks. Mechanism after DEER (arXiv 2504.15895), confidence after Step-GRPO (arXiv 2604.16890, Eq. 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, NamedTuple, Protocol, Self, TypeVar

from stepgrpo.config import ProbeConfig, is_own
from stepgrpo.plugin import make_own
from stepgrpo.reward.steps import StepRule
from stepgrpo.tokens import Codec, TextStream
from stepgrpo.types import Exit

T = TypeVar("T")

THINK, ANSWER = 0, 1
"""Segments of a trajectory that are sampled with noise of their own."""


def _hash(*parts: int | str) -> int:
    """63 bits, the same on every machine."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def seed_for(run_seed: int, draw: int, sample: int, segment: int) -> int:
    """Sampling seed of one request, in [0, 2**63): a problem that comes back next epoch, as another draw, meets other
    noise, and an answer does not replay its own thinking."""
    return _hash("seed", run_seed, draw, sample, segment)


def is_control(run_seed: int, draw: int, sample: int, fraction: float) -> bool:
    """Whether this sample stays untruncated: by hash, because a fraction of a small group would round to none."""
    return _hash("control", run_seed, draw, sample) < fraction * 2**63


def is_probed(run_seed: int, draw: int, sample: int, trigger: int, probability: float) -> bool:
    """Whether trigger number ``trigger`` of this sample is probed."""
    return _hash("probe", run_seed, draw, sample, trigger) < probability * 2**63


@dataclass(frozen=True, slots=True)
class Trigger:
    """A word that opens a new step; the step before it is complete."""

    index: int
    """Its number in the trajectory, from 0."""
    position: int
    """Response token that holds its first character: the completed step is the tokens before."""


class Answer(NamedTuple):
    """A tentative answer, decoded to its end by the weights that had thought."""

    trigger: Trigger
    token_ids: tuple[int, ...]
    confidence: float
    """In [0, 1]; nan where the policy asked no question."""


@dataclass(frozen=True, slots=True)
class Preset:
    """How a tentative answer is asked for, when it may count, and how thinking is closed."""

    inducer: str
    """Asks for the answer, after the completed step."""
    closing: str
    """Closes thinking at a confident exit; where the answer is kept it is the inducer, which the answer follows."""
    stop: tuple[str, ...]
    """Texts that end a tentative answer; EOS always does."""
    skip_first: int
    """First tokens that do not count for confidence."""
    require_close: bool
    """Only an answer that ended in one of ``stop`` may count."""
    keep_answer: bool
    """The tentative answer is the final one, instead of being sampled anew."""
    delta: float
    max_tokens: int

    @classmethod
    def resolve(cls, config: ProbeConfig, think_close: str) -> Self:
        """The named preset, overridden by the fields that are set.

        Raises:
            ValueError: the result would not close thinking.
        """
        keep_answer = config.preset == "paper"
        if keep_answer:
            if config.closing is not None:
                raise ValueError(
                    f"rollout.probe.closing: got {config.closing!r}, takes null with preset paper, where the inducer "
                    "closes thinking: set rollout.probe.inducer instead"
                )
            inducer = closing = _given(config.inducer, f"{think_close} The final answer is")
        else:
            inducer = _given(config.inducer, "\n**Final Answer**\n\\boxed")
            closing = _given(config.closing, f"{think_close}\n\n")
        if think_close not in closing:
            raise ValueError(
                f"rollout.probe.{'inducer' if keep_answer else 'closing'}: got {closing!r}, takes a text with "
                f"{think_close!r} in it, because it closes thinking"
            )
        skip_first = _given(config.skip_first, 0 if keep_answer else 1)
        if skip_first >= config.max_tokens:
            raise ValueError(
                f"rollout.probe.skip_first: got {skip_first}, takes less than rollout.probe.max_tokens "
                f"({config.max_tokens}): otherwise no token counts and no probe can pass"
            )
        stop = tuple(_given(config.stop, [] if keep_answer else [think_close]))
        require_close = _given(config.require_close, not keep_answer)
        if require_close and not stop:
            raise ValueError("rollout.probe.stop: got none, takes a text where rollout.probe.require_close is true")
        return cls(
            inducer=inducer,
            closing=closing,
            stop=stop,
            skip_first=skip_first,
            require_close=require_close,
            keep_answer=keep_answer,
            delta=config.delta,
            max_tokens=config.max_tokens,
        )

    def confidence(self, logprobs: Sequence[float], closed: bool) -> float:
        """``exp(mean log p)`` of the tokens that count (Eq. 2); 0 where none counts, or a missing close forbids it."""
        counted = logprobs[self.skip_first :]
        if not counted or (self.require_close and not closed):
            return 0.0
        return min(1.0, math.exp(sum(counted) / len(counted)))


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


class ProbePolicy(Protocol):
    """When thinking ends. Asked about the triggers of one trajectory in token order, whatever arrives first.

    One object serves every trajectory, so it keeps no state of its own.
    """

    def question(self, trigger: Trigger) -> tuple[int, ...] | None:
        """Token ids that ask for a tentative answer after the completed step; None: none is needed to decide."""
        ...

    def hopeless(self, logprobs: Sequence[float]) -> bool:
        """Whether an answer that begins with these log-probabilities can no longer pass. Once true, true for longer
        beginnings as well."""
        ...

    def confident(self, answers: Sequence[Answer]) -> bool:
        """Whether to end thinking at the last of these answers, those of the trajectory so far. Stale and hopeless
        ones are not among them."""
        ...


class ConfidencePolicy:
    """Ends thinking at the first answer whose confidence is above delta."""

    def __init__(self, preset: Preset, codec: Codec) -> None:
        self._question = tuple(codec.encode(preset.inducer))
        self._delta = preset.delta
        self._skip = preset.skip_first
        # Were every further token certain, the mean over the most tokens that can count would be this sum over them.
        self._floor = (preset.max_tokens - preset.skip_first) * math.log(preset.delta)

    def question(self, trigger: Trigger) -> tuple[int, ...] | None:
        return self._question

    def hopeless(self, logprobs: Sequence[float]) -> bool:
        return sum(logprobs[self._skip :]) <= self._floor

    def confident(self, answers: Sequence[Answer]) -> bool:
        return answers[-1].confidence > self._delta


def make_policy(config: ProbeConfig, preset: Preset, codec: Codec) -> ProbePolicy:
    """The policy that ``rollout.probe.policy`` names.

    Raises:
        ConfigError: the user's own cannot be imported or made.
    """
    if is_own(config.policy):
        policy: ProbePolicy = make_own(config.policy, "rollout.probe.policy", config, preset, codec)
        return policy
    return ConfidencePolicy(preset, codec)


class Forced(NamedTuple):
    """Thinking is closed without asking: the tokens before ``position`` stay."""

    exit: Literal[Exit.BUDGET, Exit.REPETITION]
    position: int


class Thinking:
    """Follows one response until its thinking ends, at a cost linear in its tokens.

    ``closed`` and ``forced`` are None while it goes on. A response that ends by itself before (EOS) leaves both None.
    """

    def __init__(
        self,
        codec: Codec,
        rule: StepRule,
        think_close: str,
        *,
        budget: int | None = None,
        eos_ids: frozenset[int] = frozenset(),
        repetition_limit: int | None = None,
    ) -> None:
        """``budget``: most tokens of thinking, a marker of the policy's own included. ``repetition_limit``: equal
        consecutive steps that close it."""
        self.closed: int | None = None
        """Response tokens up to the end of the policy's own closing marker."""
        self.forced: Forced | None = None
        self._stream = TextStream(codec)
        self._rule = rule
        self._think_close = think_close
        self._budget = math.inf if budget is None else budget
        self._eos_ids = eos_ids
        self._repetition_limit = repetition_limit
        self._tail = max(2 * rule.reach, len(think_close) - 1)  # an opening may be unsettled, and looks to its left
        self._num_tokens = 0
        self._num_triggers = 0
        self._window = ""  # end of the text so far, from character `_base` on
        self._base = 0
        self._settled = 0  # a trigger that begins before this character is known, or is none
        self._step: str | None = None  # the one before
        self._step_parts: list[str] = []
        self._step_start = 0
        self._num_equal = 0

    def feed(self, token_ids: Sequence[int]) -> list[Trigger]:
        """Take the next tokens, of which those beyond the budget do not exist; return the triggers now known.

        A trigger is known once its right boundary is: with the next character, or at the end.
        """
        assert self.closed is None and self.forced is None, "thinking has ended"
        room = self._budget - self._num_tokens
        reached = len(token_ids) >= room
        if reached:
            token_ids = token_ids[: int(room)]
        self._num_tokens += len(token_ids)
        text = self._stream.feed(token_ids)
        if not reached:
            return self._scan(text, final=False)
        found = self._scan(text + self._stream.finish(), final=True)
        if self.closed is None and self.forced is None and token_ids[-1] not in self._eos_ids:
            self.forced = Forced(Exit.BUDGET, self._num_tokens)
        return found

    def finish(self) -> list[Trigger]:
        """The response ended while thinking: the triggers known by that."""
        return self._scan(self._stream.finish(), final=True)

    def _scan(self, text: str, final: bool) -> list[Trigger]:
        if self._repetition_limit:
            self._step_parts.append(text)
        self._window = window = self._window + text
        end = window.find(self._think_close)
        if end >= 0:
            self.closed = self._stream.token_at(self._base + end + len(self._think_close) - 1) + 1
        else:
            end = len(window)
        found = []
        for start, stop in self._rule.openings(window, final=final, start=self._settled - self._base):
            if start >= end:
                break
            trigger = Trigger(self._num_triggers, self._stream.token_at(self._base + start))
            self._settled = self._base + stop
            self._num_triggers += 1
            if self._repetition_limit and self._repeats(self._base + start):
                self.closed = None
                self.forced = Forced(Exit.REPETITION, trigger.position)
                break
            found.append(trigger)
        self._settled = max(self._settled, self._base + len(window) - self._rule.reach)
        cut = max(0, len(window) - self._tail)
        self._window = window[cut:]
        self._base += cut
        return found

    def _repeats(self, start: int) -> bool:
        """Whether the step that ends at character ``start`` is one equal step too many."""
        text = "".join(self._step_parts)
        length = start - self._step_start
        step, self._step_parts, self._step_start = text[:length].strip(), [text[length:]], start
        self._num_equal = self._num_equal + 1 if step == self._step else 1
        self._step = step
        return self._num_equal == self._repetition_limit

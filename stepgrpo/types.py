"""What crosses a process: prompts, trajectories, groups, weight versions.

Every record is frozen and checked when it is made, so that a fault shows where it happens and not three actors later.
Dimension suffixes: ``_T`` tokens of one trajectory (prompt and response), ``_G`` trajectories of one group.

The words, once and for all: a *step* is a semantic reasoning step, an *update* one optimizer step, a *version* the id
the weights carry, a *draw* one prompt taken from the data stream.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


class Exit(StrEnum):
    """How thinking ended."""

    NATURAL = "natural"
    """The model closed it."""
    CONFIDENT = "confident"
    """A probe closed it."""
    BUDGET = "budget"
    """The token budget closed it."""
    EOS = "eos"
    """The response ended, or hit its last token, inside thinking."""
    REPETITION = "repetition"
    """Equal consecutive steps closed it."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One draw from the data stream.

    ``draw`` is never used twice in a run; ``key`` names the problem and comes back every epoch.

    >>> Prompt(draw=0, key="train.jsonl:1", token_ids=np.array([1, 20, 11], np.int32), truth="7").num_tokens
    3
    """

    draw: int
    key: str
    token_ids: IntArray
    truth: str

    def __post_init__(self) -> None:
        assert self.token_ids.dtype == np.int32 and self.token_ids.ndim == 1 and len(self.token_ids), self.key
        self.token_ids.flags.writeable = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


class Verdict(StrEnum):
    """What became of a probe."""

    CONFIDENT = "confident"
    """It ended thinking."""
    DECLINED = "declined"
    """Answered, not confident enough."""
    STALE = "stale"
    """Other weights answered than had thought: counts as declined."""
    UNUSED = "unused"
    """An earlier decision in token order made it pointless."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One question for a tentative answer at a trigger."""

    trigger: int
    """Index of the trigger in the trajectory, from 0."""
    position: int
    """Response token index where the step before the trigger ended: the probe saw the response tokens before it."""
    confidence: float
    """In [0, 1]; nan where the probe was not answered to its end."""
    token_ids: tuple[int, ...]
    """The tentative answer, as far as it was decoded."""
    verdict: Verdict
    text: str = ""
    """Question and tentative answer, where that was decoded to its end."""


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Response tokens [start, end) were sampled by weights ``version``."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A prompt with one response, token-exact.

    A response that thought "4 Wait 5", was cut before "Wait" and closed by force, looks like this (prompt of 2):

        token_ids  p  p  4  </think>  \\boxed  {  4  }  <eos>
        sampled    0  0  1  0         1       1  1  1  1
        logprobs   0  0  x  0         x       x  x  x  x        closing = (3, 4), exit = CONFIDENT
    """

    prompt_len: int
    token_ids: IntArray
    """[T] prompt and response; sampled ids are exactly those the engine returned."""
    logprobs: FloatArray
    """[T] behaviour log-probabilities, of the distribution that was sampled from; 0 where not sampled."""
    sampled: BoolArray
    """[T] False for the prompt and for forced tokens."""
    text: str
    """The response, decoded with its special tokens: for people and graders."""
    exit: Exit
    closing: tuple[int, int] | None
    """[start, end) in token_ids of the forced closing, None where the policy closed by itself or not at all."""
    complete: bool
    """Whether the response ended by itself (EOS), not by its token limit."""
    control: bool
    """Whether this sample was kept free of truncation, to measure what truncation costs."""
    spans: tuple[VersionSpan, ...]
    probes: tuple[Probe, ...] = ()
    probe_tokens: int = 0
    """Decoded for probes that were decided; never part of the trajectory."""
    discarded_tokens: int = 0
    """Decoded past the cut, and for probes that an earlier decision overtook. The one count that depends on timing."""

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        assert len(self.logprobs) == len(self.sampled) == n > self.prompt_len > 0, "token arrays differ in length"
        assert self.token_ids.dtype == np.int32 and self.logprobs.dtype == np.float32 and self.sampled.dtype == np.bool_
        assert not self.sampled[: self.prompt_len].any(), "a prompt token marked as sampled"
        assert not self.logprobs[~self.sampled].any(), "a forced token with a behaviour log-probability"
        forced = np.flatnonzero(~self.sampled[self.prompt_len :]) + self.prompt_len
        expected = range(*self.closing) if self.closing else range(0)
        assert forced.tolist() == list(expected), "forced tokens other than the closing"
        assert (self.closing is not None) == (self.exit in (Exit.CONFIDENT, Exit.BUDGET, Exit.REPETITION))
        assert self.spans and all(a.end == b.start for a, b in zip(self.spans, self.spans[1:], strict=False))
        assert (self.spans[0].start, self.spans[-1].end) == (0, n - self.prompt_len), (
            "versions do not cover the response"
        )
        for a in (self.token_ids, self.logprobs, self.sampled):
            a.flags.writeable = False

    @property
    def num_tokens(self) -> int:
        """Response tokens."""
        return len(self.token_ids) - self.prompt_len

    @property
    def oldest_version(self) -> int:
        return min(s.version for s in self.spans)

    @property
    def newest_version(self) -> int:
        return max(s.version for s in self.spans)

    def loss_mask(self, train_exit_tokens: bool) -> BoolArray:
        """[T] the tokens the loss reads: sampled ones, and the closing of a confident exit if that is trained.

        The closings of the budget and of repetition are never trained: the policy shall not learn to be cut off.
        """
        if not (train_exit_tokens and self.exit is Exit.CONFIDENT):
            return self.sampled
        assert self.closing is not None
        mask = self.sampled.copy()
        mask[slice(*self.closing)] = True
        return mask

    def versions(self) -> IntArray:
        """[T] version of each token's weights; -1 for the prompt."""
        out = np.full(len(self.token_ids), -1, np.int32)
        for s in self.spans:
            out[self.prompt_len + s.start : self.prompt_len + s.end] = s.version
        return out


@dataclass(frozen=True, slots=True)
class Group:
    """The G trajectories of one prompt."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]

    def __post_init__(self) -> None:
        ids = self.prompt.token_ids
        for t in self.trajectories:
            assert t.prompt_len == len(ids) and np.array_equal(t.token_ids[: len(ids)], ids), (
                "not this prompt's trajectory"
            )

    @property
    def draw(self) -> int:
        return self.prompt.draw


@dataclass(frozen=True, slots=True)
class TrajectoryFacts:
    """What the driver learns of one graded trajectory: everything a reward scheme or a metric reads, no tokens."""

    correct: bool
    formatted: bool
    error: str | None
    """Why the grader could give no verdict; None where it could."""
    num_steps: int
    num_tokens: int
    num_loss_tokens: int
    """Tokens the loss will read: sampled ones, and a trained closing."""
    total_len: int
    """Prompt and response, what a forward pass costs."""
    exit: Exit
    complete: bool
    control: bool
    oldest_version: int
    newest_version: int
    probe_confidences: tuple[float, ...]
    probe_verdicts: tuple[Verdict, ...]
    probe_correct: tuple[bool | None, ...]
    """Whether each tentative answer was right; None where none was decoded to its end."""
    probe_tokens: int
    discarded_tokens: int


@dataclass(frozen=True, slots=True)
class GradedGroup:
    """One group after grading, as scalars."""

    draw: int
    key: str
    facts: tuple[TrajectoryFacts, ...]
    grade_seconds: float = 0.0

    @property
    def correct(self) -> BoolArray:
        """[G]"""
        return np.array([f.correct for f in self.facts], bool)

    @property
    def formatted(self) -> BoolArray:
        """[G]"""
        return np.array([f.formatted for f in self.facts], bool)

    @property
    def num_steps(self) -> NDArray[np.float64]:
        """[G]"""
        return np.array([f.num_steps for f in self.facts], float)

    @property
    def num_tokens(self) -> NDArray[np.float64]:
        """[G]"""
        return np.array([f.num_tokens for f in self.facts], float)


@dataclass(frozen=True, slots=True)
class WeightVersion:
    """Published weights: each learner rank's manifest (``weights.Manifest``) and references to its buckets' objects.

    References stay nested in tuples, which Ray passes on without fetching; nobody pickles them by hand, because that
    pins the object for the life of the process.
    """

    version: int
    manifests: tuple[Any, ...]
    buckets: tuple[tuple[Any, ...], ...] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        return sum(sum(m.sizes) for m in self.manifests)

    @property
    def whole_bytes(self) -> int:
        """Of the buckets that were put whole for it."""
        return sum(m.whole_bytes for m in self.manifests)

    @property
    def difference_bytes(self) -> int:
        """Of what was put for it in the place of the others."""
        return sum(m.difference_bytes for m in self.manifests)

"""Sampling trajectories: one streaming request each, probed while it goes on thinking.

    thinking   p p p 4 Wait 5 + 1 Wait 6 ...        one request, which nothing pauses
    probe 0          \\ inducer -> "3 }"             declined: nothing happens
    probe 1                       \\ inducer -> "6 }" confident: the request is aborted, the trajectory cut at the
    answer     p p p 4 Wait 5 + 1 </think> ...      step's end and closed, and one request samples the answer

Whatever arrives first, the earliest decision in token order wins, so nothing here depends on timing but the number of
tokens thrown away. A trajectory waits for its own probes only; there is no barrier.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np

from stepgrpo.actors.truncation import (
    ANSWER,
    THINK,
    Answer,
    Preset,
    ProbePolicy,
    Thinking,
    Trigger,
    is_control,
    is_probed,
    make_policy,
    seed_for,
)
from stepgrpo.config import EvalConfig, RolloutConfig
from stepgrpo.reward.steps import make_step_rule
from stepgrpo.spans import Spans
from stepgrpo.tokens import Codec
from stepgrpo.types import Exit, Group, Probe, Prompt, Trajectory, Verdict, VersionSpan

FIRST, LATER = 0, 1
"""Priorities: an engine serves the lower number first. Probes and answers go before thinking."""
RECORDED_DRAWS = 16
"""Of every 16th draw the probes are recorded one by one; of all of them they would be too many to keep."""
LOGPROB_ROUNDING = 1e-3
"""How far above 0 a log-probability may come by rounding."""


class GarbageError(RuntimeError):
    """An engine whose arithmetic is broken: what it answers must not be trained on."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one request is sampled."""

    max_tokens: int
    temperature: float
    """0 is greedy."""
    top_p: float
    seed: int | None
    """None where nothing is random."""
    stop_token_ids: tuple[int, ...]
    """Tokens that end the request, themselves included in what it returns. All of them: EOS is one of these."""
    priority: int
    """The lower number is served first."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of a request. ``len(token_ids) == len(logprobs) == len(versions)``."""

    token_ids: list[int]
    logprobs: list[float]
    """Of the distribution that was sampled from."""
    versions: list[int]
    """Of the weights that sampled each token."""
    finish: Literal["stop", "length"] | None
    """Set with the last tokens: ended by a stop token, or by its token limit."""

    def __post_init__(self) -> None:
        # Every token passes here, so no loop of our own: a sum is finite only where all its parts are.
        if not math.isfinite(sum(self.logprobs)) or max(self.logprobs, default=0.0) > LOGPROB_ROUNDING:
            bad = next(p for p in self.logprobs if not -math.inf < p <= LOGPROB_ROUNDING)
            raise GarbageError(f"the engine answers garbage: a sampled token's log-probability is {bad}")


class Engine(Protocol):
    def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        """Stream one request. Closing the generator, or cancelling who iterates, aborts it."""
        ...

    async def sleep(self) -> None:
        """Give the GPU's memory back; nothing may be in flight."""
        ...

    async def wake(self) -> None:
        """Take it again, with the weights that were there."""
        ...


class Places:
    """For so many trajectories at a time, of more groups than fit whole: a place is free for another group as soon as
    its trajectory ends. The earliest draw that waits is next, also one that is sampled again; an evaluation comes
    before all, and so takes none of the room that is left for probes."""

    def __init__(self, num: int) -> None:
        self._num = self._free = num
        self._closed = False
        self._emptied = asyncio.Event()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._count = itertools.count()

    @asynccontextmanager
    async def taken(self, draw: int) -> AsyncIterator[None]:
        """Have one during the block. ``draw``: -1: an evaluation."""
        if self._free and not self._closed:
            self._free -= 1
        else:
            turn = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (draw, next(self._count), turn))
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():  # it had its turn already
                    self._give(1)
                raise
        try:
            yield
        finally:
            self._give(1)

    @asynccontextmanager
    async def empty(self) -> AsyncIterator[None]:
        """Wait until nobody has one, and give none away until the block ends."""
        assert not self._closed, "whoever came first would let the others in"
        self._closed = True
        try:
            self._emptied.clear()
            if self._free < self._num:
                await self._emptied.wait()
            yield
        finally:
            self._closed = False
            self._give(0)

    def _give(self, back: int) -> None:
        """Give away what is free, after ``back`` more of it."""
        self._free += back
        while self._free and self._waiting and not self._closed:
            *_, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                self._free -= 1
        if self._free == self._num:
            self._emptied.set()


class Rollout:
    """Samples groups of trajectories from an engine."""

    def __init__(
        self,
        engine: Engine,
        codec: Codec,
        config: RolloutConfig,
        think_close: str,
        eos_ids: Sequence[int],
        run_seed: int,
        spans: Spans | None = None,
        places: Places | None = None,
    ) -> None:
        """
        Args:
            spans: gets the probes of every 16th draw.
            places: None: as many as are asked for.

        Raises:
            ValueError: a setting that does not fit the tokenizer or the token budget.
        """
        self.engine = engine
        self.codec = codec
        self.config = config
        self.think_close = think_close
        self.eos_ids = frozenset(eos_ids)
        self.stop_ids = tuple(sorted(self.eos_ids))
        self.run_seed = run_seed
        self.spans = spans or Spans()
        self.places = places
        self.step_rule = make_step_rule(config)
        # What the budget forces is the same for every method that is compared, whatever a preset would append to it.
        self.close_ids = codec.encode(think_close)
        self.think_budget = self._think_budget()
        self.probing: _Probing | None = None
        if config.probe:
            preset = Preset.resolve(config.probe, think_close)
            stop_ids = {i for text in preset.stop if (i := codec.single_token(text)) is not None}
            self.probing = _Probing(
                policy=make_policy(config.probe, preset, codec),
                preset=preset,
                closing=codec.encode(preset.closing),
                sampling=Sampling(
                    max_tokens=preset.max_tokens,
                    temperature=0.0,
                    top_p=1.0,
                    seed=None,
                    stop_token_ids=tuple(sorted(stop_ids | self.eos_ids)),
                    priority=FIRST,
                ),
                max_probes=config.probe.max_probes,
                probability=config.probe.probability,
            )

    def _think_budget(self) -> int | None:
        ratio, total = self.config.think_ratio, self.config.max_response_tokens
        if ratio is None:
            return None
        budget = min(int(ratio * total), total - len(self.close_ids))
        if budget < 1:
            raise ValueError(
                f"rollout.max_response_tokens: got {total}, takes more: think_ratio {ratio} of it, with "
                f"{len(self.close_ids)} tokens to close thinking, leaves none to think"
            )
        return budget

    async def group(self, prompt: Prompt, group_size: int, *, plain: EvalConfig | None = None) -> Group:
        """Sample ``group_size`` trajectories of one prompt.

        ``plain`` decodes as evaluation does: with its sampling and token limit, nothing forced, and nothing probed
        unless ``plain.early_exit`` says so.

        The first failure of a trajectory is raised, once every request of the group is closed.
        """
        with first_cause():
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(self.trajectory(prompt, i, plain=plain)) for i in range(group_size)]
        return Group(prompt, tuple(task.result() for task in running))

    async def trajectory(self, prompt: Prompt, sample: int, *, plain: EvalConfig | None = None) -> Trajectory:
        """Sample trajectory number ``sample`` of a prompt's group; ``plain`` as in ``group``."""
        async with self.places.taken(-1 if plain else prompt.draw) if self.places else nullcontext():
            return await _Run(self, prompt, sample, plain).trajectory()


@contextmanager
def first_cause() -> Iterator[None]:
    """Raise what failed first in a task group, instead of a group of exceptions."""
    try:
        yield
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


@dataclass(frozen=True, slots=True)
class _Probing:
    """How trajectories are probed."""

    policy: ProbePolicy
    preset: Preset
    closing: list[int]
    sampling: Sampling
    max_probes: int
    probability: float


@dataclass(slots=True)
class _Probe:
    """A probe while it is open."""

    trigger: Trigger
    version: int
    """Of the trigger's token."""
    question: tuple[int, ...] | None
    """None: decided without asking."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    answered: bool = False
    closed: bool = False
    """It ended in one of the stop texts."""
    hopeless: bool = False
    stale: bool = False

    def record(self, verdict: Verdict, confidence: float = math.nan, text: str = "") -> Probe:
        ids = () if verdict is Verdict.UNUSED else tuple(self.token_ids)
        return Probe(self.trigger.index, self.trigger.position, confidence, ids, verdict, text)


class _Cut(NamedTuple):
    """Thinking is ended from outside: the tokens before ``position`` stay and ``closing`` follows."""

    exit: Exit
    position: int
    closing: list[int]


class _Run:
    """One trajectory under way."""

    def __init__(self, rollout: Rollout, prompt: Prompt, sample: int, plain: EvalConfig | None) -> None:
        self.rollout = rollout
        self.plain = plain is not None
        self.config = config = plain or rollout.config
        self.prompt: list[int] = prompt.token_ids.tolist()
        self.key = (rollout.run_seed, prompt.draw, sample)
        self.control = False
        self.probing = rollout.probing if plain is None or plain.early_exit else None
        if self.probing and not plain and is_control(*self.key, rollout.config.control_fraction):
            self.probing, self.control = None, True
        limited = rollout.think_budget is not None or rollout.config.repetition_limit is not None
        self.decides = self.probing is not None or (limited and not plain)
        self.max_tokens = config.max_response_tokens
        # The response so far, whatever of it will stay.
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.complete = False
        # Probes in token order; the first `len(records)` of them are decided.
        self.probes: list[_Probe] = []
        self.records: list[Probe] = []
        self.answers: list[Answer] = []
        self.num_asked = 0
        self.probe_tokens = 0
        self.task_group = asyncio.TaskGroup()
        self.tasks: list[asyncio.Task[None]] = []
        self.ended = False  # thinking is over, by itself or by force: no further triggers
        self.forced: _Cut | None = None
        self.decided: asyncio.Future[_Cut | None] = asyncio.get_running_loop().create_future()

    async def trajectory(self) -> Trajectory:
        sampling = self._sampling(THINK, self.max_tokens, LATER)
        if not self.decides:
            await self._extend(sampling)
            return self._record(None)
        cut = await self._think(sampling)
        if cut is None:
            return self._record(None)
        discarded = len(self.token_ids) - cut.position
        end = self._close(cut)
        if end < self.max_tokens and not self.complete:
            await self._extend(self._sampling(ANSWER, self.max_tokens - end, FIRST))
        return self._record(cut, discarded)

    def _close(self, cut: _Cut) -> int:
        """Put the closing in the place of everything after the cut; return where it ends."""
        start, num = cut.position, len(cut.closing)
        self.versions[start:] = [self.versions[max(start - 1, 0)]] * num
        self.token_ids[start:] = cut.closing
        self.logprobs[start:] = [0.0] * num
        self.complete = cut.closing[-1] in self.rollout.eos_ids
        return start + num

    def _sampling(self, segment: int, max_tokens: int, priority: int) -> Sampling:
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            seed=seed_for(*self.key, segment),
            stop_token_ids=self.rollout.stop_ids,
            priority=priority,
        )

    def _stream(self, prompt: list[int], sampling: Sampling) -> aclosing[AsyncGenerator[Chunk, None]]:
        return aclosing(self.rollout.engine.generate(prompt, sampling))

    def _add(self, chunk: Chunk) -> None:
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        self.versions += chunk.versions
        self.complete = chunk.finish == "stop"

    async def _extend(self, sampling: Sampling) -> None:
        """Sample on from what is there, to the end."""
        async with self._stream(self.prompt + self.token_ids, sampling) as chunks:
            async for chunk in chunks:
                self._add(chunk)

    async def _think(self, sampling: Sampling) -> _Cut | None:
        """Think until it is decided how that ends; None where the response ended by itself."""
        with first_cause():
            async with self.task_group:
                self.tasks.append(self.task_group.create_task(self._follow(sampling)))
                cut = await self.decided
                for task in self.tasks:
                    task.cancel()
        self.records += [probe.record(Verdict.UNUSED) for probe in self.probes[len(self.records) :]]
        return cut

    async def _follow(self, sampling: Sampling) -> None:
        """Read the thinking request and probe at its triggers."""
        rollout = self.rollout
        thinking = Thinking(
            rollout.codec,
            rollout.step_rule,
            rollout.think_close,
            budget=None if self.plain else rollout.think_budget,
            eos_ids=rollout.eos_ids,
            repetition_limit=None if self.plain else rollout.config.repetition_limit,
        )
        async with self._stream(self.prompt, sampling) as chunks:
            async for chunk in chunks:
                self._add(chunk)
                if thinking.closed is None:
                    self._probe(thinking.feed(chunk.token_ids))
                    if thinking.forced:
                        self.forced = _Cut(*thinking.forced, rollout.close_ids)
                        break
            else:
                if thinking.closed is None:
                    self._probe(thinking.finish())
        self.ended = True
        self._settle()

    def _probe(self, triggers: list[Trigger]) -> None:
        """Ask at these triggers, as far as they are to be probed."""
        probing = self.probing
        if not triggers or probing is None:
            return
        for trigger in triggers:
            if self.decided.done() or not is_probed(*self.key, trigger.index, probing.probability):
                continue
            question = probing.policy.question(trigger)
            probe = _Probe(trigger, self.versions[trigger.position], question)
            if question is None:
                probe.answered = True
                self.probes.append(probe)
                self._settle()
            elif self.num_asked < probing.max_probes:
                self.num_asked += 1
                self.probes.append(probe)
                prompt = [*self.prompt, *self.token_ids[: trigger.position], *question]
                self.tasks.append(self.task_group.create_task(self._ask(probing, probe, prompt)))

    async def _ask(self, probing: _Probing, probe: _Probe, prompt: list[int]) -> None:
        with self._recorded(probe):
            async with self._stream(prompt, probing.sampling) as chunks:
                async for chunk in chunks:
                    self.probe_tokens += len(chunk.token_ids)
                    if self._read(probing, probe, chunk):
                        break
        probe.answered = True
        self._settle()

    def _recorded(self, probe: _Probe) -> AbstractContextManager[object]:
        _, draw, sample = self.key
        if draw % RECORDED_DRAWS:
            return nullcontext()
        return self.rollout.spans.span("probe", draw=draw, sample=sample, step=probe.trigger.index)

    def _read(self, probing: _Probing, probe: _Probe, chunk: Chunk) -> bool:
        """Take a chunk of a tentative answer, no further than to its end; return whether that is reached."""
        left = len(chunk.token_ids)
        for token, logprob, version in zip(chunk.token_ids, chunk.logprobs, chunk.versions, strict=True):
            left -= 1
            probe.token_ids.append(token)
            probe.logprobs.append(logprob)
            text = self.rollout.codec.decode(probe.token_ids)
            probe.closed = any(stop in text for stop in probing.preset.stop)
            probe.stale = version != probe.version
            ended = probe.closed or probe.stale or (chunk.finish is not None and not left)
            probe.hopeless = not ended and probing.policy.hopeless(probe.logprobs)
            if ended or probe.hopeless:
                return True
        return chunk.finish is not None

    def _settle(self) -> None:
        """Decide in token order, as far as the answers are there."""
        while not self.decided.done():
            if len(self.records) == len(self.probes):
                if self.ended:
                    self.decided.set_result(self.forced)
                return
            probe = self.probes[len(self.records)]
            if not probe.answered:
                return
            self.records.append(self._judge(probe))

    def _judge(self, probe: _Probe) -> Probe:
        assert self.probing is not None
        policy, preset = self.probing.policy, self.probing.preset
        if probe.stale:
            return probe.record(Verdict.STALE)
        if probe.hopeless:
            return probe.record(Verdict.DECLINED)
        confidence = math.nan if probe.question is None else preset.confidence(probe.logprobs, probe.closed)
        self.answers.append(Answer(probe.trigger, tuple(probe.token_ids), confidence))
        text = self.rollout.codec.decode([*(probe.question or ()), *probe.token_ids])
        closing = self.probing.closing
        if preset.keep_answer and probe.question is not None:
            closing = [*probe.question, *probe.token_ids]
        fits = probe.trigger.position + len(closing) <= self.max_tokens
        if not (policy.confident(self.answers) and fits):
            return probe.record(Verdict.DECLINED, confidence, text)
        self.decided.set_result(_Cut(Exit.CONFIDENT, probe.trigger.position, closing))
        return probe.record(Verdict.CONFIDENT, confidence, text)

    def _record(self, cut: _Cut | None, discarded_tokens: int = 0) -> Trajectory:
        prompt_len, num_tokens = len(self.prompt), len(self.token_ids)
        sampled = np.ones(prompt_len + num_tokens, np.bool_)
        sampled[:prompt_len] = False
        text = self.rollout.codec.decode(self.token_ids)
        closing = None
        if cut:
            exit = cut.exit
            start = prompt_len + cut.position
            closing = (start, start + len(cut.closing))
            sampled[slice(*closing)] = False
        else:
            exit = Exit.NATURAL if self.rollout.think_close in text else Exit.EOS
        # Probes that an earlier decision overtook count as thrown away: how many there are depends on timing.
        probe_tokens = sum(len(record.token_ids) for record in self.records)
        versions = np.array(self.versions)
        edges = [0, *(np.flatnonzero(np.diff(versions)) + 1).tolist(), num_tokens]
        return Trajectory(
            prompt_len=prompt_len,
            token_ids=np.array(self.prompt + self.token_ids, np.int32),
            logprobs=np.array([0.0] * prompt_len + self.logprobs, np.float32),
            sampled=sampled,
            text=text,
            exit=exit,
            closing=closing,
            complete=self.complete,
            control=self.control,
            spans=tuple(VersionSpan(int(versions[a]), a, b) for a, b in itertools.pairwise(edges)),
            probes=tuple(self.records),
            probe_tokens=probe_tokens,
            discarded_tokens=discarded_tokens + self.probe_tokens - probe_tokens,
        )

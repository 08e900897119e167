"""Useful tokens per second of the truncated rollout, against loops that wait for their probes.

    python bench/rollouts.py [--repetitions 5]

Every loop answers the same prompts within the same budget, on one vLLM engine, with the settings of
`configs/quickstart.yaml` (every trigger of every trajectory is probed), and decides by the same code:

    plain     sampling without any probe: the upper bound
    ours      stepgrpo.actors.rollout: probing while it goes on thinking
    pausing   one coroutine per trajectory, which waits for each of its probes
    rounds    everyone thinks to the next trigger, all wait, everyone probes, all wait: the loop of the code released
              with the method (arXiv 2604.16890), without its faults

and, since trajectories that were cut are shorter, `ours` and `rounds` once more with a gate that never opens: what they
lose against `plain` is the price of probing alone. `ours` then samples the very tokens of `plain`, which is checked.

Loops alternate within each repetition, which has draws, and so noise, of its own; the prefix cache is emptied in
between. Ratios are taken within a repetition. Useful tokens are sampled ones that stay in a trajectory.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import gc
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from figures import machine, spread, table

from stepgrpo.actors.engine import CPU_ENV, VllmEngine
from stepgrpo.actors.rollout import LATER, Chunk, Engine, Rollout, Sampling
from stepgrpo.actors.truncation import Answer, ConfidencePolicy, Preset, Trigger, seed_for
from stepgrpo.config import Config, ProbeConfig, RolloutConfig, load
from stepgrpo.data import PromptStream, load_problems
from stepgrpo.hub import eos_ids
from stepgrpo.tokens import Codec
from stepgrpo.types import Prompt, Trajectory

ROOT = Path(__file__).parents[1]
NUM_PROMPTS = (8, 16)
YARDSTICK = "rounds"


@dataclass(frozen=True, slots=True)
class Work:
    """What one trajectory, or all of a loop's, took."""

    useful: int
    probes: int = 0
    probe_tokens: int = 0
    discarded: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.useful + other.useful,
            self.probes + other.probes,
            self.probe_tokens + other.probe_tokens,
            self.discarded + other.discarded,
        )

    @property
    def decoded(self) -> int:
        return self.useful + self.probe_tokens + self.discarded


Loop = Callable[[Sequence[Prompt]], Awaitable[list[Work]]]


class NeverConfident(ConfidencePolicy):
    """Asks as the real gate does, and gives up on an answer where that would, but never opens."""

    def __init__(self, config: ProbeConfig, preset: Preset, codec: Codec) -> None:
        super().__init__(preset, codec)

    def confident(self, answers: Sequence[Answer]) -> bool:
        return False


class Segments:
    """A trajectory in segments, each a request: thinking up to a trigger, a probe, thinking on or the answer."""

    def __init__(self, rollout: Rollout, prompt: Prompt, sample: int) -> None:
        assert rollout.probing is not None
        self.rollout, self.probing = rollout, rollout.probing
        self.prompt: list[int] = prompt.token_ids.tolist()
        self.key = (rollout.run_seed, prompt.draw, sample)
        [word] = rollout.config.triggers
        [self.trigger] = rollout.codec.encode(word)
        [self.close] = rollout.codec.encode(rollout.think_close)
        self.response: list[int] = []
        self.num_segments = self.num_probes = self.probe_tokens = self.num_forced = 0
        self.done = False

    @property
    def asks(self) -> bool:
        """Whether the next trigger ends the segment, or has ended it, to be probed."""
        return not self.done and self.num_probes < self.probing.max_probes and self.close not in self.response

    async def think(self) -> None:
        """Sample on to the next trigger that is to be probed, or to the end."""
        config = self.rollout.config
        stop = self.rollout.stop_ids
        if self.asks:
            stop = (*stop, self.trigger)
        sampling = Sampling(
            max_tokens=config.max_response_tokens - len(self.response),
            temperature=config.temperature,
            top_p=config.top_p,
            seed=seed_for(*self.key, self.num_segments),
            stop_token_ids=stop,
            priority=LATER,
        )
        self.num_segments += 1
        self.response += (await self._whole(self.prompt + self.response, sampling)).token_ids
        full = len(self.response) >= config.max_response_tokens
        self.done = full or self.response[-1] in self.rollout.eos_ids

    async def probe(self) -> None:
        """Ask before the trigger; close thinking in its place where the answer is confident."""
        policy, preset = self.probing.policy, self.probing.preset
        trigger = Trigger(self.num_probes, len(self.response) - 1)
        question = policy.question(trigger)
        assert question is not None
        answer = await self._whole([*self.prompt, *self.response[:-1], *question], self.probing.sampling)
        self.num_probes += 1
        self.probe_tokens += len(answer.token_ids)
        confidence = preset.confidence(answer.logprobs, closed=answer.finish == "stop")
        if policy.confident([Answer(trigger, tuple(answer.token_ids), confidence)]):
            self.response[-1:] = self.probing.closing
            self.num_forced = len(self.probing.closing)

    async def _whole(self, prompt: Sequence[int], sampling: Sampling) -> Chunk:
        async with aclosing(self.rollout.engine.generate(prompt, sampling)) as chunks:
            return await anext(chunks)

    def work(self) -> Work:
        cut_triggers = int(self.num_forced > 0)
        return Work(len(self.response) - self.num_forced, self.num_probes, self.probe_tokens, cut_triggers)


async def streaming(rollout: Rollout, group_size: int, prompts: Sequence[Prompt]) -> list[Work]:
    groups = await asyncio.gather(*(rollout.group(p, group_size) for p in prompts))
    return [work_of(t) for g in groups for t in g.trajectories]


def work_of(t: Trajectory) -> Work:
    return Work(int(t.sampled.sum()), len(t.probes), t.probe_tokens, t.discarded_tokens)


async def pausing(rollout: Rollout, group_size: int, prompts: Sequence[Prompt]) -> list[Work]:
    async def one(trajectory: Segments) -> Work:
        while not trajectory.done:
            await trajectory.think()
            if trajectory.asks:
                await trajectory.probe()
        return trajectory.work()

    return await asyncio.gather(*(one(Segments(rollout, p, i)) for p in prompts for i in range(group_size)))


async def rounds(rollout: Rollout, group_size: int, prompts: Sequence[Prompt]) -> list[Work]:
    trajectories = [Segments(rollout, p, i) for p in prompts for i in range(group_size)]
    while going_on := [t for t in trajectories if not t.done]:
        await asyncio.gather(*(t.think() for t in going_on))
        await asyncio.gather(*(t.probe() for t in going_on if t.asks))
    return [t.work() for t in trajectories]


class Whole:
    """The same engine, without the parts of a response, which a loop that waits for its end has no use for."""

    def __init__(self, engine: VllmEngine) -> None:
        from vllm.sampling_params import RequestOutputKind

        self._engine = engine
        self._params = partial(engine._params, output_kind=RequestOutputKind.FINAL_ONLY)

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        view = copy.copy(self._engine)
        view._params = self._params
        return view.generate(prompt, sampling)


def make_loops(engine: VllmEngine, config: Config) -> dict[str, Loop]:
    path = Path(config.model.path)
    codec, eos = Codec.from_dir(path), eos_ids(path)
    whole = Whole(engine)

    def rollout(on: Engine, settings: RolloutConfig) -> Rollout:
        return Rollout(on, codec, settings, config.model.think_close, eos, config.seed)

    probed = config.rollout
    assert probed.probe is not None
    never = probed.model_copy(
        update={"probe": probed.probe.model_copy(update={"policy": f"{Path(__file__).stem}:NeverConfident"})}
    )
    size = probed.group_size
    return {
        "rounds": partial(rounds, rollout(whole, probed), size),
        "pausing": partial(pausing, rollout(whole, probed), size),
        "ours": partial(streaming, rollout(engine, probed), size),
        "plain": partial(streaming, rollout(whole, probed.model_copy(update={"probe": None})), size),
        "rounds, no exit": partial(rounds, rollout(whole, never), size),
        "ours, no exit": partial(streaming, rollout(engine, never), size),
    }


@dataclass(frozen=True, slots=True)
class Pass:
    """One loop over one repetition's prompts."""

    seconds: float
    num: int
    work: Work

    @property
    def rate(self) -> float:
        """Useful tokens per second."""
        return self.work.useful / self.seconds


async def measure(engine: VllmEngine, loop: Loop, prompts: Sequence[Prompt]) -> Pass:
    llm: Any = engine._llm
    assert await llm.reset_prefix_cache()
    start = time.perf_counter()
    works = await loop(prompts)
    return Pass(time.perf_counter() - start, len(works), sum(works, Work(0)))


async def run(config: Config, repetitions: int) -> None:
    from transformers import AutoTokenizer

    problems = load_problems(config.data.train, config.data, AutoTokenizer.from_pretrained(config.model.path))
    stream = PromptStream(problems.items, config.seed)
    engine = VllmEngine(
        config.model.path, config.model, config.engine, device="cpu", max_model_len=config.max_model_len
    )
    try:
        loops = make_loops(engine, config)
        for loop in loops.values():
            await loop([stream[0]])
        # A full collection of all that the libraries loaded takes a third of a second, and would fall on any one loop.
        gc.collect()
        gc.freeze()
        for num_prompts in NUM_PROMPTS:
            passes: dict[str, list[Pass]] = {name: [] for name in loops}
            for r in range(repetitions):
                prompts = [stream[1 + r * num_prompts + i] for i in range(num_prompts)]
                names = list(loops)
                for name in names[r % len(names) :] + names[: r % len(names)]:
                    passes[name].append(await measure(engine, loops[name], prompts))
            for free, probed in zip(passes["plain"], passes["ours, no exit"], strict=True):
                assert free.work.useful == probed.work.useful, "probes that declined changed a trajectory"
            report(passes, num_prompts * config.rollout.group_size, repetitions)
    finally:
        engine.close()


def report(passes: dict[str, list[Pass]], num: int, repetitions: int) -> None:
    yardstick = passes[YARDSTICK]
    rows = []
    for name, done in passes.items():
        total = sum((p.work for p in done), Work(0))
        count = sum(p.num for p in done)
        rows.append(
            [
                name,
                spread([p.rate for p in done], 0),
                spread([p.rate / y.rate for p, y in zip(done, yardstick, strict=True)]),
                f"{1000 * median(p.seconds / p.num for p in done):.1f}",
                f"{total.useful / count:.1f}",
                f"{total.probes / count:.2f}",
                f"{total.probe_tokens / total.decoded:.1%}",
                f"{total.discarded / total.decoded:.1%}",
            ]
        )
    header = [
        "loop",
        "useful tokens/s",
        f"against {YARDSTICK}",
        "ms each",
        "tokens each",
        "probes",
        "probing",
        "wasted",
    ]
    print(f"\n{num} trajectories, {repetitions} repetitions: median (lowest to highest)")
    print(table(header, rows))
    overhead = {
        name: spread([p.seconds / q.seconds for p, q in zip(passes[f"{name}, no exit"], passes["plain"], strict=True)])
        for name in ("ours", "rounds")
    }
    print(
        "no exit against plain, seconds: " + ", ".join(f"{name} {text}" for name, text in overhead.items()), flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Useful tokens per second of the truncated rollout.")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("overrides", nargs="*", help="key=value, such as engine.stream_interval=8")
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ.update(CPU_ENV)
    every_trigger = ["rollout.control_fraction=0", "rollout.probe.probability=1"]
    config = load(Config, "configs/quickstart.yaml", every_trigger + args.overrides)
    print(machine())
    asyncio.run(run(config, args.repetitions))


if __name__ == "__main__":
    main()

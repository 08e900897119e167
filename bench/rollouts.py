"""Useful tokens per second of the truncated rollout, against loops that wait for their probes.

    python bench/rollouts.py [--quick] [--miniature]      # bench/results/rollouts.json

N trajectories are in flight on one vLLM engine; where one ends the next problem's begins, and what is measured lies
between warm-up and the end. Their lengths are long-tailed and follow a script (`script.py`), so that all loops sample
and decide the same trajectories, by the same code:

    plain     sampling without any probe, of the lengths that the others end up with: the upper bound
    ours      stepgrpo.actors.rollout: probing while it goes on thinking
    places    ours as a worker has it: more groups than fit whole, whose trajectories wait for places (with `--loops`)
    groups    only as many as fit whole: places are free for others when a group's last trajectory has ended (the same)
    pausing   one coroutine per trajectory, which waits for each of its probes (with `--loops`)
    batches   everyone thinks to the next trigger, all wait, everyone probes, all wait, until the last of N trajectories
              has ended; then the next N. The loop of the code released with the method (arXiv 2604.16890), without its
              faults
    rounds    the same, except that places which are free are filled at each barrier. That code does not do it: it is
              the best that its design permits

That they are the same is checked: a trajectory that two loops finished has the same length and cut in both, and
`ours` samples the very tokens of `plain` up to its cut.

Loops take turns within each repetition, which has problems of its own; the prefix cache is emptied in between. Ratios
are taken within a repetition. Useful tokens are sampled ones that stay in a trajectory: what the engine decoded in the
time measured, less the share of probes and of thrown away tokens in the trajectories that ended in it.

Besides seconds there are two measures that other work on the machine disturbs less: CPU time of the engine's process,
which is what limits all loops on an idle machine, and useful tokens per step of the engine, whose ratio is that of
a device on which a step takes the same time for any number of sequences.

`--gpu 8B`: on a GPU, a model of Qwen3-8B's shape. Only vLLM's older model runner takes the script's logits processor.

`--flat`: a deeper and narrower model with random weights, for which a step with many sequences takes less time compared
to a step with one, as on a GPU.

`--miniature`: problems, lengths and decisions of the quickstart's task instead, whose steps are 14 tokens long. There a
trajectory that nothing cuts is longer, so `plain` samples more.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import gc
import itertools
import json
import os
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, astuple, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import uvloop
from figures import machine, spread
from models import QWEN3

from stepgrpo.actors import engine as vllm_engine
from stepgrpo.actors.engine import CPU_ENV, VllmEngine
from stepgrpo.actors.rollout import LATER, Chunk, Engine, Places, Rollout, Sampling
from stepgrpo.actors.truncation import Answer, Trigger, seed_for
from stepgrpo.config import Config, RolloutConfig, load
from stepgrpo.data import PromptStream, load_problems
from stepgrpo.hub import eos_ids, load_tokenizer
from stepgrpo.pool import LOAD
from stepgrpo.tokens import Codec
from stepgrpo.types import Prompt

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results/rollouts.json"
GROUP = 8
LOOPS = "rounds,batches,ours,plain"
EVERY_TRIGGER = ["rollout.control_fraction=0", "rollout.probe.probability=1"]
SCRIPTED = [
    "data.max_prompt_tokens=160",
    "rollout.max_response_tokens=2048",
    "rollout.probe.max_tokens=20",
    "engine.max_num_seqs=256",
    "engine.kv_cache_mb=512",
    "engine.stream_interval=8",
]
GPU = [
    "cluster.device=cuda",
    "model.dtype=bfloat16",
    "engine.kv_cache_mb=null",
    "engine.block_size=null",
    "engine.enforce_eager=false",
]
FLAT = {
    "num_hidden_layers": 16,
    "hidden_size": 32,
    "num_attention_heads": 1,
    "intermediate_size": 64,
}

Problems = Iterator[Prompt]


@dataclass(frozen=True, slots=True)
class Work:
    """What trajectories took, in tokens."""

    useful: float = 0
    probing: float = 0
    discarded: float = 0
    probes: float = 0
    trajectories: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Work) -> Work:
        return Work(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def decoded(self) -> float:
        return self.useful + self.probing + self.discarded


class Mark(NamedTuple):
    """Where a loop stands."""

    seconds: float
    decoded: int
    steps: int
    engine_cpu: float
    reader_cpu: float
    work: Work
    """Of the trajectories that have ended."""


@dataclass(slots=True)
class Meter:
    """What a loop reports while it runs."""

    bench: Bench
    work: Work = field(default_factory=Work)
    ended: dict[tuple[int, int], tuple[int, list[int]]] = field(default_factory=dict)
    """Of each trajectory (draw and sample) its length and the tokens before its cut."""
    marks: list[Mark] = field(default_factory=list)

    def add(self, draw: int, sample: int, work: Work, length: int, kept: list[int]) -> None:
        self.work += work
        self.ended[draw, sample] = length, kept

    def mark(self) -> None:
        self.marks.append(self.bench.mark(self.work))


Loop = Callable[[Problems, int, Meter], Awaitable[None]]
"""Keeps so many trajectories in flight until it is cancelled, and marks where one may begin and end to measure."""


async def streaming(rollout: Rollout, held: float, problems: Problems, num: int, meter: Meter) -> None:
    """``held``: tokens of an aborted request that vLLM has decoded and not yet handed over, on average."""
    samples = ((prompt, sample) for prompt in problems for sample in range(GROUP))

    async def place() -> None:
        for prompt, sample in samples:
            t = await rollout.trajectory(prompt, sample)
            response = t.token_ids[t.prompt_len :].tolist()
            kept = response[: t.closing[0] - t.prompt_len] if t.closing else response
            discarded = t.discarded_tokens + held * (t.closing is not None)
            work = Work(int(t.sampled.sum()), t.probe_tokens, discarded, len(t.probes), 1)
            meter.add(prompt.draw, sample, work, len(response), kept)

    await _at_any_time(place, num, meter)


async def in_groups(rollout: Rollout, load: int, problems: Problems, num: int, meter: Meter) -> None:
    """``load`` times as many groups as fit whole; with 1 a place stays empty until the last one of its group ends."""
    rollout.places = Places(num)

    async def group() -> None:
        for prompt in problems:
            for t in (await rollout.group(prompt, GROUP)).trajectories:
                meter.work += Work(int(t.sampled.sum()), t.probe_tokens, t.discarded_tokens, len(t.probes), 1)

    await _at_any_time(group, load * num // GROUP, meter)


async def _at_any_time(worker: Callable[[], Awaitable[None]], num: int, meter: Meter) -> None:
    async def clock() -> None:
        while True:
            meter.mark()
            await asyncio.sleep(0.1)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(num):
            tasks.create_task(worker())
        tasks.create_task(clock())


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
        self.kept: int | None = None
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
            self.kept = trigger.position
            self.num_forced = len(self.probing.closing)

    async def _whole(self, prompt: Sequence[int], sampling: Sampling) -> Chunk:
        async with aclosing(self.rollout.engine.generate(prompt, sampling)) as chunks:
            return await anext(chunks)

    def report(self, meter: Meter) -> None:
        useful, cut = len(self.response) - self.num_forced, int(self.kept is not None)
        _, draw, sample = self.key
        work = Work(useful, self.probe_tokens, cut, self.num_probes, 1)
        meter.add(draw, sample, work, len(self.response), self.response[: self.kept])


def _trajectories(rollout: Rollout, problems: Problems) -> Iterator[Segments]:
    return (Segments(rollout, prompt, sample) for prompt in problems for sample in range(GROUP))


async def pausing(rollout: Rollout, problems: Problems, num: int, meter: Meter) -> None:
    trajectories = _trajectories(rollout, problems)

    async def place() -> None:
        for trajectory in trajectories:
            while not trajectory.done:
                await trajectory.think()
                if trajectory.asks:
                    await trajectory.probe()
            trajectory.report(meter)

    await _at_any_time(place, num, meter)


async def rounds(rollout: Rollout, refill: bool, problems: Problems, num: int, meter: Meter) -> None:
    trajectories, going_on = _trajectories(rollout, problems), list[Segments]()
    while True:
        if refill or not going_on:
            meter.mark()
            going_on += itertools.islice(trajectories, num - len(going_on))
        await asyncio.gather(*(t.think() for t in going_on))
        await asyncio.gather(*(t.probe() for t in going_on if t.asks))
        for t in going_on:
            if t.done:
                t.report(meter)
        going_on = [t for t in going_on if not t.done]


class Whole:
    """The same engine, without the parts of a response, which a loop that waits for its end has no use for.

    ``extra_args``: for the script.
    """

    def __init__(self, engine: VllmEngine, **extra_args: Any) -> None:
        from vllm.sampling_params import RequestOutputKind

        self._engine = engine
        self._params = partial(engine._params, output_kind=RequestOutputKind.FINAL_ONLY, extra_args=extra_args)

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        view = copy.copy(self._engine)
        view._params = self._params
        return view.generate(prompt, sampling)


@dataclass(frozen=True, slots=True)
class Pass:
    """One loop in steady state."""

    seconds: float
    decoded: int
    steps: int
    """Of the engine, each a forward pass and a token for every sequence in it."""
    engine_cpu: float
    reader_cpu: float
    work: Work
    """Of the trajectories that ended in it."""

    @property
    def useful(self) -> float:
        return self.decoded * self.work.useful / self.work.decoded


class Bench:
    """One engine, its loops, and what it has done so far."""

    def __init__(self, config: Config, scripted: bool, shape: Mapping[str, Any]) -> None:
        self.decoded = self.steps = 0
        if scripted:
            make_args = vllm_engine.engine_args

            def steered(*args: Any, **kwargs: Any) -> Any:
                made = make_args(*args, **kwargs)
                made.logits_processors = ["script:Scripted"]
                made.hf_overrides = {"max_position_embeddings": config.max_model_len, **shape}
                if shape:
                    made.hf_overrides["layer_types"] = ["full_attention"] * shape["num_hidden_layers"]
                    made.load_format = "dummy"
                if config.cluster.device == "cuda":
                    made.async_scheduling = False  # the script reads each token before the next
                    from vllm.config import CompilationConfig

                    # Graphs of all steps, which take seconds; compiling the model takes a minute and gains little more.
                    made.compilation_config = CompilationConfig(mode=0, cudagraph_mode="FULL")
                return made

            # The product has no setting for it, for there is no use but this.
            vllm_engine.engine_args = steered
        self.engine = VllmEngine(
            config.model.path,
            config.model,
            config.engine,
            device=config.cluster.device,
            max_model_len=config.max_model_len,
            record=self._record,
        )
        self.reader = psutil.Process()
        self.engine_processes = [psutil.Process(p.pid) for p in self.engine._processes]
        self.loops = self._loops(config)

    def _record(self, _: Any, iteration: Any) -> None:
        if iteration is not None:
            self.decoded += iteration.num_generation_tokens
            self.steps += 1

    def _loops(self, config: Config) -> dict[str, Loop]:
        path = Path(config.model.path)
        codec, eos = Codec.from_dir(path), eos_ids(path)

        def rollout(engine: Engine, settings: RolloutConfig) -> Rollout:
            return Rollout(engine, codec, settings, config.model.think_close, eos, config.seed)

        whole: Any = Whole(self.engine)
        whole_with_exits: Any = Whole(self.engine, exits=True)
        waiting = rollout(whole, config.rollout)
        probing = rollout(self.engine, config.rollout)
        unprobed = rollout(whole_with_exits, config.rollout.model_copy(update={"probe": None}))
        return {
            "rounds": partial(rounds, waiting, True),
            "batches": partial(rounds, waiting, False),
            "pausing": partial(pausing, waiting),
            "places": partial(in_groups, rollout(self.engine, config.rollout), LOAD),
            "groups": partial(in_groups, rollout(self.engine, config.rollout), 1),
            "ours": partial(streaming, probing, (config.engine.stream_interval - 1) / 2),
            "plain": partial(streaming, unprobed, 0),
        }

    def mark(self, work: Work) -> Mark:
        engine_cpu, reader_cpu = (
            sum(sum(p.cpu_times()[:2]) for p in processes) for processes in (self.engine_processes, [self.reader])
        )
        return Mark(time.perf_counter(), self.decoded, self.steps, engine_cpu, reader_cpu, work)

    async def measure(
        self, loop: Loop, problems: Problems, num: int, warm_up: float, window: float
    ) -> tuple[Pass, Meter]:
        llm: Any = self.engine._llm
        assert await llm.reset_prefix_cache()
        meter, start = Meter(self), time.perf_counter()
        running = asyncio.ensure_future(loop(problems, num, meter))

        def warm() -> list[Mark]:
            return [m for m in meter.marks if m.seconds - start >= warm_up]

        while not (marks := warm()) or marks[-1].seconds - marks[0].seconds < window:
            await asyncio.wait({running}, timeout=0.1)
            if running.done():
                running.result()
        running.cancel()
        await asyncio.wait({running})
        return Pass(*(b - a for a, b in zip(marks[0], marks[-1], strict=True))), meter


def scripted_problems(first: int, num: int) -> Problems:
    """From draw ``first`` on. The first ``num`` trajectories are under way already, as those of a steady state are."""
    import script

    for draw in itertools.count(first):
        words = random.Random(draw).choices(script.WORDS, k=100)
        starter = [script.STARTER] if (draw - first) * GROUP < num else []
        ids = np.array([1, *starter, *words, script.THINK], np.int32)
        yield Prompt(draw, f"script:{draw}", ids, "")


def miniature_problems(stream: PromptStream, first: int, num: int) -> Problems:
    return (stream[i] for i in itertools.count(first))


def check_same(meters: dict[str, Meter], scripted: bool) -> None:
    """That loops which finished the same trajectory sampled and decided alike."""
    ours = meters["ours"].ended if "ours" in meters else {}
    for name in meters.keys() - {"ours"}:
        for key in ours.keys() & meters[name].ended.keys():
            (length, kept), (other_length, other_kept) = ours[key], meters[name].ended[key]
            if name == "plain":  # noise of its own after the cut
                assert kept == other_kept[: len(kept)], f"ours and plain sampled other tokens: {key}"
            elif scripted:  # noise of its own after the first probe
                assert len(kept) == len(other_kept), f"ours and {name} cut at another place: {key}"
            if scripted:
                assert length == other_length, f"ours and {name} differ in length: {key}"


async def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    shape = FLAT if args.flat else QWEN3.get(args.gpu, {})
    bench = Bench(config, scripted=not args.miniature, shape=shape)
    problems: Callable[[int, int], Problems] = scripted_problems
    if args.miniature:
        items = load_problems(config.data.train, config.data, load_tokenizer(config.model.path)).items
        problems = partial(miniature_problems, PromptStream(items, config.seed))
    names = args.loops.split(",")
    results: dict[str, Any] = {}
    try:
        for name in names:
            await bench.measure(bench.loops[name], problems(0, GROUP), GROUP, 0.0, 0.5)
        # A full collection of all that the libraries loaded takes a third of a second, and would fall on any one loop.
        gc.collect()
        gc.freeze()
        for num in args.in_flight:
            passes: dict[str, list[Pass]] = {name: [] for name in names}
            sampled: list[dict[str, Meter]] = []
            for r in range(args.repetitions):
                turn = r % len(names)
                sampled.append({})
                for name in names[turn:] + names[:turn]:
                    # `batches` begins with all and ends with none, and is measured from the one to the other. None of
                    # its trajectories is under way at first; of the others' they are those that are not, either.
                    steady, warm_up = (0, 0.0) if name == "batches" else (num, 1 + num / 64)
                    some = problems((1 + r) * 10_000 + (num - steady) // GROUP, steady)
                    one, sampled[r][name] = await bench.measure(
                        bench.loops[name], some, num, warm_up, window=4 + num / 32
                    )
                    passes[name].append(one)
            print(f"\n### {num} trajectories in flight, {args.repetitions} repetitions\n\n{report(passes)}", flush=True)
            for meters in sampled:
                check_same(meters, scripted=not args.miniature)
            results[str(num)] = {name: [asdict(p) for p in done] for name, done in passes.items()}
    finally:
        bench.engine.close()
    return results


def report(passes: dict[str, list[Pass]]) -> str:
    """A Markdown table: medians, with the lowest and the highest where there is room."""

    def against(name: str, done: list[Pass], price: Callable[[Pass], float]) -> str:
        if name not in passes:
            return ""
        return spread([(price(y) / y.useful) / (price(p) / p.useful) for p, y in zip(done, passes[name], strict=True)])

    header = [
        "loop",
        "useful tokens/s",
        "against rounds",
        "against batches",
        "against plain",
        "engine CPU: against rounds",
        "against plain",
        "steps: against rounds",
        "sequences per step",
        "CPU us per token: engine + reader",
        "probes' tokens",
        "wasted",
    ]
    rows = []
    for name, done in passes.items():
        total = sum((p.work for p in done), Work())
        useful, steps = sum(p.useful for p in done), sum(p.steps for p in done)
        cpu = [1e6 * sum(getattr(p, kind) for p in done) / useful for kind in ("engine_cpu", "reader_cpu")]
        rows.append(
            [
                name,
                spread([p.useful / p.seconds for p in done], 0),
                against("rounds", done, lambda p: p.seconds),
                against("batches", done, lambda p: p.seconds),
                against("plain", done, lambda p: p.seconds),
                against("rounds", done, lambda p: p.engine_cpu),
                against("plain", done, lambda p: p.engine_cpu),
                against("rounds", done, lambda p: p.steps),
                f"{sum(p.decoded for p in done) / steps:.0f}",
                f"{cpu[0]:.0f} + {cpu[1]:.0f}",
                f"{total.probing / total.decoded:.1%}",
                f"{total.discarded / total.decoded:.1%}",
            ]
        )
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Useful tokens per second of the truncated rollout.")
    parser.add_argument("--quick", action="store_true", help="128 in flight only, once")
    parser.add_argument("--flat", action="store_true", help="a model that costs less per sequence; no file")
    parser.add_argument("--gpu", choices=QWEN3, help="on a GPU, a model of this shape with random weights")
    parser.add_argument("--miniature", action="store_true", help="the quickstart's own short trajectories; no file")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--loops", default=LOOPS, help="comma-separated")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--set", nargs="+", default=[], help="key=value, such as engine.stream_interval=16")
    args = parser.parse_args()
    if args.quick:
        args.in_flight, args.repetitions = [128], 1
    os.chdir(ROOT)
    os.environ.update({"VLLM_USE_V2_MODEL_RUNNER": "0"} if args.gpu else CPU_ENV)
    settings = EVERY_TRIGGER + ([] if args.miniature else SCRIPTED) + (GPU if args.gpu else []) + args.set
    config = load(Config, "configs/quickstart.yaml", settings)
    on = machine()
    print(on)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as Ray's actors have
        results = runner.run(run(config, args))
    if not args.miniature and not args.flat:
        found = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": on, "settings": settings, "in_flight": results}
        args.out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

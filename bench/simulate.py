"""How far one driver reaches: the real loop over simulated engines and a simulated learner, in virtual time.

    python bench/simulate.py [--workers 1 4 16 64 256 1024] [--staleness 0 1 2] [--sizing] [--out FILE]
    python bench/simulate.py --places [--workers 1 4 16] [--staleness 0 1 2]     # where engine.max_num_seqs binds

`train.Loop` with its pool, admission, rewards, plans, metrics and files runs as it is. What it talks to is simulated:

    engine   decodes as many trajectories at once as it has places, the earliest draws first, tokens/s = n / (a + b n)
             up to what the KV cache holds; new weights arrive over the network, then it stands still to load them and
             to compute the running sequences' KV anew
    learner  an update takes its plan's micro-batches, each as long as the slowest rank's

and the clock jumps to the next thing that happens, so that hours pass in seconds. What the driver itself computes is
measured, as processor time of its thread less the simulation's; what Ray takes for each call is not in it.

Rates follow from stated bandwidths and efficiencies (`Card`): a plan, not a measurement. Lengths are those of a real
run of the miniature, or long-tailed like a reasoning model's (`LENGTHS`).
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import heapq
import json
import math
import os
import selectors
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import NormalDist, fmean
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from figures import machine, table
from rich.console import Console

from stepgrpo import pool
from stepgrpo.config import Config, load
from stepgrpo.console import Display
from stepgrpo.data import Problem, PromptStream
from stepgrpo.dryrun import explain, model_shape
from stepgrpo.learner.batch import Plan
from stepgrpo.metrics import RunLog
from stepgrpo.pool import Pool
from stepgrpo.recovery import Start
from stepgrpo.rundir import read_json_lines
from stepgrpo.train import Loop
from stepgrpo.types import Exit, GradedGroup, Prompt, TrajectoryFacts
from stepgrpo.watchdog import Whereabouts

ROOT = Path(__file__).parents[1]
PROMPT_TOKENS = 200
NODE_GPUS = 8
GROUPS_PER_WORKER, MOST_GROUPS = 16, 4096
"""Of a rollout batch, which grows with the workers."""
UPDATES = 4
"""Of a rollout batch."""
BUCKET = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU of a cluster, as far as time depends on it: an H100 SXM's data sheet, and what of it is counted on."""

    flops: float = 989e12
    """Dense bfloat16."""
    hbm: float = 3.35e12
    """Bytes/s."""
    prefill: float = 0.5
    """Share of ``flops`` that decoding's and prefill's products reach."""
    stream: float = 0.6
    """Share of ``hbm`` that decoding reaches."""
    train: float = 0.35
    """Share of ``flops`` that the learner reaches, its waiting for gathered weights included."""
    copy: float = 2e9
    """Bytes/s at which a rank packs, checksums and stores what it publishes."""
    host_adam: float = 1e9
    """Parameters/s that a rank's processor updates, where the optimizer is offloaded."""
    upload: float = 20e9
    """Bytes/s from shared memory to the GPU."""
    node_gbit: float = 400.0
    """Network of one node, Gbit/s."""


CARD = Card()


@dataclass(frozen=True, slots=True)
class Rates:
    """What a model does on the cards, in seconds and tokens."""

    a: float
    """Seconds of one decoding step: weights read once."""
    b: float
    """The same for each sequence in it: its KV cache read, its products."""
    running: int
    """Sequences that an engine's KV cache holds; the others of its share wait."""
    pause: float
    """Seconds to load new weights."""
    prefill: float
    """Seconds to compute the KV cache of a running sequence anew."""
    fetch: float
    """Seconds until a version is on all nodes."""
    train: float
    """Seconds of a token on a learner rank."""
    update: float
    """Seconds of an optimizer update besides."""
    publish: float

    def tokens_per_second(self, n: int) -> float:
        """Of an engine with ``n`` trajectories."""
        m = min(n, self.running)
        return m / (self.a + self.b * m)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Response tokens: a problem's own length, times a response's scatter about it, up to the budget.

    Quantiles are of the product, in ascending order at equal distances.
    """

    name: str
    problem: tuple[float, ...]
    scatter: tuple[float, ...]
    limit: int

    def __call__(self, draw: int, size: int) -> list[int]:
        """The same for the same draw: [size]"""
        rng = np.random.default_rng([7, draw])
        own = self.problem[rng.integers(len(self.problem))]
        picks = rng.integers(len(self.scatter), size=size).tolist()
        return [max(1, min(self.limit, round(own * self.scatter[i]))) for i in picks]

    def mean(self) -> float:
        return fmean(n for draw in range(2000) for n in self(draw, 5))


def _lognormal(median: float, sigma: float, points: int = 101) -> tuple[float, ...]:
    return tuple(median * math.exp(sigma * NormalDist().inv_cdf((i + 0.5) / points)) for i in range(points))


def miniature() -> Lengths:
    """Of 1,000 answers of the miniature under truncated decoding, a run that is in the repository."""
    answers = json.loads((ROOT / "docs/results/miniature/deer-0.json").read_text())["answers"]
    tokens = sorted(n for problem in answers["tokens"] for n in problem)
    return Lengths("miniature", tuple(map(float, tokens)), (1.0,), 180)


def long_tailed() -> Lengths:
    """Lognormal, and so scaled that the mean is the 6,901 tokens published for Qwen3-8B under Step-GRPO (over its
    benchmarks); the spreads, 0.6 between problems and 0.4 within one, are assumed."""
    return Lengths("long-tailed", _lognormal(5730, 0.6), _lognormal(1.0, 0.4), 16384)


LENGTHS: dict[str, Callable[[], Lengths]] = {"long-tailed": long_tailed, "miniature": miniature}


def broadcast(size: float, gbit: float, nodes: int, sources: int = 1) -> tuple[float, float]:
    """Seconds until ``nodes`` hold ``size`` bytes that lie on ``sources`` nodes, all with a network of ``gbit`` Gbit/s.

    Returns:
        (where a node passes on each bucket it has, where all pull from the sources alone)

    In the first case a node's own network is the limit, since whoever begins with another rank soon has what the others
    lack; the time until there are as many sources as pullers, which doubles them with each bucket, comes on top:
    S/B (1 + log2(1 + n/s) / K) with K buckets. In the other case sources send n copies: S/B max(1, n/s).
    """
    alone = size / (gbit / 8 * 1e9)
    buckets = max(1, math.ceil(size / BUCKET))
    return alone * (1 + math.log2(1 + nodes / sources) / buckets), alone * max(1.0, nodes / sources)


def rates(config: Config, lengths: Lengths, card: Card) -> Rates:
    shape, tp, ranks = model_shape(config.model.path), config.engine.tensor_parallel, config.learner.num_ranks
    weights, params = 2 * shape.num_params, shape.num_params
    context = PROMPT_TOKENS + lengths.mean() / 2  # half-way through its response
    forward = 2 * params / (card.flops * tp)  # of one token, at full rate
    engines = config.rollout.workers.min * tp
    return Rates(
        a=weights / (card.hbm * card.stream * tp),
        b=context * shape.kv_bytes(2) / (card.hbm * card.stream * tp) + forward / card.prefill,
        running=min(config.engine.max_num_seqs, int(explain(config).kv_tokens / context)),
        pause=weights / (card.upload * tp),
        prefill=context * forward / card.prefill,
        fetch=broadcast(weights, card.node_gbit, math.ceil(engines / NODE_GPUS), math.ceil(ranks / NODE_GPUS))[0],
        # Forward and backward 6, recomputing 2, reference 2, old log-probabilities 2 operations per parameter.
        train=12 * params / (card.flops * card.train),
        update=1.0 + (params / ranks / card.host_adam if config.learner.offload_optimizer else 0.0),
        publish=weights / ranks / card.copy,
    )


# ---- virtual time


class _Jump(selectors.DefaultSelector):
    """Waits for nothing: time is then what it would have been."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "everybody waits and nothing will happen"
        self.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer; threads' work is done at once, in this one."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as e:
            future.set_exception(e)
        return future


@contextmanager
def virtual(loop: VirtualLoop) -> Iterator[None]:
    """The loop's clock for everybody, and answers to what the driver asks of Ray itself."""
    here = Whereabouts("0" * 8, os.getpid())
    with (
        patch("time.monotonic", loop.time),
        patch("stepgrpo.train.whereabouts", lambda: here),
        patch("stepgrpo.pool._draining", set),
        patch("stepgrpo.launch.spilled_bytes", lambda: 0),
    ):
        yield


def _aside(method: Callable[..., Any]) -> Callable[..., Any]:
    """What a method of the simulation takes is not the driver's."""

    @functools.wraps(method)
    def timed(self: Any, *args: Any) -> Any:
        start = time.thread_time()
        try:
            return method(self, *args)
        finally:
            self.world.aside += time.thread_time() - start

    return timed


# ---- what the driver talks to


@dataclass(slots=True, eq=False)
class _Group:
    """A group under way, and then the reference to it."""

    prompt: Prompt
    lengths: list[int]
    oldest: list[int]
    """Version that each trajectory begins under."""
    newest: int
    left: int
    done: asyncio.Future[int]


class World:
    """What all simulated actors share, and what is seen of them."""

    def __init__(self, loop: VirtualLoop, rates: Rates, lengths: Lengths, config: Config) -> None:
        self.loop, self.rates, self.lengths, self.config = loop, rates, lengths, config
        self.group_size, self.packed = config.rollout.group_size, config.model.packed_on("cuda")
        self.aside = 0.0
        """Processor seconds of the simulation."""
        self.workers: list[Worker] = []
        self.learnt = 0.0
        """Seconds in which the learner worked."""
        self.marks: list[tuple[float, float, float, float]] = []
        """(time, seconds learnt, tokens decoded, engine-seconds with something in flight) as each update begins."""

    def worker(self, index: int, options: dict[str, Any]) -> SimpleNamespace:
        self.workers.append(Worker(self, index))
        return _handle(self.workers[-1], "start", "ping", "whereabouts", "roll", "load", "spans", "close")

    def ranks(self) -> list[SimpleNamespace]:
        of_rank = ("whereabouts", "ingest", "fetch", "update", "publish", "spans")
        return [_handle(Rank(self, i), *of_rank) for i in range(self.config.learner.num_ranks)]

    def done(self, value: Any = None, after: float = 0.0) -> asyncio.Future[Any]:
        future = self.loop.create_future()
        if after:
            self.loop.call_later(after, _set, future, value)
        else:
            future.set_result(value)
        return future

    def mark(self) -> None:
        for w in self.workers:
            w.advance()
        decoded, busy = sum(w.decoded for w in self.workers), sum(w.busy for w in self.workers)
        self.marks.append((self.loop.time(), self.learnt, decoded, busy))


def _set(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():  # cancelled, at the end of the run
        future.set_result(value)


def _handle(actor: Any, *methods: str) -> SimpleNamespace:
    """``actor.METHOD.remote(...)``, as Ray has it."""
    return SimpleNamespace(**{m: SimpleNamespace(remote=getattr(actor, m)) for m in methods})


class _Actor:
    def __init__(self, world: World, index: int) -> None:
        self.world, self.index = world, index
        self.did: list[dict[str, Any]] = []

    @_aside
    def whereabouts(self) -> Any:
        return self.world.done(Whereabouts(f"{self.index // NODE_GPUS:08x}", self.index))

    @_aside
    def spans(self) -> Any:
        did, self.did = self.did, []
        return self.world.done(did)

    def note(self, name: str, seconds: float, **arguments: Any) -> None:
        end = self.world.loop.time()
        self.did.append({"name": name, "start": end - seconds, "seconds": seconds, **arguments})


class Worker(_Actor):
    """An engine that decodes all trajectories that have a place at the same speed."""

    def __init__(self, world: World, index: int) -> None:
        super().__init__(world, index)
        self.version = 0
        self.decoded = self.busy = 0.0
        self._each = 0.0  # tokens that a trajectory that was always here would have by now
        self._free = world.config.engine.max_num_seqs
        self._waiting: list[tuple[int, int, _Group]] = []
        self._ends: list[tuple[float, int, int, _Group]] = []
        self._at = self._resumes = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> Any:
        return self.world.done(f"{self.index // NODE_GPUS:08x}")

    @_aside
    def ping(self) -> Any:
        return self.world.done()

    def close(self) -> Any:
        return self.world.done()

    @_aside
    def roll(self, prompt: Prompt) -> tuple[Any, _Group]:
        self.advance()
        lengths = self.world.lengths(prompt.draw, self.world.group_size)
        size = len(lengths)
        group = _Group(prompt, lengths, [self.version] * size, self.version, size, self.world.loop.create_future())
        for i in range(size):
            heapq.heappush(self._waiting, (prompt.draw, i, group))
        self._begin()
        self._arm()
        return group.done, group

    def _begin(self) -> None:
        while self._free and self._waiting:
            self._free -= 1
            draw, i, group = heapq.heappop(self._waiting)
            group.oldest[i] = self.version
            heapq.heappush(self._ends, (self._each + group.lengths[i], draw, i, group))

    @_aside
    def load(self, weights: Any) -> Any:
        future = self.world.loop.create_future()
        self.world.loop.call_later(self.world.rates.fetch, self._load, weights.version, future)
        return future

    @_aside
    def _load(self, version: int, future: asyncio.Future[float]) -> None:
        self.advance()
        r, self.version = self.world.rates, version
        pause = r.pause + min(len(self._ends), r.running) * r.prefill
        self._resumes = self._at + pause
        self.note("load", r.fetch + pause, version=version, paused=pause)
        self.world.loop.call_later(pause, _set, future, pause)
        self._arm()

    def advance(self) -> None:
        now, n = self.world.loop.time(), len(self._ends)
        if n:
            tokens = self.world.rates.tokens_per_second(n) * max(0.0, now - max(self._at, self._resumes))
            self._each += tokens / n
            self.decoded += tokens
            self.busy += now - self._at
        self._at = now

    def _arm(self) -> None:
        if self._timer:
            self._timer.cancel()
        if n := len(self._ends):
            left = max(0.0, self._ends[0][0] - self._each) * n / self.world.rates.tokens_per_second(n)
            self._timer = self.world.loop.call_at(max(self._at, self._resumes) + left, self._end)

    @_aside
    def _end(self) -> None:
        self.advance()
        while self._ends and self._ends[0][0] <= self._each + 1e-6:
            group = heapq.heappop(self._ends)[-1]
            self._free += 1
            group.left -= 1
            if not group.left:
                group.newest = self.version
                self.note("generate", 1.0, draw=group.prompt.draw, tokens=sum(group.lengths),
                          oldest=min(group.oldest), newest=group.newest)  # fmt: skip
                _set(group.done, sum(group.lengths))
        self._begin()
        self._arm()


class Rank(_Actor):
    """A learner rank; the first computes how long an update takes all of them."""

    GRADING = 0.05

    @_aside
    def ingest(self, group: Sequence[_Group]) -> Any:
        g = group[0]
        self.note("grade", self.GRADING, draw=g.prompt.draw)
        return self.world.done(_graded(g), self.GRADING)

    @_aside
    def fetch(self, plan: Plan, refs: dict[int, _Group]) -> Any:
        return self.world.done([])

    @_aside
    def update(self, plan: Plan, refs: dict[int, _Group]) -> Any:
        if self.index == 0:
            self.world.mark()
            self._seconds = sum(self._of(u, refs) for u in plan.updates)
            self.world.learnt += self._seconds
            self.note("update", self._seconds, batch=plan.version, version=plan.version + 1)
            figures = [{"policy/skipped": 0.0} for _ in plan.updates]
            return self.world.done(figures, self._seconds)
        return self.world.done(None)

    def _of(self, update: Any, refs: dict[int, _Group]) -> float:
        """Ranks wait for each other in each micro-batch."""
        seconds = self.world.rates.update
        for turn in zip(*update.micro_batches, strict=True):
            costs = []
            for rows in turn:
                tokens = [PROMPT_TOKENS + refs[draw].lengths[i] for draw, i in rows]
                costs.append(sum(tokens) if self.world.packed else len(tokens) * max(tokens, default=0))
            seconds += max(costs) * self.world.rates.train
        return seconds

    @_aside
    def publish(self, version: int) -> Any:
        seconds = self.world.rates.publish
        self.world.learnt += seconds * (self.index == 0)
        return self.world.done((SimpleNamespace(sizes=(1,), whole_bytes=1, difference_bytes=0), [None]), seconds)


def _graded(g: _Group) -> GradedGroup:
    """Three answers of four are right; a step has 300 tokens."""
    facts = tuple(
        TrajectoryFacts(
            correct=(g.prompt.draw + 3 * i) % 4 > 0,
            formatted=True,
            error=None,
            num_steps=1 + n // 300,
            num_tokens=n,
            num_loss_tokens=n,
            total_len=PROMPT_TOKENS + n,
            exit=Exit.CONFIDENT if i % 2 else Exit.NATURAL,
            complete=True,
            control=False,
            oldest_version=g.oldest[i],
            newest_version=g.newest,
            probe_confidences=(),
            probe_verdicts=(),
            probe_correct=(),
            probe_tokens=0,
            discarded_tokens=0,
        )
        for i, n in enumerate(g.lengths)
    )
    return GradedGroup(g.prompt.draw, g.prompt.key, facts)


# ---- one run


@dataclass(frozen=True, slots=True)
class Result:
    """Shares and rates are of the time from the first update's begin to the last one's."""

    workers: int
    ranks: int
    max_staleness: int
    groups: int
    driver_us: float
    """Processor time of the driver for a group, everything included, in microseconds."""
    driver_busy: float
    """Share of the time."""
    groups_per_second: float
    staleness_mean: float
    staleness_max: int
    learner_idle: float
    engines_idle: float
    """Share of engine-time with nothing in flight."""
    engines_use: float
    """Tokens decoded, of those that full engines would have."""
    batch_seconds: float

    @property
    def saturated(self) -> str:
        """What is used most, from nine tenths on."""
        use = {"learner": 1 - self.learner_idle, "engines": self.engines_use, "driver": self.driver_busy}
        most = max(use, key=lambda name: use[name])
        return most if use[most] >= 0.9 else "nothing"


def simulate(config: Config, lengths: Lengths, card: Card = CARD) -> Result:
    """Run the loop to its end.

    Raises:
        AssertionError: a group was older than `train.max_staleness` at its update.
    """
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, VirtualLoop)
        with virtual(loop):
            world = World(loop, rates(config, lengths, card), lengths, config)
            config.run_dir.mkdir(parents=True)
            gc.collect()
            start = time.thread_time()
            runner.run(_train(config, world))
            driver = time.thread_time() - start - world.aside
    lines = list(read_json_lines(config.run_dir / "metrics.jsonl"))
    stalest = int(max(line["staleness/max"] for line in lines))
    assert stalest <= config.train.max_staleness
    (t0, learnt0, decoded0, busy0), (t1, learnt1, decoded1, busy1) = world.marks[0], world.marks[-1]
    span, batches = t1 - t0, len(world.marks) - 1
    workers, groups = config.rollout.workers.min, config.train.num_batches * config.train.prompts_per_batch
    full = world.rates.tokens_per_second(world.rates.running)
    return Result(
        workers=workers,
        ranks=config.learner.num_ranks,
        max_staleness=config.train.max_staleness,
        groups=groups,
        driver_us=1e6 * driver / groups,
        driver_busy=driver / loop.time(),
        groups_per_second=batches * config.train.prompts_per_batch / span,
        staleness_mean=fmean(line["staleness/mean"] for line in lines),
        staleness_max=stalest,
        learner_idle=max(0.0, 1 - (learnt1 - learnt0) / span),
        engines_idle=1 - (busy1 - busy0) / (span * workers),
        engines_use=(decoded1 - decoded0) / (span * workers * full),
        batch_seconds=span / batches,
    )


async def _train(config: Config, world: World) -> None:
    display = Display(Console(quiet=True))
    pool = Pool(
        world.worker,
        _anywhere,
        config.rollout.workers,
        capacity=config.engine.max_num_seqs // config.rollout.group_size,
        health_seconds=config.rollout.health_seconds,
        start_timeout=config.cluster.start_timeout,
        max_failures=config.train.max_failures,
        display=display,
    )
    await pool.start()
    problems = [Problem(f"p:{i}", "", np.ones(PROMPT_TOKENS, np.int32), "") for i in range(1024)]
    with RunLog(config.run_dir) as log:
        stream = PromptStream(problems, config.seed)
        await Loop(config, stream, [], pool, world.ranks(), display, log, Start(), {}).run()
    await pool.close()


async def _anywhere(index: int, seconds: float | None) -> tuple[None, dict[str, Any]]:
    return None, {}


def setting(directory: str, workers: int, ranks: int, staleness: int, *more: str, groups: int = 0) -> Config:
    """The paper's for Qwen3-8B, on more GPUs. ``groups``: of a batch; 0: by the number of workers."""
    groups = groups or min(GROUPS_PER_WORKER * workers, MOST_GROUPS)
    return load(
        Config,
        ROOT / "configs/qwen3_8b.yaml",
        [
            f"runs_dir={directory}", f"name=w{workers}-r{ranks}-s{staleness}-g{groups}",
            f"rollout.workers={workers}", f"learner.num_ranks={ranks}", f"train.max_staleness={staleness}",
            f"train.prompts_per_batch={groups}", f"train.prompts_per_update={max(groups // UPDATES, ranks)}",
            "train.sample_every=0", "checkpoint.every=0", "train.wait_limit=1e9", "train.wait_warning=1e8", *more,
        ],
    )  # fmt: skip


# ---- tables


def ranks_for(workers: int) -> int:
    """Two for three workers, where both take about the same time for a batch; 64 at most."""
    return min(64, max(1, round(workers * 2 / 3)))


def scan(workers: Sequence[int], staleness: Sequence[int], batches: int, lengths: Lengths) -> list[Result]:
    results = []
    with tempfile.TemporaryDirectory() as directory:
        for w in workers:
            for s in staleness:
                config = setting(directory, w, ranks_for(w), s, f"train.num_batches={batches}")
                results.append(simulate(config, lengths))
                print(f"  {w} workers, max_staleness {s}: done", flush=True)
    return results


def shown(results: Sequence[Result]) -> str:
    header = ("workers", "ranks", "max_staleness", "driver us/group", "of one core", "groups/s", "staleness",
              "learner idle", "engines idle", "engines' use", "nine tenths used")  # fmt: skip
    rows = [
        (
            f"{r.workers:,}", str(r.ranks), str(r.max_staleness), f"{r.driver_us:,.0f}", f"{r.driver_busy:.2%}",
            f"{r.groups_per_second:.2f}", f"{r.staleness_mean:.2f}, {r.staleness_max} at most",
            f"{r.learner_idle:.0%}", f"{r.engines_idle:.0%}", f"{r.engines_use:.0%}", r.saturated,
        )
        for r in results
    ]  # fmt: skip
    return table(header, rows)


def places(workers: Sequence[int], staleness: Sequence[int], batches: int, lengths: Lengths) -> str:
    """Engines of 40 places and batches four times as large: only groups that fit whole, against more of them."""
    rows = []
    for w, s, size in product(workers, staleness, (5, 8)):
        results = []
        for load_ in (1, pool.LOAD):
            more = (f"train.num_batches={batches}", "engine.max_num_seqs=40", f"rollout.group_size={size}")
            with tempfile.TemporaryDirectory() as directory, patch("stepgrpo.pool.LOAD", load_):
                groups = 4 * 40 * w // size
                results.append(simulate(setting(directory, w, 2 * ranks_for(w), s, *more, groups=groups), lengths))
        whole, ours = results
        rows.append(
            (
                str(w), str(s), str(size), f"{whole.groups_per_second:.3f}", f"{ours.groups_per_second:.3f}",
                f"{ours.groups_per_second / whole.groups_per_second:.2f}",
                f"{whole.engines_use:.0%}, {ours.engines_use:.0%}",
                f"{whole.staleness_mean:.2f}, {ours.staleness_mean:.2f}", f"{ours.staleness_max}",
            )
        )  # fmt: skip
        print(f"  {w} workers, max_staleness {s}, groups of {size}: done", flush=True)
    header = ("workers", "max_staleness", "group", "groups/s, whole", "places", "ratio", "engines' use",
              "staleness mean", "max")  # fmt: skip
    return table(header, rows)


@dataclass(frozen=True, slots=True)
class Split:
    """How so many GPUs are shared out."""

    model: str
    gpus: int
    ranks: int
    workers: int
    tensor_parallel: int
    offload: bool
    result: Result


def sizing(model: str, gpus: int, lengths: Lengths, groups: int = 512, batches: int = 4) -> Split:
    """Of the splits that fit in memory, as `--dry-run` counts it: for each number of GPUs of an engine the one whose
    slower half is fastest; of these, simulated, the one that is done first. GPUs left over stay idle."""
    splits = []
    with tempfile.TemporaryDirectory() as directory:
        for tp in (1, 2, 4, 8):
            candidates = []
            for share, offload in product(range(1, 16), (False, True)):
                ranks = max(1, gpus * share // 16)
                workers = (gpus - ranks) // tp
                if not workers or ranks > groups // UPDATES:
                    continue
                config = setting(
                    directory, workers, ranks, 1, f"model.path={model}", f"engine.tensor_parallel={tp}",
                    f"learner.offload_optimizer={str(offload).lower()}", f"train.num_batches={batches}",
                    f"runs_dir={directory}/{tp}", groups=groups,
                )  # fmt: skip
                if not explain(config).faults:
                    r = rates(config, lengths, CARD)
                    there = min(r.running, math.ceil(groups * config.rollout.group_size / workers))
                    candidates.append((min(workers * r.tokens_per_second(there), ranks / r.train), -offload, config))
            if candidates:
                *_, config = max(candidates, key=lambda c: c[:2])
                offload, result = config.learner.offload_optimizer, simulate(config, lengths)
                splits.append(Split(model, gpus, result.ranks, result.workers, tp, offload, result))
    return min(splits, key=lambda s: s.result.batch_seconds)


def sized(plans: Sequence[Split]) -> str:
    header = ("model", "GPUs", "learner ranks", "workers x GPUs", "minutes/batch", "learner idle", "engines' use")
    rows = []
    for p in plans:
        ranks = f"{p.ranks}{', optimizer on the host' * p.offload}"
        figures = (f"{p.result.batch_seconds / 60:.1f}", f"{p.result.learner_idle:.0%}", f"{p.result.engines_use:.0%}")
        rows.append((p.model, str(p.gpus), ranks, f"{p.workers} x {p.tensor_parallel}", *figures))
    return table(header, rows)


def broadcasts(size: float) -> str:
    rows = []
    for nodes in (1, 4, 16, 64, 128):
        times = [broadcast(size, gbit, nodes) for gbit in (25, 100, 200)]
        rows.append((f"{nodes}", *(f"{relayed:.1f} / {alone:,.0f}" for relayed, alone in times)))
    return table(("nodes", "25 Gbit/s", "100 Gbit/s", "200 Gbit/s"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--staleness", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--lengths", choices=LENGTHS, default="long-tailed")
    parser.add_argument("--places", action="store_true", help="instead: groups that wait for places against none")
    parser.add_argument("--sizing", action="store_true", help="also the table of GPUs for Qwen3-8B and 32B")
    parser.add_argument("--out", type=Path, help="results as JSON")
    args = parser.parse_args()
    print(machine())
    lengths = LENGTHS[args.lengths]()
    print(f"lengths: {lengths.name}, {lengths.mean():,.0f} tokens on average, at most {lengths.limit:,}")
    if args.places:
        print(places(args.workers, args.staleness, args.batches, lengths))
        return
    results = scan(args.workers, args.staleness, args.batches, lengths)
    print(shown(results), "\n\nseconds for 16 GB on all nodes, passed on / from one node alone:", sep="\n")
    print(broadcasts(16e9))
    plans = []
    if args.sizing:
        for model in ("Qwen/Qwen3-8B", "Qwen/Qwen3-32B"):
            plans += [sizing(model, gpus, lengths) for gpus in (8, 16, 32, 64, 128, 256, 512)]
        print("\nA plan, not measured:", sized(plans), sep="\n")
    if args.out:
        record = {
            "machine": machine(), "lengths": args.lengths, "mean_tokens": round(lengths.mean(), 1),
            "card": asdict(CARD), "scan": [asdict(r) for r in results], "sizing": [asdict(p) for p in plans],
        }  # fmt: skip
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A run around the loop: what it needs is checked and read, its actors started, and its end recorded."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from types import MappingProxyType
from typing import Any

from stepgrpo import launch, recovery, rundir
from stepgrpo.actors.rollout import Rollout
from stepgrpo.actors.truncation import Preset
from stepgrpo.benchmarks import by_name
from stepgrpo.config import Config, ConfigError, is_own
from stepgrpo.console import Display
from stepgrpo.crew import rollout_crew, saved
from stepgrpo.data import Problems, PromptStream, in_order, load_problems, without_overlap
from stepgrpo.evaluate import Answers, Evaluation, compression, decode, evaluation, exit_cost, shown
from stepgrpo.hub import checkpoint_files, eos_ids, fingerprint, load_tokenizer, max_positions, portable
from stepgrpo.metrics import RunLog
from stepgrpo.placement import all_bundles, rollout_bundles
from stepgrpo.plugin import load_own
from stepgrpo.reward.schemes import make_scheme
from stepgrpo.tokens import Codec
from stepgrpo.tracking import Tracker, check_key
from stepgrpo.train import Loop
from stepgrpo.types import Prompt

Keep = Callable[[str, dict[str, Any]], None]
"""(name of the problems, one problem's answers with their texts)"""


def train(config: Config, display: Display, resume: str | None = None) -> dict[str, Any]:
    """Train, and leave a run directory; returns the summary that also lies there.

    Args:
        resume: go on with a run that was cut off, as ``recovery.claim`` has it.

    Raises:
        ConfigError, DataError: something the user must change, found before anything is started.
        TrainError: the run could not go on.
    """
    with rundir.alone(config.run_dir, "run"), contextlib.ExitStack() as stack:
        with display.phase("prepare", "reading model and data") as phase:
            config = portable(config)
            check_key(config.train)
            start = recovery.claim(config, resume, display)
            check_rollout(config)
            train_set, held_out = read_problems(config, display)
            inputs = {
                "model.path": fingerprint(config.model.path),
                "data.train": recovery.digest(train_set.items),
                "data.eval": recovery.digest(held_out.items),
            }
            recovery.check_inputs(start, inputs)
            phase.result = f"{len(train_set.items):,} training and {len(held_out.items):,} held-out problems"
        stream, eval_prompts = PromptStream(train_set.items, config.seed), in_order(held_out.items)
        with display.phase("ray", "starting Ray"):
            # The node that took the run down may not be replaced yet.
            patience = config.cluster.start_timeout if start.restart else 0.0
            stack.enter_context(launch.session(config.cluster, all_bundles(config), patience))
        # Not before: what is refused up to here leaves an empty directory, which the next attempt may take.
        recovery.begin(config, start, display)
        with rundir.recorded(config.run_dir, display.seconds) as summary:
            asyncio.run(_train(config, display, stream, eval_prompts, summary, start, inputs))
    return summary


def read_problems(config: Config, display: Display) -> tuple[Problems, Problems]:
    """Training and held-out problems, the former without the latter; what was found in them is told.

    Raises:
        ConfigError, DataError: something the user must change.
    """
    tokenizer = load_tokenizer(config.model.path)
    train_set = load_problems(config.data.train, config.data, tokenizer)
    held_out = load_problems(config.data.eval, config.data, tokenizer) if config.data.eval else Problems((), ())
    train_set = without_overlap(train_set, held_out, config.data)
    note_skipped(display, train_set, held_out)
    return train_set, held_out


async def _train(
    config: Config,
    display: Display,
    stream: PromptStream,
    held_out: Sequence[Prompt],
    summary: dict[str, Any],
    start: recovery.Start,
    inputs: dict[str, str],
) -> None:
    ending = Ending()
    beat = asyncio.create_task(launch.heartbeat())
    async with rollout_crew(config, display, learner=True) as (pool, ranks):
        tracker = None if config.train.wandb == "off" else Tracker(config, display.warn)
        with RunLog(config.run_dir, tracker) as log:
            loop = Loop(config, stream, held_out, pool, ranks, display, log, start, inputs)
            ending.after(loop.last_checkpoint)
            try:
                last_turn = partial(loop.learners_turn, for_good=True)
                async with saved(ranks, config.model_dir, display, lambda: loop.update > 0, last_turn):
                    await loop.run()
            finally:
                summary["updates"] = loop.update
                if (cost := exit_cost(loop.exit_counts)) is not None:
                    summary["exit_cost"] = asdict(cost)
    beat.cancel()
    if held_out:
        summary |= _before_and_after(config)


def _before_and_after(config: Config) -> dict[str, Any]:
    """Held-out figures of a run that is done; only those after it, where the others were lost with its machine."""
    lines = rundir.read_json_lines(config.run_dir / "evaluations.jsonl")
    by_version = {line.pop("version"): line for line in lines}
    answers = json.loads((config.run_dir / "heldout.json").read_text())
    out: dict[str, Any] = {}
    for when, version in (("before", 0), ("after", max(by_version))):
        if version in by_version and when in answers:
            figures = {k: v for k, v in by_version[version].items() if k not in ("update", "restart")}
            out[when] = {"version": version, **figures}
    if len(out) == 2:
        out["compression"] = asdict(compression(Answers(**answers["before"]), Answers(**answers["after"])))
    return out


def evaluate(
    config: Config,
    display: Display,
    sources: Sequence[str],
    keep: Keep | None = None,
    reference: Mapping[str, Answers] = MappingProxyType({}),
) -> dict[str, tuple[Evaluation, Answers]]:
    """Let ``config.model.path`` answer problems as it is.

    Args:
        sources: benchmarks or files.
        keep: given the benchmark's name and each problem's answers with their texts.
        reference: answers, by benchmark, that these will be compared with.

    Returns:
        By name of the benchmark.

    Raises:
        ConfigError, DataError: something the user must change, such as a reference to other problems.
    """
    with display.phase("prepare", "reading model and data") as phase:
        # The engine's context has room for what is evaluated, not for what the run would train on.
        config = portable(config).model_copy(update={"data": config.data.model_copy(update={"eval": sources[0]})})
        tokenizer = load_tokenizer(config.model.path)
        check_rollout(config)
        named = by_name(sources, config.data)
        sets = {name: load_problems(source, config.data, tokenizer) for name, source in named.items()}
        note_skipped(display, *sets.values())
        questions = {(name, p.key): p.question for name, problems in sets.items() for p in problems.items}
        prompts = {name: in_order(problems.items)[: config.eval.num_prompts] for name, problems in sets.items()}
        for name, chosen in prompts.items() if reference else ():
            if name not in reference or reference[name].key != [p.key for p in chosen]:
                raise ConfigError(f"--reference: has no answers to the same problems of {name}")
        phase.result = f"{sum(map(len, prompts.values())):,} problems"

    def kept(name: str, group: dict[str, Any]) -> None:
        assert keep is not None
        keep(name, {"question": questions[name, group["key"]], **group})

    return answer(config, display, prompts, keep and kept)


def answer(
    config: Config, display: Display, prompts: Mapping[str, Sequence[Prompt]], keep: Keep | None = None
) -> dict[str, tuple[Evaluation, Answers]]:
    """Let the model answer prompts that are read already; ``config`` has been through ``portable``.

    Returns:
        By the prompts' name.
    """

    async def go() -> dict[str, tuple[Evaluation, Answers]]:
        Ending()
        results = {}
        async with rollout_crew(config, display, learner=False) as (pool, _), pool.serving():
            for name, chosen in prompts.items():
                with display.phase(f"eval {name}", f"{name}: answering {len(chosen)} problems") as phase:
                    start = time.monotonic()
                    groups = await decode(pool.ask, chosen, phase.problems, keep and partial(keep, name))
                    result = evaluation(groups, version=0, seconds=time.monotonic() - start)
                    phase.result = shown(result)
                results[name] = result, Answers.of(groups)
        return results

    with launch.session(config.cluster, rollout_bundles(config)):
        return asyncio.run(go())


def check_rollout(config: Config) -> None:
    """Refuse what the rollout worker would refuse, before an engine is started for it.

    Raises:
        ConfigError: a text that the checkpoint's tokenizer cannot spell, too few tokens to think and answer, more than
            the model has positions for, or a function of the user's own that is not there.
    """
    directory = checkpoint_files(config.model.path)
    positions = max_positions(directory)
    if positions is not None and config.max_model_len > positions:
        raise ConfigError(
            f"rollout.max_response_tokens: prompt, response and probe may take {config.max_model_len} tokens, but "
            f"{config.model.path} has {positions} positions: lower it, eval.max_response_tokens or "
            "data.max_prompt_tokens"
        )
    with _named("model.path"):
        codec = Codec.from_dir(directory)
    make_scheme(config.reward, config.rollout.max_response_tokens)
    if is_own(config.reward.grader):
        load_own(config.reward.grader, "reward.grader")
    r, close = config.rollout, config.model.think_close
    texts = [("model.think_close", close)]
    if r.step_rule == "triggers":
        texts += [("rollout.triggers", text) for text in r.triggers]
    try:
        if r.probe:
            preset = Preset.resolve(r.probe, close)
            texts += [("rollout.probe.inducer", preset.inducer), ("rollout.probe.closing", preset.closing)]
            texts += [("rollout.probe.stop", text) for text in preset.stop]
        for field, text in texts:
            with _named(field):
                length = len(codec.encode(text))
            if length > config.MAX_INDUCER_TOKENS:
                raise ConfigError(f"{field}: got a text of {length} tokens, takes {config.MAX_INDUCER_TOKENS} at most")
        no_engine: Any = None  # nothing is sampled
        Rollout(no_engine, codec, r, close, eos_ids(directory), config.seed)
    except ValueError as e:
        raise ConfigError(str(e)) from None


@contextlib.contextmanager
def _named(field: str) -> Iterator[None]:
    """Put the field's name before an error that does not know it."""
    try:
        yield
    except ValueError as e:
        raise ConfigError(f"{field}: {e}") from None


def note_skipped(display: Display, *sets: Problems) -> None:
    for note in (note for s in sets for note in s.notes):
        display.warn(note)


class Ending:
    """Ends a run when it is asked to, by SIGTERM (a scheduler, `ray job stop`), SIGHUP (its terminal is gone) or by
    Ctrl-C, of which asyncio makes a cancelled task and a KeyboardInterrupt; a second Ctrl-C does so at once."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._of_asyncio = signal.getsignal(signal.SIGINT)
        self._first: Callable[[], Awaitable[None]] | None = None
        self._task: asyncio.Task[None] | None = None
        self._asks = [signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
            self._asks.append(signal.SIGHUP)
        for asks in self._asks:
            self._loop.add_signal_handler(asks, self._asked)
        if self._of_asyncio is not signal.SIG_IGN:  # as in the background of a script
            self._loop.add_signal_handler(signal.SIGINT, self._asked, True)

    def after(self, first: Callable[[], Awaitable[None]]) -> None:
        """Await ``first`` before the run is cancelled."""
        self._first = first

    def _asked(self, by_key: bool = False) -> None:
        if self._task is None:
            self._task = self._loop.create_task(self._end())
        elif by_key:  # Ray and a supervisor may both send SIGTERM, which is one wish
            self._cancel()

    async def _end(self) -> None:
        if self._first:
            await self._first()
        self._loop.call_soon(self._cancel)  # which must not raise in this task, whose exception nobody looks at

    def _cancel(self) -> None:
        for asks in self._asks:
            self._loop.remove_signal_handler(asks)
            signal.signal(asks, signal.SIG_IGN)
        self._loop.remove_signal_handler(signal.SIGINT)
        is_ignored = self._of_asyncio is signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.default_int_handler if is_ignored else self._of_asyncio)
        signal.raise_signal(signal.SIGINT)

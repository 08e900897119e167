"""A run around the loop: what it needs is checked and read, its actors started, and its end recorded."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from stepgrpo import launch, rundir
from stepgrpo.actors.rollout import Rollout
from stepgrpo.actors.truncation import Preset
from stepgrpo.config import Config, ConfigError
from stepgrpo.console import Display
from stepgrpo.crew import learner_bundles, rollout_bundles, rollout_crew, saved
from stepgrpo.data import Problems, PromptStream, in_order, load_problems
from stepgrpo.evaluate import Evaluation, compression, decode, evaluation
from stepgrpo.hub import checkpoint_files, eos_ids, load_tokenizer, max_positions, portable
from stepgrpo.launch import Bundle
from stepgrpo.metrics import RunLog
from stepgrpo.tokens import Codec
from stepgrpo.train import Loop, Seat
from stepgrpo.types import Prompt


def train(config: Config, display: Display) -> dict[str, Any]:
    """Train, and leave a run directory; returns the summary that also lies there.

    Raises:
        ConfigError, DataError: something the user must change, found before anything is started.
        TrainError: the run could not go on.
    """
    with display.phase("prepare", "reading model and data") as phase:
        rundir.claim(config.run_dir)
        config = portable(config)
        tokenizer = load_tokenizer(config.model.path)
        check_rollout(config)
        train_set = load_problems(config.data.train, config.data, tokenizer)
        held_out = load_problems(config.data.eval, config.data, tokenizer) if config.data.eval else Problems((), ())
        phase.result = f"{len(train_set.items):,} training and {len(held_out.items):,} held-out problems"
        note_skipped(display, train_set, held_out)
    stream, eval_prompts = PromptStream(train_set.items, config.seed), in_order(held_out.items)

    bundles = [*rollout_bundles(config), *learner_bundles(config)]
    with contextlib.ExitStack() as stack:
        with display.phase("ray", "starting Ray"):
            stack.enter_context(launch.session(config.cluster, bundles))
        # Not before: what is refused up to here leaves an empty directory, which the next attempt may take.
        rundir.save_json(config.run_dir / "config.json", config.model_dump())
        with rundir.recorded(config.run_dir, display.seconds) as summary:
            asyncio.run(_train(config, display, stream, eval_prompts, bundles, summary))
    return summary


async def _train(
    config: Config,
    display: Display,
    stream: PromptStream,
    held_out: Sequence[Prompt],
    bundles: Sequence[Bundle],
    summary: dict[str, Any],
) -> None:
    cancel_on_sigterm()
    t, capacity = config.train, config.engine.max_num_seqs // config.rollout.group_size
    settings = config.model_dump(mode="json")
    async with rollout_crew(config, display, bundles) as (workers, ranks):
        with RunLog(config.run_dir, wandb_mode=t.wandb, project=t.wandb_project, config=settings) as log:
            loop = Loop(config, stream, held_out, [Seat(w, capacity) for w in workers], ranks, display, log)
            try:
                async with saved(ranks, config.model_dir, display, lambda: loop.update > 0):
                    results = await loop.run()
            finally:
                summary["updates"] = loop.update
    if results["before"] is not None:
        (before, before_groups), (after, after_groups) = results["before"], results["after"]
        ratio = compression(before_groups, after_groups)
        summary |= {"before": before.as_dict(), "after": after.as_dict(), "compression": asdict(ratio)}


def evaluate(config: Config, display: Display) -> Evaluation:
    """Decode the held-out problems with ``config.model.path`` as it is.

    Raises:
        ConfigError, DataError: something the user must change.
    """
    if (source := config.data.eval) is None:
        raise ConfigError("data.eval: got null, takes the held-out problems to evaluate on")
    with display.phase("prepare", "reading model and data") as phase:
        config = portable(config)
        tokenizer = load_tokenizer(config.model.path)
        check_rollout(config)
        problems = load_problems(source, config.data, tokenizer)
        note_skipped(display, problems)
        prompts = in_order(problems.items)[: config.eval.num_prompts]
        phase.result = f"{len(prompts):,} problems"
    bundles = rollout_bundles(config)

    async def go() -> Evaluation:
        cancel_on_sigterm()
        async with rollout_crew(config, display, bundles) as (workers, _):
            with display.phase("eval", f"answering {len(prompts)} problems") as phase:
                groups = await decode(workers, prompts, lambda done: phase.show(f"{done} problems", done, len(prompts)))
        return evaluation(groups, version=0, seconds=display.seconds["eval"])

    with launch.session(config.cluster, bundles):
        return asyncio.run(go())


def check_rollout(config: Config) -> None:
    """Refuse what the rollout worker would refuse, before an engine is started for it.

    Raises:
        ConfigError: a text that the checkpoint's tokenizer cannot spell, too few tokens to think and answer, or more
            than the model has positions for.
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
    r, close = config.rollout, config.model.think_close
    texts = [("model.think_close", close), *(("rollout.triggers", text) for text in r.triggers)]
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
    for skipped in (s.skipped for s in sets if s.skipped):
        display.warn(f"{len(skipped)} bad lines left out (data.on_bad_line), the first: {skipped[0]}")


def cancel_on_sigterm() -> None:
    """`ray job stop` sends SIGTERM: end as on Ctrl-C, which asyncio makes a cancelled task and a KeyboardInterrupt."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, signal.raise_signal, signal.SIGINT)

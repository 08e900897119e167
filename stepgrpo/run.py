"""A run around the loop: its directory, its data, its actors, its end, also when it ends early."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import traceback
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stepgrpo import launch
from stepgrpo.actors.rollout import Rollout
from stepgrpo.actors.truncation import Preset
from stepgrpo.config import Config, ConfigError, LearnerConfig, ModelConfig, SftConfig
from stepgrpo.console import Display
from stepgrpo.data import Problems, PromptStream, Tokenizer, in_order, load_problems
from stepgrpo.evaluate import Evaluation, compression, decode, evaluation
from stepgrpo.hub import checkpoint_files, eos_ids
from stepgrpo.launch import Bundle
from stepgrpo.metrics import RunLog
from stepgrpo.tokens import Codec
from stepgrpo.train import Loop, Seat

SAVE_SECONDS_WHEN_INTERRUPTED = 5.0
CLOSE_SECONDS = 2.0


def train(config: Config, display: Display) -> dict[str, Any]:
    """Train, and leave a run directory; returns the summary that also lies there.

    Raises:
        ConfigError, DataError: something the user must change, found before anything is started.
        TrainError: the run could not go on.
    """
    with display.phase("prepare", "reading model and data") as phase:
        claim_directory(config.run_dir)
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
        save_json(config.run_dir / "config.json", config.model_dump())
        return asyncio.run(_train(config, display, stream, eval_prompts, bundles))


async def _train(
    config: Config, display: Display, stream: PromptStream, held_out: Sequence[Any], bundles: Sequence[Bundle]
) -> dict[str, Any]:
    cancel_on_sigterm()
    summary: dict[str, Any] = {"status": "failed", "name": config.name}
    loop: Loop | None = None
    t = config.train
    try:
        async with _actors(config, display, bundles) as (workers, ranks):
            log = RunLog(
                config.run_dir, wandb_mode=t.wandb, project=t.wandb_project, config=config.model_dump(mode="json")
            )
            capacity = max(1, config.engine.max_num_seqs // config.rollout.group_size)
            with log:
                loop = Loop(config, stream, held_out, [Seat(w, capacity) for w in workers], ranks, display, log)
                try:
                    results = await loop.run()
                    with display.phase("save", "saving the model"):
                        await save_model(ranks, config.run_dir / "model")
                except asyncio.CancelledError:
                    # The learner may be in the middle of an update, which the save then waits for.
                    with contextlib.suppress(Exception):
                        async with asyncio.timeout(SAVE_SECONDS_WHEN_INTERRUPTED):
                            await save_model(ranks, config.run_dir / "model")
                    raise
        summary["status"] = "finished"
        summary |= _results(results)
    except asyncio.CancelledError:
        summary["status"] = "interrupted"
        raise
    except Exception:
        (config.run_dir / "error.txt").write_text(traceback.format_exc())
        raise
    finally:
        summary["updates"] = loop.update if loop else 0
        summary["seconds"] = {k: round(v, 2) for k, v in display.seconds.items()}
        save_json(config.run_dir / "summary.json", summary)
    return summary


def _results(results: dict[str, Any]) -> dict[str, Any]:
    if results["before"] is None:
        return {}
    (before, before_groups), (after, after_groups) = results["before"], results["after"]
    return {
        "before": before.as_dict(),
        "after": after.as_dict(),
        "compression": asdict(compression(before_groups, after_groups)),
    }


def evaluate(config: Config, display: Display) -> Evaluation:
    """Decode the held-out problems with ``config.model.path`` as it is.

    Raises:
        ConfigError, DataError: something the user must change.
    """
    if config.data.eval is None:
        raise ConfigError("data.eval: got null, takes the held-out problems to evaluate on")
    with display.phase("prepare", "reading model and data") as phase:
        tokenizer = load_tokenizer(config.model.path)
        check_rollout(config)
        problems = load_problems(config.data.eval, config.data, tokenizer)
        note_skipped(display, problems)
        prompts = in_order(problems.items)[: config.eval.num_prompts]
        phase.result = f"{len(prompts):,} problems"
    bundles = rollout_bundles(config)

    async def go() -> Evaluation:
        cancel_on_sigterm()
        async with _actors(config, display, bundles) as (workers, _):
            with display.phase("eval", f"answering {len(prompts)} problems") as phase:
                groups = await decode(workers, prompts, lambda done: phase.show(f"{done} problems", done, len(prompts)))
        return evaluation(groups, version=0, seconds=display.seconds["eval"])

    with launch.session(config.cluster, bundles):
        return asyncio.run(go())


# ---- actors


def rollout_bundles(config: Config) -> list[Bundle]:
    gpus = config.engine.tensor_parallel if config.cluster.device == "cuda" else 0
    return [Bundle("rollout.num_workers", config.cluster.cpus_per_worker, gpus)] * config.rollout.num_workers


def learner_bundles(config: Config | SftConfig) -> list[Bundle]:
    gpus = 1 if config.cluster.device == "cuda" else 0
    return [Bundle("learner.num_ranks", config.cluster.cpus_per_rank, gpus)] * config.learner.num_ranks


@asynccontextmanager
async def _actors(
    config: Config, display: Display, bundles: Sequence[Bundle]
) -> AsyncIterator[tuple[list[Any], list[Any]]]:
    """Rollout workers and, where there are bundles for them, learner ranks; started together, stopped at the end."""
    num_workers = config.rollout.num_workers
    token = launch.run_token()
    with display.phase("start", "starting vLLM and DeepSpeed" if len(bundles) > num_workers else "starting vLLM"):
        group = await launch.reserve(bundles, config.cluster.start_timeout)
        workers = [start_worker(config, token, i, launch.place(group, i, bundles[i])) for i in range(num_workers)]
        ranks = start_ranks(
            config.learner,
            config.model,
            config.cluster.device,
            config.train.num_batches * config.updates_per_batch,
            [launch.place(group, i, bundles[i]) for i in range(num_workers, len(bundles))],
            temperature=config.rollout.temperature,
            reward=config.reward,
            triggers=config.rollout.triggers,
        )
        try:
            await launch.within(_start_all(workers, ranks), config.cluster.start_timeout, "the actors")
        except BaseException:
            await close(workers, ranks)
            raise
    try:
        yield workers, ranks
    finally:
        await close(workers, ranks)


async def _start_all(workers: Sequence[Any], ranks: Sequence[Any]) -> None:
    async with asyncio.TaskGroup() as tasks:
        for w in workers:
            tasks.create_task(answer(w.start.remote()))
        if ranks:
            tasks.create_task(set_up_ranks(ranks))


async def set_up_ranks(ranks: Sequence[Any]) -> None:
    """Let learner ranks find each other: rank 0 names the address, all join at once."""
    host, port = await ranks[0].address.remote()
    async with asyncio.TaskGroup() as tasks:
        for r in ranks:
            tasks.create_task(answer(r.setup.remote(host, port)))


async def answer(ref: Any) -> Any:
    return await ref


async def close(workers: Sequence[Any], ranks: Sequence[Any]) -> None:
    with contextlib.suppress(Exception):
        async with asyncio.timeout(CLOSE_SECONDS):
            await asyncio.gather(*(answer(a.close.remote()) for a in (*workers, *ranks)), return_exceptions=True)


async def save_model(ranks: Sequence[Any], directory: Path) -> None:
    """Write a plain Hugging Face checkpoint; all ranks take part."""
    await asyncio.gather(*(answer(r.save.remote(str(directory))) for r in ranks))


def start_worker(config: Config, run_token: str, index: int, options: dict[str, Any]) -> Any:
    import ray

    from stepgrpo.actors.worker import RolloutWorker, env_vars

    actor = ray.remote(RolloutWorker).options(
        max_concurrency=10_000, runtime_env={"env_vars": env_vars(config.cluster.device)}, **options
    )
    return actor.remote(config, run_token, index)


def start_ranks(
    learner: LearnerConfig,
    model: ModelConfig,
    device: str,
    total_updates: int,
    options: Sequence[dict[str, Any]],
    **rollouts: Any,
) -> list[Any]:
    """Learner ranks, one per entry of ``options``; `set_up_ranks` makes them one process group.

    Args:
        rollouts: what only RL needs: ``temperature``, ``reward``, ``triggers``.
    """
    import ray

    from stepgrpo.learner.worker import LearnerWorker

    actor = ray.remote(concurrency_groups={"ingest": 64})(LearnerWorker)
    return [
        actor.options(**o).remote(
            rank, len(options), learner, model, device=device, total_updates=total_updates, **rollouts
        )
        for rank, o in enumerate(options)
    ]


# ---- the run directory


def claim_directory(directory: Path) -> None:
    """Refuse a directory that holds another run, or cannot be written.

    Raises:
        ConfigError: says which other name to take.
    """
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(
            f"name: {directory} already holds a run; choose another with name={_free_name(directory)}, or remove it"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise ConfigError(f"runs_dir: got {directory.parent}, cannot be written ({e.strerror})") from None


def _free_name(directory: Path) -> str:
    n = 2
    while (directory.parent / f"{directory.name}-{n}").exists():
        n += 1
    return f"{directory.name}-{n}"


def save_json(path: Path, record: Any) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def load_tokenizer(path: str) -> Tokenizer:
    from transformers import AutoTokenizer

    directory = checkpoint_files(path)
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"model.path: got {path}, without a usable tokenizer ({' '.join(str(e).split())[:160]})"
        ) from None
    return tokenizer


def check_rollout(config: Config) -> None:
    """Refuse what the rollout worker would refuse, before an engine is started for it.

    Raises:
        ConfigError: a text that the checkpoint's tokenizer cannot spell, or too few tokens to think and answer.
    """
    directory = checkpoint_files(config.model.path)
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
                codec.encode(text)
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
        display.print(f"[yellow]{len(skipped)} bad lines left out (data.on_bad_line), the first:[/] {skipped[0]}")


def cancel_on_sigterm() -> None:
    """`ray job stop` sends SIGTERM: end as on Ctrl-C, which asyncio makes a cancelled task and a KeyboardInterrupt."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, signal.raise_signal, signal.SIGINT)

"""vLLM behind the ``Engine`` protocol: tokens in, tokens out, log-probabilities of what was really sampled from.

vLLM runs in a process of its own (`EngineCore`); this is its client. With ``receive`` the only file that imports vllm,
and it does so when an engine is built, so that importing this module costs nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from stepgrpo.actors.forking import ForkingContext, call_forked, import_ahead
from stepgrpo.actors.rollout import Chunk, Sampling
from stepgrpo.config import EngineConfig, ModelConfig
from stepgrpo.weights import Table

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs

CPU_ENV: dict[str, str] = {
    # One compiled function (the rank of a log-probability) would build for 20 s at the first request.
    "TORCH_COMPILE_DISABLE": "1",
    # Otherwise the CPU platform puts the worker into a third process.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # More threads than free cores are 50 times slower, and one thread makes results independent of the batch.
    "OMP_NUM_THREADS": "1",
    # "auto" pins the worker of every engine to the same core.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment of an engine on CPU, set before vllm is imported: for Ray, `env_vars` of the worker's runtime_env."""


SPAWNS = os.environ.get("VLLM_WORKER_MULTIPROC_METHOD") == "spawn" or os.environ.get(
    "VLLM_ENABLE_CUDA_COMPATIBILITY", ""
).lower() in ("1", "true")
"""Whether the engine's process begins with nothing: the user wants it, as this module is imported (vLLM itself sets the
variable later on), or it must find other CUDA libraries, which a process looks for when it begins."""
HEARTBEAT_SECONDS = 1.0
"""How long a dead engine may go unnoticed during a control call."""

T = TypeVar("T")


class EngineDied(RuntimeError):
    """The engine cannot generate any more: close it and start another, whose weights are the initial ones."""


class VllmEngine:
    """One vLLM engine.

    Starts the engine process and loads the model before it returns (about ten seconds on CPU), inside or outside of an
    event loop.

    Args:
        path: checkpoint directory, or a name on the hub.
        device: what to compute on; on CPU ``CPU_ENV`` must be set.
        max_model_len: longest prompt and response together, in tokens.
        seed: of requests without a seed of their own.
        sleeps: whether it can; on CPU sleeping does nothing, for there is no memory of a device to give back.
        version: the version that the checkpoint's weights count as.
        record: given vLLM's statistics of each step, see ``stats.EngineStats``; None: it keeps none.
    """

    def __init__(
        self,
        path: str | Path,
        model: ModelConfig,
        config: EngineConfig,
        *,
        device: Literal["cpu", "cuda"],
        max_model_len: int,
        seed: int = 0,
        sleeps: bool = False,
        version: int = 0,
        record: Callable[[Any, Any], None] | None = None,
    ) -> None:
        if not SPAWNS:
            _import_ahead(device)
        from vllm import SamplingParams
        from vllm.envs import enable_envs_cache
        from vllm.outputs import CompletionOutput
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.exceptions import EngineDeadError

        self.version = version
        self._initial = version
        self._sleeps, self._asleep = sleeps and device != "cpu", False
        self._stream_interval = config.stream_interval
        self._max_model_len = max_model_len
        self._reports_versions = hasattr(CompletionOutput, "weight_versions")  # vLLM 0.26 does not
        self._dead_error = EngineDeadError
        self._params = partial(
            SamplingParams,
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            skip_clone=True,
        )
        self._ids = itertools.count()
        self._loading = asyncio.Lock()
        self._cause: str | None = None
        others = set(multiprocessing.active_children())
        args = engine_args(
            path, model, config, device=device, max_model_len=max_model_len, seed=seed, sleeps=self._sleeps
        )
        with nullcontext() if SPAWNS else _forked():
            self._llm: Any = AsyncLLM.from_engine_args(args, stat_loggers=[_stat_logger(record)] if record else None)
        self._processes = set(multiprocessing.active_children()) - others
        enable_envs_cache()  # vLLM looks settings up for each array that it decodes: 5 % of this process's time

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        """Stream one response; closing the generator aborts the request.

        Nothing but ``sampling.stop_token_ids`` and the token limit ends it, also not the model's own EOS. A stop token
        is part of the response. Log-probabilities are those after temperature and top-p, at temperature 0 those of
        temperature 1.

        Raises:
            ValueError: if prompt and response may become longer than the engine's limit.
            EngineDied: if the engine died, before or meanwhile.
        """
        if len(prompt) + sampling.max_tokens > self._max_model_len:
            raise ValueError(
                f"a prompt of {len(prompt)} and a response of up to {sampling.max_tokens} tokens do not fit the "
                f"engine's {self._max_model_len}: shorten one of them, or raise max_model_len"
            )
        self._check()
        params = self._params(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop_token_ids=list(sampling.stop_token_ids),
            # A short request, such as a probe, is worth a look at every token; a long one is not.
            stream_interval=max(1, min(self._stream_interval, sampling.max_tokens // 16)),
        )
        request_id = str(next(self._ids))
        outputs = self._llm.generate(
            {"type": "token", "prompt_token_ids": list(prompt)}, params, request_id, priority=sampling.priority
        )
        seen = 0
        last = floor = self.version
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    part = output.outputs[0]
                    if part.finish_reason not in (None, "stop", "length"):
                        raise RuntimeError(f"vLLM ended a request: {part.finish_reason}")
                    ids = list(part.token_ids)
                    versions = self._versions(request_id, part, seen, floor)
                    seen, last, floor = seen + len(ids), self.version, last
                    yield Chunk(ids, part.logprobs.logprobs, versions, part.finish_reason)
        except self._dead_error as e:
            self._cause = self._cause or "its process died"
            raise EngineDied(f"the vLLM engine died: {self._cause}") from e

    def _versions(self, request_id: str, part: Any, seen: int, floor: int) -> list[int]:
        """The version of each new token of a request, ``seen`` being the number of earlier ones.

        vLLM hands its spans over with the last output only; before that they are read where it collects them. A vLLM
        that reports none leaves ``floor``, never newer than the truth: the version at the look before the last one.
        What came with the last look may have been waiting for it since then, and these tokens begin where that ended.
        """
        num = len(part.token_ids)
        if not self._reports_versions:
            return [floor] * num
        if part.finish_reason is not None:
            starts = [(span.version, span.start) for span in part.weight_versions]
        else:
            processor = self._llm.output_processor
            starts = processor.request_states[processor.external_req_ids[request_id][0]].weight_version_starts
        versions: list[int] = []
        for label, start in starts:
            if start < seen + num:
                del versions[max(start - seen, 0) :]
                versions += [self._initial if label == "default" else int(label)] * (num - len(versions))
        return versions

    async def load(self, version: int, path: str | Path, table: Table) -> float:
        """Replace the weights by those of an assembled file, in the middle of whatever is being generated.

        Requests in flight are frozen, their KV cache is computed anew under the new weights, and they go on; the prefix
        cache is emptied.

        Returns:
            Seconds during which nothing was generated.

        Raises:
            EngineDied: after any error in between, because the weights are then undefined. Requests in flight end with
                the same error.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self._check()
        update = WeightTransferUpdateRequest(update_info={"path": str(path), "table": table})
        async with self._loading:
            started = time.perf_counter()
            try:
                await self._unless_dead(self._replace(version, update))
            except BaseException as e:
                # vLLM's own words for a dead process point to a stack trace that nobody sees.
                why = "its process died" if isinstance(e, self._dead_error) else f"{type(e).__name__}: {e}"
                self._die(f"loading weights version {version} failed ({why})")
                if isinstance(e, Exception):
                    self._check(e)
                raise
            return time.perf_counter() - started

    async def _replace(self, version: int, request: Any) -> None:
        await self._llm.pause_generation(mode="keep", clear_cache=True)
        await self._llm.start_weight_update()
        await self._llm.update_weights(request)
        if self._reports_versions:
            await self._llm.finish_weight_update(str(version))
        else:
            await self._llm.finish_weight_update()
        self.version = version
        await self._llm.resume_generation()

    async def _unless_dead(self, call: Coroutine[Any, Any, T]) -> T:
        """vLLM never answers a control call whose engine dies meanwhile: look after it."""
        task = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait({task}, timeout=HEARTBEAT_SECONDS))[0]:
                if self._llm.errored:
                    raise self._dead_error
            return task.result()
        finally:
            task.cancel()

    async def ping(self) -> None:
        """Return once every process of the engine has answered: never, where one of them hangs.

        Raises:
            EngineDied: if the engine died.
        """
        await self._control(lambda: self._llm.collective_rpc("check_health"))

    async def sleep(self) -> None:
        """Give the GPU's memory back: weights go to the host, the KV cache is dropped. Nothing may be in flight."""
        if self._sleeps and not self._asleep:
            await self._control(lambda: self._llm.sleep(level=1))
            self._asleep = True

    async def wake(self) -> None:
        """Take the memory again, with the weights that were there."""
        if self._asleep:
            await self._control(self._llm.wake_up)
            self._asleep = False

    async def _control(self, call: Callable[[], Coroutine[Any, Any, object]]) -> None:
        self._check()
        try:
            await self._unless_dead(call())
        except self._dead_error as e:
            self._cause = self._cause or "its process died"
            raise EngineDied(f"the vLLM engine died: {self._cause}") from e

    def close(self) -> None:
        """Stop the engine process. Requests in flight end with ``EngineDied``."""
        self._die("it was closed")

    def _check(self, cause: Exception | None = None) -> None:
        if self._cause is not None:
            raise EngineDied(f"the vLLM engine died: {self._cause}") from cause

    def _die(self, cause: str) -> None:
        self._cause = self._cause or cause
        if self._llm is not None:
            self._llm.output_processor.propagate_error(self._dead_error())
            self._llm.shutdown(timeout=2.0)  # then it is killed; it holds nothing worth waiting for
            for process in self._processes:
                process.join()
            self._llm = None  # its finaliser would fail noisily at the interpreter's exit


def _import_ahead(device: Literal["cpu", "cuda"]) -> None:
    """Have the engine's process import vLLM while this one does, which takes each of them most of its start."""
    modules = ["vllm.v1.engine.core"]
    environment = {}
    if device == "cpu":
        modules.append("vllm.v1.worker.cpu_worker")
        # As vLLM's CPU platform adds them for a process that begins anew: torch's own OpenMP, and a faster malloc.
        present = os.environ.get("LD_PRELOAD", "")
        added = [] if "omp" in present else _libraries("torch", "lib/libgomp*.so*")
        added += [] if "tcmalloc" in present else _libraries("vllm", "libs/libtcmalloc*.so*")
        environment["LD_PRELOAD"] = ":".join([*filter(None, [present]), *added])
    import_ahead(modules, environment, os.environ.get("VLLM_RPC_BASE_PATH"))  # where vLLM's own sockets lie


def _libraries(package: str, pattern: str) -> list[str]:
    """One of a package's files that match, found without importing it."""
    spec = find_spec(package)
    files = Path(spec.origin).parent.glob(pattern) if spec and spec.origin else ()
    return [str(file) for file in sorted(files)[-1:]]


@contextmanager
def _forked() -> Iterator[None]:
    """What vLLM starts, it starts from this process's fork server: its engine, and before that, where its cache does
    not know the model's class yet, a process that looks at it, which else would import all of vLLM for that.

    It has no setting for either, but means to: the server of its own API names `forkserver`, which its settings refuse.
    """
    from vllm.model_executor.models import registry
    from vllm.v1.engine import utils

    spawned, inspected = utils.get_mp_context, registry._run_in_subprocess

    def forking() -> Any:
        spawned()  # what it sets in the environment, for the processes of that process, holds
        return ForkingContext()

    utils.get_mp_context, registry._run_in_subprocess = forking, call_forked
    try:
        yield
    finally:
        utils.get_mp_context, registry._run_in_subprocess = spawned, inspected


def engine_args(
    path: str | Path,
    model: ModelConfig,
    config: EngineConfig,
    *,
    device: Literal["cpu", "cuda"],
    max_model_len: int,
    seed: int,
    sleeps: bool = False,
) -> AsyncEngineArgs:
    """The settings of ``VllmEngine`` in vLLM's own."""
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    from stepgrpo.actors import receive

    args: dict[str, Any] = {}
    if config.kv_cache_mb is not None:
        args["kv_cache_memory_bytes"] = config.kv_cache_mb * 2**20
    if config.block_size is not None:
        args["block_size"] = config.block_size
    if device == "cpu":
        args.setdefault("block_size", 32)
        # A prefill in parts would rewind the generator of a request with a seed, which kills the engine on CPU.
        args.update(enable_chunked_prefill=False, max_num_batched_tokens=max(max_model_len, 2048))
    return AsyncEngineArgs(
        model=str(path),
        dtype=model.dtype,
        seed=seed,
        max_model_len=max_model_len,
        # A quarter more than think at a time: priority puts probes and answers first in the queue, but frees no place.
        max_num_seqs=config.max_num_seqs + -(-config.max_num_seqs // 4),
        tensor_parallel_size=config.tensor_parallel,
        # In an actor vLLM would choose Ray, and ask the cluster for GPUs that the actor itself holds.
        distributed_executor_backend="mp" if config.tensor_parallel > 1 else None,
        # vLLM asks for so much free memory at the start, also where it is told how much to take.
        gpu_memory_utilization=config.gpu_memory_utilization if config.kv_cache_mb is None else 0.01,
        enforce_eager=config.enforce_eager or device == "cpu",
        enable_prefix_caching=True,
        scheduling_policy="priority",
        stream_interval=1,  # requests set their own, which may not be lower
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        skip_tokenizer_init=True,
        worker_extension_cls=f"{receive.__name__}.{receive.WorkerExtension.__name__}",
        weight_transfer_config=WeightTransferConfig(backend=receive.BACKEND),
        disable_log_stats=True,
        enable_sleep_mode=sleeps,
        use_tqdm_on_load=False,
        **args,
    )


def _stat_logger(record: Callable[[Any, Any], None]) -> Any:
    """The one logger of an engine. In the place of vLLM's own for Prometheus, which nobody could scrape in here."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class HandOver(PrometheusStatLogger):
        def __init__(self, vllm_config: Any, engine_indexes: Any = None) -> None:
            pass

        def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
            record(scheduler_stats, iteration_stats)

        def _nothing(self, *_: Any, **__: Any) -> None:
            pass

        log_engine_initialized = record_sleep_state = record_admission_rejection = _nothing

    return HandOver

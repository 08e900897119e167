"""The policy under DeepSpeed ZeRO-3: log-probabilities, updates, shards and state of one rank.

The only file that imports deepspeed, which reads ``DS_ACCELERATOR`` when it is imported: set that before. Every public
method except ``shards`` and ``snapshot`` is a collective: all ranks call it, in the same order, with equally many
micro-batches.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import psutil
import torch
import torch.distributed as dist
import transformers
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_modules,
)
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations import HfDeepSpeedConfig

from stepgrpo.config import LearnerConfig, ModelConfig
from stepgrpo.hub import copy_tokenizer
from stepgrpo.learner import state
from stepgrpo.learner.attention import LAYOUTS, check_logits, check_packs
from stepgrpo.learner.batch import MicroBatch
from stepgrpo.learner.loss import LossTokens, Sums
from stepgrpo.types import FloatArray
from stepgrpo.weights import Piece

Objective = Callable[[Tensor, LossTokens], tuple[Tensor, Sums]]
"""(log-probabilities [N] with gradient, tokens) -> (scalar to differentiate, sums to report)."""


def join(
    rank: int, world_size: int, host: str, port: int, device: str, *, own_host: str, door: socket.socket | None = None
) -> None:
    """Make this process rank ``rank`` of the learner, which it stays: a second call does nothing. One process, one
    rank, one visible GPU at most.

    Args:
        host, port: where rank 0 listens.
        own_host: address at which the other ranks reach this one.
        door: rank 0's listening socket.
    """
    if dist.is_initialized():
        return
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # DeepSpeed's calls
    transformers.utils.logging.disable_progress_bar()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    # Gloo would take the address that the machine's name has, which on some machines is another's or loopback.
    if interface := _interface(own_host):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # Made here, because torch's own would listen on all interfaces.
    fd = door.detach() if door else None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, world_size, is_master=door is not None, master_listen_fd=fd
    )
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    # Otherwise init_distributed probes compilers and builds, for a minute, an operator that only inference uses.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def _interface(host: str) -> str | None:
    """Name of this machine's network interface with that address, such as `lo`; None: it has none."""
    addresses = ((name, a.address) for name, of in psutil.net_if_addrs().items() for a in of)
    return next((name for name, address in addresses if address == host), None)


def learning_rate(config: LearnerConfig, update: int, total_updates: int) -> float:
    """Learning rate of the ``update``-th update (from 0): linear warm-up, then constant, or down to 0 at the end."""
    if update < config.warmup_updates:
        return config.lr * (update + 1) / config.warmup_updates
    rest = max(1, total_updates - config.warmup_updates)
    progress = min(1.0, (update - config.warmup_updates) / rest)
    match config.schedule:
        case "constant":
            return config.lr
        case "linear":
            return config.lr * (1 - progress)
        case "cosine":
            return config.lr * (1 + math.cos(math.pi * progress)) / 2


class LogProbHead(nn.Module):
    """Stands in for the language model head: hidden states and targets in, log-probabilities out, no logits kept.

    One call covers a whole micro-batch, so ZeRO-3 gathers the weight once per forward and once per backward, while
    ``chunk_tokens`` bounds the tokens whose logits exist at the same time.
    """

    def __init__(self, weight: nn.Parameter, chunk_tokens: int, temperature: float) -> None:
        super().__init__()
        self.weight = weight
        self._chunk_tokens = chunk_tokens
        self._temperature = temperature

    def forward(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies, both [N] float32; only the former carry a gradient.

        Args:
            hidden: [N, H]
            targets: [N] token ids.
        """
        return _LogProb.apply(hidden, self.weight, targets, self._chunk_tokens, self._temperature)  # type: ignore[no-untyped-call]


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy, lse = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
        for c in _chunks(len(hidden), chunk_tokens):
            logits = (hidden[c] @ weight.T).float().div_(temperature)
            lse[c] = logits.logsumexp(-1)
            logp = logits.sub_(lse[c, None])
            logprobs[c] = logp.gather(-1, targets[c, None]).squeeze(-1)
            entropy[c] = -logp.exp().mul_(logp).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.chunk_tokens, ctx.temperature = chunk_tokens, temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, targets, lse = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        # Summed in float32: bfloat16 would round once per chunk.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for c in _chunks(len(hidden), ctx.chunk_tokens):
            logits = (hidden[c] @ weight.T).float().div_(ctx.temperature)
            scaled = grad[c, None] / ctx.temperature
            grad_logits = logits.sub_(lse[c, None]).exp_().mul_(-scaled)  # d logp[t] / d logit[v] = [v = t] - p[v]
            grad_logits.scatter_add_(-1, targets[c, None], scaled)
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden[c] = grad_logits @ weight
            grad_weight += grad_logits.T @ hidden[c]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, start + chunk_tokens)


class _Scorer(nn.Module):
    """Causal language model -> log-probabilities of given tokens; only the hidden states that predict them are used."""

    def __init__(self, model: transformers.PreTrainedModel, chunk_tokens: int, temperature: float) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise ValueError(f"model.path: {type(model).__name__} has a head with a bias, takes one without")
        model.set_output_embeddings(LogProbHead(head.weight, chunk_tokens, temperature))
        self.model = model

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, index: Tensor, targets: Tensor, layout: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        # No attention mask: packed sequences are kept apart by their ``layout``.
        states = self.model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **layout)
        return self.model.get_output_embeddings()(states.last_hidden_state.flatten(0, 1)[index], targets)


def _use_liger(model: transformers.PreTrainedModel) -> None:
    """Its loss is not called: the head is ours."""
    from liger_kernel.transformers.monkey_patch import (
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        _apply_liger_kernel_to_instance,
    )

    if (kind := model.config.model_type) not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(f"model.liger: got true, takes false with a model of type {kind}, for which Liger has nothing")
    _apply_liger_kernel_to_instance(model)


def _without_dropout(model: nn.Module) -> None:
    """Of dropped-out layers a response would have other log-probabilities in each pass, and none would be those that it
    was sampled with. On modules, not in the config, which goes into what is saved."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _piece(name: str, flat: Tensor, shape: tuple[int, ...], start: int) -> Piece:
    data = flat.cpu().view(torch.uint8).numpy()
    return Piece(name, str(flat.dtype).removeprefix("torch."), shape, start, data)


class LearnerEngine:
    """One rank's share of the policy, its optimizer and, with a KL term, of the frozen reference.

    ``join`` comes first. Log-probabilities are of the distribution at ``temperature``, as the rollouts sampled.
    """

    def __init__(
        self,
        config: LearnerConfig,
        model: ModelConfig,
        *,
        temperature: float,
        device: str,
        with_reference: bool,
        persistence_threshold: int = 100_000,
    ) -> None:
        """
        Args:
            with_reference: build the frozen reference, a second copy of the model.
            persistence_threshold: parameters with fewer elements stay gathered between forward passes.
        """
        self._model_path = model.path
        self._device = torch.device(device)
        attention = model.attention_on(device)
        self._layout = LAYOUTS[attention]
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            # backward() as often as an update has micro-batches, then step(): no fixed count.
            "managed_gradient_accumulation": False,
            "bf16": {"enabled": model.dtype == "bfloat16"},
            "data_types": {"grad_accum_dtype": "fp32"},  # bfloat16 would round once per micro-batch
            "gradient_clipping": config.grad_clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": persistence_threshold},
        }
        # transformers builds models in pieces, one per rank, for as long as this object lives.
        sharded = HfDeepSpeedConfig(settings)

        def load() -> _Scorer:
            lm = transformers.AutoModelForCausalLM.from_pretrained(
                model.path, dtype=getattr(torch, model.dtype), attn_implementation=attention
            )
            check_logits(lm.config)
            if model.packed_on(device):
                check_packs(lm)
            if model.liger:
                _use_liger(lm)
            _without_dropout(lm)
            # A transformer layer is gathered whole, in one collective, between one pair of hooks: those around each of
            # its dozen modules were a tenth to a third of an update of a small model (bench/learner.py).
            whole = {type(module) for module in lm.modules() if type(module).__name__ in (lm._no_split_modules or ())}
            if whole:
                set_z3_leaf_modules(lm, list(whole))
            return _Scorer(lm, config.logprob_chunk_tokens, temperature)

        policy = load()
        self.pad_id = _pad_id(policy.model.config)
        if config.gradient_checkpointing:
            policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = torch.optim.AdamW(
            policy.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
        use_offload = config.offload_optimizer and device != "cpu"
        self._policy: DeepSpeedEngine
        self._policy, self._optimizer, *_ = deepspeed.initialize(
            model=policy,
            optimizer=optimizer,
            config=settings | {"zero_optimization": settings["zero_optimization"] | (offload if use_offload else {})},
        )
        self._policy.train()
        # As AdamW makes them at its first update, before which a checkpoint may be taken or restored.
        for flat in self._optimizer.fp32_partitioned_groups_flat:
            self._optimizer.optimizer.state[flat] = {
                "step": torch.zeros((), device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        self._sums: list[Sums] = []
        """Of the micro-batches since the last step."""
        self._max_skips, self._num_skips = config.max_skips, 0
        self._sleeps, self._offloads = False, use_offload
        states = [OffloadStateTypeEnum.lp_params, OffloadStateTypeEnum.contiguous_grad_buffer]
        self._movable = states if use_offload else [*states, OffloadStateTypeEnum.lp_grads]

        self._reference: DeepSpeedEngine | None = None
        if with_reference:
            reference = load().requires_grad_(False).eval()
            self._reference, *_ = deepspeed.initialize(model=reference, config=settings)
        del sharded

    def logprobs(self, batch: MicroBatch) -> tuple[FloatArray, FloatArray]:
        """Log-probabilities [N] of the loss tokens under the policy, and entropies [N]; no gradient."""
        return self._score(self._policy, batch)

    def reference_logprobs(self, batch: MicroBatch) -> FloatArray:
        """Log-probabilities [N] of the loss tokens under the reference."""
        assert self._reference is not None, "no reference was built"
        return self._score(self._reference, batch)[0]

    def update(
        self, batches: Sequence[MicroBatch], objective: Objective, *, lr: float, own_version: int = -1
    ) -> dict[str, float]:
        """One optimizer update over all ranks' micro-batches: ``accumulate`` and ``step``.

        ``objective`` scales its sum by 1 / (loss tokens of all ranks): the result is the global token mean.
        """
        self.accumulate(batches, objective, own_version=own_version)
        return self.step(lr=lr)

    def accumulate(self, batches: Sequence[MicroBatch], objective: Objective, *, own_version: int = -1) -> None:
        """Add the gradients of all ranks' micro-batches to those that the next ``step`` uses.

        DeepSpeed averages gradients over ranks; this multiplies them up again, so that they are the gradients of the
        sum over ranks, however many there are.

        Args:
            batches: this rank's, equally many on each rank.
            own_version: version of the policy's weights, to find the tokens it sampled itself.
        """
        assert batches, "a rank without work passes an empty micro-batch"
        for batch in batches:
            logprobs, entropy = self._policy(*self._inputs(batch))
            loss, parts = objective(logprobs, self._loss_tokens(batch, own_version))
            # A loss that is not finite must not have a finite gradient: DeepSpeed sees only that, after the reduction.
            factor = torch.where(loss.detach().isfinite(), float(dist.get_world_size()), math.nan)
            self._policy.backward(loss * factor)
            self._sums.append(parts | {"policy/entropy": (entropy.sum(), entropy.new_tensor(len(entropy)))})

    def step(self, *, lr: float, divisor: float = 1.0) -> dict[str, float]:
        """The optimizer's step with the accumulated gradients.

        Args:
            divisor: of the gradients, before their norm is taken and clipped.

        Returns:
            The objective's metrics (nan where no token counts), ``policy/entropy``, ``policy/lr``,
            ``policy/grad_norm``, ``policy/loss_tokens`` and ``policy/skipped``, the same on all ranks. An update whose
            loss or gradient is not finite is skipped: weights and optimizer stay as they were.

        Raises:
            FloatingPointError: it was the last of ``max_skips`` skipped updates in a row.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        # DeepSpeed divides by its loss scale when all gradients are there; no backward pass has multiplied by it.
        self._optimizer.loss_scale = divisor
        self._policy.step()
        self._optimizer.loss_scale = 1.0
        sums, self._sums = self._sums, []
        grad_norm = float(self._policy.get_global_grad_norm())
        is_skipped = not math.isfinite(grad_norm)
        self._num_skips = self._num_skips + 1 if is_skipped else 0
        if self._num_skips == self._max_skips:
            raise FloatingPointError(
                f"loss or gradient was not finite in {self._num_skips} updates in a row (learner.max_skips), none of "
                "which was made; start again with a lower learner.lr"
            )
        means, counts = _combine(sums)
        return means | {
            "policy/lr": lr,
            "policy/grad_norm": grad_norm,
            "policy/loss_tokens": counts["policy/entropy"],
            "policy/skipped": float(is_skipped),
        }

    def shards(self) -> Iterator[Piece]:
        """This rank's piece of every parameter, in the forward pass's dtype, straight from ZeRO-3's partition; rank 0's
        with the buffers that a model's files hold.

        No communication, and on CPU no copy: the pieces are views that the next update changes. All ranks' pieces of a
        parameter, by ``start``, are the whole parameter. Tied parameters appear once, under the first name.
        """
        for name, param, start, size in self._partitions():
            yield _piece(name, param.ds_tensor.detach()[:size], tuple(param.ds_shape), start)
        if dist.get_rank() == 0:
            for name, buffer in state.persistent_buffers(self._policy.module.model).items():
                yield _piece(name, buffer.detach().flatten(), tuple(buffer.shape), 0)

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """This rank's share of the training state, copied to the host: tensors and metadata of its file, see ``state``.

        No communication; the next update may begin when this returns.
        """
        tensors: dict[str, Tensor] = {}
        pieces: dict[str, state.Place] = {}
        for name, param, start, size in self._partitions():
            pieces[name] = {"start": start, "shape": list(param.ds_shape)}
            for kind in state.KINDS:
                is_master = kind == state.MASTER
                share = safe_get_local_fp32_param(param) if is_master else safe_get_local_optimizer_state(param, kind)
                tensors[f"{kind}/{name}"] = share.detach()[:size].to("cpu", copy=True)
        tensors |= {f"rng/{device}": rng.get_rng_state() for device, rng in self._generators().items()}
        return tensors, state.metadata(dist.get_rank(), self._step(), pieces)

    @torch.no_grad()
    def restore(self, paths: Sequence[Path]) -> None:
        """Take weights, optimizer and random numbers from a checkpoint, of however many ranks.

        With equally many ranks the next update is, on CPU bit for bit, the one that would have followed.

        Args:
            paths: files of all its ranks, or, of equally many, of this one.

        Raises:
            ValueError: it is of another model, or incomplete.
        """
        files = state.StateFiles(paths)
        model = self._policy.module.model
        partitions = list(self._partitions())
        files.check({n: tuple(p.ds_shape) for n, p in model.named_parameters()}, [n for n, *_ in partitions])
        for name, param, start, size in partitions:
            for kind in state.KINDS:
                share = torch.zeros(param.ds_tensor.numel())
                share[:size] = torch.from_numpy(files.read(kind, name, start, size))
                if kind == state.MASTER:
                    safe_set_local_fp32_param(param, share)
                    param.ds_tensor.copy_(share)
                else:
                    safe_set_local_optimizer_state(param, share, kind)
        for adam in self._optimizer.optimizer.state.values():
            adam["step"].fill_(files.step)
        generators = self._generators()
        for device, rng_state in files.rng(dist.get_rank()).items():
            if device in generators:
                generators[device].set_rng_state(torch.from_numpy(rng_state))
        self._num_skips = 0
        self._policy.empty_partition_cache()  # parameters that stay gathered are gathered anew

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the policy as a plain Hugging Face directory, tokenizer included; it appears whole or not at all.

        Parameters are gathered one module at a time and collected in rank 0's host memory.
        """
        is_writer = dist.get_rank() == 0
        model = self._policy.module.model
        own_names = {name for name, _ in model.named_parameters()}  # a tied parameter's first one only
        weights: dict[str, Tensor] = {}
        for prefix, module in model.named_modules():
            params = {n: p for n, p in module.named_parameters(prefix, recurse=False) if n in own_names}
            with deepspeed.zero.GatheredParameters(list(params.values())):
                if is_writer:
                    weights |= {name: p.detach().to("cpu", copy=True) for name, p in params.items()}
        if not is_writer:
            return
        weights |= state.persistent_buffers(model)
        target = Path(directory).absolute()
        partial, previous = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "previous"))
        if previous.exists() and not target.exists():  # a save was cut off between its two renames
            previous.rename(target)
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial, state_dict=weights)
        copy_tokenizer(self._model_path, partial)
        shutil.rmtree(previous, ignore_errors=True)
        if target.exists():
            target.rename(previous)
        partial.rename(target)
        shutil.rmtree(previous, ignore_errors=True)

    def sleep(self) -> None:
        """Move weights, gradients and optimizer to the host."""
        if self._sleeps:
            return
        self._policy.offload_states(include=self._movable)
        self._move("cpu")
        torch.cuda.empty_cache()
        self._sleeps = True

    def wake(self) -> None:
        """Take them back; one that is awake stays so."""
        if self._sleeps:
            self._policy.reload_states()
            self._move(self._device)
            self._sleeps = False

    def _move(self, device: str | torch.device) -> None:
        """What DeepSpeed does not move: states of another optimizer than its own, and engines without one."""
        tensors = [param.ds_tensor for param in self._reference.parameters()] if self._reference else []
        if not self._offloads:
            for flat in self._optimizer.fp32_partitioned_groups_flat:
                adam = self._optimizer.optimizer.state[flat]
                tensors += [flat, adam["exp_avg"], adam["exp_avg_sq"]]
        for tensor in tensors:
            tensor.data = tensor.data.to(device)

    def close(self) -> None:
        """Release the engines; the process group stays, for it belongs to the process."""
        for engine in (self._policy, self._reference):
            if engine is not None:
                engine.destroy()

    def _partitions(self) -> Iterator[tuple[str, Any, int, int]]:
        """(name, parameter, start, size) of this rank's piece of each flattened parameter, where it has any."""
        for name, param in self._policy.module.model.named_parameters():
            start = dist.get_rank() * param.ds_tensor.numel()
            size = min(param.ds_tensor.numel(), param.ds_numel - start)  # the last ranks' are padded
            if size > 0:
                yield name, param, start, size

    def _step(self) -> int:
        """Updates made, by AdamW's count."""
        return int(next(iter(self._optimizer.optimizer.state.values()))["step"])

    def _generators(self) -> dict[str, Any]:
        """Device -> what has ``get_rng_state`` and ``set_rng_state``."""
        return {"cpu": torch} | ({"cuda": torch.cuda} if self._device.type == "cuda" else {})

    def _inputs(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        return (
            self._tensor(batch.input_ids),
            self._tensor(batch.position_ids),
            self._tensor(batch.index),
            self._tensor(batch.targets),
            self._layout(batch.position_ids, self._device),
        )

    def _loss_tokens(self, batch: MicroBatch, own_version: int) -> LossTokens:
        return LossTokens(
            advantage=self._tensor(batch.advantage),
            behaviour=self._tensor(batch.behaviour),
            forced=self._tensor(batch.forced),
            own=self._tensor(batch.versions == own_version),
            old=None if batch.old is None else self._tensor(batch.old),
            reference=None if batch.reference is None else self._tensor(batch.reference),
        )

    def _tensor(self, array: NDArray) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    @torch.no_grad()
    def _score(self, engine: DeepSpeedEngine, batch: MicroBatch) -> tuple[FloatArray, FloatArray]:
        logprobs, entropy = engine(*self._inputs(batch))
        return logprobs.cpu().numpy(), entropy.cpu().numpy()


def _combine(sums: Sequence[Sums]) -> tuple[dict[str, float], dict[str, float]]:
    """Means (nan over no token) or maxima, and counts, over all micro-batches and ranks: one collective."""
    names = list(sums[0])
    is_max = torch.tensor([name.endswith("/max") for name in names])

    def merge(parts: Tensor) -> Tensor:
        """[P, K, 2] -> [K, 2]"""
        total = parts.sum(0)
        total[is_max, 0] = parts[:, is_max, 0].amax(0)
        return total

    local = merge(torch.stack([torch.stack([torch.stack(s[name]).double() for name in names]) for s in sums]))
    ranks = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, local)
    value, count = merge(torch.stack(ranks)).cpu().unbind(-1)
    mean = torch.where(count > 0, value / torch.where(is_max, 1.0, count), math.nan)
    return dict(zip(names, mean.tolist(), strict=True)), dict(zip(names, count.tolist(), strict=True))


def _pad_id(config: transformers.PreTrainedConfig) -> int:
    """Any token does: what stands in the padding is never seen by a real token."""
    return config.pad_token_id if config.pad_token_id is not None else 0

"""What a config would do, without starting anything: placement, memory by part, batch arithmetic.

Everything follows from the config and the model's shape, by formulas; no weights are read and no library that could is
imported. Memory is an estimate with the large parts named, meant to tell a plan that fits from one that does not.
Bytes are decimal: 1 GB is 1e9 bytes, so an "80 GB" card has a few GB more than is counted here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stepgrpo.config import Config, ConfigError
from stepgrpo.hub import checkpoint_files
from stepgrpo.placement import all_bundles, half, learner_bundles, plan, rollout_bundles, shown

GB = 1e9

CUDA_CONTEXT = 1.5 * GB
"""CUDA context, kernels and NCCL buffers of one process."""
ENGINE_WORKSPACE = 3.0 * GB
"""vLLM's activations and CUDA graphs."""
RANK_LIBRARIES, WORKER_LIBRARIES = 0.6 * GB, 1.4 * GB
"""Python, torch and the rest, in one process of a learner rank and two of a rollout worker; counted on CPU."""
LIVE_PARAMS = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`: parameters gathered at the same time."""
REDUCE_BUCKET = 500_000_000
"""DeepSpeed's `reduce_bucket_size`: gradients on their way to their ranks."""
SUB_GROUP = 1_000_000_000
"""DeepSpeed's `sub_group_size`: parameters the optimizer works on at the same time."""
TRAJECTORY_BYTES = 13
"""Of one token in a stored trajectory: id 4, log-probability 4, mark 1, text about 4."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a dense decoder that memory depends on."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    max_positions: int
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    source: str = ""
    """Where the numbers come from."""

    @property
    def q(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def num_params(self) -> int:
        h = self.hidden
        attention = 2 * h * self.q + 2 * h * self.kv + 2 * self.head_dim * self.qk_norm
        bias = (self.q + 2 * self.kv) * self.qkv_bias + h * self.out_bias
        layer = attention + bias + 3 * h * self.intermediate + 2 * h
        return self.num_layers * layer + h + self.vocab * h * (1 if self.tied else 2)

    def kv_bytes(self, width: int) -> int:
        """KV cache of one token; ``width`` bytes per number."""
        return 2 * self.num_layers * self.kv * width

    def activation_bytes(self, tokens: int, width: int, *, checkpointing: bool) -> int:
        """What the backward pass needs of one forward pass over ``tokens``; ``width`` bytes per number.

        Counted from the tensors transformers' Qwen3 saves with sdpa attention: norms keep a float32 copy (4) beside
        their result, projections keep their input, the gated MLP keeps four vectors of its width. Checkpointing keeps
        the input of every layer and recomputes one layer at a time.
        """
        attention = 4 + 3 * width if self.qk_norm else 2 * width
        layer = (8 + 4 * width) * self.hidden + attention * (self.q + self.kv) + 4 * width * self.intermediate
        if checkpointing:
            return tokens * (self.num_layers * width * self.hidden + layer)
        return tokens * self.num_layers * layer


def _qwen3(num_layers: int, hidden: int, intermediate: int, num_heads: int, *, tied: bool) -> ModelShape:
    return ModelShape(
        num_layers, hidden, intermediate, num_heads, 8, 128, 151936, tied, 40960,
        qk_norm=True, source="the built-in table of Qwen3 models; the checkpoint itself was not looked at",
    )  # fmt: skip


KNOWN_SHAPES = {
    "Qwen/Qwen3-0.6B": _qwen3(28, 1024, 3072, 16, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(28, 2048, 6144, 16, tied=True),
    "Qwen/Qwen3-4B": _qwen3(36, 2560, 9728, 32, tied=True),
    "Qwen/Qwen3-8B": _qwen3(36, 4096, 12288, 32, tied=False),
    "Qwen/Qwen3-14B": _qwen3(40, 5120, 17408, 40, tied=False),
    "Qwen/Qwen3-32B": _qwen3(64, 5120, 25600, 64, tied=False),
}


def model_shape(path: str) -> ModelShape:
    """The shape of a known Qwen3 model, or of any other checkpoint from its ``config.json``.

    Raises:
        ConfigError: no such checkpoint, or an architecture whose parameters are not counted here.
    """
    if path in KNOWN_SHAPES and not Path(path).is_dir():
        return KNOWN_SHAPES[path]
    file = checkpoint_files(path) / "config.json"
    try:
        tree = json.loads(file.read_text())
    except json.JSONDecodeError as e:
        raise ConfigError(f"model.path: {file} is not JSON ({e.msg}, line {e.lineno})") from None
    return _shape_of(tree, file)


def _shape_of(tree: dict[str, Any], file: Path) -> ModelShape:
    kind = tree.get("model_type")
    known = ("qwen3", "qwen2", "llama", "mistral")
    if kind not in known:
        raise ConfigError(f"model.path: {file} is of type {kind!r}; --dry-run counts {', '.join(known)}")
    try:
        heads = tree["num_attention_heads"]
        bias = tree.get("attention_bias", False)
        return ModelShape(
            num_layers=tree["num_hidden_layers"],
            hidden=tree["hidden_size"],
            intermediate=tree["intermediate_size"],
            num_heads=heads,
            num_kv_heads=tree.get("num_key_value_heads") or heads,
            head_dim=tree.get("head_dim") or tree["hidden_size"] // heads,
            vocab=tree["vocab_size"],
            tied=tree.get("tie_word_embeddings", False),
            max_positions=tree["max_position_embeddings"],
            qk_norm=kind == "qwen3",
            qkv_bias=bias or kind == "qwen2",
            out_bias=bias and kind != "qwen2",
            source=str(file),
        )
    except KeyError as e:
        raise ConfigError(f"model.path: {file} has no {e}; takes a complete config.json") from None


@dataclass(frozen=True, slots=True)
class Part:
    """One consumer of memory."""

    name: str
    bytes: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Memory:
    """What one process holds, by part."""

    always: tuple[Part, ...]
    """Held all the time."""
    peaks: tuple[tuple[Part, ...], ...] = ()
    """Alternatives that never coincide; the largest counts."""

    @property
    def total(self) -> float:
        return _sum(self.always) + max((_sum(p) for p in self.peaks), default=0.0)


def _sum(parts: tuple[Part, ...]) -> float:
    return sum(p.bytes for p in parts)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything ``render`` shows."""

    config: Config
    shape: ModelShape
    gpu_memory: float | None
    """Bytes of one GPU; None on CPU."""
    gpus: int
    """What the cluster must have; 0 on CPU."""
    cpus: float
    gpus_per_node: int
    nodes: tuple[str, ...]
    """On GPUs, what lies on each node; empty where an actor needs more GPUs than a node has."""
    learner: Memory
    """One learner rank."""
    rollout: Memory
    """One GPU of a rollout worker (on CPU: one worker)."""
    kv_tokens: int
    """Tokens the KV cache of one rollout worker holds."""
    full_sequences: int
    """Sequences of full length it holds."""
    object_store: float
    """Bytes of published weights and waiting groups, over all nodes."""
    rollout_host: float
    """Bytes of host memory on each node with rollout workers, for weights."""
    learner_host: float
    """Bytes of host memory of one learner rank: its offloaded optimizer, what it leaves the GPU to sleep, and the last
    version it published."""
    trajectories: int
    """Of a rollout batch."""
    response_tokens: int
    """Of a rollout batch, at most."""
    num_updates: int
    """Of the run."""
    micro_batches: int
    """Of one rank in one update, at most."""
    num_problems: int | None
    """Training problems, where the data is a file on this machine."""
    faults: tuple[str, ...]
    """What does not fit, and what to change; empty where all fits."""

    @property
    def memory_limit(self) -> float | None:
        """Bytes of a GPU that one process may fill; None on CPU."""
        if self.gpu_memory is None:
            return None
        return self.gpu_memory - CUDA_CONTEXT * self.config.cluster.colocate  # what the one that sleeps keeps


def explain(config: Config, gpu_memory: float = 80.0, gpus_per_node: int = 8) -> Plan:
    """Work out a config for GPUs of ``gpu_memory`` GB, so many to a node (neither is read where it runs on CPU).

    Raises:
        ConfigError: the model's shape cannot be found.
    """
    shape = model_shape(config.model.path)
    ro, lrn, tr, cl = config.rollout, config.learner, config.train, config.cluster
    on_gpu = cl.device == "cuda"
    width = 2 if config.model.dtype == "bfloat16" else 4
    weights = shape.num_params * width
    longest = config.data.max_prompt_tokens + ro.max_response_tokens

    learner, learner_host = _learner_memory(config, shape, width)
    rollout, kv_bytes = _rollout_memory(config, shape, width, gpu_memory * GB)
    # With more GPUs than key-value heads, several hold the same head.
    copies = max(1, config.engine.tensor_parallel // shape.num_kv_heads)
    kv_tokens = int(kv_bytes // (copies * shape.kv_bytes(width)))
    trajectories = tr.prompts_per_batch * ro.group_size
    # Two versions may lie in the store: the newest, and the one before it until the last worker has loaded it; that
    # one perhaps with its differences, which together are smaller than it. A worker that waits for its trajectories
    # to end keeps the one that it waits with.
    versions = (2 if lrn.full_every == 1 else 3) + (not ro.in_flight_updates and tr.max_staleness > 1)
    waiting = (1 + tr.max_staleness) * trajectories * longest * TRAJECTORY_BYTES
    bundles = all_bundles(config)
    draft = Plan(
        config=config,
        shape=shape,
        gpu_memory=gpu_memory * GB if on_gpu else None,
        gpus=int(sum(b.gpus for b in bundles)),
        cpus=sum(b.cpus for b in bundles),
        gpus_per_node=gpus_per_node,
        nodes=_nodes(config, gpus_per_node) if on_gpu else (),
        learner=learner,
        rollout=rollout,
        kv_tokens=kv_tokens,
        full_sequences=kv_tokens // config.max_model_len,
        object_store=versions * weights + waiting,
        rollout_host=(4 if cl.colocate else 3) * weights,
        learner_host=learner_host,
        trajectories=trajectories,
        response_tokens=trajectories * ro.max_response_tokens,
        num_updates=tr.num_batches * config.updates_per_batch,
        micro_batches=_ceil(
            _ceil(tr.prompts_per_update * ro.group_size, lrn.num_ranks), lrn.micro_batch_tokens // longest
        ),
        num_problems=_count_problems(config.data.train),
        faults=(),
    )
    return replace(draft, faults=tuple(_faults(draft)))


def _nodes(config: Config, gpus: int) -> tuple[str, ...]:
    """What lies on each of the fewest nodes that hold all, CPUs being no obstacle."""
    bundles = all_bundles(config)
    node = {"GPU": float(gpus), "CPU": sum(b.cpus for b in bundles)}
    for num in range(math.ceil(sum(b.gpus for b in bundles) / gpus), len(bundles) + 1):
        if (lies := plan(config, [node] * num)) is not None:
            return tuple(shown(names) for names in lies)
    return ()


def _learner_memory(config: Config, shape: ModelShape, width: int) -> tuple[Memory, float]:
    """(one rank, its host memory)"""
    lrn, n = config.learner, shape.num_params
    own, offload = n / lrn.num_ranks, lrn.offload_optimizer and config.cluster.device == "cuda"
    always = [
        Part("weights", width * own, config.model.dtype),
        Part("gradients", 0 if offload else 4 * own, "float32"),
        Part("optimizer", 0 if offload else 12 * own, "float32 weights and Adam's two moments"),
        Part("reference", width * own if lrn.kl_coef else 0, "the KL term's frozen model"),
        Part("gradient bucket", min(n, REDUCE_BUCKET) * width, "on the way to their ranks"),
    ]
    on_gpu = config.cluster.device == "cuda"
    always.append(Part("CUDA context, NCCL", CUDA_CONTEXT) if on_gpu else Part("libraries", RANK_LIBRARIES))
    checkpointing = lrn.gradient_checkpointing
    forward_backward = (
        Part("gathered weights", min(n, LIVE_PARAMS) * width, "layers put together for the pass"),
        Part(
            "activations",
            shape.activation_bytes(lrn.micro_batch_tokens, width, checkpointing=checkpointing),
            f"{lrn.micro_batch_tokens:,} tokens, {'' if checkpointing else 'no '}gradient checkpointing",
        ),
        Part(
            "logits",
            (8 + width) * shape.vocab * min(lrn.logprob_chunk_tokens, lrn.micro_batch_tokens),
            f"of {lrn.logprob_chunk_tokens:,} tokens, with their gradient",
        ),
        Part("head's gradient", (4 + width) * shape.vocab * shape.hidden, "whole, summed in float32"),
    )
    update = (Part("update", 0 if offload else 4 * min(own, SUB_GROUP), "float32 gradients of one sub-group"),)
    host = 20 * own if offload else 0.0  # with the gradients, and once more those of a sub-group
    if on_gpu and config.cluster.colocate:
        host = sum(part.bytes for part in always[:4]) + 20 * own * offload
    if lrn.full_every > 1:
        host += width * own
    return Memory(tuple(always), (forward_backward, update)), host


def _rollout_memory(config: Config, shape: ModelShape, width: int, gpu: float) -> tuple[Memory, float]:
    """(one GPU, KV cache of the whole worker)"""
    eng = config.engine
    weights = shape.num_params * width / eng.tensor_parallel
    on_gpu = config.cluster.device == "cuda"
    workspace = ENGINE_WORKSPACE if on_gpu else 0.0
    left = eng.gpu_memory_utilization * gpu - weights - workspace
    kv = eng.kv_cache_mb * 2**20 if eng.kv_cache_mb is not None else max(left, 0.0)
    rest = Part("activations, CUDA graphs", workspace) if on_gpu else Part("libraries", WORKER_LIBRARIES)
    parts = (Part("weights", weights, config.model.dtype), Part("KV cache", kv), rest)
    return Memory(parts), kv * eng.tensor_parallel


def _count_problems(source: str) -> int | None:
    path = Path(source)
    if not path.is_file():
        return None
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return int(pyarrow.parquet.read_metadata(path).num_rows)
        except pyarrow.ArrowInvalid:  # the run will say so; this page is about memory
            return None
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _faults(p: Plan) -> Iterator[str]:
    config, shape, gpu = p.config, p.shape, p.memory_limit
    eng, lrn, store = config.engine, config.learner, config.cluster.object_store_mb
    if gpu is not None:
        if not p.nodes:
            yield (
                f"a rollout worker takes {eng.tensor_parallel} GPUs of one node, which has {p.gpus_per_node}: lower "
                "engine.tensor_parallel, or name larger nodes (--gpus-per-node)"
            )
        if p.learner.total > gpu:
            ways = ["raise learner.num_ranks"]
            ways += [] if lrn.gradient_checkpointing else ["set learner.gradient_checkpointing=true"]
            ways += [] if lrn.offload_optimizer else ["set learner.offload_optimizer=true"]
            yield f"a learner rank needs {size(p.learner.total)} of {size(gpu)}: {', or '.join(ways)}"
        if p.rollout.total > gpu:
            yield (
                f"a rollout GPU needs {size(p.rollout.total)} of {size(gpu)}: "
                f"raise engine.tensor_parallel{', or lower engine.kv_cache_mb' if eng.kv_cache_mb else ''}"
            )
    if p.full_sequences < 1:
        larger = "engine.kv_cache_mb" if eng.kv_cache_mb else "engine.tensor_parallel or engine.gpu_memory_utilization"
        yield (
            f"the KV cache holds {p.kv_tokens:,} tokens, less than one sequence of full length "
            f"({config.max_model_len:,}): raise {larger}, or lower the token budgets"
        )
    if config.max_model_len > shape.max_positions:
        yield (
            f"sequences of up to {config.max_model_len:,} tokens, but the model takes {shape.max_positions:,}: lower "
            "data.max_prompt_tokens, rollout.max_response_tokens or eval.max_response_tokens"
        )
    tp, kv_heads = eng.tensor_parallel, shape.num_kv_heads
    if shape.num_heads % tp or (kv_heads % tp and tp % kv_heads):
        yield (
            f"engine.tensor_parallel: got {tp}, takes a number that divides the model's "
            f"{shape.num_heads} heads and {kv_heads} key-value heads"
        )
    if store is not None and store * 2**20 < p.object_store:
        yield f"cluster.object_store_mb: got {store}, needs about {p.object_store / 2**20:,.0f} (Ray spills to disk)"


def size(num_bytes: float) -> str:
    """`16.4 GB` or `12.3 MB`."""
    return f"{num_bytes / GB:.1f} GB" if num_bytes >= 0.1 * GB else f"{num_bytes / 1e6:.1f} MB"


def render(p: Plan) -> RenderableType:
    """A plan for people: one table for each question, and the verdict."""
    config, place = p.config, "process" if p.gpu_memory is None else "GPU"
    head = Text.assemble(
        (config.name, "bold"),
        f": {config.model.path}, {p.shape.num_params:,} parameters, {config.model.dtype}\n",
        (f"shape from {p.shape.source}", "dim"),
    )
    verdict = [Text(f"✗ {x}", style="red") for x in p.faults] or [Text("✓ all parts fit", style="green")]
    return Group(
        head,
        _placement(p),
        _memory(f"one learner rank, per {place}", p.learner, p.memory_limit),
        _memory(f"one rollout worker, per {place}", p.rollout, p.memory_limit),
        _facts("host memory and object store", _host_facts(p)),
        _facts("batch arithmetic", _batch_facts(p)),
        Text(),
        *verdict,
    )


def _titled(title: str, table: Table) -> Group:
    return Group(Text(f"\n{title}", style="bold"), table)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE, show_header=bool(columns), show_edge=False, pad_edge=False)
    for i, name in enumerate(columns or ("", "")):
        table.add_column(name, justify="right" if columns and i else "left")
    return table


def _placement(p: Plan) -> Group:
    config = p.config
    table = _table("", "actors", "GPUs each", "CPUs each", "GPUs", "CPUs")
    for name, number, bundles in (
        ("rollout workers", config.rollout.workers, rollout_bundles(config)),
        ("learner ranks", config.learner.num_ranks, learner_bundles(config)),
    ):
        bundles = [half(b) for b in bundles] if config.cluster.colocate else bundles
        each, all_gpus, all_cpus = bundles[0], sum(b.gpus for b in bundles), sum(b.cpus for b in bundles)
        table.add_row(name, str(number), f"{each.gpus:g}", f"{each.cpus:g}", f"{all_gpus:g}", f"{all_cpus:g}")
    table.add_row("the cluster must have", "", "", "", str(p.gpus), f"{p.cpus:g}", style="bold")
    nodes = [(f"node {i}", names) for i, names in enumerate(p.nodes, 1)]
    by_node = [_facts(f"on nodes of {p.gpus_per_node} GPUs", nodes)] if nodes else []
    return Group(_titled("placement", table), *by_node)


def _memory(title: str, memory: Memory, limit: float | None) -> Group:
    table = _table("part", "memory")
    table.add_column("", style="dim")
    for part in memory.always:
        if part.bytes:
            table.add_row(part.name, size(part.bytes), part.note)
    largest = max(memory.peaks, key=_sum, default=())
    for part in largest:
        table.add_row(part.name, size(part.bytes), part.note)
    total = size(memory.total)
    verdict = "" if limit is None else f"of {size(limit)}: {'fits' if memory.total <= limit else 'DOES NOT FIT'}"
    table.add_row("at most", total, verdict, style="bold")
    return _titled(title, table)


def _facts(title: str, rows: list[tuple[str, str]]) -> Group:
    table = _table()
    for name, value in rows:
        table.add_row(name, value)
    return _titled(title, table)


def _host_facts(p: Plan) -> list[tuple[str, str]]:
    lrn = p.config.learner
    asleep = ", 1 of each engine that sleeps" if p.config.cluster.colocate else ""
    differences = " and as much of differences" if lrn.full_every > 1 else ""
    rows = [
        ("each rollout node", f"{size(p.rollout_host)} for weights: 1 copy in the store, 2 in /dev/shm{asleep}"),
        ("object store", f"{size(p.object_store)} in all: 2 versions of the weights{differences}, waiting groups"),
    ]
    if p.learner_host:
        of = {"while it sleeps": p.config.cluster.colocate, "for the offloaded optimizer": lrn.offload_optimizer}
        what = [w for w, so in of.items() if so][:1] + ["for the last published version"] * (lrn.full_every > 1)
        rows.append(("each learner rank", f"{size(p.learner_host)} {' and '.join(what)}"))
    return rows


def _batch_facts(p: Plan) -> list[tuple[str, str]]:
    t, group_size, updates = p.config.train, p.config.rollout.group_size, p.config.updates_per_batch
    prompts, longest = t.num_batches * t.prompts_per_batch, p.config.max_model_len
    data = "size not known: no file that can be read here"
    if p.num_problems:
        data = f"{p.num_problems:,} problems: {p.num_problems / t.prompts_per_batch:.1f} batches an epoch, "
        data += f"{prompts / p.num_problems:.1f} epochs in all"
    return [
        ("rollout batch", f"{t.prompts_per_batch:,} prompts x {group_size} = {p.trajectories:,} trajectories"),
        ("", f"at most {p.response_tokens:,} response tokens"),
        ("a worker's KV cache", f"{p.kv_tokens:,} tokens: {p.full_sequences:,} sequences of {longest:,}"),
        ("updates", f"{updates} a batch, {t.prompts_per_update:,} prompts each"),
        ("micro-batches", f"at most {p.micro_batches:,} of a rank in an update"),
        ("run", f"{t.num_batches:,} batches (= versions), {p.num_updates:,} updates, {prompts:,} prompts"),
        ("staleness", f"{t.max_staleness} version{'s' * (t.max_staleness != 1)} at most"),
        ("data", data),
    ]

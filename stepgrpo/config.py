"""One strict tree of settings: YAML, then ``key=value`` overrides, then cross-field checks.

An unknown or misspelt key is an error that suggests the nearest one. Values that follow from others are properties.
Everything here is what a person may want to set; what a machine can find out is found out elsewhere.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_origin
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

PositiveInt = Annotated[int, Field(gt=0, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Word = Annotated[str, Field(min_length=1)]


class ConfigError(ValueError):
    """A setting the user must change. The message names the field, what it got and what it takes."""


def brief(error: BaseException, limit: int = 160) -> str:
    """A library's message as the part of a line."""
    return masked(" ".join(str(error).split()))[:limit]


def masked(text: str) -> str:
    """An address, or a text with some in it, without user names and passwords."""
    return re.sub(r"(//|^(?=[^/\s@]*:))[^/\s]*@", r"\1***@", text)


def is_own(name: str) -> bool:
    """Whether a setting names a function of the user's, and not one of ours."""
    return ":" in name


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


FLASH = ("varlen", "flash_attention_2")
"""Attention for a GPU, in half precision."""


class ModelConfig(Section):
    """The policy that is trained."""

    path: str
    """Checkpoint directory, or a name on the Hugging Face hub."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of rollouts and of the learner's forward pass; optimizer and master weights are always float32."""
    attention: Literal["auto", "varlen", "flash_attention_2", "packed_sdpa", "sdpa"] = "auto"
    """Attention of the learner. `varlen`: torch's own flash attention, on packed rows, on a GPU in bfloat16.
    `flash_attention_2`: the same by the `flash-attn` extra. `packed_sdpa`: packed rows anywhere, padded for attention
    alone. `sdpa`: padded rows. `auto`: varlen on a GPU in bfloat16, else packed_sdpa; models that cannot be packed,
    such as those whose layers have a state, then ask for sdpa."""
    liger: bool = False
    """Liger's fused kernels for norms, gates and rotations in the learner; on a GPU, with the `liger` extra."""
    think_close: Word = "</think>"
    """The marker that ends thinking; one token or several."""

    @model_validator(mode="after")
    def _check_attention(self) -> Self:
        if self.dtype == "float32" and self.attention in FLASH:
            raise ValueError(
                f"model.attention: got {self.attention}, takes auto, packed_sdpa or sdpa where model.dtype is float32"
            )
        return self

    def attention_on(self, device: str) -> str:
        """The learner's attention there, `auto` resolved."""
        if self.attention != "auto":
            return self.attention
        return "varlen" if device == "cuda" and self.dtype == "bfloat16" else "packed_sdpa"

    def packed_on(self, device: str) -> bool:
        """Whether the learner lays sequences end to end."""
        return self.attention_on(device) != "sdpa"


class DataConfig(Section):
    """Where problems come from. Files are JSON lines or Parquet; anything else is a data set name on the hub."""

    train: str
    """Training problems."""
    eval: str | None = None
    """Held-out problems for evaluation: a benchmark such as `math500`, a local copy of one such as `math500=FILE`, or a
    file or hub data set with the columns below; none skips evaluation."""
    subset: str | None = None
    """Subset of a hub data set; null: its default."""
    split: str = "train"
    """Split of a hub data set."""
    question_field: str = "problem"
    """Column of the question. A dot descends: `reward_model.ground_truth`."""
    answer_field: str = "answer"
    """Column of the true answer."""
    suffix: str = ""
    """Appended to each question, after a blank."""
    chat_template: bool = True
    """Wrap the question with the tokenizer's own chat template; off: the question is the prompt."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, such as `{enable_thinking: true}` for Qwen3."""
    max_prompt_tokens: PositiveInt = 2048
    """A longer prompt is a bad line."""
    on_bad_line: Literal["fail", "skip"] = "fail"
    """What to do with a line that does not parse, lacks a field, or is too long: stop, or leave it out and count it."""
    duplicates: Literal["drop", "keep"] = "drop"
    """What to do with repeated problems. `drop`: of equal questions with one answer the first is used, of equal
    questions with several answers none, since it cannot be known which is right; `keep`: all are used."""
    overlap: Literal["drop", "warn", "fail"] = "drop"
    """What to do with training problems that are also held out, equal or nearly so: leave out, only say so, or stop."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.chat_template_kwargs and not self.chat_template:
            raise ValueError(
                "data.chat_template_kwargs: got some, takes none where data.chat_template is false: nothing reads them"
            )
        ours = {"conversation", "add_generation_prompt", "tokenize", "return_dict"} & self.chat_template_kwargs.keys()
        if ours:
            raise ValueError(f"data.chat_template_kwargs: got {min(ours)}, takes variables of the template only")
        return self


class ProbeConfig(Section):
    """When and how thinking is probed for a tentative answer. Unset fields come from the preset."""

    policy: Word = "confidence"
    """When thinking ends. `confidence`: at the first answer above `delta`; `package.module:name`: your own policy."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of your own policy, which is given this section."""
    preset: Literal["deer", "paper"] = "deer"
    """`deer`: the tentative answer is thrown away and the answer is sampled. `paper`: the tentative answer is kept."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Confidence above which thinking ends."""
    max_tokens: PositiveInt = 20
    """Most tokens of a tentative answer."""
    max_probes: PositiveInt = 10
    """Most probes of one trajectory."""
    probability: Fraction = 1.0
    """How often a trigger is probed. Below 1 keeps variance in groups that a sure gate cuts all at one place."""
    inducer: str | None = None
    """Text that asks for the answer."""
    closing: str | None = None
    """Text that closes thinking at an exit."""
    stop: list[Word] | None = None
    """Texts that end a tentative answer."""
    skip_first: NonNegativeInt | None = None
    """First tokens of the tentative answer that do not count for confidence."""
    require_close: bool | None = None
    """Whether only a tentative answer that ended in one of `stop` may pass."""


class WorkersConfig(Section):
    """How many rollout workers there are; a number alone means exactly so many."""

    min: PositiveInt = 1
    """Fewest: the run starts when they are up, and waits for replacements where one of them is lost."""
    max: PositiveInt = 1
    """Most: as many as the cluster has room for, also on nodes that come later."""

    @model_validator(mode="before")
    @classmethod
    def _exactly(cls, value: Any) -> Any:
        return {"min": value, "max": value} if isinstance(value, int | str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"rollout.workers.max: got {self.max}, takes rollout.workers.min ({self.min}) or more")
        return self

    def __str__(self) -> str:
        return str(self.min) if self.min == self.max else f"{self.min} to {self.max}"


class RolloutConfig(Section):
    """How training trajectories are sampled."""

    workers: WorkersConfig = WorkersConfig()
    """vLLM engines."""
    health_seconds: PositiveFloat = 30.0
    """Seconds without an answer after which an engine counts as hung and is replaced; an engine that loads weights
    does not answer."""
    group_size: Annotated[int, Field(ge=2)] = 5
    """Trajectories per prompt (G)."""
    max_response_tokens: PositiveInt = 16384
    """Token budget of a response, thinking and answer."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling."""
    step_rule: Word = "triggers"
    """Where a new reasoning step opens, both to probe and to count. `triggers`: at those words; `structure`: at
    paragraphs and at sentences that begin with a connective; `package.module:name`: your own rule."""
    triggers: Annotated[list[Word], Field(min_length=1)] = ["Wait"]
    """Words that open a new reasoning step: standalone, case-sensitive. `stepgrpo triggers` proposes them."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of your own step rule, which is given this section."""
    probe: ProbeConfig | None = ProbeConfig()
    """Truncated rollout; null samples plainly."""
    control_fraction: Fraction = 0.0
    """Share of trajectories left untruncated, to measure what an exit costs."""
    think_ratio: Annotated[float, Field(gt=0, le=1)] | None = 0.9
    """Share of the budget after which thinking is closed by force; null never does. Independent of probing."""
    repetition_limit: Annotated[int, Field(ge=2)] | None = None
    """Close thinking after that many equal consecutive steps; null never does."""
    in_flight_updates: bool = True
    """Change weights while trajectories are decoded, which go on under the new ones. `false`: once those that are being
    decoded have ended, while no others begin, so that each is of one version; engines are partly idle meanwhile, and
    the learner where it waits for an evaluation to begin."""


class EngineConfig(Section):
    """vLLM."""

    tensor_parallel: PositiveInt = 1
    """GPUs of one engine."""
    max_num_seqs: PositiveInt = 256
    """Trajectories decoded at the same time. Up to three times as many groups as fit wait for places."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Share of a GPU's memory for weights and KV cache."""
    kv_cache_mb: PositiveInt | None = None
    """KV cache size; null: what `gpu_memory_utilization` leaves. On CPU it must be given."""
    block_size: PositiveInt | None = None
    """Tokens of a KV block; null: vLLM's default. On CPU a multiple of 32."""
    stream_interval: PositiveInt = 8
    """Tokens between two looks at a trajectory: lower cuts sooner, higher wakes Python less often."""
    enforce_eager: bool = False
    """No CUDA graphs."""


SCHEMES = ("step_aware", "outcome", "length_penalty", "overlong", "easy_length_penalty")
"""Reward schemes that come with stepgrpo."""


class RewardConfig(Section):
    """How a response is judged."""

    scheme: Word = "step_aware"
    """`step_aware`: Step-GRPO's relative reward over reasoning steps. `outcome`: plain GRPO, accuracy and format.
    `length_penalty`: a correct response earns less the longer it is among its group's correct ones. `overlong`:
    accuracy, less a ramp towards the token limit. `easy_length_penalty`: the length penalty in the batch's most
    accurate groups, accuracy in the others. `package.module:name`: your own."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of your own scheme, which is given this section."""
    alpha: Fraction = 0.9
    """Weight of accuracy; 1 - alpha is the weight of the format."""
    beta: NonNegativeFloat = 0.5
    """Strength of the step term."""
    baseline: Literal["correct", "all"] = "correct"
    """Whose mean number of steps is the yardstick: that of the group's correct responses, or of all."""
    length_alpha: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Strength of the length penalty."""
    easy_share: Fraction = 0.2
    """Share of the batch's groups, the most accurate, that `easy_length_penalty` penalises."""
    overlong_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Last share of `rollout.max_response_tokens` over which the penalty of `overlong` grows from 0 to 1."""
    normalization: Literal["std", "none", "batch"] = "std"
    """Advantages are divided by the group's standard deviation, by nothing, or by the batch's."""
    grader: Word = "math"
    """`math`: math-verify in separate processes; `exact`: equal words in the last box; `package.module:name`: your own,
    in separate processes too."""
    grade_timeout: PositiveFloat = 10.0
    """Seconds after which grading one response is given up and counted as a grader failure."""
    grade_memory_mb: Annotated[int, Field(ge=512)] = 2048
    """Memory limit of a grading process."""
    grade_processes: PositiveInt = 2
    """Grading processes per learner rank."""


class LearnerConfig(Section):
    """DeepSpeed ZeRO-3 and the loss."""

    num_ranks: PositiveInt = 1
    """Learner ranks, one GPU (or CPU) each."""
    lr: PositiveFloat = 1e-6
    """Peak learning rate of AdamW."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's betas."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's decoupled weight decay."""
    warmup_updates: NonNegativeInt = 0
    """Updates of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after warm-up; linear and cosine end at 0."""
    grad_clip: PositiveFloat = 1.0
    """Limit of the gradient norm."""
    max_skips: PositiveInt = 3
    """Consecutive updates skipped, for a loss or gradient that is not finite, at which the run stops."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The ratio current/old is clipped below at 1 - clip_low."""
    clip_high: PositiveFloat = 0.3
    """The ratio current/old is clipped above at 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """Bound of the loss of negative advantages; null: none."""
    kl_coef: NonNegativeFloat = 0.01
    """Weight of the KL term to the run's original model; 0 builds no reference."""
    importance_cap: PositiveFloat | None = 2.0
    """Cap of the importance weight old/behaviour that corrects staleness and engine numerics; null: no correction."""
    train_exit_tokens: bool = True
    """Train on the forced closing of a confident exit: it is what teaches the policy to stop."""
    micro_batch_tokens: PositiveInt = 18432
    """Most tokens (padding included) of one forward pass."""
    stream: bool = False
    """Back-propagate groups as they arrive, not when the batch is whole. The update is the same up to rounding, which
    depends on the order of arrival. Takes one update per batch, and rewards and advantages that need no other group."""
    logprob_chunk_tokens: PositiveInt = 1024
    """Tokens whose logits exist at the same time."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    offload_optimizer: bool = False
    """Keep optimizer state and master weights in host memory."""
    bucket_mb: PositiveInt = 256
    """Size of the flat buckets in which weights are published."""
    full_every: PositiveInt = 1
    """Weights are published whole at least every so many versions, and in between as what changed, bucket by bucket,
    where that is smaller: of bfloat16 at a small learning rate a few percent. Above 1 each rank keeps its part of the
    last version in host memory; in float32 nearly everything changes, and nothing is gained."""


class TrainConfig(Section):
    """The loop."""

    num_batches: PositiveInt = 100
    """Rollout batches; the weights' version grows by one with each."""
    prompts_per_batch: PositiveInt = 512
    """Groups of a rollout batch."""
    prompts_per_update: PositiveInt = 128
    """Groups of one optimizer update."""
    max_staleness: NonNegativeInt = 1
    """Most versions between a trajectory's oldest token and its update; 0 is strictly on-policy."""
    refill: bool = False
    """Replace groups without signal (all rewards equal) by further draws."""
    refill_limit: NonNegativeInt | None = None
    """Most replacements in a batch; null: one batch. Beyond it the batch trains smaller."""
    max_failures: PositiveInt = 3
    """Failures in a row, of rollouts and of rollout workers, after which the run stops. A finished group ends it."""
    max_restarts: NonNegativeInt = 3
    """Restarts from the last checkpoint without reaching a new one, after which the run gives up. 0: none at all."""
    wait_warning: PositiveFloat = 300.0
    """Seconds without progress after which the run says what it waits for, and again whenever they have doubled."""
    wait_limit: PositiveFloat = 3600.0
    """Seconds without progress after which it writes every process's stack and is restarted."""
    sample_every: NonNegativeInt = 5
    """Batches between two groups that are kept with their texts (`samples.jsonl`, for `stepgrpo report`); 0: none."""
    wandb: Annotated[Literal["off", "offline", "online"], BeforeValidator(lambda v: "off" if v is False else v)] = "off"
    """Weights & Biases."""
    wandb_project: str = "stepgrpo"
    """Its project."""
    wandb_group: str | None = None
    """What it shows together, such as the seeds of one setting; null: nothing."""


class CheckpointConfig(Section):
    """What a run that was cut off goes on from, with `--resume`."""

    every: NonNegativeInt = 10
    """Batches between two checkpoints; the last batch has one too. 0: none, and a crash costs the whole run."""
    place: str | None = None
    """Directory that all nodes see, or URL (`s3://…`, `gs://…`), under which a run's checkpoints lie by its name; null:
    `checkpoints` in the run directory."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept."""
    keep_best: NonNegativeInt = 1
    """Checkpoints kept besides, with the best held-out accuracy; needs evaluations at the same batches."""
    stop_seconds: NonNegativeFloat = 20.0
    """How long a run that is asked to end (Ctrl-C, SIGTERM) may take to finish its update and write a checkpoint; 0: it
    writes none. Whoever asks kills it after a while: Kubernetes after 30 s, a plain `ray job stop` after 3 s."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.place and urlsplit(self.place).password:
            raise ValueError(
                "checkpoint.place: got a URL with a password, takes one without: credentials come from the "
                "environment, and are never written down"
            )
        return self


class EvalConfig(Section):
    """Decoding of held-out problems."""

    every: NonNegativeInt = 0
    """Batches between two evaluations during the run; 0: only before and after."""
    num_prompts: PositiveInt | None = None
    """First held-out problems used before and after the run; null: all."""
    num_prompts_during: PositiveInt | None = None
    """The same for evaluations during the run."""
    samples: PositiveInt = 1
    """Responses per problem."""
    early_exit: bool = False
    """Probe while decoding, as `rollout.probe` says, and end thinking on confidence (DEER); off: plain decoding."""
    temperature: NonNegativeFloat = 0.6
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Nucleus sampling."""
    max_response_tokens: PositiveInt = 32768
    """Token budget of a response."""


class ClusterConfig(Section):
    """Where it runs."""

    device: Literal["cpu", "cuda"] = "cuda"
    """What engines and learner ranks compute on."""
    address: str | None = None
    """Ray cluster to join; null: $RAY_ADDRESS if set (as in `ray job submit`), otherwise a local Ray of its own."""
    temp_dir: str | None = None
    """Ray's directory of a local Ray; null: a private one. Short, because of unix sockets."""
    object_store_mb: PositiveInt | None = None
    """Object store of a local Ray; null: Ray's choice."""
    dashboard_port: Annotated[int, Field(gt=0, lt=65536)] | None = None
    """Port of a local Ray's dashboard; null: no dashboard."""
    colocate: bool = False
    """Engine and learner rank take turns on each GPU, for those who have one; one rank per rollout worker."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs of one rollout worker."""
    cpus_per_rank: PositiveFloat = 1.0
    """CPUs of one learner rank."""
    start_timeout: PositiveFloat = 600.0
    """Seconds after which a start that makes no progress is an error."""


class RunConfig(Section):
    """What every run that trains has."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The run lies under `<runs_dir>/<name>/`."""
    runs_dir: str = "runs"
    """Parent of the run directory; where the cluster has several nodes, on a file system they share."""
    seed: NonNegativeInt = 0
    """Seed of data order, sampling and evaluation."""
    model: ModelConfig
    data: DataConfig
    learner: LearnerConfig = LearnerConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check_device(self) -> Self:
        if self.cluster.device == "cpu":
            if self.model.attention in FLASH:
                raise ValueError(
                    f"model.attention: got {self.model.attention}, takes auto, packed_sdpa or sdpa where "
                    "cluster.device is cpu"
                )
            if self.model.liger:
                raise ValueError("model.liger: got true, takes false where cluster.device is cpu")
        return self

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def model_dir(self) -> Path:
        """The trained model, absolute: actors have another working directory."""
        return self.run_dir.absolute() / "model"


class Config(RunConfig):
    """A training run."""

    MAX_INDUCER_TOKENS: ClassVar[int] = 64
    """Room a probe's question gets in the engine's context, beyond prompt and response."""

    rollout: RolloutConfig = RolloutConfig()
    engine: EngineConfig = EngineConfig()
    reward: RewardConfig = RewardConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def checkpoint_place(self) -> str:
        """Absolute, because actors have another working directory."""
        if place := self.checkpoint.place:
            return f"{place if '://' in place else Path(place).absolute()}/{self.name}"
        return str(self.run_dir.absolute() / "checkpoints")

    @property
    def updates_per_batch(self) -> int:
        return self.train.prompts_per_batch // self.train.prompts_per_update

    @property
    def refill_limit(self) -> int:
        """Groups without signal a batch may replace."""
        t = self.train
        if not t.refill:
            return 0
        return t.prompts_per_batch if t.refill_limit is None else t.refill_limit

    @property
    def max_model_len(self) -> int:
        """Longest sequence an engine or the learner may meet: a prompt, a response and what a probe adds to it."""
        response = max(self.rollout.max_response_tokens, self.eval.max_response_tokens if self.data.eval else 0)
        probe = self.rollout.probe
        question = 0 if probe is None else self.MAX_INDUCER_TOKENS + probe.max_tokens
        return self.data.max_prompt_tokens + response + question

    @model_validator(mode="after")
    def _check(self) -> Self:
        t, lrn, eng, cl = self.train, self.learner, self.engine, self.cluster
        if t.prompts_per_batch % t.prompts_per_update:
            raise ValueError(
                f"train.prompts_per_update: got {t.prompts_per_update}, "
                f"takes a divisor of train.prompts_per_batch ({t.prompts_per_batch})"
            )
        if t.refill_limit is not None and not t.refill:
            raise ValueError(f"train.refill_limit: got {t.refill_limit}, takes null unless train.refill is true")
        if t.refill and self.reward.scheme == "easy_length_penalty":
            raise ValueError(
                "train.refill: got true, takes false where reward.scheme is easy_length_penalty: whether a group has "
                "signal depends on the batch it falls into"
            )
        if self.eval.every and self.data.eval is None:
            raise ValueError(
                f"eval.every: got {self.eval.every}, takes 0 where data.eval is null: nothing to evaluate on"
            )
        if t.prompts_per_update < lrn.num_ranks:
            raise ValueError(
                f"train.prompts_per_update: got {t.prompts_per_update}, "
                f"takes at least one group per rank (learner.num_ranks is {lrn.num_ranks})"
            )
        longest = self.data.max_prompt_tokens + self.rollout.max_response_tokens
        if lrn.micro_batch_tokens < longest:
            raise ValueError(
                f"learner.micro_batch_tokens: got {lrn.micro_batch_tokens}, takes at least one whole trajectory "
                f"(data.max_prompt_tokens + rollout.max_response_tokens = {longest})"
            )
        if eng.max_num_seqs < self.rollout.group_size:
            raise ValueError(
                f"engine.max_num_seqs: got {eng.max_num_seqs}, "
                f"takes at least one group (rollout.group_size is {self.rollout.group_size})"
            )
        if lrn.importance_cap is not None and self.rollout.top_p < 1:
            raise ValueError(
                f"rollout.top_p: got {self.rollout.top_p}, takes 1 unless learner.importance_cap is null: the engine's "
                "log-probabilities are of the tokens top_p keeps, the learner's of all"
            )
        names = [
            ("rollout.step_rule", self.rollout.step_rule, ("triggers", "structure")),
            ("reward.scheme", self.reward.scheme, SCHEMES),
            ("reward.grader", self.reward.grader, ("math", "exact")),
        ]
        if self.rollout.probe:
            names.append(("rollout.probe.policy", self.rollout.probe.policy, ("confidence",)))
        for field, name, known in names:
            if name not in known and not is_own(name):
                near = difflib.get_close_matches(name, known, 1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise ValueError(
                    f"{field}: got {name!r}{hint}, takes one of {', '.join(known)}, or your own as package.module:name"
                )
        if self.eval.early_exit and self.rollout.probe is None:
            raise ValueError("eval.early_exit: got true, takes false where rollout.probe is null: it says how to probe")
        if lrn.stream:
            own_scheme = is_own(self.reward.scheme) or self.reward.scheme == "easy_length_penalty"
            for reason, holds in (
                ("train.prompts_per_update is less than train.prompts_per_batch", self.updates_per_batch > 1),
                ("train.refill is true: which groups a batch has is known at its end", t.refill),
                (f"reward.scheme is {self.reward.scheme}: it sees the whole batch", own_scheme),
                ("reward.normalization is batch", self.reward.normalization == "batch"),
                ("cluster.colocate is true: while anything is sampled, the learner has no GPU", cl.colocate),
            ):
                if holds:
                    raise ValueError(f"learner.stream: got true, takes false where {reason}")
        if cl.colocate:
            w = self.rollout.workers
            if t.max_staleness:
                raise ValueError(
                    f"train.max_staleness: got {t.max_staleness}, takes 0 where cluster.colocate is true: while the "
                    "learner has the GPU, nothing is sampled"
                )
            if not w.min == w.max == lrn.num_ranks:
                raise ValueError(
                    f"rollout.workers: got {w}, takes learner.num_ranks ({lrn.num_ranks}) where cluster.colocate is "
                    "true: each shares its GPU with one rank"
                )
            if eng.tensor_parallel != 1:
                raise ValueError(
                    f"engine.tensor_parallel: got {eng.tensor_parallel}, takes 1 where cluster.colocate is true"
                )
        if cl.device == "cpu":
            if eng.kv_cache_mb is None:
                raise ValueError("engine.kv_cache_mb: got null, takes a number of MB where cluster.device is cpu")
            if eng.block_size is not None and eng.block_size % 32:
                raise ValueError(
                    f"engine.block_size: got {eng.block_size}, takes a multiple of 32 where cluster.device is cpu"
                )
            if eng.tensor_parallel != 1:
                raise ValueError(
                    f"engine.tensor_parallel: got {eng.tensor_parallel}, takes 1 where cluster.device is cpu"
                )
        return self


class SftConfig(RunConfig):
    """Supervised fine-tuning on (problem, response) pairs, through the learner of the RL loop."""

    response_field: str = "response"
    """Column of the response to learn."""
    epochs: PositiveInt = 1
    """Passes over the data."""
    batch_size: PositiveInt = 32
    """Pairs of one update."""
    max_tokens: PositiveInt = 4096
    """Longest pair, prompt and response; a longer one is a bad line."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.learner.micro_batch_tokens < self.max_tokens:
            raise ValueError(
                f"learner.micro_batch_tokens: got {self.learner.micro_batch_tokens}, "
                f"takes at least max_tokens ({self.max_tokens})"
            )
        return self


class MethodConfig(Section):
    """One line of a table of methods."""

    MAIN: ClassVar[str] = "Methods"

    kind: Literal["train", "eval", "distill"] = "train"
    """`train`: reinforcement learning; `eval`: the starting model as it is; `distill`: supervised learning on the
    starting model's own correct answers, decoded with early exit from as many responses as training would sample."""
    label: str | None = None
    """Its name in the table; null: its key."""
    group: str = MAIN
    """Heading it stands under."""
    overlay: str | None = None
    """YAML file laid over the run's."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings laid over both."""
    sft: dict[str, Any] = Field(default_factory=dict)
    """For `distill`: settings of the supervised training."""
    seeds: list[NonNegativeInt] | None = None
    """null: the table's."""
    published: dict[Literal["accuracy", "share"], float] = Field(default_factory=dict)
    """What the paper has, in %."""


class CompareConfig(Section):
    """A table of methods."""

    name: str
    """Its runs lie under `<runs_dir>/compare/<name>/`."""
    run: str
    """YAML file of the run that all methods share; paths are relative to the comparison's own file."""
    results: str
    """Directory of the rows and the table."""
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = [0, 1, 2]
    """Each is one training run per method."""
    reference: str = "vanilla"
    """Method whose tokens are 100 %."""
    methods: dict[str, MethodConfig]
    """By name, in the order of the table."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.reference not in self.methods:
            raise ValueError(f"reference: got {self.reference}, takes one of {', '.join(self.methods)}")
        return self


C = TypeVar("C", bound=Section)


def load(cls: type[C], path: str | Path, overrides: list[str] | None = None) -> C:
    """Read a YAML file, apply overrides in their order, validate.

    A file may name a ``base`` beside it; it is read first and overlaid key by key. An override is ``key=value`` (dotted
    keys, YAML values), or another YAML file to overlay.

    Raises:
        ConfigError: one line per fault, each with the field, what it got and what it takes.
    """
    tree = read(Path(path))
    for item in overrides or []:
        if "=" not in item and item.endswith((".yaml", ".yml")):
            tree = overlay(tree, read(Path(item)))
            continue
        key, sep, text = item.partition("=")
        if not sep or not key:
            raise ConfigError(
                f"override {item!r}: takes key=value, such as train.num_batches=10, or a YAML file to overlay"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise ConfigError(f"{key}: got {text!r}, takes a YAML value ({e.__class__.__name__})") from None
        node = tree
        *parents, leaf = key.split(".")
        for p in parents:
            child = node.get(p)
            if not isinstance(child, dict):
                child = node[p] = {}
            node = child
        node[leaf] = value
    return validate(cls, tree)


def validate(cls: type[C], tree: dict[str, Any]) -> C:
    """Build a config from a plain tree.

    Raises:
        ConfigError: one line per fault.
    """
    try:
        return cls.model_validate(tree)
    except ValidationError as e:
        raise ConfigError("\n".join(_explain(cls, err) for err in e.errors())) from None


def read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file as a plain tree, laid over its ``base``.

    Raises:
        ConfigError: it cannot be read.
    """
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: `base` goes in a circle")
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as e:
        raise ConfigError(
            f"{path}: cannot be read ({e.strerror}); name a config such as configs/quickstart.yaml"
        ) from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: got {type(tree).__name__}, takes a mapping of sections")
    base = tree.pop("base", None)
    if not isinstance(base, str | None):
        raise ConfigError(f"{path}: base: got {base!r}, takes the name of a file beside this one")
    return tree if base is None else overlay(read(path.parent / base, (*seen, path)), tree)


def overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """A tree with the keys of ``above`` in place of, or inside, those of ``below``."""
    out = dict(below)
    for k, v in above.items():
        out[k] = overlay(out[k], v) if isinstance(v, dict) and isinstance(out.get(k), dict) else v
    return out


def flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """With dotted keys; a mapping without entries stays one."""
    out: dict[str, Any] = {}
    for k, v in tree.items():
        out |= flat(v, f"{above}{k}.") if isinstance(v, dict) and v else {f"{above}{k}": v}
    return out


def is_under(field: str, parts: Iterable[str]) -> bool:
    """Whether a dotted field is one of the parts of a config, or in one of them."""
    return any(f"{field}.".startswith(f"{part}.") for part in parts)


def _explain(cls: type[BaseModel], err: Any) -> str:
    loc = [str(p) for p in err["loc"]]
    where = ".".join(loc)
    if err["type"] == "extra_forbidden":
        section: Any = cls
        parts = iter(loc[:-1])
        for p in parts:
            if get_origin(section.model_fields[p].annotation) is dict:
                next(parts, None)  # a name of the user's
            section = _section_of(section, p)
        names = list(section.model_fields)
        near = difflib.get_close_matches(loc[-1], names, 1)
        hint = f"did you mean {'.'.join([*loc[:-1], near[0]])}?" if near else f"takes one of {', '.join(names)}"
        return f"{where}: unknown key; {hint}"
    if err["type"] == "missing":
        return f"{where}: missing, must be set"
    if err["type"] == "value_error":  # our own cross-field checks name field, got and takes themselves
        return str(err["ctx"]["error"])
    message = err["msg"].replace("Input should be", "takes")
    return f"{where}: got {err['input']!r}, {message[0].lower()}{message[1:]}"


def _section_of(section: Any, field: str) -> Any:
    annotation = section.model_fields[field].annotation
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))

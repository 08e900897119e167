"""The dry run's arithmetic against real models, real autograd and hand-worked numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console

from stepgrpo.config import Config, ConfigError, load
from stepgrpo.dryrun import CUDA_CONTEXT, GB, KNOWN_SHAPES, ModelShape, explain, model_shape, render

CONFIGS = Path(__file__).parents[1] / "configs"


def config(size: str = "8b", *overrides: str) -> Config:
    return load(Config, CONFIGS / f"qwen3_{size}.yaml", list(overrides))


def quickstart(model: Path, *overrides: str) -> Config:
    return load(Config, CONFIGS / "quickstart.yaml", [f"model.path={model}", *overrides])


def text_of(c: Config, gpu_memory: float = 80.0) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(explain(c, gpu_memory)))
    return console.export_text()


def checkpoint(directory: Path, settings: transformers.PreTrainedConfig) -> Path:
    settings.save_pretrained(directory)
    return directory


def tiny(kind: type[transformers.PreTrainedConfig], **changes: object) -> transformers.PreTrainedConfig:
    settings = dict(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=160,
        vocab_size=101, max_position_embeddings=512,
    )  # fmt: skip
    return kind(**(settings | changes))


def real_parameters(settings: transformers.PreTrainedConfig) -> int:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(settings)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", KNOWN_SHAPES)
def test_known_shapes_have_as_many_parameters_as_the_real_models(name: str) -> None:
    s = KNOWN_SHAPES[name]
    settings = transformers.Qwen3Config(
        hidden_size=s.hidden,
        num_hidden_layers=s.num_layers,
        num_attention_heads=s.num_heads,
        num_key_value_heads=s.num_kv_heads,
        head_dim=s.head_dim,
        intermediate_size=s.intermediate,
        vocab_size=s.vocab,
        tie_word_embeddings=s.tied,
    )
    assert s.num_params == real_parameters(settings)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("0.6B", 0.596), ("1.7B", 1.721), ("4B", 4.022), ("8B", 8.191), ("14B", 14.768), ("32B", 32.762)],
)
def test_known_shapes_have_the_published_sizes(name: str, billions: float) -> None:
    assert KNOWN_SHAPES[f"Qwen/Qwen3-{name}"].num_params / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.parametrize(
    "settings",
    [
        tiny(transformers.Qwen3Config, head_dim=32, tie_word_embeddings=True),
        tiny(transformers.Qwen3Config, head_dim=16, attention_bias=True),
        tiny(transformers.Qwen2Config),
        tiny(transformers.LlamaConfig, tie_word_embeddings=True, attention_bias=True),
        tiny(transformers.MistralConfig, head_dim=32),
    ],
    ids=lambda s: s.model_type,
)
def test_a_checkpoint_directory_is_counted_from_its_config(
    tmp_path: Path, settings: transformers.PreTrainedConfig
) -> None:
    shape = model_shape(str(checkpoint(tmp_path, settings)))
    assert shape.num_params == real_parameters(settings)
    assert shape.max_positions == 512


def saved_bytes(num_layers: int, tokens: int, dtype: torch.dtype, checkpointing: bool) -> int:
    """What autograd keeps of a forward pass, parameters apart."""
    settings = tiny(transformers.Qwen3Config, num_hidden_layers=num_layers, intermediate_size=768, head_dim=64)
    model = transformers.Qwen3Model(settings).to(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in parameters:
            saved[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        states = model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    assert states.last_hidden_state.requires_grad
    return sum(t.untyped_storage().nbytes() for t in saved.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layers_activations_are_what_autograd_really_saves(dtype: torch.dtype, checkpointing: bool) -> None:
    # Three layers more, so that what is saved once (embedding, last norm) drops out.
    few, many = (ModelShape(n, 96, 768, 4, 2, 64, 101, False, 512, qk_norm=True) for n in (2, 5))
    real = saved_bytes(5, 256, dtype, checkpointing) - saved_bytes(2, 256, dtype, checkpointing)
    width = dtype.itemsize
    estimate = many.activation_bytes(256, width, checkpointing=checkpointing) - few.activation_bytes(
        256, width, checkpointing=checkpointing
    )
    assert real == pytest.approx(estimate, rel=0.02)


@pytest.mark.parametrize("size", ["1.7b", "4b", "8b"])
def test_paper_scale_fits_eight_gpus_of_80_gb(size: str) -> None:
    p = explain(config(size))
    assert p.faults == ()
    assert p.gpus == 8
    assert max(p.learner.total, p.rollout.total) < 80 * GB
    assert p.full_sequences >= 10


def test_memory_of_a_learner_rank_follows_zero_3() -> None:
    p = explain(config("8b"))
    own = 8_190_735_360 / 4
    parts = {x.name: x.bytes for x in p.learner.always}
    assert parts["weights"] == parts["reference"] == 2 * own
    assert parts["gradients"] == 4 * own, "summed in float32 over micro-batches"
    assert parts["optimizer"] == 12 * own


def test_without_a_kl_term_no_reference_is_counted() -> None:
    with_kl, without = (explain(config("8b", f"learner.kl_coef={k}")).learner.total for k in (0.01, 0))
    assert with_kl - without == 2 * 8_190_735_360 / 4


def test_publishing_what_changed_keeps_a_version_on_the_host_and_its_differences_in_the_store() -> None:
    settings = [config("8b", f"learner.full_every={n}") for n in (2, 1)]
    on, off = map(explain, settings)
    weights = 2 * 8_190_735_360
    assert on.learner_host - off.learner_host == weights / 4
    assert on.object_store - off.object_store == weights
    shown = [" ".join(text_of(c).split()) for c in settings]
    assert ["for the last published version" in text for text in shown] == [True, False]
    assert ["and as much of differences" in text for text in shown] == [True, False]


def test_offloading_moves_the_optimizer_to_the_host() -> None:
    on, off = (explain(config("8b", f"learner.offload_optimizer={x}")) for x in ("false", "true"))
    assert on.learner_host == 0
    assert off.learner_host == 20 * 8_190_735_360 / 4
    assert on.learner.total - off.learner.total == 16 * 8_190_735_360 / 4, "gradients too"


def test_kv_cache_of_qwen3_8b_takes_144_kib_a_token() -> None:
    p = explain(config("8b", "engine.kv_cache_mb=36864"))
    assert p.shape.kv_bytes(2) == 144 * 1024
    assert p.kv_tokens == 36864 * 1024 // 144
    assert p.full_sequences == p.kv_tokens // (2048 + 16384 + 256)


def test_tensor_parallel_workers_share_weights_and_add_their_caches() -> None:
    one, two = (explain(config("8b", f"engine.tensor_parallel={n}")) for n in (1, 2))
    weights = [p.rollout.always[0].bytes for p in (one, two)]
    assert weights[0] == 2 * weights[1]
    assert two.kv_tokens > 2 * one.kv_tokens
    assert two.gpus == 2 * 4 + 4


def test_batch_arithmetic_of_the_paper() -> None:
    p = explain(config("8b"))
    assert (p.trajectories, p.num_updates) == (2560, 400)
    assert p.response_tokens == 2560 * 16384
    assert p.micro_batches == 160  # 128 prompts x 5 over 4 ranks, one longest trajectory at a time


@pytest.mark.parametrize(
    ("overrides", "fault", "remedy"),
    [
        (["learner.num_ranks=1"], "a learner rank needs", "raise learner.num_ranks"),
        (["learner.gradient_checkpointing=false"], "a learner rank needs", "learner.gradient_checkpointing=true"),
        (["engine.gpu_memory_utilization=0.25"], "less than one sequence", "engine.tensor_parallel"),
        (["engine.kv_cache_mb=99999"], "a rollout GPU needs", "lower engine.kv_cache_mb"),
        (["data.max_prompt_tokens=30000", "learner.micro_batch_tokens=50000"], "the model takes 40,960", "lower data."),
        (["engine.tensor_parallel=3"], "engine.tensor_parallel: got 3", "32 heads"),
        (["cluster.object_store_mb=4000"], "cluster.object_store_mb: got 4000", "needs about"),
    ],
)
def test_what_does_not_fit_is_named_with_a_remedy(overrides: list[str], fault: str, remedy: str) -> None:
    c = config("8b", *overrides)
    faults = [f for f in explain(c).faults if fault in f]
    assert len(faults) == 1
    assert remedy in faults[0]
    assert "all parts fit" not in text_of(c)


def test_a_smaller_gpu_changes_the_verdict() -> None:
    assert explain(config("8b"), 80).faults == ()
    assert any(f.startswith("a learner rank needs") for f in explain(config("8b"), 40).faults)


def test_on_a_shared_gpu_table_and_verdict_both_leave_room_for_the_one_that_sleeps() -> None:
    c = load(Config, CONFIGS / "one_gpu.yaml", ["engine.kv_cache_mb=4000"])
    learner, rollout = (m.total / GB for m in (explain(c).learner, explain(c).rollout))
    assert learner > rollout, "the learner's memory decides here"
    room = CUDA_CONTEXT / GB
    for spare, fits in ((0.9 * room, False), (1.1 * room, True)):
        page = text_of(c, learner + spare)
        assert ("all parts fit" in page) == ("DOES NOT FIT" not in page) == fits


def test_the_page_says_where_the_shape_is_from_and_that_all_fits() -> None:
    page = text_of(config("8b"))
    for words in ("built-in table", "8,190,735,360 parameters", "the cluster must have", "all parts fit", "2,560 traj"):
        assert words in page


def test_a_local_data_file_gives_epochs(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text('{"problem": "p", "answer": "1"}\n' * 320 + "\n")
    model = checkpoint(tmp_path / "m", tiny(transformers.Qwen3Config, head_dim=32, tie_word_embeddings=True))
    c = quickstart(model, f"data.train={data}", "train.num_batches=60", "train.prompts_per_batch=16")
    assert explain(c).num_problems == 320
    assert "320 problems: 20.0 batches an epoch, 3.0 epochs in all" in text_of(c)


def test_on_cpu_no_gpu_is_asked_for_or_judged(tmp_path: Path) -> None:
    p = explain(quickstart(checkpoint(tmp_path, tiny(transformers.Qwen3Config, head_dim=32))), gpu_memory=1e-6)
    assert (p.gpus, p.gpu_memory, p.faults) == (0, None, ())
    assert p.cpus == 2


def test_a_model_that_is_nowhere_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model.path: got ./nowhere, no such directory"):
        model_shape("./nowhere")


def test_an_architecture_that_is_not_counted_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    with pytest.raises(ConfigError, match=r"of type 'qwen3_moe'; --dry-run counts qwen3, qwen2, llama, mistral"):
        model_shape(str(tmp_path))


def test_an_incomplete_config_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "num_attention_heads": 4}))
    with pytest.raises(ConfigError, match="has no 'num_hidden_layers'"):
        model_shape(str(tmp_path))


def test_a_dry_run_imports_no_heavy_library() -> None:
    program = (
        "import sys; from stepgrpo.config import Config, load; from stepgrpo.dryrun import explain, render\n"
        f"render(explain(load(Config, {str(CONFIGS / 'qwen3_8b.yaml')!r})))\n"
        "print(*{'torch', 'ray', 'vllm', 'deepspeed', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""

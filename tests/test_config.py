"""Settings: what is shipped loads, and a mistake is one line that names the field, what it got and what it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepgrpo.config import CompareConfig, Config, ConfigError, SftConfig, load, validate

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def refusal(*overrides: str, path: Path = QUICKSTART) -> str:
    with pytest.raises(ConfigError) as e:
        load(Config, path, list(overrides))
    return str(e.value)


def write(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


STREAM = ["learner.stream=true", "train.prompts_per_update=16"]
MINIMAL = "name: x\nmodel: {path: m}\ndata: {train: t.jsonl}\nlearner: {micro_batch_tokens: 18432}\n"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_loads_under_its_own_name(path: Path) -> None:
    assert load(Config, path).name == path.stem


@pytest.mark.parametrize("size", ["1.7b", "4b", "8b"])
def test_paper_scale_configs_have_the_papers_numbers(size: str) -> None:
    c = load(Config, ROOT / "configs" / f"qwen3_{size}.yaml")
    assert c.model.path == f"Qwen/Qwen3-{size.upper()}"
    assert (c.rollout.group_size, c.train.prompts_per_batch, c.train.prompts_per_update) == (5, 512, 128)
    assert (c.updates_per_batch, c.train.num_batches) == (4, 100)
    assert (c.data.max_prompt_tokens, c.rollout.max_response_tokens) == (2048, 16384)
    assert (c.learner.lr, c.learner.weight_decay, c.learner.kl_coef) == (1e-6, 0.01, 0.01)
    assert (c.learner.clip_low, c.learner.clip_high, c.learner.dual_clip) == (0.2, 0.3, 3.0)
    assert (c.rollout.temperature, c.rollout.top_p) == (1.0, 1.0)
    assert (c.eval.temperature, c.eval.top_p, c.eval.max_response_tokens) == (0.6, 0.95, 32768)
    assert c.rollout.probe is not None
    assert (c.rollout.probe.preset, c.rollout.probe.delta, c.rollout.probe.probability) == ("deer", 0.95, 1.0)
    assert (c.reward.alpha, c.reward.beta, c.reward.baseline) == (0.9, 0.5, "correct")
    assert c.data.suffix == r"Please reason step by step, and put your final answer within \boxed{}."
    assert c.rollout.workers.max * c.engine.tensor_parallel + c.learner.num_ranks == 8


def test_an_unknown_key_suggests_the_nearest_one() -> None:
    assert refusal("train.num_batchs=3") == "train.num_batchs: unknown key; did you mean train.num_batches?"


def test_an_unknown_key_in_an_optional_section_suggests_the_nearest_one() -> None:
    assert refusal("rollout.probe.detla=0.9") == "rollout.probe.detla: unknown key; did you mean rollout.probe.delta?"


def test_an_unknown_key_like_no_other_lists_what_there_is() -> None:
    assert refusal("model.zzz=3") == "model.zzz: unknown key; takes one of path, dtype, attention, liger, think_close"


def test_off_is_what_wandb_takes_though_yaml_means_false() -> None:
    assert load(Config, QUICKSTART, ["train.wandb=off"]).train.wandb == "off"
    assert refusal("train.wandb=on") == "train.wandb: got True, takes 'off', 'offline' or 'online'"


def test_an_unknown_key_below_a_name_of_the_users_suggests_the_nearest_one() -> None:
    tree = {"name": "x", "run": "y", "results": "z", "seeds": [0], "methods": {"g": {"lable": "x"}}}
    with pytest.raises(ConfigError, match=r"^methods\.g\.lable: unknown key; did you mean methods\.g\.label\?$"):
        validate(CompareConfig, tree)


def test_an_unknown_section_suggests_the_nearest_one() -> None:
    assert refusal("learnr.lr=1") == "learnr: unknown key; did you mean learner?"


@pytest.mark.parametrize(
    ("override", "field", "got"),
    [
        ("train.num_batches=ten", "train.num_batches", "'ten'"),
        ("train.num_batches=1.5", "train.num_batches", "1.5"),
        ("train.num_batches=0", "train.num_batches", "0"),
        ("rollout.probe.delta=1.0", "rollout.probe.delta", "1.0"),
        ("rollout.triggers=[]", "rollout.triggers", "[]"),
        ("reward.scheme=best", "reward.scheme", "'best'"),
        ("model=3", "model", "3"),
        ("model.path=null", "model.path", "None"),
        ("name=../elsewhere", "name", "'../elsewhere'"),
        ("cluster.dashboard_port=70000", "cluster.dashboard_port", "70000"),
        ("train.num_batches=true", "train.num_batches", "True"),
        ("rollout.triggers=['']", "rollout.triggers.0", "''"),
        ("model.think_close=''", "model.think_close", "''"),
        ("learner.betas=[0.9,1.0]", "learner.betas.1", "1.0"),
    ],
)
def test_a_wrong_value_is_one_line_with_field_and_value(override: str, field: str, got: str) -> None:
    message = refusal(override)
    assert message.startswith(f"{field}: got {got}, ")
    assert "\n" not in message


def test_each_mistake_has_its_own_line() -> None:
    lines = refusal("train.num_batches=ten", "seed=-1", "learner.lrr=1").splitlines()
    assert sorted(line.split(":")[0] for line in lines) == ["learner.lrr", "seed", "train.num_batches"]


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "c.yaml", "name: x\ndata: {train: t.jsonl}\n")
    assert refusal(path=path) == "model: missing, must be set"


@pytest.mark.parametrize(
    ("field", "got", "near", "known"),
    [
        (
            "reward.scheme",
            "step_awere",
            "step_aware",
            "step_aware, outcome, length_penalty, overlong, easy_length_penalty",
        ),
        ("reward.grader", "maths", "math", "math, exact"),
        ("rollout.probe.policy", "confident", "confidence", "confidence"),
        ("rollout.step_rule", "trigger", "triggers", "triggers, structure"),
    ],
)
def test_a_name_that_is_neither_known_nor_ones_own_suggests_the_nearest(
    field: str, got: str, near: str, known: str
) -> None:
    takes = f"takes one of {known}, or your own as package.module:name"
    assert refusal(f"{field}={got}") == f"{field}: got '{got}' (did you mean {near}?), {takes}"
    assert refusal(f"{field}=zzz") == f"{field}: got 'zzz', {takes}"


def test_a_name_of_ones_own_is_taken_with_its_options() -> None:
    c = load(Config, QUICKSTART, ["reward.scheme=mine:fn", "reward.options={price: 0.1, of: [1, 2]}"])
    assert (c.reward.scheme, c.reward.options) == ("mine:fn", {"price": 0.1, "of": [1, 2]})


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["train.prompts_per_update=7"], "train.prompts_per_update"),
        (["learner.num_ranks=9"], "train.prompts_per_update"),
        (["learner.micro_batch_tokens=243"], "learner.micro_batch_tokens"),
        (["engine.max_num_seqs=7"], "engine.max_num_seqs"),
        (["engine.kv_cache_mb=null"], "engine.kv_cache_mb"),
        (["engine.block_size=16"], "engine.block_size"),
        (["model.attention=flash_attention_2"], "model.attention"),
        (["model.attention=varlen", "model.dtype=bfloat16"], "model.attention"),
        (["model.liger=true"], "model.liger"),
        (["engine.tensor_parallel=2"], "engine.tensor_parallel"),
        (["rollout.top_p=0.95"], "rollout.top_p"),
        (["train.refill_limit=5"], "train.refill_limit"),
        (["train.refill=true", "reward.scheme=easy_length_penalty"], "train.refill"),
        (["data.eval=null"], "eval.every"),
        (["eval.early_exit=true", "rollout.probe=null"], "eval.early_exit"),
        (["learner.stream=true"], "learner.stream"),
        ([*STREAM, "train.refill=true"], "learner.stream"),
        ([*STREAM, "reward.scheme=easy_length_penalty"], "learner.stream"),
        ([*STREAM, "reward.scheme=mine:fn"], "learner.stream"),
        ([*STREAM, "reward.normalization=batch"], "learner.stream"),
        ([*STREAM, "cluster.colocate=true", "train.max_staleness=0"], "learner.stream"),
    ],
)
def test_an_impossible_combination_is_one_line_with_field_got_and_takes(overrides: list[str], field: str) -> None:
    message = refusal(*overrides)
    assert message.startswith(f"{field}: got ")
    assert ", takes " in message
    assert "\n" not in message


@pytest.mark.parametrize("change", [{"attention": "varlen", "dtype": "bfloat16"}, {"liger": True}])
def test_what_needs_a_gpu_is_refused_on_cpu_in_supervised_training_too(change: dict[str, object]) -> None:
    settings = {"name": "x", "model": {"path": "m"} | change, "data": {"train": "t"}, "cluster": {"device": "cpu"}}
    field = next(iter(change))
    with pytest.raises(ValueError, match=rf"model\.{field}: got .*, takes .* where cluster\.device is cpu"):
        SftConfig.model_validate(settings)


def test_flash_attention_over_packed_rows_is_taken_where_it_can_be() -> None:
    model = load(Config, QUICKSTART, ["model.dtype=bfloat16"]).model
    assert (model.attention_on("cuda"), model.packed_on("cuda")) == ("varlen", True)
    assert (model.attention_on("cpu"), model.packed_on("cpu")) == ("packed_sdpa", True)
    exact = load(Config, QUICKSTART).model
    assert (exact.attention_on("cuda"), exact.packed_on("cuda")) == ("packed_sdpa", True)
    padded = load(Config, QUICKSTART, ["model.attention=sdpa"]).model
    assert (padded.attention_on("cuda"), padded.packed_on("cuda")) == ("sdpa", False)


def test_one_update_per_batch_may_be_streamed() -> None:
    assert load(Config, QUICKSTART, STREAM).learner.stream


def test_a_micro_batch_of_exactly_the_longest_trajectory_is_enough() -> None:
    assert load(Config, QUICKSTART, ["learner.micro_batch_tokens=244"]).learner.micro_batch_tokens == 64 + 180


def test_sft_refuses_a_pair_longer_than_a_micro_batch(tmp_path: Path) -> None:
    path = write(tmp_path, "sft.yaml", MINIMAL + "max_tokens: 20000\n")
    with pytest.raises(
        ConfigError, match=r"^learner.micro_batch_tokens: got 18432, takes at least max_tokens \(20000\)"
    ):
        load(SftConfig, path)


def test_overrides_are_yaml_values_under_dotted_keys() -> None:
    c = load(
        Config,
        QUICKSTART,
        ["seed=7", "rollout.probe=null", "rollout.triggers=[Wait, Hmm]", "learner.lr=1.0e-4", "data.suffix=a = b"],
    )
    assert (c.seed, c.rollout.probe, c.rollout.triggers) == (7, None, ["Wait", "Hmm"])
    assert (c.learner.lr, c.data.suffix) == (1e-4, "a = b")


def test_a_later_override_wins_and_opens_a_section_that_was_null() -> None:
    c = load(Config, QUICKSTART, ["seed=1", "seed=2", "rollout.probe=null", "rollout.probe.delta=0.9"])
    assert c.seed == 2
    assert c.rollout.probe is not None
    assert (c.rollout.probe.delta, c.rollout.probe.inducer) == (0.9, None)


@pytest.mark.parametrize("override", ["train.num_batches", "=3"])
def test_an_override_without_key_or_value_is_refused(override: str) -> None:
    message = f"override {override!r}: takes key=value, such as train.num_batches=10, or a YAML file to overlay"
    assert refusal(override) == message


def test_an_override_that_is_not_yaml_is_refused() -> None:
    assert refusal("rollout.triggers=[Wait").startswith("rollout.triggers: got '[Wait', takes a YAML value")


def test_an_overlay_changes_single_keys_of_its_base(tmp_path: Path) -> None:
    write(tmp_path, "low.yaml", MINIMAL + "train: {num_batches: 5, prompts_per_batch: 256}\n")
    write(tmp_path, "sub/mid.yaml", "base: ../low.yaml\ntrain: {num_batches: 6}\nrollout: {probe: null}\n")
    top = write(tmp_path, "top.yaml", "base: sub/mid.yaml\nname: top\n")
    c = load(Config, top, ["train.prompts_per_update=64"])
    assert (c.name, c.model.path) == ("top", "m")
    assert (c.train.num_batches, c.train.prompts_per_batch, c.train.prompts_per_update) == (6, 256, 64)
    assert c.rollout.probe is None


def test_files_and_settings_are_laid_over_the_config_in_the_order_they_are_given(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", MINIMAL + "train: {num_batches: 5, prompts_per_batch: 256}\n")
    method = str(write(tmp_path, "method.yaml", "seed: 3\nrollout: {probe: {delta: 0.9}}\nreward: {scheme: outcome}\n"))
    plain = str(write(tmp_path, "plain.yml", "rollout: {probe: null}\n"))
    c = load(Config, base, [method, "seed=4", "rollout.group_size=7"])
    assert (c.seed, c.reward.scheme, c.rollout.group_size, c.train.num_batches) == (4, "outcome", 7, 5)
    assert c.rollout.probe is not None and c.rollout.probe.delta == 0.9
    assert load(Config, base, ["seed=4", method]).seed == 3
    assert load(Config, base, [method, plain]).rollout.probe is None
    again = load(Config, base, [plain, method]).rollout.probe
    assert again is not None and again.delta == 0.9


def test_a_file_laid_over_may_have_a_base_of_its_own(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", MINIMAL)
    write(tmp_path, "methods/low.yaml", "seed: 3\nrollout: {group_size: 7}\n")
    top = write(tmp_path, "methods/top.yaml", "base: low.yaml\nseed: 5\n")
    c = load(Config, base, [str(top)])
    assert (c.name, c.seed, c.rollout.group_size) == ("x", 5, 7)


def test_a_file_to_lay_over_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert refusal(f"{tmp_path}/none.yaml").startswith(f"{tmp_path}/none.yaml: cannot be read (No such file")


def test_bases_that_go_in_a_circle_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path, "a.yaml", "base: b.yaml\n")
    write(tmp_path, "b.yaml", "base: a.yaml\n")
    assert refusal(path=a) == f"{a}: `base` goes in a circle"


def test_a_base_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "base: none.yaml\n")
    assert refusal(path=path).startswith(f"{tmp_path / 'none.yaml'}: cannot be read (No such file or directory)")


@pytest.mark.parametrize(("text", "reason"), [("a: [", "not YAML"), ("- a\n", "got list, takes a mapping of sections")])
def test_a_file_that_is_no_config_is_refused_in_one_line(tmp_path: Path, text: str, reason: str) -> None:
    path = write(tmp_path, "c.yaml", text)
    message = refusal(path=path)
    assert message.startswith(f"{path}: {reason}")
    assert "\n" not in message


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_saved_settings_of_a_run_make_the_same_run_again(path: Path) -> None:
    c = load(Config, path)
    assert validate(Config, c.model_dump(mode="json")) == c


def test_without_refill_nothing_is_replaced_and_with_it_one_batch_at_most() -> None:
    assert load(Config, QUICKSTART).refill_limit == 0
    assert load(Config, QUICKSTART, ["train.refill=true"]).refill_limit == 16
    assert load(Config, QUICKSTART, ["train.refill=true", "train.refill_limit=5"]).refill_limit == 5

"""From a checkpoint of a run to a plain Hugging Face directory of its policy."""

from __future__ import annotations

import tempfile
from pathlib import Path

from stepgrpo import checkpoint
from stepgrpo.checkpoint import CheckpointError, Manifest
from stepgrpo.config import ConfigError
from stepgrpo.hub import copy_tokenizer, with_tokenizer
from stepgrpo.learner.state import persistent_buffers, read_parameters


def export(place: str, manifest: Manifest, output: Path, model: str | None = None) -> None:
    """Write the policy, its configuration and its tokenizer; the directory appears whole or not at all.

    Takes host memory for the parameters in float32 and in the dtype they are written in.

    Args:
        output: must not exist yet, or be empty.
        model: where configuration and tokenizer come from; None: from where the run had them.

    Raises:
        CheckpointError: the checkpoint is no run's, is damaged, or does not hold all of the model.
        ConfigError: ``output`` holds something, or the model's configuration or tokenizer is not to be had.
    """
    import torch
    import transformers

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output: got {output}, which exists; name another directory, or remove it")
    files = [f.name for f in manifest.files if f.name.startswith("learner-")]
    if not files or not {"model", "dtype"} <= manifest.meta.keys():
        raise CheckpointError(f"{manifest.name}: holds no policy: it lacks a learner's files, or its model and dtype")
    path = model or manifest.meta["model"]
    source = with_tokenizer(path)
    dtype = getattr(torch, manifest.meta["dtype"])
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(source)
        policy = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if beside := list(persistent_buffers(policy)):
        raise CheckpointError(
            f"{manifest.name}: of a model with {beside[0]}, which is no parameter and in no checkpoint: let the run "
            "end, which writes model/"
        )
    if (source / "generation_config.json").is_file():
        policy.generation_config = transformers.GenerationConfig.from_pretrained(source)
    with tempfile.TemporaryDirectory(prefix="stepgrpo-export-") as cache:
        parameters = read_parameters([checkpoint.fetch(place, manifest.name, f, Path(cache)) for f in files])
        expected = {n: tuple(p.shape) for n, p in policy.named_parameters()}  # tied ones once
        found = {n: p.shape for n, p in parameters.items()}
        if wrong := sorted(dict(expected.items() ^ found.items())):
            raise CheckpointError(
                f"{manifest.name}: of another model than {path}: {wrong[0]} is {found.get(wrong[0], 'missing')} there, "
                f"{expected.get(wrong[0], 'missing')} in the model"
            )
        target = output.absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as parent:
            aside = Path(parent) / target.name
            policy.save_pretrained(aside, state_dict={n: torch.from_numpy(p).to(dtype) for n, p in parameters.items()})
            copy_tokenizer(path, aside)
            aside.rename(target)

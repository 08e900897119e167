"""From a checkpoint's directory, or its name on the Hugging Face hub, to its small files on this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from stepgrpo.config import ConfigError, RunConfig, brief

C = TypeVar("C", bound=RunConfig)


@lru_cache(maxsize=1)
def hub_answers(timeout: float = 3.0) -> bool:
    """Whether the hub can be reached within ``timeout`` seconds. Asked once: where it cannot, its clients would retry
    for half a minute before they look into the local cache."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception:  # what kind depends on the client below it; all mean no
        return False
    return True


@lru_cache(maxsize=8)
def checkpoint_files(path: str) -> Path:
    """Directory with a checkpoint's configuration and tokenizer; its weights may lie elsewhere.

    Raises:
        ConfigError: neither a directory with a ``config.json`` nor a name the hub, or its local cache, knows.
    """
    local = Path(path)
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ConfigError(
                f"model.path: got {path}, a directory without config.json; takes a Hugging Face checkpoint"
            )
        return local
    if path.startswith((".", "/", "~")) or path.count("/") != 1 or local.parent.is_dir():
        raise ConfigError(f"model.path: got {path}, no such directory; takes a checkpoint directory or a hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.jinja", "*.txt"]
        return Path(snapshot_download(path, allow_patterns=patterns, local_files_only=not hub_answers()))
    except Exception as e:  # the hub client raises many kinds; each means the checkpoint is not at hand
        reason = "the hub cannot be reached" if isinstance(e, LocalEntryNotFoundError) else brief(e)
        raise ConfigError(
            f"model.path: got {path}, neither a directory here nor to be had from the hub or its local cache "
            f"({reason}); with a network: hf download {path}"
        ) from None


def eos_ids(directory: Path) -> tuple[int, ...]:
    """Token ids that end a response, from the generation config and the model config.

    Raises:
        ConfigError: the checkpoint names none.
    """
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value: Any = _json(directory / name).get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    if not ids:
        raise ConfigError(f"model.path: {directory} names no eos_token_id in generation_config.json or config.json")
    return tuple(dict.fromkeys(ids))


def max_positions(directory: Path) -> int | None:
    """Longest sequence the model was made for, where its config says so."""
    value = _json(directory / "config.json").get("max_position_embeddings")
    return value if isinstance(value, int) else None


def fingerprint(path: str) -> str:
    """Tells checkpoints apart without reading all of them: sizes, and both ends of each weight file."""
    local = Path(path)
    if not local.is_dir():
        return str(checkpoint_files(path).name)  # the hub's commit
    sha = hashlib.sha256()
    for file in [local / "config.json", *sorted(local.glob("*.safetensors"))]:
        size = file.stat().st_size
        sha.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as f:
            sha.update(f.read(_END_BYTES))
            f.seek(max(0, size - _END_BYTES))
            sha.update(f.read())
    return sha.hexdigest()


_END_BYTES = 1 << 20


def portable(config: C) -> C:
    """The same config with a local checkpoint by its absolute path: actors have another working directory."""
    path = Path(config.model.path)
    if not path.is_dir():
        return config
    model = config.model.model_copy(update={"path": str(path.absolute())})
    return config.model_copy(update={"model": model})


def tokenizer_file(directory: str | Path) -> Path:
    """
    Raises:
        ValueError: there is none.
    """
    file = Path(directory) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"{file}: not there; a checkpoint needs its fast tokenizer "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it)"
        )
    return file


def load_tokenizer(path: str) -> Any:
    """The checkpoint's tokenizer with its chat template: its ``tokenizer.json`` as it is, which ``tokens.Codec`` reads.

    ``AutoTokenizer`` would import torch, for three seconds, and may build a pipeline of its own for a name such as
    ``LlamaTokenizer``, under which checkpoints ship others.

    Raises:
        ConfigError: there is none that can be used.
    """
    from transformers import PreTrainedTokenizerFast

    directory = with_tokenizer(path)
    try:
        return PreTrainedTokenizerFast.from_pretrained(directory)
    except Exception as e:  # tokenizers raise all kinds
        raise ConfigError(f"model.path: got {path}, without a usable tokenizer ({brief(e)})") from None


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def copy_tokenizer(path: str, directory: Path) -> None:
    """Write the checkpoint's tokenizer into another directory, byte for byte: training changes nothing in it.

    Raises:
        ConfigError: it has none.
    """
    source = with_tokenizer(path)
    for file in (file for pattern in _TOKENIZER_FILES for file in source.glob(pattern)):
        copy = directory / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def with_tokenizer(path: str) -> Path:
    """As ``checkpoint_files``, of a checkpoint that has its fast tokenizer.

    Raises:
        ConfigError: it is not to be had, or has none.
    """
    directory = checkpoint_files(path)
    try:
        tokenizer_file(directory)
    except ValueError as e:
        raise ConfigError(f"model.path: {e}") from None
    return directory


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}

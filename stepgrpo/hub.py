"""From a checkpoint's directory, or its name on the Hugging Face hub, to its small files on this machine."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from stepgrpo.config import ConfigError


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

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.jinja", "*.txt"], etag_timeout=10))
    except Exception as e:  # the hub client raises many kinds; each means the checkpoint is not at hand
        reason = " ".join(str(e).split())[:160]
        raise ConfigError(
            f"model.path: got {path}, neither a directory here nor to be had from the hub "
            f"({type(e).__name__}: {reason}); with a network: hf download {path}"
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


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}

"""A user's own function, named in the config as ``package.module:name``."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from stepgrpo.config import ConfigError, brief


def load_own(name: str, field: str) -> Any:
    """What ``package.module:name`` stands for. Modules in the working directory are found, as by ``python -m``.

    Args:
        field: the setting that holds ``name``, for the error.

    Raises:
        ConfigError: no such module, nothing of that name in it, or not callable; the module's own error is quoted.
    """
    module_name, _, attribute = name.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as e:  # importing runs the user's code, which may raise anything
        raise ConfigError(
            f"{field}: got {name}, which cannot be imported ({type(e).__name__}: {brief(e)}); takes "
            "package.module:name, with the package installed or in the working directory"
        ) from None
    if not callable(found):
        raise ConfigError(f"{field}: got {name}, which is a {type(found).__name__}; takes a function or a class")
    return found


def own_file(name: str, field: str) -> Path:
    """The file that holds ``name``, or the first that is imported for it.

    Raises:
        ConfigError: as ``load_own``.
    """
    load_own(name, field)
    return Path(sys.modules[name.partition(":")[0]].__file__ or "")


def make_own(name: str, field: str, *args: object) -> Any:
    """What the function or class that ``name`` stands for makes of ``args``.

    Raises:
        ConfigError: as ``load_own``, or it failed on them; its own error is quoted.
    """
    make = load_own(name, field)
    try:
        return make(*args)
    except Exception as e:
        raise ConfigError(f"{field}: {name} failed ({type(e).__name__}: {brief(e)})") from e

"""Write docs/configuration.md and docs/metrics.md from the docstrings and names in the code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from stepgrpo.config import CompareConfig, Config, MethodConfig, SftConfig
from stepgrpo.metrics import METRICS

INTRODUCTION = """\
# Configuration

*Written by `make docs` from the docstrings in `stepgrpo/config.py`; change it there.*

A run is one YAML file, such as `configs/quickstart.yaml`. Any setting can be overridden behind it on the command line,
with its dotted key and a YAML value; lists are replaced as a whole, `null` means none:

    stepgrpo train configs/quickstart.yaml train.num_batches=20 rollout.probe.delta=0.9 'rollout.triggers=[Wait, Hmm]'

A YAML file there is laid over the first one, so that a method is a few lines of its own (`configs/methods/`):

    stepgrpo train configs/quickstart.yaml configs/methods/grpo.yaml name=grpo

A file may start from another one beside it and say only what differs:

    base: qwen3_8b.yaml
    name: my_run
    model:
      path: Qwen/Qwen3-4B

An unknown key, a wrong type or a combination that cannot work is refused before anything starts, in one line that names
the setting, what it got and what it takes. The settings a run really had are saved as `config.json` in its directory,
and `stepgrpo train CONFIG --dry-run` shows what they mean for placement and memory.
"""


METRICS_INTRODUCTION = """\
# Metrics

*Written by `make docs` from `METRICS` in `stepgrpo/metrics.py`; change it there.*

`metrics.jsonl` in the run directory gets one JSON line per optimizer update; Weights & Biases gets the same names
(`train.wandb=offline` needs no network, `wandb sync` uploads later). A quantity that does not exist in an update, such
as the accuracy of control samples where there are none, is `null`. What is measured per rollout batch (times, bytes)
stands on the batch's last update only, so columns can be added up.

Everything but `time/`, `rate/` and `discarded/` is the same in two runs with one seed, where `train.max_staleness` is 0
and the arithmetic is float32 on CPU.

Training figures are those of the *sampled* trajectories, which the probe cuts and the exploration lengthens: what the
policy does when it decodes plainly stands in `evaluations.jsonl` and `summary.json`.

Worth watching:

- `closing/logprob` with `exit/confident`: how likely the policy was to stop where the probe stopped it, and how often
  the probe had to. A policy that stops by itself leaves the probe only places where it would rather go on: both fall.
- `rollout/tokens_per_step` rises when the policy stops *saying* the trigger word without getting shorter.
- `accuracy/control` against `accuracy/treated` is what a confident exit costs (`rollout.control_fraction` above 0).
  Exited against natural trajectories tells nothing: they select themselves.
- `mismatch/max` is how far vLLM and the learner disagree about the same tokens and weights: about 1e-5 in float32.
- `staleness/max` never exceeds `train.max_staleness`.
- `time/wait` near 0 means the learner is the bottleneck; near `time/batch`, generation is.
"""


def metrics() -> str:
    """The page of metrics."""
    rows = [f"| `{name}` | {meaning} |" for name, meaning in METRICS.items()]
    return METRICS_INTRODUCTION + "\n" + "\n".join(["| name | meaning |", "|---|---|", *rows]) + "\n"


def configuration() -> str:
    """The page of settings."""
    shared = Config.model_fields
    own = [name for name in SftConfig.model_fields if name not in shared]
    parts = [INTRODUCTION, "## A training run", *_section(Config)]
    parts += ["## Supervised fine-tuning", "`stepgrpo sft` takes these, and the settings named alike above:"]
    parts += ["\n".join(_table(SftConfig, "", own))]
    parts += ["## A table of methods", "`stepgrpo compare` takes a file of its own:"]
    parts += ["\n".join(_table(CompareConfig, "", list(CompareConfig.model_fields)))]
    parts += ["### `methods.<name>`", "\n".join(_table(MethodConfig, "", list(MethodConfig.model_fields)))]
    return "\n\n".join(p.strip() for p in parts) + "\n"


def _section(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The section's own settings in a table, then its subsections."""
    below = {name: sub for name in section.model_fields if (sub := _subsection(section, name))}
    yield "\n".join(_table(section, prefix, [n for n in section.model_fields if n not in below]))
    for name, sub in below.items():
        key = f"{prefix}{name}"
        optional = section.model_fields[name].description
        yield f"### `{key}`\n\n{sub.__doc__}{f' {optional}' if optional else ''}"
        yield from _section(sub, f"{key}.")


def _subsection(section: type[BaseModel], name: str) -> type[BaseModel] | None:
    annotation = section.model_fields[name].annotation
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _table(section: type[BaseModel], prefix: str, names: list[str]) -> Iterator[str]:
    schema = section.model_json_schema()["properties"]
    yield "| setting | takes | default | meaning |"
    yield "|---|---|---|---|"
    for name in names:
        field, shape = section.model_fields[name], schema[name]
        default = (
            "must be set" if field.is_required() else f"`{json.dumps(field.get_default(call_default_factory=True))}`"
        )
        meaning = " ".join((field.description or "").split())
        yield f"| `{prefix}{name}` | {_takes(shape)} | {default} | {meaning} |".replace(" |  |", " | |")


def _takes(shape: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in shape:
        return " or ".join(_takes(s) for s in shape["anyOf"])
    if "enum" in shape:
        return ", ".join(f"`{v}`" for v in shape["enum"])
    if "prefixItems" in shape:
        return "list of " + ", ".join(_takes(s) for s in shape["prefixItems"])
    if shape.get("type", "object") == "object":
        return "mapping"
    if shape["type"] == "array":
        return f"list of {_takes(shape['items'])}s"
    bounds = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {shape[key]:g}" for key, sign in bounds.items() if key in shape]
    words = {"string": "text", "boolean": "`true`, `false`", "integer": "integer", "number": "number", "null": "`null`"}
    return " ".join([words[shape["type"]], *limits[:1], *(f"and {x}" for x in limits[1:])])


if __name__ == "__main__":
    for page in (configuration, metrics):
        path = Path(__file__).with_name(f"{page.__name__}.md")
        path.write_text(page(), encoding="utf-8")
        print(f"wrote {path.name}")

"""The documentation says what the code does."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from pydantic import BaseModel

from stepgrpo.config import Config

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", ["configuration", "metrics"])
def test_the_committed_reference_page_is_the_generated_one(page: str) -> None:
    generated = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))[page]()
    assert (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") == generated, "run `make docs`"


def test_the_configuration_page_names_every_setting() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert [key for key in settings(Config) if f"| `{key}` |" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_setting_a_page_names_exists(page: Path) -> None:
    known = set(settings(Config))
    sections = "|".join(name for name in Config.model_fields if any(key.startswith(f"{name}.") for key in known))
    named = set(re.findall(rf"(?<![\w/.-])(?:{sections})\.[a-z_]+(?:\.[a-z_]+)?(?![\w(/])", page.read_text("utf-8")))
    files = {name for name in named if name.rpartition(".")[2] in ("py", "jsonl", "yaml", "parquet", "md")}
    assert {n for n in named - files if n not in known and not any(k.startswith(f"{n}.") for k in known)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    assert [t for t in targets if not (page.parent / t).exists()] == []


def settings(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted keys of all settings."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        below = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        keys += settings(below, f"{prefix}{name}.") if below else [f"{prefix}{name}"]
    return keys

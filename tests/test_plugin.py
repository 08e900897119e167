"""Names of the user's own functions: what they load, and how a wrong one is refused."""

import sys
from pathlib import Path

import pytest

from stepgrpo.config import ConfigError, is_own
from stepgrpo.plugin import load_own, make_own


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; modules of it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def test_a_colon_makes_a_name_ones_own() -> None:
    assert [is_own(n) for n in ("outcome", "mine:fn", "package.mine:fn")] == [False, True, True]


def test_a_module_of_the_working_directory_is_found(here: Path) -> None:
    (here / "own_a.py").write_text("def fn():\n    return 7\n")
    assert load_own("own_a:fn", "reward.scheme")() == 7


def test_a_module_of_an_installed_package_is_found() -> None:
    assert load_own("json.decoder:JSONDecoder", "reward.scheme").__name__ == "JSONDecoder"


@pytest.mark.parametrize(
    ("text", "name", "reason"),
    [
        (None, "own_b:fn", "ModuleNotFoundError: No module named 'own_b'"),
        ("", "own_b:fn", "AttributeError: module 'own_b' has no attribute 'fn'"),
        ("1 / 0", "own_b:fn", "ZeroDivisionError: division by zero"),
        ("def fn(:", "own_b:fn", "SyntaxError: invalid syntax"),
        ("", "own_b:", "AttributeError"),
        ("", ":fn", "ValueError: Empty module name"),
    ],
)
def test_what_cannot_be_imported_is_one_line_with_field_name_and_cause(
    here: Path, text: str | None, name: str, reason: str
) -> None:
    if text is not None:
        (here / "own_b.py").write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_own(name, "reward.grader")
    message = str(refused.value)
    assert message.startswith(f"reward.grader: got {name}, which cannot be imported ({reason}")
    assert message.endswith("takes package.module:name, with the package installed or in the working directory")
    assert "\n" not in message


def test_what_cannot_be_called_is_refused(here: Path) -> None:
    (here / "own_c.py").write_text("fn = 3\n")
    with pytest.raises(
        ConfigError, match=r"^rollout\.step_rule: got own_c:fn, which is a int; takes a function or a cl"
    ):
        load_own("own_c:fn", "rollout.step_rule")


def test_what_is_made_gets_the_arguments_and_a_failure_is_one_line(here: Path) -> None:
    (here / "own_d.py").write_text("def fn(options, n):\n    return options['a'] + n\n")
    assert make_own("own_d:fn", "rollout.step_rule", {"a": 1}, 2) == 3
    with pytest.raises(ConfigError, match=r"^rollout\.step_rule: own_d:fn failed \(KeyError: 'a'\)$"):
        make_own("own_d:fn", "rollout.step_rule", {}, 2)
    with pytest.raises(
        ConfigError, match=r"^rollout\.step_rule: own_d:fn failed \(TypeError: fn\(\) missing 1 required"
    ):
        make_own("own_d:fn", "rollout.step_rule", {})

"""The page opens offline in a real browser, shows what is there, says what is not, and runs nothing it was given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepgrpo.config import ConfigError
from stepgrpo.report import write
from tests.browser import opened

HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
SECTIONS = ("headline", "curves", "tradeoff", "steps", "time", "exits", "viewer")
NUM_BATCHES = 12


def estimate(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def measured(update: int, accuracy: float, tokens: float, steps: float) -> dict[str, Any]:
    return {
        "update": update,
        "version": update // 2,
        "problems": 40,
        "accuracy": estimate(accuracy, 0.03),
        "tokens": estimate(tokens, 3),
        "steps": estimate(steps, 0.2),
    }


def trajectory(text: str, **changes: Any) -> dict[str, Any]:
    return {
        "text": text,
        "steps": [],
        "probes": [],
        "cut": None,
        "closed": None,
        "exit": "natural",
        "complete": True,
        "control": False,
        "correct": True,
        "answer": "4",
        "num_steps": 1,
        "num_tokens": 9,
        "reward": 1.0,
        "advantage": 0.5,
        **changes,
    }


CUT = "😀 4 Wait 5 </think> {4}"
"""Its first letter is two UTF-16 units."""


def group(batch: int) -> dict[str, Any]:
    declined = {"at": 3, "confidence": 0.71, "answer": HOSTILE, "verdict": "declined", "correct": False}
    unread = {"at": 3, "confidence": None, "answer": "{ 4", "verdict": "stale", "correct": None}
    confident = {"at": 10, "confidence": 0.99, "answer": "{4}", "verdict": "confident", "correct": True}
    return {
        "batch": batch,
        "draw": 10 * batch,
        "key": f"train.jsonl:{batch}",
        "prompt": f"{HOSTILE} sum {batch}?",
        "truth": "4",
        "trajectories": [
            trajectory(CUT, steps=[4], probes=[declined, confident], cut=10, closed=19, exit="confident", num_steps=2),
            trajectory(HOSTILE + " Wait 4 </think> {5}", steps=[len(HOSTILE) + 1], correct=False, advantage=-1.0),
            trajectory("4 " * 4000 + "</think> {4}", probes=[unread], control=True, advantage=None, reward=None),
        ],
    }


def save(path: Path, records: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def make_run(directory: Path, *, tokens_after: float = 45.0) -> Path:
    """A run of which every file is there."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    times = {"time/batch": 4.0, "time/wait": 1.0, "time/train": 2.5, "time/publish": 0.1, "time/generate": 3.8}
    rows = []
    for update in range(1, 2 * NUM_BATCHES + 1):
        done = update / (2 * NUM_BATCHES)
        tokens, steps = 90 + done * (tokens_after - 90), 6 - 3 * done
        names = ("reward/mean", "reward/accuracy", "accuracy/control", "accuracy/treated", "policy/entropy")
        rows.append(
            {
                "update": update,
                "batch": (update - 1) // 2,
                **{name: 0.7 + 0.2 * done + rng.normal(0, 0.02) for name in names},
                "rollout/tokens": tokens,
                "rollout/steps": steps,
                "rollout/tokens_per_step": tokens / steps,
                "exit/natural": 0.6,
                "exit/confident": 0.4,
                "closing/logprob": None if update == 3 else -2.0 - done,
                "staleness/mean": 0.9,
                "staleness/max": 1,
                "policy/kl": 0.1 * done,
                **(times if update % 2 == 0 else {}),
            }
        )
    save(directory / "metrics.jsonl", rows)
    ends = measured(0, 0.78, 88, 5.8), measured(2 * NUM_BATCHES, 0.97, tokens_after, 2.5)
    save(directory / "evaluations.jsonl", ends)
    summary = {
        "status": "finished",
        "seconds": {"start": 9.0, "train": 48.0, "save": 0.1},
        "before": ends[0],
        "after": ends[1],
        "compression": estimate(tokens_after / 88, 0.02),
    }
    (directory / "summary.json").write_text(json.dumps(summary))
    config = {"model": {"think_close": "</think>"}, "rollout": {"probe": {"delta": 0.95}}}
    (directory / "config.json").write_text(json.dumps(config))
    answers = {
        when: {
            "key": [str(i) for i in range(40)],
            "correct": rng.integers(0, 2, (40, 2)).tolist(),
            "tokens": rng.integers(20, most * 10, (40, 2)).tolist(),
            "steps": rng.integers(1, most, (40, 2)).tolist(),
        }
        for when, most in {"before": 12, "after": 5}.items()
    }
    (directory / "heldout.json").write_text(json.dumps(answers))
    probes = {
        "confidence": [0.6, 0.97, 0.9995],
        "correct": [0, 0, 1],
        "verdict": ["declined", "confident", "confident"],
    }
    save(directory / "probes.jsonl", [{"batch": i, **probes} for i in range(NUM_BATCHES)])
    save(directory / "samples.jsonl", [group(0), group(5)])
    return directory


def make_results(directory: Path) -> Path:
    """A table in which three methods lie close together."""
    directory.mkdir()
    methods = [
        {
            "method": name,
            "label": label,
            "group": "Methods",
            "seeds": 2,
            "accuracy": estimate(accuracy, 0.01),
            "tokens": estimate(tokens, 2),
            "share": None if name == "odd" else estimate(tokens / 88, 0.02),
            "steps": estimate(3, 0.1),
            "published": {},
            "points": [{"seed": s, "accuracy": accuracy, "tokens": tokens + s, "steps": 3.0} for s in (0, 1)],
        }
        for name, label, accuracy, tokens in [
            ("vanilla", "vanilla", 0.78, 88),
            ("a", "GRPO + a long name of a penalty", 0.96, 45),
            ("b", "GRPO + another long name", 0.965, 46),
            ("odd", HOSTILE, 0.955, 47),
        ]
    ]
    (directory / "table.json").write_text(json.dumps({"name": "small", "reference": "vanilla", "methods": methods}))
    return directory


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    output = directory / "report.html"
    write([make_run(directory / "first"), make_run(directory / "second"), make_results(directory / "table")], output)
    return output


def test_every_section_has_its_charts_and_nothing_given_to_it_runs(page: Path) -> None:
    with opened(page) as browser:
        for name in SECTIONS:
            assert browser.locator(f"#{name} h2").is_visible()
        for name, charts in {"curves": 11, "tradeoff": 2, "steps": 2, "time": 2, "exits": 3}.items():
            assert browser.locator(f"#{name} .plot").count() == charts
            assert browser.locator(f"#{name} .plot:has(svg.main-svg)").count() == charts
        assert browser.locator(".empty").count() == 0
        assert browser.title() == "first, second, small · stepgrpo"
        assert browser.locator(".said").filter(has_text=HOSTILE).count() == 2
        assert HOSTILE in browser.locator("#headline tbody tr:last-child th").last.inner_text()
        assert browser.locator("img").count() == 0


def test_labels_of_methods_that_lie_close_together_do_not_collide(page: Path) -> None:
    for width in (1280, 390):
        with opened(page, width=width) as browser:
            boxes = [
                label.bounding_box() for label in browser.locator("#tradeoff .card >> nth=0 >> .annotation-text").all()
            ]
        assert len(boxes) == 4
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                assert a and b
                apart = (a["x"] + a["width"] <= b["x"], b["x"] + b["width"] <= a["x"])
                assert any(apart) or a["y"] + a["height"] <= b["y"] + 2 or b["y"] + b["height"] <= a["y"] + 2


def test_a_trajectory_shows_steps_probes_and_the_cut_where_they_are(page: Path) -> None:
    with opened(page) as browser:
        cards = browser.locator(".trajectory")
        assert cards.count() == 3
        steps = cards.nth(0).locator(".step .said")
        assert [s.evaluate("e => e.firstChild.textContent") for s in steps.all()] == ["😀 4", "Wait 5"]
        probes = cards.nth(0).locator(".probe")
        assert [p.evaluate("e => e.className") for p in probes.all()] == ["probe declined", "probe confident"]
        assert probes.nth(1).inner_text() == "{4} · 0.990 ✓"
        assert cards.nth(2).locator(".probe").inner_text() == "{ 4 · not read to its end"
        assert cards.nth(0).locator(".cut").inner_text() == "✂ cut here"
        assert cards.nth(0).locator(".forced").inner_text() == "</think>"
        assert cards.nth(1).locator(".cut").count() == 0
        assert [c.locator(".control").count() for c in cards.all()] == [0, 0, 1]
        text = cards.nth(2).locator(".text")
        assert text.evaluate("e => e.scrollHeight > 2 * e.clientHeight")


def test_the_viewer_goes_through_the_groups_by_button_and_by_key(page: Path) -> None:
    with opened(page) as browser:
        prompt = browser.locator(".prompt dd").first
        assert prompt.inner_text().endswith("sum 0?")
        browser.click("#next")
        assert prompt.inner_text().endswith("sum 5?") and browser.locator("#next").is_disabled()
        browser.keyboard.press("ArrowLeft")
        assert prompt.inner_text().endswith("sum 0?")
        browser.keyboard.press("ArrowRight")
        assert prompt.inner_text().endswith("sum 5?")
        browser.locator("#viewer select.run").select_option("second")
        assert prompt.inner_text().endswith("sum 0?")
        assert browser.locator("#exits select.run").input_value() == "1"


def test_nothing_overflows_a_phone(page: Path) -> None:
    for width in (390, 380):
        with opened(page, width=width, height=844, is_mobile=True, has_touch=True) as browser:
            assert browser.evaluate("document.documentElement.scrollWidth") == width
            assert browser.locator(".plot:has(svg.main-svg)").count() == 20


def test_dark_mode_changes_page_and_charts_while_it_is_open(page: Path) -> None:
    look = """() => [getComputedStyle(document.body).backgroundColor,
                     getComputedStyle(document.querySelector('#curves .xtick text')).fill]"""
    with opened(page, color_scheme="light") as browser:
        light = browser.evaluate(look)
        browser.emulate_media(color_scheme="dark")
        browser.wait_for_function(f"light => ({look})().every((colour, i) => colour !== light[i])", arg=light)


def test_it_prints_every_section_on_paper(page: Path, tmp_path: Path) -> None:
    with opened(page, color_scheme="dark") as browser:
        browser.pdf(path=tmp_path / "report.pdf")
        assert "printing" not in (browser.get_attribute("html", "class") or "")
    assert (tmp_path / "report.pdf").stat().st_size > 50_000


def test_an_old_run_says_in_one_line_what_it_lacks(tmp_path: Path) -> None:
    run = make_run(tmp_path / "old")
    for name in ("heldout.json", "probes.jsonl", "samples.jsonl"):
        (run / name).unlink()
    write([run], tmp_path / "report.html")
    with opened(tmp_path / "report.html") as browser:
        said = {s: browser.locator(f"#{s} .empty").all_inner_texts() for s in ("steps", "exits", "viewer")}
        assert all(text.startswith("old has no heldout.json: ") for text in said["steps"])
        assert len(said["exits"]) == 2 and "old has no probes" in said["exits"][0]
        assert said["viewer"][0].startswith("old has no samples.jsonl: ")


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "young"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"update": 1, "batch": 0, "reward/mean": 0.5}\n{"update": 2, "rew')
    write([run], tmp_path / "report.html")
    with opened(tmp_path / "report.html") as browser:
        assert "no summary: going on, or killed" in browser.locator("#headline").inner_text()
        assert browser.locator("#curves .plot:has(svg.main-svg)").count() == 2


@pytest.mark.parametrize(("tokens", "warned"), [(45.0, 0), (86.0, 1)])
def test_fewer_steps_without_fewer_tokens_are_warned_about(tmp_path: Path, tokens: float, warned: int) -> None:
    write([make_run(tmp_path / "run", tokens_after=tokens)], tmp_path / "report.html")
    with opened(tmp_path / "report.html") as browser:
        warnings = browser.locator(".warning").all_inner_texts()
    assert len(warnings) == warned
    assert all("may have stopped saying its trigger" in text for text in warnings)


def test_a_source_that_is_no_run_is_refused_with_what_lies_in_it(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "one")
    with pytest.raises(ConfigError, match=r"runs: takes a run directory .*; try what lies in it: one$"):
        write([tmp_path / "runs"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_bad_line_is_named_with_file_and_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "probes.jsonl").write_text('{"batch": 0\n')
    with pytest.raises(ConfigError, match=r"probes.jsonl:1: is not JSON \(.*\); repair or remove the line"):
        write([run], tmp_path / "report.html")


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--output: got .*, cannot be written \("):
        write([make_run(tmp_path / "run")], tmp_path)

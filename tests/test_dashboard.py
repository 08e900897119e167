"""The dashboard shows what the files say, follows them, and lets in nobody else: a recorded run in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import httpx
import numpy as np
import pytest
import uvicorn
from playwright.sync_api import Page, expect

from stepgrpo import rundir
from stepgrpo.config import ConfigError
from stepgrpo.console import Display
from stepgrpo.dashboard import recorded, serve
from stepgrpo.dashboard.files import CHUNK, Tail
from stepgrpo.dashboard.runs import Run, Runs
from stepgrpo.dashboard.server import application
from stepgrpo.dashboard.timeline import MOST_BLOCKS, Timeline
from tests.browser import opened

PAGES = ("overview", "timeline", "throughput", "trajectories", "exits", "logs", "compare")
UNREACHABLE = "Failed to load resource"
"""What Chromium logs of a request that was refused, or of a server that is gone."""

expect.set_options(timeout=20_000)


@contextmanager
def served(*sources: Path, port: int = 0, **options: Any) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", port))
    port = listener.getsockname()[1]
    app = application(Runs([str(s) for s in sources]), port=port, **{"token": None, **options})
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A real run, which is over."""
    with recorded() as [directory]:
        shutil.copytree(Path(directory, "quickstart"), tmp_path / "runs" / "quickstart")
    return tmp_path / "runs" / "quickstart"


def lines(path: Path) -> list[dict[str, Any]]:
    return list(rundir.read_json_lines(path))


def tile(page: Page, name: str) -> Any:
    return page.locator(".tile", has=page.get_by_text(name, exact=True)).locator("dd")


def turn_to(page: Page, name: str) -> None:
    page.click(f"[data-page={name}]")
    expect(page.locator(f"#{name}")).to_be_visible()


def num_shown(spans: Sequence[dict[str, Any]]) -> int:
    """Without the kinds of work that are switched off at first."""
    return sum(s["name"] not in ("probe", "reference", "old", "optimize", "snapshot") for s in spans)


def span(actor: str, name: str, start: float, seconds: float, **arguments: Any) -> dict[str, Any]:
    return {"actor": actor, "node": "0", "restart": 0, "name": name, "start": start, "seconds": seconds, **arguments}


def timeline(spans: Sequence[dict[str, Any]]) -> Timeline:
    made = Timeline()
    for i, s in enumerate(sorted(spans, key=lambda s: s["start"] + s["seconds"])):
        made.add(i, s)
    return made


# ---- the page


def test_the_pages_show_the_figures_of_the_files(run: Path) -> None:
    rows, spans = lines(run / "metrics.jsonl"), lines(run / "spans.jsonl")
    evaluations, samples = lines(run / "evaluations.jsonl"), lines(run / "samples.jsonl")
    with served(run) as url, opened(url) as page:
        expect(page.locator("#status .badge")).to_have_text("finished")
        expect(tile(page, "Updates")).to_contain_text(f"{rows[-1]['update']}")
        expect(tile(page, "Reward")).to_contain_text(f"{rows[-1]['reward/mean']:.3f}")
        before, after = (100 * evaluations[i]["accuracy"]["mean"] for i in (0, -1))
        expect(tile(page, "Accuracy")).to_contain_text(f"held out: {before:.1f} → {after:.1f} %")
        assert page.locator("#recent tr").count() == len(lines(run / "events.jsonl"))
        assert "[object" not in page.locator("#recent").inner_text()
        assert page.evaluate("runs[0].curves['rollout/tokens'].length") == len(rows)
        expect(page.locator("#curves .plot:has(svg.main-svg)")).to_have_count(11)

        turn_to(page, "timeline")
        expect(page.locator("#lanes .controls")).to_contain_text(f"{num_shown(spans):,} spans")
        for box in page.locator("#lanes fieldset input").all():
            box.check()
        expect(page.locator("#lanes .controls")).to_contain_text(f"{len(spans):,} spans")
        assert page.evaluate("timeline.shown.answer.blocks.count.reduce((a, b) => a + b)") == len(spans)
        turn_to(page, "throughput")
        expect(page.locator("#shares tr")).to_have_count(len({s["actor"] for s in spans}))
        expect(page.locator("#tokens .plot:has(svg.main-svg)")).to_have_count(2)
        turn_to(page, "trajectories")
        page.click("#next")
        expect(page.locator("#viewer .prompt dd").first).to_have_text(samples[1]["prompt"])
        assert page.locator("#viewer .trajectory").count() == len(samples[1]["trajectories"])
        turn_to(page, "exits")
        expect(page.locator("#exits .plot:has(svg.main-svg)")).to_have_count(5)
        page.keyboard.press("ArrowRight")  # a tab has the focus
        expect(page.locator("#logs")).to_be_visible()
        page.click("#settings summary")
        assert '"delta": 0.95' in page.inner_text("#settings pre")


def test_a_block_of_the_timeline_tells_what_it_was_and_keys_move_the_window(run: Path) -> None:
    with served(run) as url, opened(url + "#page=timeline") as page:
        expect(page.locator("canvas")).to_be_visible()
        said = page.locator("#lanes .controls")
        expect(said).to_contain_text(f"{num_shown(lines(run / 'spans.jsonl')):,} spans")
        place = page.evaluate("""() => {
            const {blocks} = timeline.shown.answer, at = blocks.seconds.indexOf(Math.max(...blocks.seconds)),
              row = timeline.places().find(box => box[4] === at);
            return {x: (row[0] + row[2]) / 2, y: row[1] + 3, at: blocks.at[at]};
        }""")
        page.locator("canvas").click(position={"x": place["x"], "y": place["y"]})
        with (run / "spans.jsonl").open("rb") as f:
            f.seek(place["at"])
            it = json.loads(f.readline())
        expect(page.locator(".detail b")).to_have_text(f"{it['actor']}: {it['name']}")
        expect(page.locator(".detail")).to_contain_text(f"node {it['node']}")
        whole = said.inner_text()
        page.click("text=Last minute")
        expect(said).to_contain_text("spans in 60.00 s")
        page.locator("canvas").focus()
        page.keyboard.press("+")
        expect(said).to_contain_text("spans in 30.00 s")
        page.keyboard.press("Home")
        expect(said).to_have_text(whole, use_inner_text=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_a_phone(run: Path, scheme: Any) -> None:
    phone = {"width": 390, "height": 844, "is_mobile": True, "has_touch": True, "color_scheme": scheme}
    with served(run) as url, opened(url, **phone) as page:
        expect(page.locator("#status .badge")).to_be_visible()
        for name in PAGES:
            turn_to(page, name)
            assert page.evaluate("document.documentElement.scrollWidth") == 390, name


# ---- while a run goes on


def test_lines_that_are_appended_appear_and_a_roll_back_is_followed(run: Path) -> None:
    (run / "summary.json").unlink()
    rows = lines(run / "metrics.jsonl")
    with served(run.parent) as url, opened(url) as page:
        with rundir.alone(run, "run"):  # as `train` has it: looking on does not keep it out
            expect(page.locator("#status .badge")).to_have_text("● live")
            expect(tile(page, "Updates")).to_contain_text("90")
            with (run / "metrics.jsonl").open("a") as f:
                f.write(json.dumps({**rows[-1], "update": 91, "reward/mean": 0.12345}) + '\n{"update": 92, "rew')
            expect(tile(page, "Updates")).to_contain_text("91")
            expect(tile(page, "Reward")).to_contain_text("0.123")
            rundir.append_event(run, "died", worker=3, node="abc", reason="its node went away", reissued=[7])
            expect(page.locator("#recent tr").first).to_contain_text("reason its node went away")

            assert rundir.roll_back(run, 30)
            expect(tile(page, "Updates")).to_contain_text("60")
            # A look may have come between two of the files.
            kept = {"curves.update": 60, "samples": len(lines(run / "samples.jsonl"))}
            for name, number in kept.items():
                page.wait_for_function(f"runs[0].{name}.length === {number}")
            rundir.append_json(run / "metrics.jsonl", {**rows[60], "restart": 1})
            expect(tile(page, "Updates")).to_contain_text("61")
        (run / "error.txt").write_text("Traceback ...\nRuntimeError: the disk is full\n")
        (run / "summary.json").write_text('{"status": "failed", "seconds": {"train": 5.0}}')
        expect(page.locator("#status")).to_contain_text("RuntimeError: the disk is full")


def test_the_page_says_when_the_server_is_gone_and_goes_on_when_it_is_back(run: Path) -> None:
    with ExitStack() as stack:
        with served(run) as url:
            page = stack.enter_context(opened(url, forgiven=UNREACHABLE))
            expect(tile(page, "Updates")).to_contain_text("90")
        expect(page.locator("#offline")).to_contain_text("does not answer")
        assert tile(page, "Updates").is_visible()
        rundir.roll_back(run, 30)
        with served(run, port=int(url.rsplit(":")[-1].strip("/"))):
            expect(page.locator("#offline")).to_be_hidden()
            expect(tile(page, "Updates")).to_contain_text("60")


def test_a_copy_of_a_run_without_an_end_is_not_called_live(run: Path, tmp_path: Path) -> None:
    (run / "summary.json").unlink()
    with rundir.alone(run, "run"):
        shutil.copytree(run, tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        os.utime(path, (1e9, 1e9))
    with served(tmp_path / "copy") as url, opened(url) as page:
        expect(page.locator("#status .badge")).to_have_text("silent")
        expect(page.locator("#status")).to_contain_text("goes on with --resume")
        expect(tile(page, "Updates")).to_contain_text("90")


def test_a_run_that_is_broken_in_places_is_shown_with_what_is_wrong(run: Path) -> None:
    for name in ("samples.jsonl", "heldout.json", "events.jsonl", "config.json"):
        (run / name).unlink()
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("no JSON\n[1]\n" + whole + '{"update": 9')
    (run / "probes.jsonl").write_text('{"batch": 0}\n')
    (run / "summary.json").write_text('{"status": "fin')
    with (run / "spans.jsonl").open("a") as f:
        f.write('{"actor": "driver"}\n')
    stacks = "stacks-20260101-000000.txt"
    for name in ("error.txt", stacks):  # also root cannot read a directory as a file
        (run / name).mkdir()
        (run / name / "x").touch()
    with served(run) as url, opened(url, forgiven=UNREACHABLE) as page:
        expect(tile(page, "Updates")).to_contain_text("90")
        for name in PAGES:
            turn_to(page, name)
        turn_to(page, "logs")
        expect(page.locator("#faults")).to_contain_text("metrics.jsonl, byte 0: is no record")
        expect(page.locator("#faults")).to_contain_text("summary.json: is no record")
        expect(page.locator("#faults")).to_contain_text("calibration: cannot be told")
        expect(page.locator("#faults")).to_contain_text("error.txt: cannot be read: [Errno 21] Is a directory")
        page.get_by_role("button", name=stacks).click()
        expect(page.locator("#offline")).to_contain_text("a file of the run cannot be read ([Errno 21] Is a directory")
        turn_to(page, "trajectories")
        expect(page.locator("#viewer .empty")).to_contain_text("has no samples.jsonl")


def test_names_that_look_like_markup_are_shown_as_they_are(run: Path) -> None:
    worker, phase = "worker <b>7</b>", "<i>before</i>"
    rundir.append_json(
        run / "spans.jsonl", span(worker, "generate", lines(run / "spans.jsonl")[0]["start"], 9, tokens=1)
    )
    (run / "summary.json").write_text(json.dumps({"status": "finished", "seconds": {phase: 5.0, "train": 9.0}}))
    with served(run) as url, opened(url) as page:
        turn_to(page, "throughput")
        expect(page.locator("#tokens .legend")).to_contain_text(worker)
        expect(page.locator("#time .legend").last).to_contain_text(phase)


def test_a_directory_whose_first_run_begins_later_shows_it_then(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with served(tmp_path / "empty") as url, opened(url) as page:
        expect(page.locator("#nothing")).to_contain_text("No run lies there yet")
        (run / "spans.jsonl").rename(tmp_path / "spans")
        run.rename(tmp_path / "empty" / "first")
        expect(page.locator("h1")).to_have_text("first")
        expect(tile(page, "Updates")).to_contain_text("90")
        turn_to(page, "timeline")
        expect(page.locator(".detail")).to_contain_text("No spans.jsonl yet")
        (tmp_path / "spans").rename(tmp_path / "empty" / "first" / "spans.jsonl")
        expect(page.locator("canvas")).to_be_visible()


def test_runs_are_compared_by_their_curves_and_by_the_settings_that_differ(run: Path) -> None:
    other = run.with_name("other")
    shutil.copytree(run, other)
    config = json.loads((run / "config.json").read_text())
    config["reward"]["beta"] = 0.25
    (other / "config.json").write_text(json.dumps(config))
    with served(run.parent) as url, opened(url + "#run=quickstart&page=compare") as page:
        expect(page.locator("h1")).to_have_text("quickstart")
        expect(page.locator("#differences")).to_contain_text("Choose other runs above")
        page.locator("#chosen label", has_text="other").locator("input").check()
        expect(page.locator("#table tbody tr")).to_have_count(2)
        assert page.locator("#differences tbody tr").all_inner_texts() == ["reward.beta\t0.5\t0.25"]
        # Of each run the updates, their average and the evaluations; drawn where it is looked at.
        page.locator("#overlaid .plot").first.scroll_into_view_if_needed()
        expect(page.locator("#overlaid .plot").first.locator(".scatterlayer .trace")).to_have_count(6)
        page.select_option("#run", "other")
        expect(page.locator("h1")).to_have_text("other")


# ---- who may look


def test_with_a_token_nobody_gets_in_without_it_and_it_leaves_the_address(run: Path) -> None:
    with served(run, token="s3cret") as url, httpx.Client(base_url=url) as client:
        for path in (
            "/",
            "/api/runs",
            "/api/run?run=quickstart",
            "/static/parts.js",
            "/api/runs?token=s3cret",
            "/?token=x",
        ):
            assert client.get(path).status_code == 401, path
        assert client.get("/", params={"token": "s3cret"}, headers={"Host": "node7:8270"}).headers["location"] == "/"
        cookie = client.cookies.jar.__iter__().__next__()
        assert cookie.has_nonstandard_attr("HttpOnly") and cookie.get_nonstandard_attr("SameSite") == "strict"
        assert client.get("/api/runs").json()["runs"] == ["quickstart"]
        with opened(url + "?token=s3cret", forgiven=UNREACHABLE) as page:
            expect(tile(page, "Updates")).to_contain_text("90")
            assert "s3cret" not in page.url
            page.context.clear_cookies()
            expect(page.locator("#offline")).to_contain_text("A token is needed")


def test_without_a_token_it_answers_to_this_machines_own_names_alone(run: Path) -> None:
    with served(run) as url, httpx.Client(base_url=url) as client:
        for host, status in {
            "127.0.0.1:8270": 200,
            "localhost": 200,
            "[::1]:8270": 200,
            "evil.example": 403,
            "localhost.evil.example:8270": 403,
            "": 403,
        }.items():
            assert client.get("/api/runs", headers={"Host": host}).status_code == status, host
        policy = client.get("/").headers["content-security-policy"]
        assert "default-src 'self'" in policy and "unsafe-inline" not in policy.split("style-src")[0]
        assert client.post("/api/runs").status_code == 405


def test_no_file_but_those_of_its_runs_can_be_had(run: Path) -> None:
    (run.parent / "secret.txt").write_text("secret")
    (run / "stacks-20260101-000000.txt").write_text("Thread 1")
    with served(run) as url, httpx.Client(base_url=url) as client:
        got = client.get("/api/stacks", params={"run": "quickstart", "file": "stacks-20260101-000000.txt"})
        assert got.json() == {"text": "Thread 1"}
        for file in ("../secret.txt", "config.json", "stacks-20260101-000000.txt/../../secret.txt", "/etc/passwd", ""):
            assert client.get("/api/stacks", params={"run": "quickstart", "file": file}).status_code == 404
        for name in ("..", "../runs/quickstart", "/etc", str(run)):
            assert client.get("/api/run", params={"run": name}).status_code == 404
        for path in ("/static/..%2f..%2fcli.py", "/static/server.py", "/static/%2e%2e/server.py", "/etc/passwd"):
            assert client.get(path).status_code == 404
        for index in ("-1", "1e9"):
            assert client.get("/api/sample", params={"run": "quickstart", "index": index}).status_code == 404
        assert client.get("/api/timeline", params={"run": "quickstart", "from": "nan"}).status_code == 400


def test_the_same_question_is_answered_with_nothing_until_there_is_something_new(run: Path) -> None:
    with served(run) as url, httpx.Client(base_url=url) as client:
        first = client.get("/api/run", params={"run": "quickstart"})
        again = {"run": "quickstart", "since": first.json()["mark"]}
        second = client.get("/api/run", params=again)
        assert second.json()["curves"] == {}
        known = {"If-None-Match": second.headers["etag"]}
        assert client.get("/api/run", params=again, headers=known).status_code == 304
        rundir.append_json(run / "metrics.jsonl", {"update": 91, "reward/mean": 0.5})
        third = client.get("/api/run", params=again, headers=known)
        assert third.status_code == 200 and third.json()["curves"] == {"update": [91.0], "reward/mean": [0.5]}


# ---- the command


def test_the_demo_opens_without_a_run_and_says_what_it_is() -> None:
    command = [sys.executable, "-m", "stepgrpo", "dashboard", "--demo", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            url = process.stdout.readline().split()[2]
            with opened(url) as page:
                expect(page.locator("#demo")).to_contain_text("Demo data")
                expect(tile(page, "Updates")).to_contain_text("90")
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("sources", "demo", "message"),
    [
        ([], False, "dashboard: got neither, takes run directories or --demo"),
        (["runs"], True, "dashboard: got both, takes run directories or --demo"),
        (["/none"], False, r"/none: is no directory; takes a run directory"),
        (["http://127.0.0.1:8270"], False, "open a dashboard's URL in a browser"),
        (["nonsense://a"], False, "takes a directory or a URL that fsspec can open"),
    ],
)
def test_what_it_cannot_show_is_refused_in_one_line(sources: list[str], demo: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        serve(sources, Display(), host="127.0.0.1", port=0, demo=demo)


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--host, --port: got 127.0.0.1 and {port}, cannot be had"):
            serve([str(tmp_path)], Display(), host="127.0.0.1", port=port, demo=False)


# ---- files


def test_a_url_is_read_like_a_directory(run: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(run), "/bucket/quickstart", recursive=True)
    found = Runs(["memory://bucket"]).all()
    assert list(found) == ["quickstart"]
    assert found["quickstart"].state("")["last"] == 90
    assert found["quickstart"].timeline(None, None, 1000, None)["spans"] == len(lines(run / "spans.jsonl"))


def test_a_growing_file_is_read_on_and_a_replaced_one_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    tail = Tail(fsspec.filesystem("file"), str(path))

    def read() -> tuple[bool, list[int]]:
        part = tail.read()
        return part.anew, [line["n"] for _, line in part.lines]

    assert read() == (False, [])
    path.write_text('{"n": 1}\n{"n": 2}\n{"n"')
    assert read() == (False, [1, 2])
    with path.open("a") as f:
        f.write(': 3}\n{"n": 4}')
    assert read() == (False, [3])
    path.write_text('{"n": 1}\n')  # shorter
    assert read() == (True, [1])
    path.write_text('{"n": 5}\n')  # as long
    os.utime(path, (1, 1))
    assert read() == (True, [5])
    path.write_text('{"n": 6}\n{"n": 7}\n')  # longer, and another one
    assert read() == (True, [6, 7])
    path.unlink()
    assert read() == (True, [])


# ---- spans


def test_100_000_spans_come_in_parts_and_as_few_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    starts, seconds = rng.uniform(0, 3600, 100_000), rng.exponential(2.0, 100_000)
    order = np.argsort(starts + seconds)
    with (tmp_path / "spans.jsonl").open("w") as f:
        for i in order:
            generate = span(f"rollout worker {i % 8}", "generate", 1e9 + starts[i], seconds[i], draw=int(i), tokens=300)
            f.write(json.dumps({**generate, "oldest": 3, "newest": 4}) + "\n")
    assert (tmp_path / "spans.jsonl").stat().st_size > CHUNK
    run = Run(fsspec.filesystem("file"), str(tmp_path), "many")
    first = run.timeline(None, None, 1200, None)
    assert first["more"] and 0 < first["read"] < 1
    while (answer := run.timeline(None, None, 1200, None))["more"]:
        pass
    blocks = answer["blocks"]
    assert answer["spans"] == sum(blocks["count"]) == 100_000
    assert len(blocks["count"]) <= MOST_BLOCKS and max(blocks["busy"]) <= 1
    assert len(json.dumps(answer)) < 1.5e6
    near = run.timeline(1e9 + 600, 1e9 + 602, 1200, None)
    within = (starts < 602) & (starts + seconds > 600)
    assert near["spans"] == within.sum() and len(near["blocks"]["count"]) > 0.9 * within.sum()
    one = near["blocks"]["count"].index(1)
    assert run.span(near["blocks"]["at"][one])["tokens"] == 300  # type: ignore[index]


def test_spans_that_overlap_take_as_many_lanes_as_go_on_at_once() -> None:
    made = timeline([span("w 0", "generate", s, d) for s, d in [(0, 4), (1, 1), (2, 3), (4, 2), (5, 1)]])
    answer = made.window(0, 10, 10, None, {})
    assert answer["tracks"] == [{"actor": "w 0", "name": "generate", "lanes": 2}]
    placed: dict[int, list[tuple[float, float]]] = {}
    for lane, start, seconds in zip(*(answer["blocks"][c] for c in ("lane", "start", "seconds")), strict=True):
        placed.setdefault(lane, []).append((start, start + seconds))
    for intervals in placed.values():
        intervals.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(intervals))


def test_a_group_is_as_stale_as_its_update_was_late() -> None:
    made = timeline(
        [
            span("rollout worker 0", "generate", 0, 1, draw=7, tokens=5, oldest=2, newest=3),
            span("rollout worker 0", "generate", 2, 1, draw=8, tokens=5, oldest=3, newest=3),
            span("learner rank 0", "publish", 4, 1, version=4),
        ]
    )
    blocks = made.window(0, 10, 10, None, {7: 4})["blocks"]
    assert blocks["version"] == [4, 3, 3] and blocks["oldest"] == [4, 2, 3] and blocks["stale"] == [-1, 2, -1]


def test_busy_shares_count_what_overlaps_once_and_tokens_lie_where_they_were_made() -> None:
    made = timeline([
        span("rollout worker 0", "generate", 0, 4, draw=0, tokens=400),
        span("rollout worker 0", "generate", 2, 4, draw=1, tokens=40),
        span("learner rank 0", "update", 5, 2, batch=0, version=1),
        span("learner rank 0", "grade", 0, 10, draw=0),
        span("driver", "batch", 0, 10, batch=0),
    ])  # fmt: skip
    driver, rank, worker = made.shares(0, 10)
    assert (driver["actor"], driver["busy"]) == ("driver", None)
    assert rank["busy"] == pytest.approx(0.2) and rank["names"] == pytest.approx({"update": 0.2, "grade": 1.0})
    assert worker["busy"] == pytest.approx(0.6)
    assert made.rates(0, 10, 5)["actors"] == {"rollout worker 0": [100.0, 110.0, 10.0, 0.0, 0.0]}

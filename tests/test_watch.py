"""The view of a run from outside: of directories written by hand, and of a real run from before its beginning on."""

from __future__ import annotations

import fcntl
import gzip
import io
import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from stepgrpo import console, rundir, watch
from stepgrpo.cli import app
from stepgrpo.config import Config, ConfigError, load
from stepgrpo.console import Display
from stepgrpo.rundir import append_event, append_json, save_json
from tests import test_submit
from tests.test_trace import arrows, assert_keeps_perfettos_rules

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
STEPGRPO = Path(sys.executable).with_name("stepgrpo")
SMALL = [
    "rollout.group_size=4",
    "engine.kv_cache_mb=64",
    "train.prompts_per_batch=4",
    "train.prompts_per_update=2",
    "train.num_batches=8",
    "eval.num_prompts=20",
    "eval.num_prompts_during=10",
    "eval.every=3",
    "checkpoint.every=4",
]
ROW = {
    "batch": 0,
    "reward/accuracy": 0.75,
    "rollout/tokens": 50.0,
    "rollout/steps": 3.0,
    "exit/confident": 0.25,
    "staleness/mean": 1.0,
    "rate/tokens": 4000.0,
    "time/batch": 2.0,
}
SECONDS = 300.0

Json = dict[str, Any]


def begun(directory: Path, *settings: str, batches: int = 0) -> Path:
    """A run of 90 batches by hand, as it lies there after the first ones."""
    save_json(directory / "config.json", load(Config, QUICKSTART, list(settings)).model_dump())
    append_event(directory, "start", restart=0)
    for batch in range(batches):
        append_json(directory / "metrics.jsonl", *({**ROW, "batch": batch, "update": 2 * batch + i} for i in (1, 2)))
    return directory


def silent(directory: Path) -> Path:
    an_hour_ago = time.time() - 3600
    for path in (*directory.iterdir(), directory):
        os.utime(path, (an_hour_ago, an_hour_ago))
    return directory


def seen(directory: Path) -> tuple[int, str]:
    """Status and words of a watch without a terminal."""
    done = subprocess.run([STEPGRPO, "watch", directory], stdout=subprocess.PIPE, text=True, timeout=60)
    return done.returncode, done.stdout


@contextmanager
def worked_on(directory: Path) -> Iterator[None]:
    """Somebody else holds the directory's lock."""
    script = f"""
import sys
from pathlib import Path
from stepgrpo.rundir import alone
with alone(Path({str(directory)!r}), "run"):
    print("mine", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        yield
        holder.communicate()


# ---- how a run ends


def test_a_run_whose_driver_died_is_told_from_one_that_is_only_slow(tmp_path: Path) -> None:
    directory = begun(tmp_path, batches=3)
    config = load(Config, QUICKSTART)
    with worked_on(directory):
        assert watch._ended(silent(directory), config) is None
    assert watch._ended(silent(directory), config) == {}
    status, screen = seen(directory)
    assert status == 1
    words = "the run died: nothing was written for 1:00:0. and nobody works on it; go on with it by its command with"
    assert re.search(rf"error: .*: {words} --resume\n$", screen)


def test_a_run_that_has_just_lost_its_driver_may_be_started_again(tmp_path: Path) -> None:
    assert watch._ended(begun(tmp_path), load(Config, QUICKSTART)) is None


@pytest.mark.parametrize(
    ("summary", "words"),
    [
        (
            {"status": "interrupted", "updates": 2},
            "the run was interrupted; go on with it by its command with --resume",
        ),
        ({"status": "failed", "updates": 2}, "the run failed: TrainError: the cause; go on with it by its command"),
    ],
)
def test_a_run_that_ended_early_says_why_and_what_to_do(tmp_path: Path, summary: Json, words: str) -> None:
    directory = begun(tmp_path, "train.max_restarts=0", batches=1)
    save_json(directory / "summary.json", summary)
    # As Python prints a group of exceptions.
    (directory / "error.txt").write_text(
        "  | Traceback\n  |  line\n    | TrainError: the cause\n    +-----------------\n"
    )
    status, screen = seen(directory)
    assert status == 1 and words in screen


def test_a_failed_run_is_waited_for_while_it_may_be_started_again(tmp_path: Path) -> None:
    directory = begun(tmp_path)
    config = load(Config, QUICKSTART)
    assert config.train.max_restarts > 0
    save_json(directory / "summary.json", {"status": "failed"})
    assert watch._ended(directory, config) is None
    assert watch._ended(silent(directory), config) == {"status": "failed"}


def test_a_run_that_is_gone_on_with_is_not_over(tmp_path: Path) -> None:
    directory = begun(tmp_path)
    save_json(directory / "summary.json", {"status": "interrupted"})
    with worked_on(directory):
        assert watch._ended(directory, load(Config, QUICKSTART)) is None


def test_a_run_on_another_machine_is_over_when_its_lock_is_left_or_touched_no_more(tmp_path: Path) -> None:
    """A copy is what another machine sees of a shared directory: the files, and no lock that its kernel knows."""
    directory, before, after = (tmp_path / name for name in ("here", "before", "after"))
    directory.mkdir()
    begun(directory)
    summary = {"status": "interrupted"}  # of an earlier attempt
    save_json(directory / "summary.json", summary)
    with worked_on(directory):
        shutil.copytree(directory, before)
    shutil.copytree(directory, after)
    config = load(Config, QUICKSTART)
    assert watch._ended(before, config) is None
    assert watch._ended(silent(before), config) == watch._ended(after, config) == summary


def test_a_lock_is_touched_for_as_long_as_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "TOUCH_SECONDS", 0.01)
    with rundir.alone(begun(tmp_path), "run"):
        silent(tmp_path)
        while watch._silent_seconds(tmp_path) > rundir.FRESH_SECONDS:
            time.sleep(0.01)
        with pytest.raises(ConfigError, match=f"another run works here .*, process {os.getpid()}"):
            rundir.alone(tmp_path, "run").__enter__()


def test_where_no_run_begins_it_says_what_it_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "BEGIN_SECONDS", 0.0)
    screen = io.StringIO()
    with pytest.raises(ConfigError, match=r"none: holds no run, and none began within 0 s; takes a run's directory"):
        watch.watch(tmp_path / "none", Display(Console(file=screen)))
    assert screen.getvalue().startswith(f"… waiting for a run to begin in {tmp_path / 'none'}"[:60])


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    status, screen = seen(tmp_path)
    assert status == 2 and "takes a run of `stepgrpo train` (name: missing" in screen


# ---- what is shown


def test_the_end_of_a_file_is_read_as_far_as_its_lines_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lines.jsonl"
    assert watch._tail(file) == []
    append_json(file, *({"n": n} for n in range(10)))
    with file.open("a") as f:
        f.write('{"n": 1')
    assert watch._tail(file) == [{"n": n} for n in range(10)]
    monkeypatch.setattr(watch, "TAIL_BYTES", 30)  # 7 of the half line, 20 of whole ones, 3 of another
    assert watch._tail(file) == [{"n": 8}, {"n": 9}]


def shown(directory: Path) -> str:
    screen = io.StringIO()
    Console(file=screen, width=120).print(watch._below(watch._Look.at(directory)))
    return screen.getvalue()


def test_the_table_has_each_actors_rates_and_what_it_did_last(tmp_path: Path) -> None:
    now = time.time()

    def span(actor: str, name: str, start: float, end: float, **more: Any) -> Json:
        common = {"actor": actor, "node": "abcdef12", "restart": 0, "name": name}
        return {**common, "start": now + start, "seconds": end - start, **more}

    append_json(
        tmp_path / "spans.jsonl",
        span("rollout worker 1", "generate", -80, -70, draw=0, tokens=9999),  # longer ago than rates go back
        *(span("rollout worker 0", "generate", -40 + 3 * i, -20 + i, draw=i, tokens=300) for i in range(10)),
        span("rollout worker 0", "load", -13, -12, version=6),
        span("learner rank 0", "update", -40, -10, batch=5, version=6),
        *(span("learner rank 0", "grade", -10, -10, draw=i) for i in range(10)),
    )
    append_json(tmp_path / "draws.jsonl", {"batch": 5, "trained": [0, 1, 2], "filtered": [3]})
    append_json(tmp_path / "draws.jsonl", {"batch": 6, "trained": [4, 5, 6], "filtered": []})  # its span comes later
    append_event(tmp_path, "death", worker=1, node="abcdef12", reason="[killed]", reissued=[4])
    estimate = {"mean": 0.5}
    append_json(
        tmp_path / "evaluations.jsonl", {"version": 3, "accuracy": estimate, "tokens": estimate, "steps": estimate}
    )
    lines = [line.split() for line in shown(tmp_path).splitlines()]
    assert lines[0] == ["node", "weights", "groups", "tokens/s", "busy", "last"]
    # In the minute: 10 groups of 2 to 20 s and 300 tokens each, one of them at least for 29 s; the update took half.
    assert lines[1][:7] == ["learner", "rank", "0", "abcd", "50%", "update", "5,"]
    assert lines[2] == ["rollout", "worker", "0", "abcd", "6", "1.8", "50", "48%", "generate", "9,", "11", "s", "ago"]
    assert " ".join(lines[3]) == "rollout worker 1 abcd death: [killed]"
    assert " ".join(lines[4]) == "6 groups are graded and not trained on yet"
    assert " ".join(lines[5]) == "held-out, weights 3: accuracy 50.0% tokens 0.5 steps 0.50"
    assert " ".join(lines[6][1:]) == "death worker 1, node abcdef12, reason [killed], reissued [4]"


def test_each_event_is_printed_once_also_several_of_a_millisecond() -> None:
    events = [{"time": 1.0, "kind": "death", "worker": n} for n in range(9)]
    assert watch._after(None, events) == events[4:]
    assert watch._after(events[5], events) == events[6:]
    assert watch._after(events[8], [*events, events[8]]) == []


# ---- terminals


def test_a_log_gets_a_line_with_the_time_where_there_is_something_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "QUIET_SECONDS", 0.0)
    screen = io.StringIO()
    with Display(Console(file=screen)).phase("train", "training") as phase:
        for batch in (1, 1, 2):
            phase.show(f"batch {batch}", batch, 2, "a table")
    words = [
        r"… training  \d{4}-\d\d-\d\d \d\d:\d\d:\d\d",
        *(rf"  \d\d:\d\d:\d\d  {batch}/2  batch {batch}" for batch in (1, 2)),
        r"✓ training  0 s",
    ]
    assert re.fullmatch("\n".join(words) + "\n", screen.getvalue())


class Terminal:
    """A command on a pseudo-terminal of 120 columns, and what it wrote there."""

    def __init__(self, command: Sequence[str | Path], **environment: str) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            of_its_own = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
            os.execve(command[0], [str(c) for c in command], {**of_its_own, "TERM": "xterm", **environment})
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self.raw = ""

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw).replace("\r", "")

    def read(self) -> bool:
        """Wait for more; whether there was any before the end."""
        assert select.select([self._fd], [], [], SECONDS)[0], f"silent for {SECONDS} s:\n{self.text[-2000:]}"
        try:
            new = os.read(self._fd, 65536)
        except OSError:  # so ends a pseudo-terminal
            return False
        self.raw += new.decode(errors="replace")
        return bool(new)

    def until(self, words: str) -> None:
        while words not in self.text:
            assert self.read(), f"ended without {words!r}:\n{self.text[-2000:]}"

    def press(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def end(self) -> int:
        """Its exit status."""
        while self.read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_ctrl_c_leaves_the_run_alone_and_says_so(tmp_path: Path) -> None:
    directory = begun(tmp_path, batches=4)
    with worked_on(directory):
        terminal = Terminal([STEPGRPO, "watch", directory])
        terminal.until("update 8 of 180 · accuracy 75% · 50 tokens · 3.0 steps · 25% confident · 1.0 stale")
        terminal.until("2:52 left")
        terminal.press(b"\x03")
        assert terminal.end() == 130
        assert "The run is left alone." in terminal.text
        assert rundir.is_held(directory)


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(tmp_path: Path) -> None:
    directory = silent(begun(tmp_path, batches=4))
    terminal = Terminal([STEPGRPO, "watch", directory], TERM="dumb")
    assert terminal.end() == 1
    assert "\x1b" not in terminal.raw
    assert terminal.text.startswith("… watching ")


# ---- a real run


def test_a_real_run_is_followed_from_before_it_begins_to_its_result_and_leaves_a_trace(tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "real"
    terminal = Terminal([STEPGRPO, "watch", directory])
    terminal.until("it has no config.json yet")
    command = [STEPGRPO, "train", QUICKSTART, "name=real", f"runs_dir={directory.parent}", *SMALL]
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    terminal.until("no batch is done yet, begun")
    terminal.until("rollout worker 0 ")
    terminal.until(" of 16 · accuracy")
    terminal.until("held-out, weights 3: accuracy")
    terminal.until("checkpoint  name r0000-batch-000004")
    assert terminal.end() == 0, terminal.text[-2000:]
    assert driver.wait() == 0
    lines = (tmp_path / "log").read_text().splitlines()
    of_train = lines[lines.index(next(x for x in lines if "before" in x and "after" in x)) :]
    of_watch = terminal.text[terminal.text.rindex("before") :].splitlines()
    assert [x.split() for x in of_watch[2:6]] == [x.split() for x in of_train[2:6]], "the final table is that of train"
    assert f"The trained model: {directory / 'model'}" in terminal.text

    output = tmp_path / "trace.json.gz"
    result = CliRunner().invoke(app, ["trace", str(directory), "-o", str(output)])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("batches 0 to 7, ")
    record = json.loads(gzip.decompress(output.read_bytes()))
    assert_keeps_perfettos_rules(record)
    ways = Counter(tuple(name.split()[0] for name in way) for way in arrows(record["traceEvents"]))
    # The last weights are loaded after the last batch has ended, and a slow worker loads only the newest.
    assert 1 <= ways.pop(("publish", "load")) <= 8
    assert ways == {("generate", "grade", "update"): 32, ("update", "publish"): 8}


# ---- Ray jobs

head = test_submit.head


def test_a_job_is_followed_to_its_end_and_its_status_taken_over(head: test_submit.Head) -> None:
    _, output = head.result(
        "ray", "job", "submit", f"--address={head.address}", "--no-wait", "--", "sh", "-c", "echo it runs; exit 3"
    )
    job = next(word for word in output.split() if word.startswith("'raysubmit_")).strip("'")
    status, output = head.result(STEPGRPO, "watch", job, f"--address={head.address}")
    assert status == 3 and "\nit runs\n" in output and output.endswith(f"the job {job} failed\n")
    status, output = head.result(STEPGRPO, "watch", "raysubmit_none", f"--address={head.address}")
    assert status == 2 and output.startswith(f"error: raysubmit_none: {head.address} has no such job (")

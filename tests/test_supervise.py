"""The supervisor, over real drivers: small programs that die by real signals and leave real orphans."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stepgrpo.supervise import RECOVERABLE

SUPERVISOR = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which the background of a script ignores
from pathlib import Path
from rich.console import Console
from stepgrpo import supervise
from stepgrpo.console import Display
supervise.FIRST_BACKOFF_SECONDS, supervise.MAX_BACKOFF_SECONDS = {backoff}
supervise.GRACE_SECONDS, supervise.LOOK_SECONDS = 0.5, 0.1
here = Path(sys.argv[1])
status = supervise.run(
    [sys.executable, str(here / "driver.py"), *{arguments}],
    max_restarts={max_restarts},
    display=Display(Console(file=sys.stderr, highlight=False)),
    progress=lambda: len(list(here.glob("checkpoint-*"))),
    hung_seconds=1,
    keep=here,
)
sys.exit(status)
"""

# Each start adds a line to `starts`: its arguments. `n` is the number of starts before this one.
DRIVER = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from stepgrpo.supervise import mark_end
here = Path(__file__).parent
starts = here / "starts"
n = len(starts.read_text().splitlines()) if starts.exists() else 0
with starts.open("a") as f:
    f.write(json.dumps(sys.argv[1:]) + "\\n")
def kill(): os.kill(os.getpid(), signal.SIGKILL)
mark_end()
def ready(): print("ready", flush=True)
"""


def supervisor(
    here: Path,
    driver: str,
    *,
    max_restarts: int = 3,
    backoff: tuple[float, float] = (0.01, 0.03),
    arguments: tuple[str, ...] = (),
):
    (here / "driver.py").write_text(DRIVER + driver)
    code = SUPERVISOR.format(max_restarts=max_restarts, backoff=backoff, arguments=arguments)
    return [sys.executable, "-c", code, str(here)]


def ends(here: Path, driver: str, **options) -> tuple[int, str]:
    """Status and words of a supervisor, at its end."""
    done = subprocess.run(supervisor(here, driver, **options), stderr=subprocess.PIPE, text=True, timeout=60)
    return done.returncode, re.sub(r"after \d+ s", "after N s", done.stderr)


def starts(here: Path) -> list[list[str]]:
    return [json.loads(line) for line in (here / "starts").read_text().splitlines()]


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_driver_that_succeeds_or_errs_is_not_started_again(tmp_path, status):
    assert ends(tmp_path, f"sys.exit({status})") == (status, "")
    assert starts(tmp_path) == [[]]


def test_a_killed_driver_is_started_again_from_its_checkpoint(tmp_path):
    status, words = ends(tmp_path, "if n < 2: kill()")
    assert status == 0
    assert starts(tmp_path) == [[], ["--resume", "auto"], ["--resume", "auto"]]
    assert words.splitlines() == [
        "the driver was killed by SIGKILL after N s: restart 1 of 3 in 0.01 s",
        "the driver was killed by SIGKILL after N s: restart 2 of 3 in 0.02 s",
    ]


def test_a_driver_that_dies_before_it_has_gone_back_is_told_again_where_to(tmp_path):
    driver = """
if n == 1: (here / "checkpoint-1").touch()
if n < 3: kill()
"""
    back = ["--resume", "batch-1"]
    assert ends(tmp_path, driver, arguments=("--resume", "batch-1"))[0] == 0
    assert starts(tmp_path) == [back, back, [*back, "--resume", "auto"], [*back, "--resume", "auto"]]


def test_a_driver_that_is_ended_from_within_its_libraries_is_started_again(tmp_path):
    status, words = ends(tmp_path, "if n == 0: os._exit(1)")
    assert status == 0 and len(starts(tmp_path)) == 2
    assert words.startswith("the driver ended with status 1 after N s: restart 1 of 3")


def test_the_logs_of_a_killed_driver_are_taken_along(tmp_path):
    driver = """
logs = Path(os.environ["STEPGRPO_SCRATCH"], "sgx", "session_1", "logs")
if n == 0:
    logs.mkdir(parents=True)
    (logs / "raylet.out").write_text("why")
    kill()
"""
    _, words = ends(tmp_path, driver)
    (logs,) = tmp_path.glob("ray-logs-*")
    assert (logs / "raylet.out").read_text() == "why" and words.rstrip().endswith(f"Ray's logs: {logs}")


def test_the_logs_of_one_that_is_given_up_are_taken_along_too(tmp_path):
    driver = """
logs = Path(os.environ["STEPGRPO_SCRATCH"], "sgx", "session_1", "logs")
logs.mkdir(parents=True)
(here / "scratch").write_text(os.environ["STEPGRPO_SCRATCH"])
os._exit(1)
"""
    status, words = ends(tmp_path, driver, max_restarts=0)
    (logs,) = tmp_path.glob("ray-logs-*")
    assert status == 1 and words.rstrip().endswith(f"without a new checkpoint; Ray's logs: {logs}")
    assert not Path((tmp_path / "scratch").read_text()).exists()


def test_a_driver_that_hangs_is_killed_and_started_again_and_leaves_its_stack(tmp_path):
    driver = """
def hangs_here():
    time.sleep(100)
if n == 0:
    Path(os.environ["STEPGRPO_SCRATCH"], "beat").touch()
    hangs_here()
"""
    status, words = ends(tmp_path, driver)
    assert status == 0 and len(starts(tmp_path)) == 2
    assert "the driver gave no sign of life for" in words and "restart 1 of 3" in words
    (stack,) = tmp_path.glob("stacks-*.txt")
    assert "hangs_here" in stack.read_text()


def test_the_last_word_of_the_supervisor_names_the_first_cause_too(tmp_path):
    status, words = ends(tmp_path, f"sys.exit({RECOVERABLE}) if n == 0 else kill()", max_restarts=3)
    assert status == 128 + signal.SIGKILL and len(starts(tmp_path)) == 4
    assert [line.partition(": ")[2] for line in words.splitlines()[:3]] == [
        f"restart {i} of 3 in {pause} s" for i, pause in ((1, "0.01"), (2, "0.02"), (3, "0.03"))
    ]
    assert words.splitlines()[3] == (
        "the driver was killed by SIGKILL after N s: given up after 3 restart(s) without a new checkpoint; "
        "the first time, the driver ended with status 75 after N s"
    )


def test_a_new_checkpoint_gives_the_driver_all_its_restarts_again(tmp_path):
    driver = """
if n < 3:
    (here / f"checkpoint-{n}").touch()
    kill()
"""
    status, words = ends(tmp_path, driver, max_restarts=1)
    assert status == 0 and len(starts(tmp_path)) == 4
    assert words.count("restart 1 of 1 in 0.01 s") == 3


def test_no_process_of_a_dead_driver_is_left_when_the_next_one_starts(tmp_path):
    driver = """
def alive(pid):
    return Path(f"/proc/{pid}").exists()
pids = here / "pids"
if n == 0:
    deaf = "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(100)"
    # In a session of its own, by a parent that ends at once: an orphan that no longer belongs to the driver.
    forked = "import os, time; os.fork() and os._exit(0); os.setsid(); print(os.getpid(), flush=True); time.sleep(100)"
    with pids.open("w") as f:
        for program in (deaf, forked):
            child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
            f.write(child.stdout.readline().decode())
    assert all(map(alive, pids.read_text().split()))
    kill()
assert len(pids.read_text().split()) == 2
sys.exit(any(map(alive, pids.read_text().split())))
"""
    assert ends(tmp_path, driver)[0] == 0
    assert len(starts(tmp_path)) == 2


def test_temporary_directories_and_shared_memory_of_a_killed_driver_are_gone(tmp_path):
    driver = """
import tempfile
from multiprocessing.shared_memory import SharedMemory
from stepgrpo.weights import SharedWeights
left = here / "left"
if n == 0:
    scratch = tempfile.mkdtemp(prefix="sg", dir=os.environ["STEPGRPO_SCRATCH"])
    assert len(scratch.encode()) <= 42
    weights = SharedWeights(f"/dev/shm/stepgrpo-{os.getuid()}-test-{os.getpid()}")
    segment = SharedMemory(create=True, size=1 << 20)
    paths = [scratch, str(weights.directory), f"/dev/shm/{segment._name.lstrip('/')}"]
    assert all(map(os.path.exists, paths))
    left.write_text("\\n".join(paths))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:  # still alive when it is killed, and until then Python does not remove the segment
        time.sleep(100)
    kill()
sys.exit(any(map(os.path.exists, left.read_text().split())))
"""
    assert ends(tmp_path, driver)[0] == 0
    assert len(starts(tmp_path)) == 2


def test_logs_of_which_a_failed_driver_speaks_are_kept_and_an_empty_scratch_is_not(tmp_path):
    driver = """
scratch = Path(os.environ["STEPGRPO_SCRATCH"])
(here / "scratch").write_text(str(scratch))
if {leaves}:
    (scratch / "log").touch()
sys.exit(1)
"""
    for leaves in (True, False):
        assert ends(tmp_path, driver.format(leaves=leaves))[0] == 1
        scratch = Path((tmp_path / "scratch").read_text())
        assert scratch.exists() == leaves
        if leaves:
            (scratch / "log").unlink()
            scratch.rmdir()


def started(command: list[str]) -> subprocess.Popen[str]:
    """A supervisor whose driver is ready."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_the_drivers_end_is_final(tmp_path, sent):
    driver = """
for s in (signal.SIGINT, signal.SIGTERM):
    signal.signal(s, lambda number, _: sys.exit(100 + number))
ready()
signal.pause()
"""
    process = started(supervisor(tmp_path, driver))
    process.send_signal(sent)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == 100 + sent
    assert len(starts(tmp_path)) == 1


def test_a_driver_that_dies_of_the_users_signal_is_not_started_again(tmp_path):
    process = started(supervisor(tmp_path, "ready(); signal.pause()"))
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == 128 + signal.SIGTERM
    assert len(starts(tmp_path)) == 1


def test_a_second_interrupt_is_passed_on_and_a_third_kills_a_driver_that_does_not_end(tmp_path):
    driver = """
signal.signal(signal.SIGINT, lambda *_: ready())
ready()
while True: signal.pause()
"""
    process = started(supervisor(tmp_path, driver))
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == 128 + signal.SIGKILL
    assert len(starts(tmp_path)) == 1


def test_a_key_at_the_terminal_interrupts_the_driver_once(tmp_path):
    driver = """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
ready()
signal.sigwait([signal.SIGINT])
sys.exit(3 if signal.sigtimedwait([signal.SIGINT], 0.5) else 4)
"""
    command = supervisor(tmp_path, driver)
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(command[0], command)
    with os.fdopen(os.dup(terminal), "rb", buffering=0) as output:
        assert output.readline() == b"ready\r\n"
    os.write(terminal, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4
    os.close(terminal)


def test_a_wish_between_two_drivers_is_heard(tmp_path):
    command = supervisor(tmp_path, "kill()", backoff=(1000, 1000))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None and "restart 1 of 3 in 1000 s" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert len(starts(tmp_path)) == 1


def test_a_driver_ends_when_its_supervisor_is_killed(tmp_path):
    driver = """
def end(*_):
    os.rmdir(os.environ["STEPGRPO_SCRATCH"])  # which nobody else does any more
    sys.exit(print("asked to end", flush=True))
signal.signal(signal.SIGTERM, end)
ready()
signal.pause()
"""
    process = started(supervisor(tmp_path, driver))
    process.kill()
    assert process.communicate(timeout=30)[0] == "asked to end\n"

"""Processes from a fork server: what they find when they begin, and when they end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil

PROGRAM = textwrap.dedent("""
    import json, os, sys, time
    from pathlib import Path
    from stepgrpo.actors.forking import ForkingContext, call_forked, import_ahead

    def begin(told):
        found = {name: os.environ.get(name) for name in ("AHEAD", "LATER", "REPLACED")}
        Path(told + ".part").write_text(json.dumps({**found, "imported": "wave" in sys.modules, "pid": os.getpid()}))
        os.rename(told + ".part", told)
        time.sleep(600)

    if __name__ == "__main__":
        os.environ["REPLACED"] = "old"
        import_ahead(["no_such_module", "wave"], {"AHEAD": "1"})
        assert "wave" not in sys.modules and "AHEAD" not in os.environ
        os.environ |= {"LATER": "2", "REPLACED": "new"}
        maker = os.getpid()
        found = call_forked(lambda: (os.environ["LATER"], "wave" in sys.modules, os.getpid() != maker))
        assert found == ("2", True, True)
        try:
            call_forked(lambda: {}["nothing"])
        except KeyError as e:
            assert str(e) == "'nothing'"
        else:
            raise AssertionError
        process = ForkingContext().Process(target=begin, name="worker", kwargs={"told": sys.argv[1]})
        process.start()
        process.join()
""")


def test_a_process_begins_with_its_imports_and_the_newest_environment_and_dies_with_who_made_it(tmp_path: Path) -> None:
    script, told = tmp_path / "program.py", tmp_path / "told"
    script.write_text(PROGRAM)
    with subprocess.Popen([sys.executable, script, told]) as maker:
        try:
            deadline = time.monotonic() + 60
            while not told.exists():
                assert maker.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            found = json.loads(told.read_text())
            process = psutil.Process(found.pop("pid"))
            assert found == {"AHEAD": "1", "LATER": "2", "REPLACED": "new", "imported": True}
            assert process.ppid() != maker.pid, "a child of the fork server, not of its maker"
        finally:
            maker.send_signal(signal.SIGKILL)
    process.wait(10)

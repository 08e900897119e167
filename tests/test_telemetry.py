"""What Prometheus sees of a run, and the Grafana dashboard over it: a real Prometheus scrapes a real run."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import ray
import yaml

from stepgrpo.metrics import METRICS
from stepgrpo.telemetry import COUNTED, NOW, OF_WORKERS, Telemetry, metric
from tests.nodes import free_port
from tests.runs import ENDLESS, command, variables

ROOT = Path(__file__).parents[1]
GRAFANA = ROOT / "cluster" / "grafana"
DASHBOARD = json.loads((GRAFANA / "stepgrpo.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
OF_GPUS = {"GPU use", "GPU memory"}
"""Panels that a machine without GPUs leaves empty."""
RARE = {"closing/logprob", "closing/logprob_rewarded", "closing/logprob_punished"}
"""Of confident exits in batches that teach: a short run may have none."""
GAUGES = [f'ray_{metric(name)}{{run="$run"}}' for name in METRICS if name not in RARE]
PATIENCE = 300.0


def waited(look: Callable[[], Any], seconds: float, process: subprocess.Popen[bytes] | None = None) -> Any:
    """The first answer that is true; while a process lives."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not come"
        assert process is None or process.poll() is None, "its process has ended"
        time.sleep(0.2)
    return found


class Prometheus:
    def __init__(self, port: int, run: str) -> None:
        self._url, self._run = f"http://127.0.0.1:{port}/api/v1", run

    def ask(self, what: str, **parameters: Any) -> Any:
        try:
            with urlopen(f"{self._url}/{what}?{urlencode(parameters)}", timeout=10) as answer:
                return json.load(answer)["data"]
        except HTTPError as e:
            pytest.fail(f"{what} {parameters}: {e.read().decode()}")
        except URLError:
            return None  # it is not up yet

    def values(self, expression: str) -> list[float]:
        """All finite values that a panel's query has had in the last five minutes."""
        asked = expression.replace("$__rate_interval", "40s").replace("$run", self._run)
        now = time.time()
        series = (self.ask("query_range", query=asked, start=now - 300, end=now, step=2) or {}).get("result", [])
        return [v for s in series for _, text in s["values"] if math.isfinite(v := float(text))]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus, with the configuration that is shipped, over a run in which all has happened that panels show."""
    if not shutil.which("prometheus"):
        reason = "no prometheus: Debian has a package of this name"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    directory, temp_dir = tmp_path_factory.mktemp("watched"), tempfile.mkdtemp(prefix="r", dir="/tmp")
    shipped = (ROOT / "cluster" / "prometheus" / "prometheus.yml").read_text()
    config = yaml.safe_load(shipped.replace("/tmp/ray", temp_dir).replace("10s", "2s"))
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    settings = [*ENDLESS, f"cluster.temp_dir={temp_dir}", f"cluster.dashboard_port={free_port()}"]
    settings += ["cluster.object_store_mb=150", "eval.every=5", "checkpoint.every=5", "rollout.control_fraction=0.5"]
    scraper = [
        "prometheus",
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    prometheus = Prometheus(port, "watched")
    queries = [t["expr"] for p in PANELS if p["title"] not in OF_GPUS for t in p["targets"]] + GAUGES

    def all_answered() -> bool:
        queries[:] = [q for q in queries if not prometheus.values(q)]
        return not queries

    with (
        subprocess.Popen(command(directory, "watched", settings), env=variables(), stdout=subprocess.DEVNULL) as run,
        subprocess.Popen(scraper) as server,
    ):
        try:
            waited((directory / "watched" / "metrics.jsonl").exists, PATIENCE, run)
            try:
                waited(all_answered, PATIENCE, run)
            except AssertionError as e:
                e.add_note(f"without an answer: {queries}")
                raise
            yield prometheus
        finally:
            run.send_signal(signal.SIGINT)
            run.wait(PATIENCE)
            server.terminate()
            shutil.rmtree(temp_dir, ignore_errors=True)


@pytest.mark.parametrize("panel", PANELS, ids=lambda p: p["title"])
def test_a_panel_has_data_of_a_run(watched: Prometheus, panel: dict[str, Any]) -> None:
    if panel["title"] in OF_GPUS and shutil.which("nvidia-smi"):
        pytest.skip("no machine with GPUs has been seen by this test: whether Ray has told of them by now is not known")
    for target in panel["targets"]:
        assert bool(watched.values(target["expr"])) == (panel["title"] not in OF_GPUS), target["expr"]


def test_throughput_is_counted(watched: Prometheus) -> None:
    tokens, trajectories = (
        max(watched.values(f'ray_stepgrpo_worker_{what}_total{{run="$run", worker="0"}}'))
        for what in ("tokens", "trajectories")
    )
    assert trajectories > 0 and trajectories % 4 == 0, "whole groups"
    assert 1 < tokens / trajectories < 180


def test_every_metric_of_an_update_is_a_gauge(watched: Prometheus) -> None:
    assert [gauge for gauge in GAUGES if not watched.values(gauge)] == []


def test_the_dashboard_can_choose_the_run(watched: Prometheus) -> None:
    (variable,) = (v for v in DASHBOARD["templating"]["list"] if v["name"] == "run")
    series, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
    assert watched.ask(f"label/{label}/values", **{"match[]": series}) == ["watched"]


def test_a_worker_that_left_vanishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within three reports of Ray's, of which there is one every second here."""
    directory = tempfile.mkdtemp(prefix="r", dir="/tmp")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    context = ray.init(
        num_cpus=1,
        _temp_dir=directory,
        include_dashboard=False,
        object_store_memory=80 << 20,
        log_to_driver=False,
    )
    try:
        node = next(n for n in ray.nodes() if n["NodeID"] == context["node_id"])
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        telemetry, up = Telemetry("left"), [0, 1]

        def shown() -> set[str]:
            """Workers whose version is exported, while those that are up are told of."""
            telemetry.tell({"workers/up": len(up)}, {w: {"worker/version": 3} for w in up})
            try:
                with urlopen(address, timeout=10) as answer:
                    exported = answer.read().decode()
            except URLError:
                return set()
            lines = [line for line in exported.splitlines() if line.startswith("ray_stepgrpo_worker_version{")]
            return {worker for line in lines for worker in re.findall(r'worker="(\d)"', line)}

        waited(lambda: shown() == {"0", "1"}, PATIENCE)
        up.remove(0)
        waited(lambda: shown() == {"1"}, PATIENCE)
    finally:
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


def test_no_two_metrics_have_one_name() -> None:
    names = [*METRICS, *NOW, *OF_WORKERS, *COUNTED]
    assert len({metric(name) for name in names}) == len(names)


def test_the_committed_dashboard_is_the_generated_one() -> None:
    generated = runpy.run_path(str(GRAFANA / "make_dashboard.py"))["dashboard"]()
    assert (GRAFANA / "stepgrpo.json").read_text() == generated, "run `python cluster/grafana/make_dashboard.py`"


def test_every_metric_besides_those_of_an_update_is_documented() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text()
    names = [metric(n) for n in (*NOW, *OF_WORKERS)] + [f"{metric(n)}_total" for n in COUNTED]
    assert [name for name in names if f"`ray_{name}`" not in page] == []
    assert [p["title"] for p in PANELS if f"**{p['title']}**" not in page] == []

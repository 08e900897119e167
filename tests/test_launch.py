"""What can be missing at the start is found at the start, with a message that says what to do."""

import socket
import subprocess
import sys
import textwrap

import pytest

from stepgrpo.config import ClusterConfig, ConfigError
from stepgrpo.launch import check_resources, session
from stepgrpo.placement import Bundle
from tests.nodes import free_port

WORKER = Bundle("rollout.workers", 1.0, 2)
RANK = Bundle("learner.num_ranks", 1.0, 1)


def test_more_gpus_than_the_cluster_has_is_an_error_that_says_who_asks_for_them():
    with pytest.raises(ConfigError, match=r"GPUs: the config asks for 8 \(rollout.workers takes 4, learner") as e:
        check_resources({"CPU": 64, "GPU": 4}, [{"CPU": 64, "GPU": 4}], [WORKER] * 2 + [RANK] * 4)
    assert "has 4; lower them, or add a node" in str(e.value)


def test_more_cpus_than_the_cluster_has_is_an_error():
    with pytest.raises(ConfigError, match="CPUs: the config asks for 3"):
        check_resources({"CPU": 2}, [{"CPU": 2}], [Bundle("learner.num_ranks", 1.0, 0)] * 3)


def test_an_actor_that_fits_no_single_node_is_an_error():
    nodes = [{"CPU": 8, "GPU": 1}] * 4
    with pytest.raises(ConfigError, match="one actor asks for 2 GPUs but the largest node has 1"):
        check_resources({"CPU": 32, "GPU": 4}, nodes, [WORKER])


def test_a_cluster_that_fits_is_accepted():
    check_resources({"CPU": 8, "GPU": 8}, [{"CPU": 8, "GPU": 8}], [WORKER] * 2 + [RANK] * 4)


@pytest.mark.parametrize("path", ["/proc/none", "relative/dir", "/tmp/" + "x" * 60])
def test_a_temp_dir_that_cannot_be_used_is_named_before_ray_starts(path):
    with (
        pytest.raises(ConfigError, match=r"^cluster\.temp_dir: got "),
        session(ClusterConfig(device="cpu", temp_dir=path), []),
    ):
        pass


def test_a_port_in_use_is_named_before_ray_starts():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=rf"^cluster\.dashboard_port: got {port}, cannot be used"),
            session(ClusterConfig(device="cpu", dashboard_port=port), []),
        ):
            pass


def test_an_address_where_no_cluster_answers_is_an_error(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with (
        pytest.raises(ConfigError, match=r"^cluster\.address: got 127\.0\.0\.1:1, no Ray cluster answers there"),
        session(ClusterConfig(device="cpu", address="127.0.0.1:1"), []),
    ):
        pass


JOIN = """
import sys
import ray
from stepgrpo.config import ClusterConfig
from stepgrpo.launch import session
with session(ClusterConfig(device="cpu", address=sys.argv[1]), []):
    print(ray.get(ray.remote(lambda: "joined").remote()))
"""


def test_a_local_ray_listens_on_loopback_where_others_may_join_it(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    program = "import ray, subprocess, sys\n" + textwrap.dedent("""
        from stepgrpo.config import ClusterConfig
        from stepgrpo.launch import session
        with session(ClusterConfig(device="cpu", object_store_mb=100), []):
            address = ray.get_runtime_context().gcs_address
            assert address.startswith("127.0.0.1:"), address
            sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1], address]).returncode)
    """)
    done = subprocess.run([sys.executable, "-c", program, JOIN], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "joined\n", done.stderr


def test_a_local_rays_dashboard_has_the_parts_of_use_here_and_gives_way_to_the_run(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("REPORTER_UPDATE_INTERVAL_MS", "7000")
    program = textwrap.dedent("""
        import os, psutil, sys, time
        from ray._private.worker import global_worker
        from ray.util.state import list_nodes
        from stepgrpo.config import ClusterConfig
        from stepgrpo.launch import session

        def nodes(patience=60.0):
            page = global_worker.node.address_info["webui_url"]  # another port, where this one was taken meanwhile
            end = time.monotonic() + patience
            while True:
                try:
                    return list_nodes(f"http://{page}")
                except Exception:  # on a busy machine its address is known before it answers
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.2)

        with session(ClusterConfig(device="cpu", object_store_mb=100, dashboard_port=int(sys.argv[1])), []):
            num_nodes = len(nodes())
            titles = {p: p.cmdline()[0] for p in psutil.Process().children(recursive=True)}
            parts = {title.split("-")[2]: p.nice() for p, title in titles.items() if title.startswith("ray-dashboard-")}
            print(sorted(parts), set(parts.values()), num_nodes)
            print({name: os.environ[name] for name in ("REPORTER_UPDATE_INTERVAL_MS", "METRICS_RECORD_INTERVAL_S")})
    """)
    done = subprocess.run(
        [sys.executable, "-c", program, str(free_port())], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "['EventHead', 'JobHead', 'MetricsHead', 'NodeHead', 'ReportHead', 'StateHead'] {19} 1",
        "{'REPORTER_UPDATE_INTERVAL_MS': '7000', 'METRICS_RECORD_INTERVAL_S': '60'}",
    ]

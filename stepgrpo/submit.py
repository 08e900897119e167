"""A run as a job of a Ray cluster: what can be wrong is found before anything is sent, then its output is followed.

A thin layer over Ray's Jobs API. The job's working directory is a copy of the current one, made by Ray.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml
from rich.filesize import decimal

from stepgrpo.config import Config, ConfigError, brief, is_own, load, masked

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from stepgrpo.console import Display

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS = "RAY_API_SERVER_ADDRESS"
AUTH_MODE = "RAY_AUTH_MODE"
NO_AGENT = (
    "the head's agent does not answer. Just after its start: try again. Else it is not there, mostly for another Ray "
    "on the machine has its port: `dashboard_agent.log` says so, and `ray start --dashboard-agent-listen-port=…` takes "
    "another"
)
EXCLUDES = ("/runs", "/wandb", ".*_cache")
"""What is never sent, as lines of a .gitignore; Ray adds .git, .venv, venv and __pycache__."""
STOP_SECONDS = 300
"""Between Ray's SIGTERM and its SIGKILL: a run that is stopped saves its model. Ray's default is 3."""
SILENT_SECONDS = 60.0
"""Without output after which the connection may be a dead one, and is made anew."""
LOST_SECONDS = 60.0
"""Without any answer after which the job is given up on, here."""


@dataclass(frozen=True, slots=True)
class Job:
    """What Ray is asked to run."""

    entrypoint: str
    """Shell command."""
    runtime_env: Mapping[str, Any]
    """As Ray takes it, but for the working directory."""
    secrets: frozenset[str] = frozenset()
    """Environment variables whose values are not shown."""
    submission_id: str | None = None
    """None: Ray chooses one."""
    sent: Mapping[Path, int] = field(default_factory=dict)
    """Size in bytes of each file that is sent."""

    def command(self, address: str) -> str:
        """The `ray job submit` this stands for; secrets are taken from the environment of the shell that runs it, and a
        password in the address is to be filled in."""
        env_vars = self.runtime_env.get("env_vars", {})
        # NUL cannot be part of anybody's value.
        shown = {name: f"\0{name}\0" if name in self.secrets else value for name, value in env_vars.items()}
        words = ["ray", "job", "submit", "--working-dir", "."]
        words += ["--submission-id", self.submission_id] if self.submission_id else []
        words += ["--runtime-env-json", json.dumps({**self.runtime_env, "env_vars": shown}), "--"]
        line = f"{_reaching(address)} {shlex.join(words)} {self.entrypoint}"
        for name in self.secrets:
            # Ends the single quotes of the JSON, and begins them anew.
            line = line.replace(f"\\u0000{name}\\u0000", f"'\"${name}\"'")
        return line


def prepare(
    config: Path,
    overrides: Sequence[str] = (),
    *,
    resume: str | None = None,
    env: Iterable[str] = (),
    runtime_env: Path | None = None,
    submission_id: str | None = None,
    limit: int = 100_000_000,
) -> Job:
    """A job that trains in a copy of the current directory.

    Args:
        resume: as `stepgrpo train` takes it.
        env: environment variables: ``NAME=VALUE``, or ``NAME`` for a secret with the value it has here.
        runtime_env: YAML file of a Ray runtime environment.
        limit: most bytes to send.

    Raises:
        ConfigError: a setting that `train` would refuse, a file that would not be sent, results that would be lost with
            the job's directory, or too much to send.
    """
    settings = load(Config, config, list(overrides))
    _check_places(settings)
    _quiet_ray()
    environment, secrets = _environment(env, runtime_env)
    sent = upload(environment["excludes"], limit)
    arguments = _relative(config, overrides)
    for name, given, file in _local_files(settings, arguments):
        if Path(os.path.abspath(file)) not in sent:
            raise ConfigError(
                f"{name}: got {given}, but {file} would not be sent; takes files in the current directory that no "
                f".gitignore and .rayignore and not {', '.join(EXCLUDES)} leaves out, or an absolute path on all nodes"
            )
    words = ["python", "-m", "stepgrpo", "train", *arguments, *([f"--resume={resume}"] if resume else [])]
    return Job(shlex.join(words), environment, secrets, submission_id, sent)


def upload(excludes: Sequence[str], limit: int) -> dict[Path, int]:
    """Size of each file that Ray would send of the current directory, found by Ray's own walk.

    Raises:
        ConfigError: more than ``limit`` bytes; names the largest.
    """
    from ray._private import ray_constants  # no public call says what is sent
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    here = Path.cwd()
    sizes: dict[Path, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[path] = path.stat().st_size

    skipped = _get_excludes(here, [*ray_constants.get_runtime_env_default_excludes(), *excludes])
    gitignore = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE) != "1"
    _dir_travel(here, [skipped], note, include_gitignore=gitignore)
    if (total := sum(sizes.values())) > limit:
        largest = ", ".join(f"{path.relative_to(here)} ({decimal(size)})" for path, size in _largest(here, sizes))
        raise ConfigError(
            f"--upload-limit: the current directory has {decimal(total)} to send, takes {decimal(limit)} at most; the "
            f"largest are {largest}: leave them out with a line in .rayignore, and put what the run needs of them "
            "where all nodes see it"
        )
    return sizes


def _largest(here: Path, sizes: Mapping[Path, int], number: int = 3) -> list[tuple[Path, int]]:
    """Entries of a directory by size, each narrowed down to what most of it is."""
    totals: Counter[Path] = Counter()
    for file, size in sizes.items():
        for path in (file, *file.parents):
            if path == here:
                break
            totals[path] += size

    def narrowed(path: Path) -> Path:
        below = next((p for p, size in totals.items() if p.parent == path and size > 0.9 * totals[path]), None)
        return narrowed(below) if below else path

    top = sorted((p for p in totals if p.parent == here), key=lambda p: -totals[p])[:number]
    return [(path, totals[path]) for path in map(narrowed, top)]


def _quiet_ray() -> None:
    """Ray names every ignore file it reads, several times."""
    import ray  # noqa: F401  # makes the handlers

    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)


def _check_places(settings: Config) -> None:
    """Ray removes a job's directory after it."""
    for name, place in (("runs_dir", settings.runs_dir), ("checkpoint.place", settings.checkpoint.place)):
        if place and "://" not in place and not os.path.isabs(place):
            raise ConfigError(
                f"{name}: got {place}, which would be removed with the job's own directory; takes an absolute path "
                f"that all nodes see (where the cluster is this machine: {name}={os.path.abspath(place)})"
            )


def _environment(env: Iterable[str], file: Path | None) -> tuple[dict[str, Any], frozenset[str]]:
    """A runtime environment, and the variables of it that are secret."""
    from ray.runtime_env import RuntimeEnv

    out: dict[str, Any] = {}
    if file:
        try:
            out = yaml.safe_load(file.read_text())
        except (OSError, yaml.YAMLError) as e:
            raise ConfigError(f"--runtime-env: {file} cannot be read ({brief(e)})") from None
        if not isinstance(out, dict) or "working_dir" in out:
            raise ConfigError(
                f"--runtime-env: {file}: takes a mapping, such as `pip: [PACKAGE]`, without working_dir: it is the "
                "current directory"
            )
    given: dict[str, str] = {}
    secrets = set()
    for item in env:
        name, sign, value = item.partition("=")
        secrets.discard(name)  # the last one counts, also in this
        if not sign and name in os.environ:
            value = os.environ[name]
            secrets.add(name)
        elif not sign or not name:
            raise ConfigError(f"--env: got {item}, takes NAME=VALUE, or the NAME of a variable that is set here")
        given[name] = value
    out["excludes"] = [*EXCLUDES, *out.get("excludes", [])]
    out["env_vars"] = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **out.get("env_vars", {}), **given}
    try:
        RuntimeEnv(working_dir=str(Path.cwd()), **out)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"--runtime-env: Ray does not take it: {brief(e, 300)}") from None
    return out, frozenset(secrets & out["env_vars"].keys())


def _relative(config: Path, overrides: Iterable[str]) -> list[str]:
    """Arguments of `train` that mean the same in a copy of the current directory."""
    return [
        os.path.relpath(item) if "=" not in item and item.endswith((".yaml", ".yml")) else item
        for item in (str(config), *overrides)
    ]


def _local_files(settings: Config, arguments: Iterable[str]) -> Iterator[tuple[str, str, Path]]:
    """Files here that the job is to find in its own directory: (who names it, the name, the file)."""
    for item in arguments:
        if "=" not in item:
            for file in _with_bases(Path(item)):
                yield "CONFIG", item, file
    data = settings.data
    for name, value in (("model.path", settings.model.path), ("data.train", data.train), ("data.eval", data.eval)):
        path = Path((value or "").rpartition("=")[2])  # of `math500=FILE`
        if value and path.exists() and not path.is_absolute():
            for file in (f for f in path.iterdir() if f.is_file()) if path.is_dir() else [path]:
                yield name, value, file
    rollout, reward = settings.rollout, settings.reward
    functions = {"rollout.step_rule": rollout.step_rule, "reward.scheme": reward.scheme, "reward.grader": reward.grader}
    if rollout.probe:
        functions["rollout.probe.policy"] = rollout.probe.policy
    for name, function in functions.items():
        module = Path(*function.partition(":")[0].split("."))
        for file in (module.with_suffix(".py"), module / "__init__.py") if is_own(function) else ():
            if file.is_file():
                yield name, function, file


def _with_bases(file: Path) -> Iterator[Path]:
    yield file
    if base := yaml.safe_load(file.read_text()).get("base"):
        yield from _with_bases(file.parent / base)


def given_address(address: str | None) -> str:
    """``address``, or what Ray's own environment variables say."""
    if address and "://" not in address:
        raise ConfigError(
            f"--address: got {masked(address)}, takes the URL of Ray's dashboard, such as {DEFAULT_ADDRESS}"
        )
    return address or os.environ.get(ADDRESS) or os.environ.get("RAY_ADDRESS") or DEFAULT_ADDRESS


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster's job server.

    Args:
        address: the dashboard's URL, or a cluster's host:port, which Ray asks for that URL.

    Raises:
        ConfigError: nobody answers there, not Ray, or it wants a token.
    """
    from ray.exceptions import AuthenticationError, RayError
    from ray.job_submission import JobSubmissionClient

    before = os.environ.get(ADDRESS)
    os.environ[ADDRESS] = address  # which Ray prefers to its other variable, and that to any argument
    try:
        url = urlsplit(address if "://" in address else f"//{address}")
        if url.hostname and url.port:  # knock first: Ray itself waits for minutes
            socket.create_connection((url.hostname, url.port), timeout=5).close()
        headers = json.loads(os.environ.get("RAY_JOB_HEADERS", "null"))  # as `ray job` has it
        return JobSubmissionClient(headers=headers)
    except AuthenticationError as e:
        if AUTH_MODE not in os.environ and _take_token():
            return connect(address)
        raise ConfigError(
            f"--address: {masked(address)} lets nobody in without its token ({brief(e, 60)}); set RAY_AUTH_MODE=token, "
            "and RAY_AUTH_TOKEN unless ~/.ray/auth_token has it"
        ) from None
    except (OSError, RuntimeError, ValueError, RayError) as e:
        raise ConfigError(
            f"--address: got {masked(address)}, no Ray job server answers there ({brief(e)}); start one with `ray "
            "start --head`, name another, or forward its port (Kubernetes: kubectl port-forward svc/NAME-head-svc 8265)"
        ) from None
    finally:
        if before is None:
            os.environ.pop(ADDRESS, None)
        else:
            os.environ[ADDRESS] = before


def _take_token() -> bool:
    """Use this machine's token, if there is one, as `ray start` and `ray.init` do unasked, and `ray job` does not."""
    from ray._private.authentication import authentication_token_setup as setup

    logging.getLogger(setup.__name__).setLevel(logging.ERROR)  # it speaks of a cluster that it takes for a new one
    return setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _reaching(address: str) -> str:
    """Variables for a `ray job` that is to reach the same job server."""
    mode = os.environ.get(AUTH_MODE, "")
    return f"{ADDRESS}={shlex.quote(masked(address))}" + (f" {AUTH_MODE}=token" if mode.lower() == "token" else "")


def submit(client: JobSubmissionClient, job: Job) -> str:
    """Send the current directory and start the job; returns its id.

    Raises:
        ConfigError: Ray does not take it.
    """
    try:
        return client.submit_job(
            entrypoint=job.entrypoint,
            runtime_env={**job.runtime_env, "working_dir": str(Path.cwd())},
            submission_id=job.submission_id,
        )
    except (OSError, RuntimeError, ValueError) as e:
        cause = str(e).strip(".\n").splitlines()[-1]  # of the server's traceback
        cause = NO_AGENT if "No available agent" in cause else cause
        raise ConfigError(masked(f"{client.get_address()}: does not take the job ({cause})")) from None


def attend(client: JobSubmissionClient, job: str, display: Display) -> int:
    """Print what a job prints until it ends; returns the exit status of its command.

    128 + n where signal n ended it, 143 (SIGTERM) where it was stopped, 1 where it was never started. Ctrl-C asks
    whether to stop it.

    Raises:
        SystemExit: the job goes on (130), or the cluster does not answer any more (1).
    """
    output = _Output(client, job)
    try:
        info = output.follow()
    except KeyboardInterrupt:
        try:
            display.print("\nThe job goes on. Press Ctrl-C again to stop it, Enter to leave it.")
            sys.stdin.readline()
        except KeyboardInterrupt:
            display.print("\nstopping the job")
            client.stop_job(job)
            info = output.follow()
        else:
            display.print(ways(client, job))
            raise SystemExit(128 + signal.SIGINT) from None
    status = info.driver_exit_code
    if info.status == "STOPPED":
        status = 128 + signal.SIGTERM
    elif status is None:
        display.warn(str(info.message))
        status = 1
    display.print(f"the job {job} {info.status.lower()}")
    return status if status >= 0 else 128 - status


def ways(client: JobSubmissionClient, job: str) -> str:
    """Commands to follow and to stop a job."""
    address = _reaching(client.get_address())
    return f"to follow it: {address} ray job logs -f {job}\nto stop it:   {address} ray job stop {job}"


class _Output:
    """What a job printed, each part once, over any number of connections."""

    def __init__(self, client: JobSubmissionClient, job: str) -> None:
        self._client, self._job = client, job
        self._printed = 0

    def follow(self) -> Any:
        """Print until the job ends; returns Ray's record of it."""
        from aiohttp import ClientError
        from ray.exceptions import AuthenticationError

        lost = (ClientError, OSError, RuntimeError, AuthenticationError)
        heard = time.monotonic()
        while True:
            with suppress(*lost):
                asyncio.run(self._print_new())
            try:
                info = self._client.get_job_info(self._job)
            except lost as e:
                if time.monotonic() - heard > LOST_SECONDS:
                    raise SystemExit(
                        f"{masked(self._client.get_address())} does not answer ({brief(e)}); the job may go on\n"
                        f"{ways(self._client, self._job)}"
                    ) from None
            else:
                heard = time.monotonic()
                if info.status.is_terminal():
                    return info
            time.sleep(1)

    async def _print_new(self) -> None:
        position = 0  # Ray begins at the beginning each time
        async with aclosing(self._client.tail_job_logs(self._job)) as chunks:
            while True:
                async with asyncio.timeout(SILENT_SECONDS):
                    text = await anext(chunks, None)
                if text is None:
                    return
                print(text[max(0, self._printed - position) :], end="", flush=True)
                position += len(text)
                self._printed = max(self._printed, position)

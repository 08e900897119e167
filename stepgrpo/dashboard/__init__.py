"""A local web page about runs, while they go on and afterwards. It only reads their directories, or copies of them."""

from __future__ import annotations

import secrets
import socket
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib import resources

from stepgrpo.config import ConfigError
from stepgrpo.console import Display


def serve(sources: Sequence[str], display: Display, *, host: str, port: int, demo: bool) -> None:
    """Serve the page until interrupted.

    Args:
        sources: run directories, directories that hold some, or their URLs.
        port: 0: any free one.
        demo: of a recorded run instead.

    Raises:
        ConfigError: a source is none, or the address cannot be had.
    """
    import uvicorn

    from stepgrpo.dashboard.runs import Runs
    from stepgrpo.dashboard.server import LOOPBACK, application

    if demo == bool(sources):
        raise ConfigError(f"dashboard: got {'both' if demo else 'neither'}, takes run directories or --demo")
    with recorded() if demo else nullcontext(sources) as places:
        runs = Runs(places)
        try:
            listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as e:
            raise ConfigError(
                f"--host, --port: got {host} and {port}, cannot be had ({e.strerror}); take others"
            ) from None
        token = None if host in LOOPBACK else secrets.token_urlsafe()
        port = listener.getsockname()[1]
        name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        display.print(f"The dashboard: http://{name}:{port}/{f'?token={token}' if token else ''}  (Ctrl-C ends it)")
        app = application(runs, token=token, port=port, demo=demo)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


@contextmanager
def recorded() -> Iterator[list[str]]:
    """What `--demo` shows: a directory with a run of the quickstart of half as many batches, as it once went."""
    packed = resources.files(__package__) / "demo.tar.xz"
    with tempfile.TemporaryDirectory(prefix="stepgrpo-demo-") as directory:
        with packed.open("rb") as f, tarfile.open(fileobj=f) as archive:
            archive.extractall(directory, filter="data")
        yield [directory]

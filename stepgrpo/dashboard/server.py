"""The page and its data over HTTP, on this machine alone unless told otherwise."""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable
from importlib import resources
from typing import Any
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request, cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepgrpo.config import brief
from stepgrpo.dashboard.runs import Run, Runs
from stepgrpo.metrics import METRICS

LOOPBACK = ("127.0.0.1", "::1", "localhost")
STATIC = {
    "parts.css": ("stepgrpo.report", "page.css"),
    "parts.js": ("stepgrpo.report", "parts.js"),
    "page.css": ("stepgrpo.dashboard", "page.css"),
    "timeline.js": ("stepgrpo.dashboard", "timeline.js"),
    "page.js": ("stepgrpo.dashboard", "page.js"),
}
"""Name in the page -> the package's file."""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
MOST_PIXELS = 8192


def application(runs: Runs, *, token: str | None, port: int, demo: bool = False) -> ASGIApp:
    """
    Args:
        token: what a browser must know; None: it must be one of this machine, by the name of this machine.
        port: names the cookie, which all ports of a host share.
        demo: what is shown is no run of the user's.
    """

    def run(request: Request) -> Run:
        found = runs.all().get(request.query_params.get("run", ""))
        if found is None:
            raise HTTPException(404, "there is no such run (any more)")
        return found

    def unless_same(request: Request, answer: Callable[[Run, QueryParams], dict[str, Any]]) -> Response:
        wanted, query = run(request), request.query_params
        tag = f'"{wanted.stamp()} {query}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304)
        value = answer(wanted, query)
        # Of a file that is not read to its end, there is more to say while it stays the same.
        return _json(value) if value.get("more") else _json(value, ETag=tag)

    def list_runs(request: Request) -> Response:
        names = list(runs.all())
        return _json({"runs": sorted(names), "newest": names[0] if names else None, "demo": demo, "metrics": METRICS})

    def state(request: Request) -> Response:
        return unless_same(request, lambda wanted, query: wanted.state(query.get("since", "")))

    def timeline(request: Request) -> Response:
        def answer(wanted: Run, query: QueryParams) -> dict[str, Any]:
            pixels = max(1, min(int(_number(query.get("pixels")) or 1000), MOST_PIXELS))
            names = query["names"].split(",") if "names" in query else None
            return wanted.timeline(_number(query.get("from")), _number(query.get("to")), pixels, names)

        return unless_same(request, answer)

    def activity(request: Request) -> Response:
        return unless_same(request, lambda wanted, _: wanted.activity())

    def sample(request: Request) -> Response:
        return _found(run(request).sample(int(_number(request.query_params.get("index")) or 0)))

    def span(request: Request) -> Response:
        return _found(run(request).span(int(_number(request.query_params.get("at")) or 0)))

    def stacks(request: Request) -> Response:
        text = run(request).stacks(request.query_params.get("file", ""))
        return _found({"text": text} if text else None)

    endpoints: dict[str, Callable[[Request], Response]] = {
        "/": lambda _: Response(_resource("stepgrpo.dashboard", "page.html"), media_type="text/html"),
        "/static/{file}": _static,
        "/api/runs": list_runs,
        "/api/run": state,
        "/api/timeline": timeline,
        "/api/activity": activity,
        "/api/sample": sample,
        "/api/span": span,
        "/api/stacks": stacks,
    }
    return Starlette(
        routes=[Route(path, endpoint) for path, endpoint in endpoints.items()],
        middleware=[
            Middleware(Gate, token=token, cookie=f"stepgrpo_{port}"),
            Middleware(GZipMiddleware, minimum_size=2000),
        ],
        exception_handlers={OSError: _unreadable},
    )


class Gate:
    """Lets in who knows the token, or without one, requests to this machine by its own name: a foreign page whose name
    was made to lead here (DNS rebinding) sends another."""

    def __init__(self, app: ASGIApp, token: str | None, cookie: str) -> None:
        self._app, self._token, self._cookie = app, token, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                there = {name.lower() for name, _ in message["headers"]}
                new = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message["headers"] = [*message["headers"], *(h for h in new if h[0] not in there)]
            await send(message)

        await (self._refusal(scope) or self._app)(scope, receive, with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        if self._token is None:
            host = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
            if host.strip("[]") in LOOPBACK:
                return None
            return PlainTextResponse("This dashboard answers to 127.0.0.1 and localhost only.", 403)
        offered = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["path"] == "/" and self._is_token(offered):  # out of the address, and so out of the history
            moved = RedirectResponse("/", 303)
            moved.set_cookie(self._cookie, offered, httponly=True, samesite="strict")
            return moved
        if self._is_token(cookie_parser(headers.get("cookie", "")).get(self._cookie, "")):
            return None
        return PlainTextResponse("A token is needed: open the URL that `stepgrpo dashboard` printed.", 401)

    def _is_token(self, offered: str) -> bool:
        return self._token is not None and hmac.compare_digest(offered.encode(), self._token.encode())


def _static(request: Request) -> Response:
    name = request.path_params["file"]
    media = "text/css" if name.endswith(".css") else "text/javascript"
    if name == "plotly.js":
        return _plotly()
    if name not in STATIC:
        raise HTTPException(404)
    return Response(_resource(*STATIC[name]), media_type=media)


def _plotly() -> Response:
    from plotly.offline import get_plotlyjs

    return Response(get_plotlyjs(), media_type="text/javascript", headers={"Cache-Control": "private, max-age=86400"})


def _resource(package: str, name: str) -> str:
    return (resources.files(package) / name).read_text(encoding="utf-8")


def _json(value: Any, **headers: str) -> Response:
    return Response(json.dumps(value, separators=(",", ":")), media_type="application/json", headers=headers)


def _found(value: dict[str, Any] | None) -> Response:
    if value is None:
        raise HTTPException(404, "it is gone: the run went back to a checkpoint, or its files were replaced")
    return _json(value)


def _unreadable(_: Request, error: Exception) -> Response:
    return PlainTextResponse(f"a file of the run cannot be read ({brief(error)})", 503)


def _number(text: str | None) -> float | None:
    """
    Raises:
        HTTPException: it is none.
    """
    try:
        value = None if text is None else float(text)
    except ValueError:
        raise HTTPException(400, f"got {text!r}, takes a number") from None
    if value is not None and not abs(value) < 1e15:
        raise HTTPException(400, f"got {text!r}, takes a finite number")
    return value

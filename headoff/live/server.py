"""The web server of the live page. It answers this machine's browser alone, and reads only images it was given or sent.

A page of another site can make a browser send requests to 127.0.0.1, under that name or (DNS rebinding) under its own.
Therefore the Host header must be this machine's, and the Origin of what sends or computes something this page.
"""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headoff.errors import HeadoffError, SettingError, is_out_of_memory
from headoff.figures.colouring import subdued_css
from headoff.live.session import MOST_BYTES, Session, Setting
from headoff.report.maps import as_script
from headoff.report.page import template

HOST = "127.0.0.1"
_NAMES = [HOST, "localhost"]
_MOST_JSON = 64 * 2**10
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class TooLarge(SettingError):
    """A request with a body that is too large."""


def application(session: Session) -> Starlette:
    """The pages and answers of a session."""
    # One request of each kind is computed at a time. Those that wait meanwhile are dropped if their page has gone on.
    turns = {"boxes": anyio.Lock(), "maps": anyio.Lock()}

    def page(_: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        text = template("live.html").render(
            nonce=nonce, data=as_script(session.about()), about=session.about(), subdued=subdued_css()
        )
        return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY.format(nonce=nonce)})

    def picture(request: Request) -> Response:
        kind, contents = session.picture(request.path_params["number"])
        return Response(contents, media_type=f"image/{kind}")

    async def boxes(request: Request) -> Response:
        setting = Setting.of(await _json(request))
        return await _in_turn(request, turns["boxes"], partial(session.boxes, setting))

    async def maps(request: Request) -> Response:
        contents = await _json(request)
        number, head = (
            (contents.pop(name, None) for name in ("map", "head"))
            if isinstance(contents, dict)
            else (None, None)
        )
        if type(number) is not int or type(head) not in (int, type(None)):
            raise SettingError(
                "a request for maps needs the number of an object, and may have that of a head: load the page again"
            )
        return await _in_turn(
            request, turns["maps"], partial(session.maps, Setting.of(contents), number, head)
        )

    async def send(request: Request) -> Response:
        contents = await _body(request, MOST_BYTES)
        name = request.query_params.get("name", "")
        return JSONResponse(await run_in_threadpool(session.add, name, contents))

    return Starlette(
        routes=[
            Route("/", page),
            Route("/images/{number}", picture),
            Route("/images", send, methods=["POST"]),
            Route("/boxes", boxes, methods=["POST"]),
            Route("/maps", maps, methods=["POST"]),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=_NAMES, www_redirect=False),
            Middleware(SameOrigin),
        ],
        exception_handlers={HeadoffError: _told},
    )


def listen(port: int) -> socket.socket:
    """A socket bound to a port of this machine; 0 is any free one.

    Raises:
        SettingError: the port is in use, or not allowed.
    """
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((HOST, port))
        # A socket that is only bound would share its port with another one.
        found.listen()
    except (OSError, OverflowError) as error:
        found.close()
        words = getattr(error, "strerror", None) or str(error)
        raise SettingError(
            f"port {port} of {HOST} cannot be used ({words}): give another one, or --port 0 for any that is free"
        ) from None
    return found


class Server(uvicorn.Server):
    """Answers requests: `run(sockets=[listen(port)])` returns after Ctrl-C, or when `should_exit` is set.

    Args:
        app: an `application`.
        started: called when the first request can come.
    """

    def __init__(self, app: ASGIApp, started: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=2
            )
        )
        self._started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._started()


class SameOrigin:
    """Middleware: requests of other sites' pages are rejected, and answers are for this site's pages only."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)  # there is no route for web sockets
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        own = f"http://{headers.get('host', '')}"
        elsewhere = origin not in (None, own) or (scope["method"] not in ("GET", "HEAD") and origin is None)
        # Links to this page may be anywhere, images of it may not.
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            elsewhere |= headers.get("sec-fetch-mode") != "navigate"
        if elsewhere:
            await JSONResponse({"error": "this page answers to itself only"}, 403)(scope, receive, send)
            return

        async def add_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self.app(scope, receive, add_headers)


async def _in_turn(request: Request, turn: anyio.Lock, work: Callable[[], dict[str, Any]]) -> Response:
    async with turn:
        if await request.is_disconnected():
            return Response(status_code=204)  # to nobody
        try:
            return JSONResponse(await run_in_threadpool(work))
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise SettingError(
                    "out of memory: choose a smaller image, or start with --short-side"
                ) from None
            raise


async def _json(request: Request) -> Any:
    try:
        return json.loads(await _body(request, _MOST_JSON))
    except ValueError as error:
        if isinstance(error, TooLarge):
            raise
        raise SettingError("a request must be JSON: load the page again") from None


async def _body(request: Request, most: int) -> bytes:
    received = bytearray()
    async for part in request.stream():
        received += part
        if len(received) > most:
            raise TooLarge(f"more than {most:,} bytes were sent: send something smaller")
    return bytes(received)


def _told(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 413 if isinstance(error, TooLarge) else 400)

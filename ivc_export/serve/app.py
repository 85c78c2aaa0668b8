"""The HTTP endpoints, as an ASGI application over one worker."""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ivc_export import __version__
from ivc_export.errors import UserError
from ivc_export.selection.method import METHODS
from ivc_export.serve.completions import Completions, ServerSettings, check_model
from ivc_export.serve.errors import RequestError, error_body
from ivc_export.serve.worker import Worker

LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(worker: Worker, settings: ServerSettings) -> Starlette:
    """The application. It starts and ends the worker."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await anyio.to_thread.run_sync(worker.close)

    card = {"id": settings.name, "object": "model", "created": 0, "owned_by": "ivc-export"}

    def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    def model(request: Request) -> Response:
        check_model(request.path_params["name"], settings)
        return JSONResponse(card)

    def health(request: Request) -> Response:
        alive = worker.alive
        return JSONResponse({"status": "ok" if alive else "failed", "version": __version__}, 200 if alive else 503)

    def metrics(request: Request) -> Response:
        return Response(worker.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    page = files("ivc_export.serve").joinpath("page.html").read_text(encoding="utf-8")
    manifest = worker.session.bundle.manifest
    facts = {
        "model": settings.name,
        "ratio": manifest.default_ratio,
        "layer": manifest.selection_layer,
        "backend": worker.session.backend,
        "methods": [name for name, method in METHODS.items() if method_fits(name, worker)],
        "locked": bool(settings.keys),
        "max_tokens": min(settings.tokens, settings.most_tokens),
    }
    page = page.replace("/*FACTS*/{}", json.dumps(facts).replace("<", "\\u003c"))

    def index(request: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"})

    return Starlette(
        routes=[
            Route("/", index),
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/chat/completions", Completions(worker, settings)),
        ],
        middleware=[Middleware(Guard, settings=settings)],
        exception_handlers={HTTPException: http_error, RequestError: request_error, Exception: unexpected_error},
        lifespan=lifespan,
    )


def method_fits(name: str, worker: Worker) -> bool:
    """Whether a method can run on the bundle's graphs."""
    try:
        worker.session.converse(method=name)
    except UserError:
        return False
    return True


def http_error(request: Request, error: Exception) -> Response:
    """Answer a request that Starlette refuses."""
    assert isinstance(error, HTTPException)
    body = error_body(f"{error.detail}: this server does not answer {request.method} at this path", error.status_code)
    return JSONResponse(body, error.status_code, headers=error.headers)


def request_error(request: Request, error: Exception) -> Response:
    """Answer a request that we refuse."""
    assert isinstance(error, RequestError)
    return JSONResponse(error.body, error.status)


def unexpected_error(request: Request, error: Exception) -> Response:
    """Answer after a bug, which is in the log."""
    return JSONResponse(error_body("the server failed: see its log for the reason", 500), 500)


class Guard:
    """Lets only permitted clients pass."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            request = Request(scope)
            error = self._refused(request)
            if error is not None:
                await JSONResponse(error.body, error.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refused(self, request: Request) -> RequestError | None:
        if self._settings.loopback and not LOOPBACK.fullmatch(request.headers.get("host", "")):
            return RequestError("the Host header names another machine: use 127.0.0.1 or localhost", 403)
        open_to_all = request.url.path in ("/", "/health")
        if not self._settings.keys or open_to_all:
            return None
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if any([hmac.compare_digest(given, key.encode()) for key in self._settings.keys]):  # noqa: C419 (all of them)
            return None
        return RequestError(
            "the API key is missing or wrong: send it as a bearer token in the Authorization header",
            401,
            code="invalid_api_key",
        )

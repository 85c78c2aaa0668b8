"""Runs the application on a socket, by uvicorn."""

from __future__ import annotations

import json
import socket

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ivc_export.errors import UserError
from ivc_export.serve.app import make_app
from ivc_export.serve.completions import ServerSettings
from ivc_export.serve.errors import error_body
from ivc_export.serve.worker import Worker

GRACE = 10
"""How many seconds answers have to end when the server ends."""


class Protocol(H11Protocol):
    """HTTP/1.1, with refusals in our form."""

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that is not HTTP."""
        body = json.dumps(error_body("the request is not valid HTTP/1.1", 400)).encode()
        headers = [("content-type", "application/json"), ("connection", "close"), ("content-length", str(len(body)))]
        for part in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(part) or b"")
        self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UserError: the address cannot be used.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"the server cannot listen on port {port} of {host} ({error}): choose another with --port or --host"
        ) from error


def make_server(worker: Worker, settings: ServerSettings) -> uvicorn.Server:
    """The server, which `run(sockets=[...])` runs until a signal ends it."""
    config = uvicorn.Config(
        make_app(worker, settings),
        http=Protocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE,
    )
    return uvicorn.Server(config)

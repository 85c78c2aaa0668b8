from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ivc_export.bundle.bundle import Bundle
from ivc_export.runtime.interface import Session
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.serve.completions import ServerSettings
from ivc_export.serve.metrics import Metrics
from ivc_export.serve.server import listen, make_server
from ivc_export.serve.worker import Worker


@contextmanager
def serving(session: Session, settings: ServerSettings | None = None, **options: object) -> Iterator[str]:
    """A server on a port of its own; its address."""
    worker = Worker(session, Metrics(), **options)  # type: ignore[arg-type]
    server = make_server(worker, settings or ServerSettings("tiny"))
    with listen("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
    assert not worker.alive


@pytest.fixture(scope="session")
def tiny_session(sample_bundle: Bundle) -> OnnxSession:
    return OnnxSession(sample_bundle, threads=1)


@pytest.fixture(scope="session")
def address(tiny_session: OnnxSession) -> Iterator[str]:
    with serving(tiny_session, ServerSettings("tiny", most_body=1 << 20, most_tokens=64)) as found:
        yield found

from __future__ import annotations

from urllib.parse import urlsplit

from benchmarks import serve_load
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.serve.completions import ServerSettings
from tests.serve.conftest import serving


def test_under_load_every_answer_is_that_of_a_single_run(tiny_session: OnnxSession) -> None:
    kinds = serve_load.mixture(tiny_session)
    with serving(tiny_session, ServerSettings("load", queue=4)) as address:
        port = urlsplit(address).port
        assert port is not None
        outcome = serve_load.load(port, kinds, 12, lambda number: number < 120, lambda: 0)
    assert {*outcome.counts} == {"answered", "left", "malformed", "told to wait"}, outcome.counts
    assert outcome.counts.total() - outcome.counts["told to wait"] == 120

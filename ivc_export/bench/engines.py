"""Engines of a few nodes, to time them alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from ivc_export.runtime.tensorrt.engine import Engine
from ivc_export.runtime.tensorrt.session import TensorrtSession
from ivc_export.tensorrt.compile import compile_graph
from ivc_export.tensorrt.profiles import Extents


def open_engine(session: TensorrtSession, model: ir.Model, profiles: Mapping[str, Extents]) -> Engine:
    """Build a graph as the session's own engines were built, and open it; nothing is written to the bundle.

    Raises:
        UserError: TensorRT refuses it.
    """
    options = replace(session.recipe.options(session.capability, session.dtype), timing_cache=None)  # the builds' own
    with TemporaryDirectory() as work:  # the bundle may be read-only
        plan = compile_graph(session.trt, model, profiles.values(), options, Path(work))
        path = Path(work) / f"{model.graph.name}.plan"
        path.write_bytes(plan)
        return Engine(session.trt, path, list(profiles), session.device, session.runtime)

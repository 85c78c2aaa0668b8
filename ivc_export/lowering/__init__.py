"""Lowering: what turns the portable graphs into graphs for one runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ivc_export.lowering.add_biases import AddBiasesPass
from ivc_export.lowering.compact_caches import CompactCachesPass
from ivc_export.lowering.fuse_activations import FuseActivationsPass
from ivc_export.lowering.fuse_attention import FuseAttentionPass
from ivc_export.lowering.fuse_norms import FuseNormsPass
from ivc_export.lowering.inline_ivc_functions import InlineIvcFunctionsPass
from ivc_export.lowering.pack_projections import PackProjectionsPass
from ivc_export.lowering.retype_floats import RetypeFloatsPass
from ivc_export.lowering.scale_residuals import ScaleResidualsPass
from ivc_export.lowering.use_custom_ops import UseCustomOpsPass
from ivc_export.lowering.use_plugin import UsePluginPass
from ivc_export.lowering.widen_floats import WidenFloatsPass
from ivc_export.lowering.widen_residuals import WidenResidualsPass

Lowering = Literal["portable", "native", "plugin", "ort-cuda", "ort-cuda-ops"]


def _ort_cuda(*more: ir.passes.PassBase) -> tuple[ir.passes.PassBase, ...]:
    attention = (FuseAttentionPass(), PackProjectionsPass(), CompactCachesPass())
    fusing = (ScaleResidualsPass(), *attention, FuseNormsPass(), FuseActivationsPass(), AddBiasesPass())
    return (*fusing, *more, RemoveUnusedNodesPass())


LOWERINGS: Mapping[Lowering, Callable[[], tuple[ir.passes.PassBase, ...]]] = {
    "portable": lambda: (),  # keeps ivc nodes and their bodies: onnxruntime inlines them
    "native": lambda: (InlineIvcFunctionsPass(),),  # standard operators only: any TensorRT, no plugin
    "plugin": lambda: (UsePluginPass(),),  # nodes without bodies: TensorRT with our plugin library
    # what onnxruntime's CUDA provider has kernels for, over caches that are written in place
    "ort-cuda": lambda: _ort_cuda(),
    # the same with our library of custom operators, which selects and compacts
    "ort-cuda-ops": lambda: _ort_cuda(UseCustomOpsPass()),
}


EXPORTED: tuple[Lowering, ...] = ("portable", "native")
"""Lowerings that a bundle can be exported in; the others are applied when an engine is built or a session opened."""


def lower(model: ir.Model, lowering: Lowering) -> ir.Model:
    """Apply the passes of `lowering` to a portable graph, in place."""
    for one in LOWERINGS[lowering]():
        model = one(model).model
    return model


__all__ = [
    "EXPORTED",
    "LOWERINGS",
    "AddBiasesPass",
    "CompactCachesPass",
    "FuseActivationsPass",
    "FuseAttentionPass",
    "FuseNormsPass",
    "InlineIvcFunctionsPass",
    "Lowering",
    "PackProjectionsPass",
    "RetypeFloatsPass",
    "ScaleResidualsPass",
    "UseCustomOpsPass",
    "UsePluginPass",
    "WidenFloatsPass",
    "WidenResidualsPass",
    "lower",
]

"""Lowering: what turns the portable graphs into graphs for one runtime, one record each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ivc_export.contract.graphs import in_place_info
from ivc_export.contract.manifest import GraphInfo
from ivc_export.contract.names import IVC_DOMAIN, OPSET, AnyGraphName
from ivc_export.contract.operators import PLUGIN_OPERATORS, verify_graph
from ivc_export.lowering.in_place_caches import CompactCachesPass
from ivc_export.lowering.inline import InlinePass
from ivc_export.lowering.onnxruntime.activations import FuseActivationsPass
from ivc_export.lowering.onnxruntime.attention import UseFusedAttentionPass, UseRotaryEmbeddingPass
from ivc_export.lowering.onnxruntime.biases import AddBiasesPass
from ivc_export.lowering.onnxruntime.custom_operators import UseCustomOpsPass
from ivc_export.lowering.onnxruntime.norms import FuseNormsPass
from ivc_export.lowering.onnxruntime.projections import PackProjectionsPass
from ivc_export.lowering.onnxruntime.rotate_in_attention import RotateInAttentionPass
from ivc_export.lowering.precision.scale_residuals import SCALE, ScaleResidualsPass
from ivc_export.lowering.tensorrt.plugin import UsePluginPass

Passes = Sequence[ir.passes.PassBase]
Operators = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Lowering:
    """How portable graphs become graphs for one runtime.

    passes: what makes them, in order, new for each graph. operators: beyond the contract's, by domain and name, that
    may be left. io: a graph's inputs and outputs as they are then. opset: of the default domain. hidden_scale: what
    hidden_states are multiplied by between the graphs. exported: whether a bundle can be exported in it; others are
    applied when an engine is built or a session opened.
    """

    passes: Callable[[], Passes]
    operators: Operators = frozenset()
    io: Callable[[GraphInfo], GraphInfo] = lambda info: info
    opset: int = OPSET
    hidden_scale: float = 1.0
    exported: bool = False

    def apply(self, model: ir.Model) -> ir.Model:
        """Lower a portable graph, in place.

        Raises:
            PreconditionError, PostconditionError: the graph is not what a pass needs or should leave; a bug.
        """
        for one in self.passes():
            model = one(model).model
        return model

    def verify(self, name: AnyGraphName, model: ir.Model, portable: GraphInfo) -> None:
        """Check a lowered graph against the contract.

        Raises:
            AssertionError: it breaks it; a bug.
        """
        verify_graph(name, model, self.io(portable), self.operators, self.opset)


def fused(*more: ir.passes.PassBase) -> Passes:
    """For onnxruntime's CUDA provider: what it has kernels for, over caches that are written in place."""
    return (
        ScaleResidualsPass(),
        UseFusedAttentionPass(),
        CompactCachesPass(),
        UseRotaryEmbeddingPass(),
        FuseNormsPass(),
        InlinePass(kept=("SelectTokens", "SelectTileTokens", "CompactGather")),  # whose bodies onnxruntime inlines
        PackProjectionsPass(),
        RotateInAttentionPass(),
        FuseActivationsPass(),
        AddBiasesPass(),
        *more,
        RemoveUnusedNodesPass(),
    )


OUR_OPERATORS: Operators = frozenset((IVC_DOMAIN, name) for name in PLUGIN_OPERATORS)
FUSED_OPERATORS: Operators = frozenset(
    [("", "SimplifiedLayerNormalization")]
    + [("com.microsoft", op) for op in ("GroupQueryAttention", "MultiHeadAttention", "RotaryEmbedding")]
    + [("com.microsoft", op) for op in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "QuickGelu")]
)

LOWERINGS: dict[str, Lowering] = {
    # keeps ivc functions and their bodies: onnxruntime inlines them
    "portable": Lowering(passes=lambda: (), exported=True),
    # standard operators only: any TensorRT, no plugin
    "native": Lowering(passes=lambda: (InlinePass(),), exported=True),
    # nodes without bodies: TensorRT with our plugin library
    "plugin": Lowering(passes=lambda: (UsePluginPass(),), operators=OUR_OPERATORS),
    "ort-cuda": Lowering(passes=fused, operators=FUSED_OPERATORS, io=in_place_info, hidden_scale=SCALE),
    # the same with our library of custom operators, which selects and compacts
    "ort-cuda-ops": Lowering(
        passes=lambda: fused(UseCustomOpsPass()),
        operators=FUSED_OPERATORS | OUR_OPERATORS,
        io=in_place_info,
        hidden_scale=SCALE,
    ),
}
"""Every lowering, by the name that manifests and options have for it."""


def lower(model: ir.Model, lowering: str) -> ir.Model:
    """Lower a portable graph, in place."""
    return LOWERINGS[lowering].apply(model)


def exported() -> tuple[str, ...]:
    """Lowerings that a bundle can be exported in."""
    return tuple(name for name, lowering in LOWERINGS.items() if lowering.exported)

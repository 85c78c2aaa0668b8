"""Lowerings: each turns portable graphs into graphs for one runtime, and is one record."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ivc_export.contract.caches import in_place_info, owned_caches_info, placed_rows_info
from ivc_export.contract.manifest import GraphInfo
from ivc_export.contract.names import IVC_DOMAIN, OPSET, AnyGraphName
from ivc_export.contract.operators import verify_graph
from ivc_export.graph.functions import RESULTS
from ivc_export.lowering.fused.linears import FuseLinearsPass
from ivc_export.lowering.in_place_caches import CompactCachesPass
from ivc_export.lowering.inline import InlinePass
from ivc_export.lowering.onnxruntime.activations import FuseActivationsPass
from ivc_export.lowering.onnxruntime.attention import UseFusedAttentionPass, UseRotaryEmbeddingPass
from ivc_export.lowering.onnxruntime.biases import AddBiasesPass
from ivc_export.lowering.onnxruntime.custom_operators import LIBRARY, UseCustomOpsPass
from ivc_export.lowering.onnxruntime.joined_gathers import JoinGathersPass
from ivc_export.lowering.onnxruntime.norms import FuseNormsPass
from ivc_export.lowering.onnxruntime.own_attention import UseOwnAttentionPass
from ivc_export.lowering.onnxruntime.projections import PackProjectionsPass
from ivc_export.lowering.onnxruntime.rotate_in_attention import RotateInAttentionPass
from ivc_export.lowering.onnxruntime.sorted_selection import SortSelectionPass
from ivc_export.lowering.onnxruntime.write_caches import WriteCachesPass
from ivc_export.lowering.precision.scale_residuals import SCALE, ScaleResidualsPass
from ivc_export.lowering.precision.widen_gelu import WidenGeluPass
from ivc_export.lowering.spell import SpellPass
from ivc_export.lowering.tensorrt.attention import AttendInPlacePass, EncodeAttendPass
from ivc_export.lowering.tensorrt.block_dequantise import BlockDequantisePass
from ivc_export.lowering.tensorrt.dequantise import DequantiseWeightsPass
from ivc_export.lowering.tensorrt.joined import TurnHeadsPass
from ivc_export.lowering.tensorrt.linears import FuseOwnLinearsPass
from ivc_export.lowering.tensorrt.opset import BLOCKS, NEWEST, RaiseOpsetPass
from ivc_export.lowering.tensorrt.plugin import KEPT, KERNELS, UsePluginPass

Passes = Sequence[ir.passes.PassBase]
Operators = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Lowering:
    """How portable graphs become graphs for one runtime.

    passes: makes the passes, in order, new for each graph.
    functions: of domain `ivc`, that may be left, as calls of bodies or as operators of a library of ours. Any other
        that is left is an error.
    operators: by domain and name, that may be left in addition to these and the contract's.
    io: a graph's inputs and outputs after the lowering.
    opset: of the default domain.
    hidden_scale: factor of hidden_states between the graphs.
    exported: whether a bundle can be exported in it. Others are applied when an engine is built or a session opened.
    packed_weights: whether a bundle that is exported in it may have weights in 4 and 8 bits.
    """

    passes: Callable[[], Passes]
    functions: frozenset[str] = frozenset()
    operators: Operators = frozenset()
    io: Callable[[GraphInfo], GraphInfo] = lambda info: info
    opset: int = OPSET
    hidden_scale: float = 1.0
    exported: bool = False
    packed_weights: bool = True

    def apply(self, model: ir.Model) -> ir.Model:
        """Lower a portable graph, in place.

        Raises:
            PreconditionError, PostconditionError: a pass gets or leaves a graph that it should not, the graph calls an
                unknown function, or still calls one that this lowering should have replaced. This is a bug.
        """
        for node in calls(model, RESULTS):
            raise ir.passes.PreconditionError(f"{node.name}: there is no function ivc::{node.op_type}")
        for one in self.passes():
            model = one(model).model
        for node in calls(model, self.functions):
            raise ir.passes.PostconditionError(f"{node.name}: ivc::{node.op_type} is neither replaced nor inlined")
        return model

    def verify(self, name: AnyGraphName, model: ir.Model, portable: GraphInfo) -> None:
        """Check a lowered graph against the contract.

        Raises:
            AssertionError: the graph breaks it. This is a bug.
        """
        for node in calls(model, self.functions):
            raise AssertionError(f"{name}: {node.name} calls ivc::{node.op_type}, which this lowering does not leave")
        ours = frozenset((IVC_DOMAIN, function) for function in self.functions)
        verify_graph(name, model, self.io(portable), self.operators | ours, self.opset)


def calls(model: ir.Model, but: Collection[str]) -> Iterator[ir.Node]:
    """Nodes of domain `ivc` whose operator is not in `but`."""
    return (n for n in model.graph.all_nodes() if n.domain == IVC_DOMAIN and n.op_type not in but)


def fused(own: bool = False) -> Passes:
    """The passes for onnxruntime's CUDA provider: to its own operators, over caches that are written in place.

    own: with our library of custom operators.
    """
    return (
        ScaleResidualsPass(),
        *([FuseLinearsPass()] if own else ()),
        *([UseOwnAttentionPass()] if own else ()),
        UseFusedAttentionPass(),
        WriteCachesPass(),
        CompactCachesPass(own),
        UseRotaryEmbeddingPass(),
        FuseNormsPass(),
        *(() if own else (SortSelectionPass(),)),
        InlinePass(kept=SELECTION | LIBRARY),  # onnxruntime inlines bodies, or has operators of ours
        *([FuseLinearsPass()] if own else ()),  # in bodies
        PackProjectionsPass(),
        RotateInAttentionPass(),
        WidenGeluPass(),
        FuseActivationsPass(),
        AddBiasesPass(),
        UseCustomOpsPass() if own else JoinGathersPass(),
    )


def standard(*functions: str) -> Passes:
    """The passes to standard operators of opset 23, with its own operators in the place of these functions."""
    return (
        BlockDequantisePass(),
        DequantiseWeightsPass(),
        SpellPass(dict.fromkeys(functions, "standard")),
        InlinePass(),
        WidenGeluPass(),
        RaiseOpsetPass(),
    )


SELECTION = frozenset(("SelectAttended", "SelectTileTokens", "SelectTokens", "SelectViewTokens", "CompactGather"))
FUSED_OPERATORS: Operators = frozenset(
    [("", op) for op in ("Round", "SimplifiedLayerNormalization", "TopK")]
    + [("com.microsoft", op) for op in ("GroupQueryAttention", "MatMulNBits", "MultiHeadAttention", "RotaryEmbedding")]
    + [("com.microsoft", op) for op in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "QuickGelu")]
    + [("com.microsoft", op) for op in ("BiasGelu", "Gelu")]
)

ATTENTION = ("Attention", "EncoderAttention", "WindowAttention")
"""Functions that opset 23's operator Attention replaces. It computes the softmax in the type of its inputs."""

LOWERINGS: dict[str, Lowering] = {
    # keeps ivc functions and their bodies: onnxruntime inlines them
    "portable": Lowering(passes=lambda: (), functions=frozenset(RESULTS), exported=True),
    # standard operators only: any TensorRT, no plugin
    "native": Lowering(
        passes=lambda: (DequantiseWeightsPass(), InlinePass(), WidenGeluPass()), exported=True, packed_weights=False
    ),
    # nodes without bodies: TensorRT with our plugin library
    "plugin": Lowering(
        passes=lambda: (
            FuseOwnLinearsPass(),
            DequantiseWeightsPass(),
            TurnHeadsPass(),
            AttendInPlacePass(),
            EncodeAttendPass(),
            InlinePass(kept=KEPT),
            FuseOwnLinearsPass(),  # in bodies, and over weights in 8 bits
            WidenGeluPass(),
            UsePluginPass(),
        ),
        functions=KERNELS,
        io=owned_caches_info,
    ),
    # standard operators only, weights in 4 bits: TensorRT from 10.0
    "opset-21": Lowering(
        passes=lambda: (
            BlockDequantisePass(),
            DequantiseWeightsPass(),
            InlinePass(),
            WidenGeluPass(),
            RaiseOpsetPass(BLOCKS),
        ),
        operators=frozenset([("", "DequantizeLinear")]),
        opset=BLOCKS,
    ),
    # standard operators only: TensorRT from 10.14
    "opset-23-attention": Lowering(
        passes=lambda: standard(*ATTENTION),
        operators=frozenset([("", "Attention"), ("", "DequantizeLinear")]),
        opset=NEWEST,
    ),
    # standard operators only: TensorRT from 10.15, and TensorRT-RTX
    "opset-23": Lowering(
        passes=lambda: standard(*ATTENTION, "RMSNorm", "Rotate"),
        operators=frozenset(
            [("", op) for op in ("Attention", "DequantizeLinear", "RMSNormalization", "RotaryEmbedding")]
        ),
        opset=NEWEST,
    ),
    "ort-cuda": Lowering(
        passes=fused, functions=SELECTION, operators=FUSED_OPERATORS, io=placed_rows_info, hidden_scale=SCALE
    ),
    # the same with our library of custom operators, which attends, selects and compacts
    "ort-cuda-ops": Lowering(
        passes=lambda: fused(own=True),
        functions=LIBRARY,
        operators=FUSED_OPERATORS,
        io=in_place_info,
        hidden_scale=SCALE,
    ),
}
"""Every lowering, by its name in manifests and options."""


def lower(model: ir.Model, lowering: str) -> ir.Model:
    """Lower a portable graph, in place."""
    return LOWERINGS[lowering].apply(model)


def exported() -> tuple[str, ...]:
    """Lowerings in which a bundle can be exported."""
    return tuple(name for name, lowering in LOWERINGS.items() if lowering.exported)

"""Prepares a bundle's graphs for TensorRT: dtype, lowering and kind of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import GraphName
from ivc_export.contract.operators import ATTENDED_SIZES
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.lowering import ATTENTION, lower
from ivc_export.lowering.precision.narrow_angles import NarrowAnglesPass
from ivc_export.lowering.precision.retype_floats import RetypeFloatsPass
from ivc_export.lowering.precision.scale_residuals import SCALE, ScaleResidualsPass
from ivc_export.lowering.precision.widen_residuals import WidenResidualsPass
from ivc_export.lowering.spell import Spellings, SpellPass
from ivc_export.lowering.tensorrt.opset import RaiseOpsetPass
from ivc_export.tensorrt.loading import Target, major, version
from ivc_export.tensorrt.recipe import EngineRecipe

EngineGraphs = Literal["native", "plugin", "opset-21", "opset-23-attention", "opset-23"]
"""Lowerings from which engines are built."""
SPELLED: tuple[EngineGraphs, ...] = ("native", "plugin", "opset-21")
"""Those in which attention consists of standard operators."""
IN_BLOCKS: tuple[EngineGraphs, ...] = ("opset-21", "opset-23-attention", "opset-23")
"""Those in which weights in 4 bits stay in 4 bits for every dtype. With the plugin they do, except in float32."""
DecoderAttention = Literal["grouped", "repeated", "operator"]
"""Kinds of attention of decoder layers: heads of queries grouped by their key-value head, keys and values repeated for
every head of queries, or one operator."""


@dataclass(frozen=True)
class EngineChoices:
    """All choices that decide the graphs of engines.

    softmax: dtype of the vision encoder's softmax; float32 in engines of dtypes other than float16.
    """

    target: Target
    dtype: FloatName
    graphs: EngineGraphs
    softmax: FloatName
    attention: DecoderAttention

    def lowering(self, name: GraphName) -> EngineGraphs:
        """The lowering of one graph. If the softmax is wider than its input, no operator replaces attention."""
        spelled = name == "vision" and self.softmax != self.dtype and self.graphs not in SPELLED
        return "native" if spelled else self.graphs

    def spellings(self, name: GraphName) -> Spellings:
        """The bodies for functions that the lowering inlines."""
        if name != "vision":
            return {"Attention": "repeated"} if self.attention == "repeated" else {}
        narrow = self.softmax == "float16" and self.lowering(name) in SPELLED
        return dict.fromkeys(("EncoderAttention", "WindowAttention"), "narrow") if narrow else {}

    def narrow_angles(self, name: GraphName) -> bool:
        """Whether a decoder's rotations compute in float16. Operators of ours and of opset 23 compute in float32.

        Source: TensorRT 8.6 took 305 s to build a prefix of three layers with rotations in float32, and 142 s with
        rotations in float16 (benchmarks/results/native_turns-h200.json).
        """
        return self.dtype == "float16" and name != "vision" and self.graphs in SPELLED and self.attention != "operator"

    def own_products(self, name: GraphName) -> bool:
        """Whether our plugin's products add to a decoder's residual stream. They do if its kernels attend."""
        return self.lowering(name) == "plugin" and name != "vision" and self.attention == "operator"

    def score_bytes(self, name: GraphName) -> int:
        """Memory that attention takes while it runs for each of its scores. 0 for a fused kernel, which stores none.

        Source: the scratch memory of TensorRT 8.6's engines in float16 at Qwen2-VL-2B's sizes (docs/tensorrt.md): 26.1
        GB for 16,384 patches of 16 heads with the softmax in float32, 0.5 GB with the softmax in float16; 3.3 GB for
        4,160 rows of 12 heads over twice as many, grouped, and 1.8 GB repeated. In float32 nothing is fused.
        """
        if name == "vision":
            fused = self.softmax == "float16" or self.target == "tensorrt-rtx"  # which fuses through the casts
            return 8 if self.dtype == "float32" else 0 if fused else 6
        if self.attention == "repeated" and self.dtype != "float32":
            return 4
        return 0 if self.attention == "operator" else 8


def choose_graphs(bundle: Bundle, recipe: EngineRecipe, trt: Any, capability: str) -> EngineChoices:
    """Choose what to build. Attention is grouped if the recipe leaves it open; memory may change this later.

    Raises:
        UserError: this TensorRT, this GPU or the dtype lacks something that the recipe names.
    """
    dtype = build_dtype(bundle, recipe, trt, capability)
    if recipe.softmax == "float16" and dtype != "float16":
        raise UserError(
            f"--softmax float16 needs engines in float16, but these are in {dtype}: leave it out, or add --dtype "
            "float16"
        )
    graphs: EngineGraphs = "native" if recipe.plugin is None else "plugin"
    if recipe.plugin is None and dtype != "float32":  # in these no kernel computes attention
        packed = "int4" in packed_weights(bundle, "native", dtype)
        graphs = best_opset(recipe.target, version(trt), packed)
    attention: DecoderAttention = "grouped" if recipe.attention == "auto" else recipe.attention
    if (graphs == "plugin" or graphs not in SPELLED) and recipe.attention != "auto":
        other = "our plugin" if graphs == "plugin" else f"{recipe.target} {trt.__version__}"
        raise UserError(
            f"--attention has no effect, because {other} has its own attention operator in {dtype}: leave out "
            "--attention"
        )
    sizes = bundle.manifest.decoder
    if graphs not in SPELLED or (graphs == "plugin" and sizes.head_dim == sizes.value_dim in ATTENDED_SIZES):
        attention = "operator"
    softmax = recipe.softmax or ("float16" if dtype == "float16" else "float32")
    return EngineChoices(recipe.target, dtype, graphs, softmax, attention)


def attentions(graphs: EngineGraphs) -> tuple[DecoderAttention, ...]:
    """Kinds of attention that decoder layers may have in engines of a lowering. The plugin has no kernel for some sizes
    of heads."""
    if graphs == "plugin":
        return ("grouped", "operator")
    return ("grouped", "repeated") if graphs in SPELLED else ("operator",)


def packed_weights(bundle: Bundle, graphs: EngineGraphs, dtype: FloatName) -> dict[str, str]:
    """What packed layers become in engines, by their form in the bundle: int4, or floats."""
    kinds = sorted({stored.format for stored in bundle.manifest.weight_formats.values()})
    kept = graphs in IN_BLOCKS or (graphs == "plugin" and dtype != "float32")
    return {kind: kind if kind == "int4" and kept else dtype for kind in kinds}


def best_opset(target: Target, found: tuple[int, int], packed: bool = False) -> EngineGraphs:
    """The lowering with the newest operators that this version of TensorRT's parser reads.

    packed: whether there are weights in 4 bits.

    For TensorRT-RTX, 1.7 is the first version that was tried.
    """
    if target == "tensorrt-rtx":
        return "opset-23" if found >= (1, 7) else "native"
    older: EngineGraphs = "opset-21" if packed and found >= (10, 0) else "native"
    return "opset-23" if found >= (10, 15) else "opset-23-attention" if found >= (10, 14) else older


def build_dtype(bundle: Bundle, recipe: EngineRecipe, trt: Any, capability: str) -> FloatName:
    """The dtype of the engines.

    Raises:
        UserError: this TensorRT or this GPU has no bfloat16.
    """
    old = (recipe.target == "tensorrt" and major(trt) < 10) or float(capability) < 8.0
    if recipe.dtype == "bfloat16" and old:
        raise UserError("bfloat16 needs TensorRT 10 and a GPU of compute capability 8.0: use --dtype float16")
    if recipe.dtype is not None:
        return recipe.dtype
    dtype: FloatName = bundle.manifest.dtype
    return "float16" if dtype == "bfloat16" and old else dtype


def lowered(bundle: Bundle, name: GraphName, choices: EngineChoices) -> ir.Model:
    """A graph in the form for TensorRT."""
    model = typed(bundle, name, choices.dtype, choices.own_products(name))
    if choices.narrow_angles(name):
        model = NarrowAnglesPass()(model).model
    return lower(SpellPass(choices.spellings(name))(model).model, choices.lowering(name))


def graph_to_count(bundle: Bundle, name: GraphName, choices: EngineChoices) -> ir.Model:
    """The same graph for counting, with one operator for each attention, whatever TensorRT gets."""
    spelled = SpellPass(dict.fromkeys(ATTENTION, "standard"))(
        typed(bundle, name, choices.dtype, choices.own_products(name))
    ).model
    return RaiseOpsetPass()(lower(spelled, choices.lowering(name))).model


def typed(bundle: Bundle, name: GraphName, dtype: FloatName, own_products: bool = False) -> ir.Model:
    """A graph in `dtype` before it is lowered. In float16, residual sums are scaled, and in float32.

    They are scaled because TensorRT 8.6 stores them in float16 whatever it is told. If our plugin's products add to
    them, in float32, and round their results, they are in float16.
    """
    model = bundle.graph(name)
    if dtype != bundle.manifest.dtype:
        model = RetypeFloatsPass(dtype)(model).model
    if dtype == "float16":
        model = ScaleResidualsPass()(model).model
        if not own_products:
            model = WidenResidualsPass()(model).model
    return model


def residual_scale(dtype: FloatName) -> float:
    """The scale of the residual stream of graphs in `dtype`, as `typed` makes them."""
    return SCALE if dtype == "float16" else 1.0

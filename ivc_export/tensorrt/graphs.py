"""A bundle's graphs as TensorRT gets them: in which dtype, and lowered."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import GraphName
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.lowering import lower
from ivc_export.lowering.precision.retype_floats import RetypeFloatsPass
from ivc_export.lowering.precision.scale_residuals import SCALE, ScaleResidualsPass
from ivc_export.lowering.precision.widen_residuals import WidenResidualsPass
from ivc_export.tensorrt.library import major
from ivc_export.tensorrt.recipe import EngineRecipe


def build_dtype(bundle: Bundle, recipe: EngineRecipe, trt: Any, capability: str) -> FloatName:
    """The dtype to build in.

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


def lowered(bundle: Bundle, name: GraphName, dtype: FloatName, plugin: bool) -> ir.Model:
    """A graph as TensorRT gets it."""
    return lower(typed(bundle, name, dtype), "plugin" if plugin else "native")


def typed(bundle: Bundle, name: GraphName, dtype: FloatName) -> ir.Model:
    """A graph in `dtype`, in float16 with residual sums in float32 and in scale, before it is lowered.

    In scale, since TensorRT 8.6 holds them in float16 whatever it is told.
    """
    model = bundle.graph(name)
    if dtype != bundle.manifest.dtype:
        model = RetypeFloatsPass(dtype)(model).model
    if dtype == "float16":
        model = WidenResidualsPass()(ScaleResidualsPass()(model).model).model
    return model


def residual_scale(dtype: FloatName) -> float:
    """Of the residual stream of graphs in `dtype`, as `typed` makes them."""
    return SCALE if dtype == "float16" else 1.0

"""Bundles computed with every narrow value rounded, in onnxruntime on the CPU, which has no kernels for bfloat16."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import onnxruntime

from ivc_export.contract.names import GraphName
from ivc_export.dtypes import FLOATS
from ivc_export.lowering.inline import InlinePass
from ivc_export.lowering.precision.widen_floats import WidenFloatsPass
from ivc_export.runtime.onnxruntime.cpu import OnnxSession


class RoundedSession(OnnxSession):
    """A bundle widened to float32, whose values are rounded to its own dtype wherever its graphs have them in it."""

    def _open(self, name: GraphName) -> onnxruntime.InferenceSession:
        path = self.bundle.folder / f"{name}.onnx"
        narrow = int(FLOATS[self.bundle.manifest.dtype].onnx)
        graph = onnx.shape_inference.infer_shapes(ir.to_proto(InlinePass()(ir.load(path)).model)).graph
        values = (*graph.value_info, *graph.output)
        names = {v.name for v in values if v.type.tensor_type.elem_type == narrow}
        model = ir.to_proto(InlinePass()(WidenFloatsPass()(ir.load(path)).model).model)
        nodes = list(model.graph.node)
        del model.graph.node[:]
        for node in nodes:
            rounded = [one for one in node.output if one in names]
            wide = [f"{one}/wide" if one in names else one for one in node.output]
            del node.output[:]
            node.output.extend(wide)
            model.graph.node.append(node)
            for one in rounded:
                for source, target, dtype in ((f"{one}/wide", f"{one}/narrow", narrow), (f"{one}/narrow", one, 1)):
                    model.graph.node.append(onnx.helper.make_node("Cast", [source], [target], to=dtype))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it drops such casts
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

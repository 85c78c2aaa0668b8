"""Compiles one graph to an engine, by Polygraphy's loaders of TensorRT or TensorRT-RTX.

Polygraphy makes the network, the profiles, the configuration and the engine, and knows what each version lacks. These
parts stay ours, because Polygraphy lacks them or does them in another way:

- Parsing: Polygraphy prints the parser's reason. Ours becomes part of an error's sentence.
- The precisions of TensorRT 8.6's layers, and the formats of its inputs and outputs (`fix_precisions`).
- The compute capability for which TensorRT-RTX builds.
- Files of timing caches: Polygraphy leaves a lock beside each, and continues without a cache if it is given one of
  another GPU. Polygraphy does set the cache that it is given: TensorRT takes no second cache in the place of the first.
- The thread and the monitor by which Ctrl-C ends a build.
- The logger: its last error is the reason in the sentence, where Polygraphy only refers to the messages above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Event
from typing import Any

import onnx
import onnx_ir as ir

from ivc_export.checkpoint.weights import read_values
from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.dtypes import FLOATS, FloatName
from ivc_export.errors import UserError
from ivc_export.tensorrt.loading import major, make_logger, polygraphy
from ivc_export.tensorrt.profiles import Extents, make_profile
from ivc_export.tensorrt.recipe import Options


def compile_graph(
    trt: Any,
    model: ir.Model,
    profiles: Iterable[Extents],
    options: Options,
    work: Path,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> bytes:
    """Build one engine, and return it serialised.

    model: in the form for TensorRT. Its weights have paths relative to `work`, where files are written.

    Raises:
        UserError: TensorRT refuses the graph.
    """
    name = model.graph.name
    path = work / f"{name}.onnx"
    converted = any(isinstance(v.const_value, ir.LazyTensor) for v in model.graph.initializers.values())
    if converted:
        read_by_us(model)
    ir.save(model, path, external_data=f"{name}.data" if converted else None)
    logger = make_logger(trt, options.verbose)
    timed = None if options.timing_cache is None else options.timing_cache / f"{name}.cache"
    with polygraphy(options.target, logger, f"TensorRT {trt.__version__} cannot build the {name} graph") as loaders:
        builder, network = loaders.create_network(strongly_typed=not weak(trt, options))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(path)):
            raise UserError(f"TensorRT {trt.__version__} cannot read the {name} graph ({parser.get_error(0)})")
        if weak(trt, options) and options.reduced:  # in float32 there is nothing to choose
            fix_precisions(trt, network, float_types(model))
        allow_decomposition(trt, network)
        shapes = [make_profile(loaders.Profile(), model, extents) for extents in profiles]
        with timed.open("rb") if timed is not None and timed.is_file() else nullcontext() as saved:
            chosen = choices(trt, options) | {"load_timing_cache": saved}
            config = loaders.create_config(builder, network, profiles=shapes, **chosen)
        if any(node.domain == IVC_DOMAIN for node in model.graph) and hasattr(trt.PreviewFeature, ALIASES):
            config.set_preview_feature(getattr(trt.PreviewFeature, ALIASES), True)
        if options.target == "tensorrt-rtx":
            config.num_compute_capabilities = 1
            capability = getattr(trt.ComputeCapability, f"SM{options.compute_capability.replace('.', '')}")
            config.set_compute_capability(capability, 0)
        if timed is not None:
            begin_timings(config)
        plan = in_thread(trt, config, progress, lambda: loaders.engine_bytes_from_network((builder, network), config))
    if timed is not None:
        timed.write_bytes(memoryview(config.get_timing_cache().serialize()))
    for file in work.glob(f"{name}.*"):
        file.unlink()
    return bytes(memoryview(plan))


ALIASES = "ALIASED_PLUGIN_IO_10_03"
"""TensorRT's name for plugins whose outputs are in their inputs' memory, from 10.3 on."""


def read_by_us(model: ir.Model) -> None:
    """Let `read_values` read a bundle's weights, because onnx_ir refuses hard links."""
    for value in model.graph.initializers.values():
        if isinstance(stored := value.const_value, ir.ExternalTensor):

            def read(stored: ir.ExternalTensor = stored) -> ir.TensorProtocol:
                return ir.Tensor(read_values(stored), dtype=stored.dtype, name=stored.name)

            value.const_value = ir.LazyTensor(read, dtype=stored.dtype, shape=stored.shape, name=stored.name)


def weak(trt: Any, options: Options) -> bool:
    """Whether networks are weakly typed: TensorRT before 10 does not use the graph's types for the engine."""
    return options.target == "tensorrt" and major(trt) < 10


def choices(trt: Any, options: Options) -> dict[str, Any]:
    """Options for Polygraphy's CreateConfig. TF32 stays off: values that are float32 in a graph are so for a reason.

    Raises:
        UserError: this TensorRT has no such tactic source.
    """
    chosen: dict[str, Any] = {
        "builder_optimization_level": options.optimization_level,
        "profiling_verbosity": trt.ProfilingVerbosity.LAYER_NAMES_ONLY,  # TensorRT's own default
    }
    if weak(trt, options) and options.reduced:
        chosen |= {"fp16": True, "precision_constraints": "obey"}
    if options.workspace is not None:
        chosen["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: options.workspace}
    if options.tactic_sources is not None:
        known = trt.TacticSource.__members__
        unknown = [name for name in options.tactic_sources if name not in known]
        if unknown:
            raise UserError(f"there is no tactic source {unknown[0]}: give some of {', '.join(known)}")
        chosen["tactic_sources"] = [known[name] for name in options.tactic_sources]
    return chosen


def begin_timings(config: Any) -> None:
    """Start a timing cache if none was taken, because the saved one is of another TensorRT or GPU."""
    if config.get_timing_cache() is None:
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def in_thread(trt: Any, config: Any, progress: Callable[[str, int, int], None], build: Callable[[], Any]) -> Any:
    """The result of `build`, called in another thread: TensorRT swallows exceptions of signals in its callbacks.

    Ctrl-C ends a build at its next step. TensorRT before 10 has no progress monitor; there the build ends when it is
    done.
    """
    stopped = Event()
    if hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = make_monitor(trt, progress, stopped)
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(build)
        try:
            return building.result()
        except BaseException:
            stopped.set()
            raise


def float_types(model: ir.Model) -> dict[str, ir.DataType]:
    """Types of the float32 and float16 values that a graph computes, inferred, by name."""
    graph = onnx.shape_inference.infer_shapes(ir.to_proto(model)).graph
    types = {v.name: ir.DataType(v.type.tensor_type.elem_type) for v in (*graph.value_info, *graph.output)}
    return {name: dtype for name, dtype in types.items() if dtype in [FLOATS[known].onnx for known in MIXED]}


MIXED: tuple[FloatName, ...] = ("float32", "float16")
"""The types that a weakly typed builder mixes."""
ARITHMETIC = ("ACTIVATION", "ELEMENTWISE", "MATRIX_MULTIPLY", "NORMALIZATION", "REDUCE", "SOFTMAX", "UNARY")
"""Types of TensorRT's layers that compute."""


def fix_precisions(trt: Any, network: Any, types: Mapping[str, ir.DataType]) -> None:
    """Tell TensorRT 8.6's weakly typed builder which layers must be float32, and that inputs and outputs are linear.

    Otherwise it tries every mix of formats of inputs and outputs, and compiles the whole graph for each. Constraints on
    more layers, such as those that compute in float16 or reshape, contradict its own constraints and leave it no
    choice.

    types: of values by name, which are names of the network's tensors. Tensors that the parser adds between them have
    the widest type that it reads.
    """
    linear = 1 << int(trt.TensorFormat.LINEAR)
    for tensor in (
        *(network.get_input(i) for i in range(network.num_inputs)),
        *(network.get_output(i) for i in range(network.num_outputs)),
    ):
        tensor.allowed_formats = linear
    kinds = {FLOATS[name].onnx: getattr(trt.DataType, FLOATS[name].tensorrt) for name in MIXED}
    known = {name: kinds[dtype] for name, dtype in types.items()}
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        given = {known.get(t.name) for t in (layer.get_input(i) for i in range(layer.num_inputs)) if t is not None}
        widest = next((kind for kind in kinds.values() if kind in given), None)
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        for output in outputs:
            if output.name not in known and output.dtype in kinds.values():  # what the parser added
                kind = output.dtype if layer.type == trt.LayerType.CONSTANT else widest
                if kind is not None:
                    known[output.name] = kind
        constrained = layer.type in [getattr(trt.LayerType, name) for name in ARITHMETIC]
        if constrained and known.get(outputs[0].name, widest) == trt.DataType.FLOAT:  # comparisons do not give floats
            layer.precision = trt.DataType.FLOAT
            for i, output in enumerate(outputs):
                if output.name in known:
                    layer.set_output_type(i, trt.DataType.FLOAT)


def allow_decomposition(trt: Any, network: Any) -> None:
    """Allow attention to be built of other operators if no kernel has its sizes. Otherwise there would be no engine."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for layer in (network.get_layer(i) for i in range(network.num_layers) if kind is not None):
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer  # networks give layers without their kind
            layer.attention.decomposable = True


def make_monitor(trt: Any, progress: Callable[[str, int, int], None], stopped: Event) -> Any:
    """A progress monitor that passes on each phase's steps, and ends the build once `stopped` is set."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """TensorRT calls it from its own threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            """A phase begins."""
            self.steps[phase] = steps
            progress(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            """A step is done; whether to go on."""
            progress(phase, step + 1, self.steps.get(phase, step + 1))
            return not stopped.is_set()

        def phase_finish(self, phase: str) -> None:
            """A phase ends."""
            steps = self.steps.pop(phase, 1)
            progress(phase, steps, steps)

    return Monitor()

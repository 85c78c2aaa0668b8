"""Layers of Qwen2-VL-2B's size in TensorRT engines: ms a layer, and what selecting and compacting take.

    python -m benchmarks.tensorrt_layers build FOLDER [--plugin LIB]      engines, and how long they took to build
    python -m benchmarks.tensorrt_layers time FOLDER [--ceilings FILE]    their times, one table
    python -m benchmarks.tensorrt_layers ceilings FILE                    the device's ceilings, by torch

Engines: a prefix of 3 layers and a decoder of 3 layers in float16, residual sums in float32, with the profiles that
ivc-build gives them; and, by themselves, the selection, and the compaction of hidden states and of the keys and values
of the 16 layers below the cut. The vocabulary is small, so that lm_head does not count. `native` engines always,
`plugin` ones too if a plugin is given. The prefix engine includes its selection and the decoder engine its compaction:
these are subtracted before dividing by the layers.

Times are of the GPU, by events around runs of an engine one behind the other on memory that does not change: as a
CUDA graph (`ms`) where that can be captured, and enqueued one by one (`enqueued_ms`), which a slow host bounds from
below for small engines.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from benchmarks.models import make_large_checkpoint, qwen2_vl_2b
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.graphs import TensorName
from ivc_export.contract.names import GraphName
from ivc_export.exporter.estimate import COUNTED
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.pictures import Grid
from ivc_export.graph.counting import count
from ivc_export.lowering import lower
from ivc_export.lowering.precision.retype_floats import RetypeFloatsPass
from ivc_export.runtime.plan import Run, plan_run
from ivc_export.runtime.probes import compaction_part, fix_sizes, selection_feeds, selection_part
from ivc_export.runtime.tensorrt.device import MODULE, Buffers, CudaDevice, median_seconds
from ivc_export.runtime.tensorrt.engine import Engine, Tensor
from ivc_export.tensorrt.build import working_folder
from ivc_export.tensorrt.compile import compile_graph
from ivc_export.tensorrt.graphs import EngineChoices, lowered
from ivc_export.tensorrt.library import load_plugin, load_tensorrt, make_logger, own_capability
from ivc_export.tensorrt.profiles import profiles
from ivc_export.tensorrt.recipe import EngineRecipe, Options

RESULTS = Path(__file__).parent / "results"
LAYERS, CUT, BELOW = 6, 3, 16
SIZES, TEXT, NEW = (256, 1024, 4096), 64, 64
RATIOS = (1.0, 0.5)
GRAPHS: tuple[GraphName, ...] = ("prefix", "decoder")
ENGINES = (*GRAPHS, "select", "compact")
VOCABULARY = 2048
TACTICS = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
RECIPE = EngineRecipe(
    dtype="float16",
    max_visual=max(SIZES),
    max_text=TEXT,
    max_new=NEW,
    opt_visual=1024,
    opt_text=TEXT,
    tactic_sources=TACTICS,
)
ROUNDS, RUNS = 7, 20


def make_bundle(folder: Path, layers: int, cut: int, **sizes: int) -> Bundle:
    """A random model of Qwen2-VL-2B's sizes but for the layers and the vocabulary; its vision encoder has one layer."""
    config = qwen2_vl_2b(layers, depth=1) | {"vocab_size": VOCABULARY} | sizes
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config |= {name: VOCABULARY - 1 - i for i, name in enumerate(tokens) if name in config}
    if (folder / f"bundle-{layers}").is_dir():
        return Bundle.load(folder / f"bundle-{layers}")
    checkpoint = make_large_checkpoint(folder / f"checkpoint-{layers}", config, "float16")
    recipe = ExportRecipe(checkpoint, folder / f"bundle-{layers}", layer=cut, max_visual=max(SIZES), weights="link")
    return export(recipe)


def models(bundle: Bundle, whole: Bundle, plugin: bool) -> dict[str, ir.Model]:
    """The graphs to build, by name."""

    def part(model: ir.Model) -> ir.Model:
        return lower(RetypeFloatsPass("float16")(model).model, "plugin" if plugin else "native")

    choices = EngineChoices("tensorrt", "float16", "plugin" if plugin else "native", "float16", "grouped")
    found: dict[str, ir.Model] = {name: lowered(bundle, name, choices) for name in GRAPHS}
    found["select"] = part(selection_part(bundle.graph("prefix")))
    fix_sizes(found["select"], bundle.manifest)
    found["compact"] = part(compaction_part(whole.graph("decoder")))
    for name in ("select", "compact"):
        found[name].graph.name = name
    return found


def build(options: argparse.Namespace) -> None:
    """Build engines of one kind."""
    trt = load_tensorrt("tensorrt")
    if options.plugin:
        load_plugin(options.plugin)
    kind = "plugin" if options.plugin else "native"
    folder = options.folder / kind
    folder.mkdir(parents=True, exist_ok=True)
    bundle, whole = make_bundle(folder, LAYERS, CUT), make_bundle(folder, BELOW + 1, BELOW, intermediate_size=64)
    capability = own_capability(trt)
    for name, model in models(bundle, whole, bool(options.plugin)).items():
        if name not in options.only:
            continue
        extents = profiles(bundle, "prefix", RECIPE)  # the decoder has the same
        settings = Options("tensorrt", capability, tactic_sources=TACTICS, reduced=True)
        start = time.perf_counter()
        with working_folder(whole if name == "compact" else bundle) as work:
            plan = compile_graph(trt, model, extents.values(), settings, work)
        seconds = round(time.perf_counter() - start, 2)
        (folder / f"{name}.plan").write_bytes(plan)
        (folder / f"{name}.seconds").write_text(str(seconds))
        print(kind, name, f"{seconds} s", f"{len(plan) / 1e6:.0f} MB", flush=True)


def planned(bundle: Bundle, visual: int, ratio: float) -> Run:
    """A prompt with one picture."""
    side = int(np.sqrt(visual))
    tokens = np.ones(visual + TEXT, np.int32)
    tokens[TEXT // 2 : TEXT // 2 + visual] = bundle.manifest.tokens.image
    return plan_run(bundle.manifest, tokens, [Grid(side, side)], 0, ratio)


class Times(NamedTuple):
    """Milliseconds of one run, as a CUDA graph where it can be captured."""

    graph: float | None
    enqueued: float

    @property
    def best(self) -> float:
        """As a CUDA graph, or else enqueued."""
        return self.enqueued if self.graph is None else self.graph


class Timer:
    """Engines of one kind on the device."""

    def __init__(self, folder: Path, trt: Any, runtime: Any, device: CudaDevice) -> None:
        self.cuda: Any = importlib.import_module(MODULE)
        self.device, self.buffers = device, Buffers(device)
        self.engines = {
            name: Engine(trt, folder / f"{name}.plan", ("prefill", "decode"), device, runtime) for name in ENGINES
        }
        scratch = self.buffers.get("scratch", max(engine.scratch for engine in self.engines.values()))
        for engine in self.engines.values():
            engine.use_scratch(scratch)
        self.kept: list[npt.NDArray[Any]] = []  # what TensorRT reads from the host

    def put(self, name: str, array: npt.NDArray[Any], host: bool = False) -> Tensor:
        """An input."""
        if host:
            self.kept.append(array)
            return Tensor(array.ctypes.data, array.shape, array.dtype)
        address = self.buffers.get(name, array.nbytes)
        self.device.upload(address, np.ascontiguousarray(array))
        return Tensor(address, array.shape, array.dtype)

    def milliseconds(self, name: str, profile: str, inputs: Mapping[str, Tensor]) -> tuple[Times, dict[str, Tensor]]:
        """Medians over rounds of the time of one run, as a CUDA graph and enqueued."""
        engine, stream = self.engines[name], self.device.stream
        for _ in range(2):
            outputs = engine.run(profile, inputs, self.buffers, f"{name}/{profile}")
        context = engine.contexts[profile]
        enqueued = self.median(lambda: context.execute_async_v3(stream))
        self.device.synchronize()
        self.cuda.cudaStreamBeginCapture(stream, self.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        context.execute_async_v3(stream)
        status, graph = self.cuda.cudaStreamEndCapture(stream)
        if int(status):
            print(f"{name} of profile {profile} cannot be captured: {status}", flush=True)
            return Times(None, enqueued), outputs
        _, runnable = self.cuda.cudaGraphInstantiate(graph, 0)
        replayed = self.median(lambda: self.cuda.cudaGraphLaunch(runnable, stream))
        self.cuda.cudaGraphExecDestroy(runnable)
        self.cuda.cudaGraphDestroy(graph)
        return Times(replayed, enqueued), outputs

    def median(self, start: Callable[[], object]) -> float:
        """Milliseconds of one run, of many one behind the other."""
        return 1000 * median_seconds(self.device, start, ROUNDS, RUNS)

    def prompt(self, bundle: Bundle, plan: Run, rows: int, full: bool) -> dict[str, Times]:
        """Times of a prefill, or of a decode step over `rows` valid rows of full buffers; ms by engine."""
        m, generator = bundle.manifest.decoder, np.random.default_rng(0)
        noise = generator.standard_normal((1, plan.rows, m.hidden_size), np.float32)
        feeds: dict[str, npt.NDArray[Any]] = selection_feeds(plan) | {
            "inputs_embeds": noise.astype(np.float16),
            "past_length": np.array([rows], np.int32),
            "logit_index": np.array([len(plan.text_index) + plan.keep_count - 1], np.int32),
        }
        capacity = RECIPE.capacity if full else 0
        values = generator.standard_normal((1, m.kv_heads, plan.rows, m.head_dim), np.float32).astype(np.float16)
        feeds["values"] = values
        inputs = {name: self.put(name, array, host=name == "keep_count") for name, array in feeds.items()}
        for layer in range(LAYERS):
            for kind in ("key", "value"):
                address = self.buffers.get(f"cache/{kind}.{layer}", 2 * m.kv_heads * RECIPE.capacity * m.head_dim)
                shape = (1, m.kv_heads, capacity, m.head_dim)
                inputs[f"past_{kind}.{layer}"] = Tensor(address, shape, np.dtype(np.float16))
        profile = "decode" if full else "prefill"
        found: dict[str, Times] = {}
        found["prefix"], prefix = self.milliseconds("prefix", profile, inputs)
        found["select"], _ = self.milliseconds("select", profile, inputs)
        found["decoder"], _ = self.milliseconds("decoder", profile, inputs | prefix)
        kept = {name: tensor for name, tensor in prefix.items() if TensorName.of(name).role != "new"}
        for layer in range(BELOW):
            for kind in ("key", "value"):
                kept[f"new_{kind}.{layer}"] = inputs["values"]
        kept["hidden_states"] = inputs["inputs_embeds"]  # of the part's dtype
        found["compact"], _ = self.milliseconds("compact", profile, inputs | kept)
        return found


def least(bundle: Bundle, plan: Run, rows: int, capacity: int, ceilings: Mapping[str, float]) -> dict[str, float]:
    """Roofline of each engine in ms: FLOPs by the matmul ceiling, weights and caches by the copy bandwidth."""
    m, text = bundle.manifest.decoder, len(plan.text_index)
    kept = text + plan.keep_count
    axes = {"S": plan.rows, "L": plan.rows - text, "T": text, "Q": len(plan.query_index), "R": 1, "M": kept}
    axes |= {"P": capacity, "seeds": 1}
    cache_row = 2 * CUT * m.kv_heads * m.head_dim * 2
    found: dict[str, float] = {}
    for name in GRAPHS:
        model = ir.load(bundle.folder / f"{name}.onnx")
        tensors = (value.const_value for value in model.graph.initializers.values())
        weights = sum(2 * tensor.size for tensor in tensors if isinstance(tensor, ir.ExternalTensor))
        flops = count(ir.to_proto(COUNTED(model).model), axes, None).flops
        size = weights + cache_row * (rows + plan.rows)
        seconds = max(flops / ceilings["flops_per_second"], size / ceilings["bytes_per_second"])
        found[name] = 1e3 * seconds
    chosen = 2 * kept * (2 * m.hidden_size + BELOW * 2 * m.kv_heads * m.head_dim * 2)  # read and written, 2 bytes each
    found["compact"] = 1e3 * chosen / ceilings["bytes_per_second"]
    found["select"] = 1e3 * 2 * plan.rows * m.kv_heads * m.head_dim / ceilings["bytes_per_second"]
    return found


def measure(options: argparse.Namespace) -> None:
    """Time every kind of engines that is there."""
    trt = load_tensorrt("tensorrt")
    device = CudaDevice()
    runtime = trt.Runtime(make_logger(trt))
    if options.plugin:
        load_plugin(options.plugin)
    ceilings = json.loads(options.ceilings.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = []
    built: dict[str, Any] = {}
    for kind in ("native", "plugin"):
        folder = options.folder / kind
        if not all((folder / f"{name}.plan").is_file() for name in ENGINES):
            continue
        built[kind] = {name: float((folder / f"{name}.seconds").read_text()) for name in ENGINES}
        bundle, timer = Bundle.load(folder / f"bundle-{LAYERS}"), Timer(folder, trt, runtime, device)
        for visual in SIZES:
            for ratio in RATIOS:
                plan = planned(bundle, visual, ratio)
                kept = TEXT + plan.keep_count
                one = plan_run(bundle.manifest, np.ones(1, np.int32), (), plan.next_position, 1.0)
                for stage, run, past in (("prefill", plan, 0), ("decode", one, kept)):
                    found = timer.prompt(bundle, run, past, stage == "decode")
                    bound = least(bundle, run, past, RECIPE.capacity if past else 0, ceilings)
                    layer = {
                        "prefix": (found["prefix"].best - found["select"].best) / CUT,
                        "decoder": (found["decoder"].best - found["compact"].best * CUT / BELOW) / (LAYERS - CUT),
                    }
                    rows.append(
                        {"graphs": kind, "stage": stage, "visual_tokens": visual, "ratio": ratio}
                        | {f"{name}_ms": round(times.best, 4) for name, times in found.items()}
                        | {f"{name}_captured": times.graph is not None for name, times in found.items()}
                        | {f"{name}_enqueued_ms": round(times.enqueued, 4) for name, times in found.items()}
                        | {f"{name}_roofline_ms": round(value, 4) for name, value in bound.items()}
                        | {f"{name}_ms_a_layer": round(value, 4) for name, value in layer.items()}
                    )
                    print(rows[-1], flush=True)
    content = {
        "command": shlex.join(["python", "-m", "benchmarks.tensorrt_layers", *sys.argv[1:]]),
        "versions": {"tensorrt": trt.__version__, "numpy": np.__version__},
        "gpu": ceilings["gpu"],
        "dtype": "float16, residual sums in float32",
        "tactic_sources": list(TACTICS),
        "note": "cuBLAS and cuDNN tactics were off: TensorRT had its own kernels alone",
        "layers": {"prefix": CUT, "decoder": LAYERS - CUT, "compacted": BELOW},
        "text_tokens": TEXT,
        "cache_capacity": RECIPE.capacity,
        "ceilings": ceilings,
        "build_seconds": built | {"note": "both kinds and their engines side by side"},
        "cores": os.cpu_count(),
        "rows": rows,
    }
    options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_ceilings(options: argparse.Namespace) -> None:
    """Measure by torch, whose cuBLAS is not TensorRT's."""
    import torch

    from ivc_export.bench.roofline import torch_ceilings

    found = torch_ceilings("float16")
    content = {
        "gpu": torch.cuda.get_device_name(),
        "bytes_per_second": found.bytes_per_second,
        "flops_per_second": found.flops_per_second,
        "source": found.source,
    }
    options.folder.write_text(json.dumps(content), encoding="utf-8")
    print(content)


def main() -> None:
    """Build, time, or measure ceilings."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("build", "time", "ceilings"))
    p.add_argument("folder", type=Path)
    p.add_argument("--plugin", type=Path)
    p.add_argument("--only", nargs="*", choices=ENGINES, default=ENGINES, help="engines to build, several side by side")
    p.add_argument("--ceilings", type=Path)
    p.add_argument("--output", type=Path, default=RESULTS / "tensorrt_layers-h100.json")
    options = p.parse_args()
    {"build": build, "time": measure, "ceilings": write_ceilings}[options.what](options)


if __name__ == "__main__":
    main()

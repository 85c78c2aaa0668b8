"""Layers of Qwen2-VL-2B's size in TensorRT engines: ms a layer, scratch memory, and what selecting and compacting take.

    python -m benchmarks.tensorrt_layers build FOLDER [--only NAME ...] [--plugin LIB]   engines, and how long they took
    python -m benchmarks.tensorrt_layers time FOLDER [--only NAME ...] [--plugin LIB] [--ceilings FILE]   one table
    python -m benchmarks.tensorrt_layers ceilings FILE                                   the device's ceilings, by torch

NAME is a kind or `kind/engine`; they are taken in the order in which they are given, so that the worthiest come first.
The table is written anew after every row.

Kinds: `vision-float16` and `vision-float32`, encoders of one and three blocks with the softmax in that dtype, and
`vision-plugin`, with our kernel, by whose difference a block is timed. `grouped`, `repeated` and `plugin`: a prefix
of 3 layers and a decoder of 3 layers, by how attention is spelled; `plugin-int4`: the same with the plugin, over
weights in 4 bits in groups of 32; and, by themselves, the selection, and the compaction of hidden states and of the
keys and values of the 16 layers below the cut, which `repeated` shares with `grouped`, and `plugin-int4` with
`plugin`. All are in float16, with the profiles that ivc-build gives them; residual sums are in float32, with the
plugin in float16. The vocabulary is small, so that lm_head does not count. The prefix engine includes its selection
and the decoder engine its compaction: these are subtracted before dividing by the layers.

Times are of the GPU, by events around runs of an engine one behind the other on memory that does not change: as a
CUDA graph (`ms`) where that can be captured, and enqueued one by one (`enqueued_ms`), which a slow host bounds from
below for small engines.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import PIL.Image

from benchmarks.models import make_large_checkpoint, qwen2_vl_2b
from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.graphs import TensorName
from ivc_export.contract.names import GraphName
from ivc_export.exporter.estimate import COUNTED
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe, Quantisation
from ivc_export.families.pictures import Grid
from ivc_export.graph.counting import count
from ivc_export.lowering import lower
from ivc_export.lowering.precision.retype_floats import RetypeFloatsPass
from ivc_export.runtime.plan import Run, plan_run
from ivc_export.runtime.probes import compaction_part, fix_sizes, selection_feeds, selection_part
from ivc_export.runtime.tensorrt.device import Buffers, CudaDevice, Device, median_seconds
from ivc_export.runtime.tensorrt.engine import Engine, Tensor
from ivc_export.tensorrt.build import working_folder
from ivc_export.tensorrt.compile import compile_graph
from ivc_export.tensorrt.graphs import EngineChoices, lowered
from ivc_export.tensorrt.loading import load_plugin, load_tensorrt, make_logger, own_capability
from ivc_export.tensorrt.profiles import profiles
from ivc_export.tensorrt.recipe import EngineRecipe, Options

RESULTS = Path(__file__).parent / "results"
LAYERS, CUT, BELOW = 6, 3, 16
SIZES, TEXT, NEW = (256, 1024, 4096), 64, 64
RATIOS = (1.0, 0.5)
DEPTHS = (1, 3)
GRAPHS: tuple[GraphName, ...] = ("prefix", "decoder")
ENGINES = (*GRAPHS, "select", "compact")
PARTS = {"repeated": "grouped", "plugin-int4": "plugin"}
"""Whose selection and compaction a kind shares."""
NATIVE = EngineChoices("tensorrt", "float16", "native", "float16", "grouped")
PLUGIN = replace(NATIVE, graphs="plugin", attention="operator")
KINDS: dict[str, tuple[EngineChoices, tuple[str, ...]]] = {
    "vision-float16": (NATIVE, tuple(f"vision-{depth}" for depth in DEPTHS)),
    "vision-float32": (replace(NATIVE, softmax="float32"), tuple(f"vision-{depth}" for depth in DEPTHS)),
    "vision-plugin": (PLUGIN, tuple(f"vision-{depth}" for depth in DEPTHS)),
    "plugin": (PLUGIN, ENGINES),
    "plugin-int4": (PLUGIN, GRAPHS),
    "grouped": (NATIVE, ENGINES),
    "repeated": (replace(NATIVE, attention="repeated"), GRAPHS),
}
"""How a kind's engines are made, and their names."""
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
PIXELS = 28
"""A visual token's side: patches of 14, merged two by two."""


def make_bundle(folder: Path, layers: int, cut: int, depth: int = 1, packed: bool = False, **sizes: int) -> Bundle:
    """A random model of Qwen2-VL-2B's sizes but for its layers, the encoder's blocks and the vocabulary.

    packed: weights of decoder layers are in 4 bits, in groups of 32.
    """
    config = qwen2_vl_2b(layers, depth) | {"vocab_size": VOCABULARY} | sizes
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config |= {name: VOCABULARY - 1 - i for i, name in enumerate(tokens) if name in config}
    name = f"{layers}-{depth}"
    output = folder / (f"bundle-{name}-int4" if packed else f"bundle-{name}")
    if output.is_dir():
        return Bundle.load(output)
    checkpoint = folder / f"checkpoint-{name}"
    if not checkpoint.is_dir():
        make_large_checkpoint(checkpoint, config, "float16")
    recipe = ExportRecipe(checkpoint, output, layer=cut, max_visual=max(SIZES))
    return export(replace(recipe, quantisation=Quantisation("int4", 32)) if packed else replace(recipe, weights="link"))


def decoder_bundle(folder: Path, kind: str) -> Bundle:
    """Where the decoder's layers are for a kind."""
    return make_bundle(folder, LAYERS, CUT, packed=kind == "plugin-int4")


def chosen(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Kinds and engines, in order."""
    names = options.only or [kind for kind in KINDS if KINDS[kind][0] is not PLUGIN or options.plugin]
    found = []
    for kind, _, engine in (name.partition("/") for name in names):
        if kind not in KINDS or (engine and engine not in KINDS[kind][1]):
            raise SystemExit(f"there is no {kind}/{engine}: give some of {', '.join(KINDS)}")
        found += [(kind, one) for one in KINDS[kind][1] if engine in ("", one)]
    return found


def part(model: ir.Model, choices: EngineChoices) -> ir.Model:
    """A part of a graph as TensorRT gets it."""
    return lower(RetypeFloatsPass("float16")(model).model, choices.graphs)


def source(folder: Path, kind: str, engine: str) -> tuple[Bundle, ir.Model, GraphName]:
    """What an engine is built from: the bundle that has its weights, the graph, and whose profiles it has."""
    choices = KINDS[kind][0]
    if engine.startswith("vision-"):
        depth = int(engine.removeprefix("vision-"))
        bundle = make_bundle(folder, 2, 1, depth, intermediate_size=64)
        model, profile = lowered(bundle, "vision", choices), "vision"
    elif engine == "compact":
        bundle = make_bundle(folder, BELOW + 1, BELOW, intermediate_size=64)
        model, profile = part(compaction_part(bundle.graph("decoder")), choices), "prefix"  # the decoder has the same
    else:
        bundle, profile = decoder_bundle(folder, kind), "prefix"
        if engine == "select":
            model = part(selection_part(bundle.graph("prefix")), choices)
            fix_sizes(model, bundle.manifest)
        else:
            model = lowered(bundle, engine, choices)  # type: ignore[arg-type]
    model.graph.name = engine
    return bundle, model, profile  # type: ignore[return-value]


def build(options: argparse.Namespace) -> None:
    """Build engines, one after the other."""
    trt = load_tensorrt("tensorrt")
    if options.plugin:
        load_plugin(options.plugin)
    capability = own_capability(trt)
    for kind, name in chosen(options):
        folder = options.folder / kind
        folder.mkdir(parents=True, exist_ok=True)
        bundle, model, profile = source(options.folder, kind, name)
        settings = Options("tensorrt", capability, tactic_sources=TACTICS, reduced=True)
        start = time.perf_counter()
        with working_folder(bundle) as work:
            recipe = replace(RECIPE, plugin=options.plugin) if KINDS[kind][0] is PLUGIN else RECIPE
            plan = compile_graph(trt, model, profiles(bundle, profile, recipe).values(), settings, work)
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


def written(engine: Engine) -> list[str]:
    """Outputs that are caches, which an engine writes to in place."""
    return [name for name in engine.outputs if TensorName.of(name).role == "present"]


class Timer:
    """Engines of one kind on the device. paths: by their names."""

    def __init__(self, paths: Mapping[str, Path], trt: Any, runtime: Any, device: Device) -> None:
        self.device, self.buffers = device, Buffers(device)
        self.engines = {
            name: Engine(
                trt, path, ("prefill",) if name.startswith("vision") else ("prefill", "decode"), device, runtime
            )
            for name, path in paths.items()
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
        bound = {output: inputs[TensorName.of(output).to("past")] for output in written(engine)}
        for _ in range(2):
            outputs = engine.run(profile, inputs, self.buffers, f"{name}/{profile}", bound=bound)
        context = engine.contexts[profile]
        enqueued = self.median(lambda: context.execute_async_v3(stream))
        self.device.synchronize()
        graph = self.device.capture(lambda: context.execute_async_v3(stream))
        if graph is None:
            print(f"{name} of profile {profile} cannot be captured", flush=True)
            return Times(None, enqueued), outputs
        return Times(self.median(graph), enqueued), outputs

    def median(self, start: Callable[[], object]) -> float:
        """Milliseconds of one run, of many one behind the other."""
        return 1000 * median_seconds(self.device, start, ROUNDS, RUNS)

    def picture(self, bundle: Bundle, visual: int) -> dict[str, Times]:
        """Times of a picture of so many visual tokens."""
        side = int(np.sqrt(visual)) * PIXELS
        picture = families.preparation(bundle.manifest).picture(PIL.Image.new("RGB", (side, side)), 0)
        assert picture.grid.visual == visual
        inputs = {
            name: self.put(name, array.astype(np.float16) if array.dtype.kind == "f" else array)
            for name, array in picture.inputs.items()
        }
        return {name: self.milliseconds(name, "prefill", inputs)[0] for name in self.engines}

    def prompt(self, bundle: Bundle, plan: Run, rows: int, full: bool) -> dict[str, Times]:
        """Times of a prefill, or of a decode step over `rows` valid rows of full buffers; ms by engine."""
        m, generator = bundle.manifest.decoder, np.random.default_rng(0)
        noise = generator.standard_normal((1, plan.rows, m.hidden_size), np.float32)
        feeds: dict[str, npt.NDArray[Any]] = selection_feeds(plan) | {
            "inputs_embeds": noise.astype(np.float16),
            "past_length": np.array([rows], np.int32),
            "logit_index": np.array([plan.kept - 1], np.int32),
        }
        whole = full or any(written(engine) for engine in self.engines.values())
        capacity = RECIPE.capacity if whole else 0
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
        if "decoder" in self.engines:
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
        weights = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, ir.ExternalTensor))
        flops = count(ir.to_proto(COUNTED(model).model), axes, None).flops
        size = weights + cache_row * (rows + plan.rows)
        seconds = max(flops / ceilings["flops_per_second"], size / ceilings["bytes_per_second"])
        found[name] = 1e3 * seconds
    chosen = 2 * kept * (2 * m.hidden_size + BELOW * 2 * m.kv_heads * m.head_dim * 2)  # read and written, 2 bytes each
    found["compact"] = 1e3 * chosen / ceilings["bytes_per_second"]
    found["select"] = 1e3 * 2 * plan.rows * m.kv_heads * m.head_dim / ceilings["bytes_per_second"]
    return found


def layer_times(found: Mapping[str, Times]) -> dict[str, float]:
    """Milliseconds of one layer, by graph, of the engines that were timed."""
    times = {name: one.best for name, one in found.items()}
    layers: dict[str, float] = {}
    if "prefix" in times:
        layers["prefix"] = (times["prefix"] - times["select"]) / CUT
    if "decoder" in times:
        layers["decoder"] = (times["decoder"] - times["compact"] * CUT / BELOW) / (LAYERS - CUT)
    first, second = (f"vision-{depth}" for depth in DEPTHS)
    if first in times:
        layers["vision"] = (times[second] - times[first]) / (DEPTHS[1] - DEPTHS[0])
    return layers


def row(labels: Mapping[str, Any], found: Mapping[str, Times], bound: Mapping[str, float]) -> dict[str, Any]:
    """One row of the table."""
    return (
        dict(labels)
        | {f"{name}_ms": round(times.best, 4) for name, times in found.items()}
        | {f"{name}_captured": times.graph is not None for name, times in found.items()}
        | {f"{name}_enqueued_ms": round(times.enqueued, 4) for name, times in found.items()}
        | {f"{name}_roofline_ms": round(value, 4) for name, value in bound.items()}
        | {f"{name}_ms_a_layer": round(value, 4) for name, value in layer_times(found).items()}
    )


def residual_sums(kind: str) -> str:
    """The dtype in which a kind's decoder layers add to the residual stream."""
    choices = KINDS[kind][0]
    return choices.dtype if choices.own_products("decoder") else "float32"


def rows(
    options: argparse.Namespace, kind: str, timer: Timer, ceilings: Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    """All of a kind's rows."""
    if kind.startswith("vision"):
        bundle = make_bundle(options.folder, 2, 1, DEPTHS[0], intermediate_size=64)
        for visual in (size for size in options.visual if size > min(SIZES)):
            labels = {"kind": kind, "stage": "vision", "visual_tokens": visual, "patches": 4 * visual}
            yield row(labels, timer.picture(bundle, visual), {})
        return
    bundle = decoder_bundle(options.folder, kind)
    for visual in options.visual:
        for ratio in RATIOS:
            plan = planned(bundle, visual, ratio)
            kept = TEXT + plan.keep_count
            one = plan_run(bundle.manifest, np.ones(1, np.int32), (), plan.next_position, 1.0)
            for stage, run, past in (("prefill", plan, 0), ("decode", one, kept)):
                found = timer.prompt(bundle, run, past, stage == "decode")
                bound = least(bundle, run, past, RECIPE.capacity if past else 0, ceilings) if ceilings else {}
                labels = {"kind": kind, "stage": stage, "visual_tokens": visual, "ratio": ratio}
                yield row(labels | {"residual_sums": residual_sums(kind)}, found, bound)


def measure(options: argparse.Namespace) -> None:
    """Time every kind whose engines are there, and write the table after every row."""
    trt = load_tensorrt("tensorrt")
    device = CudaDevice()
    runtime = trt.Runtime(make_logger(trt))
    if options.plugin:
        load_plugin(options.plugin)
    ceilings = json.loads(options.ceilings.read_text(encoding="utf-8")) if options.ceilings else {}
    content: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.tensorrt_layers", *sys.argv[1:]]),
        "versions": {"tensorrt": trt.__version__, "numpy": np.__version__},
        "gpu": ceilings.get("gpu"),
        "dtype": "float16",
        "tactic_sources": list(TACTICS),
        "note": "cuBLAS and cuDNN tactics were off: TensorRT had its own kernels alone",
        "layers": {"prefix": CUT, "decoder": LAYERS - CUT, "compacted": BELOW, "vision": DEPTHS[1] - DEPTHS[0]},
        "text_tokens": TEXT,
        "cache_capacity": RECIPE.capacity,
        "ceilings": ceilings,
        "cores": os.cpu_count(),
        "build_seconds": {},
        "scratch_bytes": {},
        "rows": [],
    }
    for kind in dict.fromkeys(kind for kind, _ in chosen(options)):
        own = {name: options.folder / kind / f"{name}.plan" for name in KINDS[kind][1]}
        shared = {name: options.folder / PARTS[kind] / f"{name}.plan" for name in ENGINES[2:] if kind in PARTS}
        missing = [str(path) for path in (own | shared).values() if not path.is_file()]
        if missing:
            print(f"{kind} is left out: build {', '.join(missing)}", flush=True)
            continue
        timer = Timer(own | shared, trt, runtime, device)
        content["build_seconds"][kind] = {
            name: float(path.with_suffix(".seconds").read_text()) for name, path in own.items()
        }
        content["scratch_bytes"][kind] = {name: timer.engines[name].scratch for name in own}
        for one in rows(options, kind, timer, ceilings):
            content["rows"].append(one)
            print(one, flush=True)
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
    p.add_argument("--only", nargs="*", metavar="NAME", help="kinds, or kind/engine, in order (default: all)")
    p.add_argument("--visual", nargs="*", type=int, default=SIZES, help=f"visual tokens (default: {SIZES})")
    p.add_argument("--ceilings", type=Path)
    p.add_argument("--output", type=Path, default=RESULTS / "tensorrt_layers-h100.json")
    options = p.parse_args()
    {"build": build, "time": measure, "ceilings": write_ceilings}[options.what](options)


if __name__ == "__main__":
    main()

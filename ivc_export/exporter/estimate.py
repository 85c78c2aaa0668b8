"""Estimates what a model costs at an export's ratio and layer, from its graphs without their weights.

Shapes are inferred for a picture and a prompt. So the figures are those of the graphs that an export writes, for every
family:

- FLOPs: two for each multiply-add of `Gemm` (2 m n k) and `MatMul` (2 batch m n k). Element-wise operators, norms and
  softmax are left out. So is the selection, whose votes are one part in 100,000 of the prefix.
- KV cache: the bytes that a runtime appends after a prefill. These are the decoder's `compact_*` and `new_*`, and the
  prefix's `new_*` of layers that the decoder does not compact.
- Peak activations: the most bytes that intermediate tensors take while the nodes run in order. A tensor lives from its
  node to its last reader. Tensors inside the selection do not count. In 16 bits, attention counts as one kernel.
  TensorRT before 10.14 has such a kernel for the decoder only with our plugin; ivc-build knows each version.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import onnx
import onnx_ir as ir
import PIL.Image

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.checkpoint.formats import detect_format
from ivc_export.checkpoint.formats.floats import FLOAT
from ivc_export.checkpoint.formats.weight_format import WeightFormat
from ivc_export.checkpoint.weights import EMBEDDING, PlannedWeights
from ivc_export.contract.graphs import TensorName
from ivc_export.contract.manifest import Manifest, Selection, SelectionRule
from ivc_export.contract.names import GRAPH_NAMES, IVC_DOMAIN, GraphName
from ivc_export.contract.ratio import kept_tokens
from ivc_export.dtypes import FLOATS, FloatName
from ivc_export.errors import UserError
from ivc_export.exporter.graphs import build_graphs
from ivc_export.exporter.pipeline import check_lowering, chosen_as_asked, selection_layer
from ivc_export.exporter.quantise import check_stored, plan_table, planned_formats
from ivc_export.exporter.recipe import ExportRecipe, Quantisation
from ivc_export.families.encoder import Preparation
from ivc_export.families.family import Family, Model
from ivc_export.families.pictures import Visual
from ivc_export.graph.counting import count
from ivc_export.graph.functions import PACKED_LINEARS
from ivc_export.lowering import ATTENTION, LOWERINGS
from ivc_export.lowering.inline import InlinePass
from ivc_export.lowering.spell import SpellPass
from ivc_export.lowering.tensorrt.opset import RaiseOpsetPass
from ivc_export.selection.ivc_prune import seed_count
from ivc_export.selection.operators import SELECTIONS
from ivc_export.source.configuration import read_description
from ivc_export.source.hub import open_checkpoint

TEXT = 64
"""Number of text tokens of the prompt. Half of them vote."""

PIXELS = 100_000_000

GIB = 2**30
COUNTED = ir.passes.Sequential(
    SpellPass(dict.fromkeys(ATTENTION, "standard")), InlinePass(kept=SELECTIONS), RaiseOpsetPass()
)
"""The passes before a graph is counted: standard operators, with one operator for each attention. The selection, one
part in 100,000, is left out."""

SCORE_BYTES: Mapping[FloatName, int] = {"float32": 8, "float16": 0, "bfloat16": 0}
"""Bytes for a score of attention. It is stored before and after the softmax, or not at all by a fused kernel."""


class Size(NamedTuple):
    """A picture's size in pixels."""

    width: int
    height: int


class DeviceMemory(NamedTuple):
    """A device, its memory, and how much of it the system and the runtime's context take, in GiB."""

    name: str
    memory: float
    reserved: float


DEVICES = (
    *(DeviceMemory(f"Jetson {name}", memory, 1.5) for name, memory in (
        ("Orin Nano 4 GB", 4), ("Orin Nano 8 GB", 8), ("Orin NX 8 GB", 8), ("Orin NX 16 GB", 16),
        ("AGX Orin 32 GB", 32), ("AGX Orin 64 GB", 64), ("Thor 128 GB", 128),
    )),
    *(DeviceMemory(f"GPU {memory} GB", memory, 0.75) for memory in (8, 12, 16, 24, 48, 80)),
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """One answer's prefill. flops and activation_bytes by graph; cache_bytes of all layers."""

    flops: Mapping[GraphName, int]
    activation_bytes: Mapping[GraphName, int]
    cache_bytes: int


@dataclass(frozen=True)
class PictureEstimate:
    """Costs of one picture and a question: with pruning, and with every token kept."""

    picture: Size
    visual_tokens: int
    kept_tokens: int
    text_tokens: int
    pruned: Cost
    unpruned: Cost

    def saved(self, *graphs: GraphName) -> float:
        """The fraction of the FLOPs of `graphs` that pruning saves."""
        pruned, unpruned = (sum(cost.flops[name] for name in graphs) for cost in (self.pruned, self.unpruned))
        return 1 - pruned / unpruned

    @property
    def saved_cache(self) -> float:
        """The fraction of the KV cache that pruning saves."""
        return 1 - self.pruned.cache_bytes / self.unpruned.cache_bytes


@dataclass(frozen=True)
class Estimate:
    """What an export costs and saves."""

    family: str
    dtype: FloatName
    layers: int
    selection_layer: int
    calibrated: bool
    method: str
    ratio: float
    weight_bytes: int
    parameters: int
    quantisation: str
    """A sentence on how weights are quantised. Empty if they are not."""
    pictures: tuple[PictureEstimate, ...]

    @property
    def memory_bytes(self) -> int:
        """Memory for the largest of the pictures: weights, cache, and the activations of one graph at a time."""
        costs = [picture.pruned for picture in self.pictures]
        return self.weight_bytes + max(c.cache_bytes + max(c.activation_bytes.values()) for c in costs)

    def fits(self) -> dict[str, bool]:
        """For each device, by its name, whether it has enough memory."""
        return {d.name: self.memory_bytes <= (d.memory - d.reserved) * GIB for d in DEVICES}

    def to_dict(self) -> dict[str, Any]:
        """The estimate as plain data."""
        return asdict(self) | {"memory_bytes": self.memory_bytes, "fits": self.fits()}


@dataclass(frozen=True)
class Export:
    """An export, written or planned: three graphs, built once, and the facts from which their costs follow.

    weight_bytes, parameters: bytes of all weights as stored, and their number. quantisation: see Estimate. pictures:
    what prepares pictures, by the model's settings or with a lower cap.
    """

    family: Family
    graphs: Mapping[GraphName, ir.Model]
    weight_bytes: int
    dtype: FloatName
    layers: int
    selection_layer: int
    calibrated: bool
    selection: Selection
    pictures: Preparation
    parameters: int
    quantisation: str

    @staticmethod
    def planned(
        family: Family,
        model: Model,
        pictures: Preparation,
        layer: int,
        calibrated: bool,
        dtype: FloatName,
        stored: WeightFormat = FLOAT,
        quantisation: Quantisation = Quantisation(),  # noqa: B008 (it cannot change)
    ) -> Export:
        """A planned export of this model, with graphs that have no weights. stored: how a checkpoint's linear layers
        are stored.

        Raises:
            UserError: weights that should be rounded are quantised already.
        """
        weights = PlannedWeights(dtype, stored, planned_formats(quantisation, stored, model))
        graphs = build_graphs(model, weights, layer)
        shape = (model.decoder.vocab_size, model.decoder.hidden_size)
        plan_table(quantisation, model, weights)
        length = sum(weights.lengths.values())
        layers, rule = model.decoder.layers, model.selection
        number = count_parameters(graphs.values(), shape)
        said = "; ".join(sentence for sentence in (stored.said, quantisation.said) if sentence)
        return Export(family, graphs, length, dtype, layers, layer, calibrated, rule, pictures, number, said)

    @staticmethod
    def of(bundle: Bundle) -> Export:
        """The export that wrote a bundle.

        Raises:
            UserError: one of its graphs is damaged.
        """
        m = bundle.manifest
        graphs = {name: bundle.graph(name) for name in GRAPH_NAMES}
        weights = {
            (value.const_value.path, value.const_value.offset): value.const_value.nbytes
            for graph in graphs.values()
            for value in graph.graph.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        file = str(bundle.folder / m.embedding.file)
        weights |= {(file, start): size for start, size in m.embedding.parts}  # lm_head's weight may be the same
        length = sum(weights.values())
        family, layers = families.of(m.family), m.decoder.layers
        return Export(
            family,
            graphs,
            length,
            m.dtype,
            layers,
            m.selection_layer,
            m.calibrated,
            m.selection,
            families.preparation(m),
            count_parameters(graphs.values(), m.embedding.shape),
            packed_layers(m),
        )

    def estimate(self, ratio: float, pictures: Sequence[Size]) -> Estimate:
        """Estimate costs and savings if this fraction of the visual tokens is kept.

        Raises:
            UserError: a picture is too large, too small or too elongated.
        """
        graphs = {name: ir.to_proto(COUNTED(graph).model) for name, graph in self.graphs.items()}
        return Estimate(
            family=self.family.model_type,
            dtype=self.dtype,
            layers=self.layers,
            selection_layer=self.selection_layer,
            calibrated=self.calibrated,
            method=self.selection.method,
            ratio=ratio,
            weight_bytes=self.weight_bytes,
            parameters=self.parameters,
            quantisation=self.quantisation,
            pictures=tuple(self._one_picture(graphs, picture, ratio) for picture in pictures),
        )

    def _one_picture(self, graphs: Mapping[GraphName, onnx.ModelProto], size: Size, ratio: float) -> PictureEstimate:
        picture = blank(self.pictures, size)
        visual = picture.grid.visual
        kept = kept_tokens(visual, ratio)
        scores = SCORE_BYTES[self.dtype]
        vision = count(graphs["vision"], {}, picture.inputs, scores)
        axes = {"S": visual + TEXT, "L": visual, "T": TEXT, "Q": TEXT // 2, "R": 1, **empty_caches(graphs.values())}
        if isinstance(self.selection, SelectionRule):
            axes["seeds"] = seed_count(visual, self.selection.seed_divisor)
        prefix = count(graphs["prefix"], axes | {"M": TEXT + kept}, score_bytes=scores)

        def cost(rows: int) -> Cost:
            decoder = count(graphs["decoder"], axes | {"M": rows}, score_bytes=scores)
            found = {"vision": vision, "prefix": prefix, "decoder": decoder}
            return Cost(
                flops={name: found[name].flops for name in GRAPH_NAMES},
                activation_bytes={name: found[name].peak_bytes for name in GRAPH_NAMES},
                cache_bytes=cache_bytes(prefix.outputs, decoder.outputs),
            )

        return PictureEstimate(size, visual, kept, TEXT, cost(TEXT + kept), cost(TEXT + visual))


def estimate_recipe(recipe: ExportRecipe, pictures: Sequence[Size]) -> Estimate:
    """Estimate an export of `recipe`. It reads only JSON files, and writes only these, to the hub's cache.

    Raises:
        UserError: the recipe, the checkpoint's JSON files or the pictures' sizes have a problem that the user can fix.
    """
    checkpoint = open_checkpoint(recipe.model, recipe.revision)
    description = read_description(checkpoint)
    layer, calibrated = selection_layer(recipe, description)
    description = chosen_as_asked(recipe, description)
    stored = detect_format(checkpoint)
    packed = LOWERINGS[check_lowering(recipe.lowering)].packed_weights
    check_stored(recipe.quantisation, stored, description.model, packed)
    if not packed:
        stored = stored.as_floats
    if checkpoint.shards is not None:
        stored = stored.of_index({description.family.canonical_name(name) for name in checkpoint.shards})
    dtype = recipe.float_name or stored.dtype or stated_dtype(checkpoint.config)
    preparation = description.family.pictures(description.model.preprocessing.capped(recipe.max_visual))
    ratio = description.family.default_ratio if recipe.ratio is None else recipe.ratio
    family, model, q = description.family, description.model, recipe.quantisation
    planned = Export.planned(family, model, preparation, layer, calibrated, dtype, stored, q)
    return planned.estimate(ratio, pictures)


def estimate_bundle(bundle: Bundle, pictures: Sequence[Size]) -> Estimate:
    """Estimate a bundle's costs and savings, counted on its own graphs.

    Raises:
        UserError: a graph is damaged, or a picture is too large, too small or too elongated.
    """
    return Export.of(bundle).estimate(bundle.manifest.default_ratio, pictures)


def count_parameters(graphs: Iterable[ir.Model], embedding: Sequence[int]) -> int:
    """Number of weights of a model, however they are stored. graphs: portable; embedding: the table's shape."""
    found, beside = {EMBEDDING: math.prod(embedding)}, set()
    for model in graphs:
        for node in model.graph:
            if node.domain == IVC_DOMAIN and node.op_type in PACKED_LINEARS:
                packed, *others = (str(value.name) for value in node.inputs[1:] if value is not None)
                weight = packed.removesuffix(".packed")
                found[weight] = node.attributes["N"].as_int() * node.attributes["K"].as_int()
                beside |= {packed, *others, f"{weight}.order"}
        for name, value in model.graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor) and name not in found:
                found[name] = int(value.const_value.size)
    return sum(number for name, number in found.items() if name not in beside)


def packed_layers(m: Manifest) -> str:
    """A sentence on how a bundle's weights are quantised. Empty if they are not."""
    formats = Counter(stored.format for stored in m.weight_formats.values())
    return ", ".join(f"{number} layers are {name}" for name, number in sorted(formats.items()))


def stated_dtype(config: Mapping[str, Any]) -> FloatName:
    """The dtype of the weights by config.json. float32 if it names none, as in transformers."""
    text = config.get("text_config") or {}
    for stated in (config.get("dtype"), config.get("torch_dtype"), text.get("dtype"), text.get("torch_dtype")):
        for name in FLOATS:
            if stated == name:
                return name
    return "float32"


def empty_caches(graphs: Iterable[onnx.ModelProto]) -> dict[str, int]:
    """Set the symbolic axes of cache inputs to 0."""
    caches = [value for graph in graphs for value in graph.graph.input if TensorName.of(value.name).role == "past"]
    return {d.dim_param: 0 for value in caches for d in value.type.tensor_type.shape.dim if d.dim_param}


def blank(pictures: Preparation, size: Size) -> Visual:
    """A picture of that size, prepared for a model. No prompt contains it; token 0 stands for it.

    Raises:
        UserError: it is too large, too small or too elongated.
    """
    if min(size) < 1 or size.width * size.height > PIXELS:
        raise UserError(f"a picture of {size.width}x{size.height} is out of range: give 1 to {PIXELS:,} pixels")
    return pictures.picture(PIL.Image.new("RGB", size), 0)


def cache_bytes(prefix: Mapping[str, int], decoder: Mapping[str, int]) -> int:
    """Bytes that a prefill appends to the caches. prefix, decoder: bytes of their outputs by name."""
    compacted = {TensorName.of(name).to("new") for name in decoder if TensorName.of(name).role == "compact"}
    whole = {name: size for name, size in prefix.items() if name not in compacted}
    return sum(size for name, size in (*decoder.items(), *whole.items()) if TensorName.of(name).kind)

"""What TensorRT-RTX's compiler makes of attention, on a machine without a GPU: one kernel a layer, in every family.

The serialised engine holds, as text, each function that it runs and the layers that this does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import tensorrt_rtx as trt

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import GRAPH_NAMES, GraphName
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.tensorrt import compile as compiling
from ivc_export.tensorrt.build import working_folder
from ivc_export.tensorrt.compile import compile_graph
from ivc_export.tensorrt.graphs import EngineChoices, choose_graphs, lowered
from ivc_export.tensorrt.profiles import profiles
from ivc_export.tensorrt.recipe import EngineRecipe
from samples.make_sample import make_checkpoint
from samples.tiny import wide

FUNCTION = re.compile(rb'function=\{ name=(\w+) ((?!function=\{).)*? layers="([^"]*)"', re.DOTALL)
"""A kernel of an engine: its name, and the layers that it does."""
ATTENTION = re.compile(r"\[ONNX Layer: ([^]]*Attention/attended)\]")
SPELLED_OUT = EngineChoices("tensorrt-rtx", "float16", "native", "float32", "grouped")
"""Attention by standard operators of opset 17, for TensorRT that has no operator for it."""


def recipe(visual: int, capability: str = "8.6") -> EngineRecipe:
    text = max(16, visual // 16)
    return EngineRecipe(
        target="tensorrt-rtx",
        compute_capability=capability,
        dtype="float16",
        max_visual=visual,
        max_text=text,
        max_new=text,
        opt_visual=visual,
        opt_text=text,
    )


@pytest.fixture(scope="module", params=families.names())
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = make_checkpoint(folder / "checkpoint", wide(request.param), dtype="float16")
    return export(ExportRecipe(checkpoint, folder / "bundle", max_visual=2048))


class Log:
    """What TensorRT says, in the place of our own logger."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def make(self, library: Any, verbose: bool = False) -> Any:
        said = self.said

        class Logger(library.ILogger):  # type: ignore[misc]
            last = ""

            def __init__(self) -> None:
                library.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                said.append(message)

        return Logger()

    def scratch(self) -> int:
        """The most scratch memory that any profile takes, since the last call."""
        found = [int(size) for text in self.said for size in re.findall(r"Max Scratch Memory: (\d+) bytes", text)]
        self.said.clear()
        return max(found)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    found = Log()
    monkeypatch.setattr(compiling, "make_logger", found.make)
    return found


def engine(bundle: Bundle, name: GraphName, recipe: EngineRecipe, choices: EngineChoices | None = None) -> bytes:
    """As ivc-build makes it."""
    capability = str(recipe.compute_capability)
    choices = choices or choose_graphs(bundle, recipe, trt, capability)
    with working_folder(bundle) as work:
        return compile_graph(
            trt,
            lowered(bundle, name, choices),
            profiles(bundle, name, recipe).values(),
            recipe.options(capability, choices.dtype),
            work,
        )


def fused(plan: bytes) -> dict[str, int]:
    """Layers of attention that kernels of attention do, and how many do each."""
    found: dict[str, int] = {}
    for name, _, layers in FUNCTION.findall(plan):
        if b"mha" in name:
            for layer in set(ATTENTION.findall(layers.decode())):
                found[layer] = found.get(layer, 0) + 1
    return found


def spelled(bundle: Bundle, name: GraphName) -> Iterator[str]:
    """The layers of attention that a graph has."""
    for node in bundle.graph(name).graph:
        if node.domain == "ivc" and node.op_type.endswith("Attention"):
            yield f"{node.name}/attended"


def check(bundle: Bundle, name: GraphName, plan: bytes) -> None:
    """Every layer is fused in each of the graph's profiles."""
    wanted = set(spelled(bundle, name))
    assert wanted and b"fmha" in plan
    assert fused(plan) == dict.fromkeys(wanted, 1 if name == "vision" else 2)


EXPERTS = [name for name in families.names() if families.of(name).read(wide(name), None).stacks]
"""Families whose decoders no engine is built of."""
DENSE = [name for name in families.names() if name not in EXPERTS]
GRAPHS = [*((name, "vision") for name in families.names()), *((name, "decoder") for name in DENSE)]


@pytest.mark.parametrize(("bundle", "name"), GRAPHS, indirect=["bundle"])
def test_attention_is_fused_and_its_memory_grows_with_the_picture(bundle: Bundle, name: GraphName, log: Log) -> None:
    taken = []
    for visual in (1024, 2048):
        plan = engine(bundle, name, recipe(visual))
        check(bundle, name, plan)
        taken.append(log.scratch())
    assert 0 < taken[1] <= 2.2 * taken[0]


@pytest.mark.parametrize("bundle", DENSE, indirect=True)
def test_the_prefix_takes_a_quarter_of_what_it_takes_spelled_out(bundle: Bundle, log: Log) -> None:
    """But for LLaVA's, whose heads are not grouped: spelled out, TensorRT-RTX fuses it as well."""
    plan = engine(bundle, "prefix", recipe(1024))
    check(bundle, "prefix", plan)
    taken, sizes = log.scratch(), bundle.manifest.decoder
    spelled_out = fused(engine(bundle, "prefix", recipe(1024), SPELLED_OUT))
    assert bool(spelled_out) == (sizes.heads == sizes.kv_heads)
    assert taken <= log.scratch() * (1.25 if spelled_out else 0.25)


@pytest.mark.parametrize("bundle", ["qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("capability", ["8.9", "12.0"])
@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_attention_is_fused_for_other_gpus(bundle: Bundle, name: GraphName, capability: str) -> None:
    check(bundle, name, engine(bundle, name, recipe(256, capability)))

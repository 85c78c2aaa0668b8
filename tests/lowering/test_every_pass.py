"""What holds of every pass and every lowering: conditions before and after, and a truthful `modified`."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module

import onnx.parser
import onnx_ir as ir
import pytest

from ivc_export import families, lowering
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import GRAPH_NAMES, IVC_DOMAIN
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.graph import functions
from ivc_export.graph.functions import function
from ivc_export.lowering import LOWERINGS, lower
from ivc_export.lowering.in_place_caches import CompactCachesPass
from ivc_export.lowering.inline import InlinePass
from ivc_export.lowering.join_decode import join_decode
from ivc_export.lowering.onnxruntime.accuracy import SetAccuracyPass
from ivc_export.lowering.onnxruntime.attention import UseFusedAttentionPass
from ivc_export.lowering.onnxruntime.custom_operators import LIBRARY
from ivc_export.lowering.onnxruntime.rotate_together import RotateTogetherPass
from ivc_export.lowering.onnxruntime.split_bytes import SplitBytesPass
from ivc_export.lowering.precision.narrow_angles import NarrowAnglesPass
from ivc_export.lowering.precision.retype_floats import RetypeFloatsPass
from ivc_export.lowering.precision.scale_residuals import ScaleResidualsPass
from ivc_export.lowering.precision.widen_floats import WidenFloatsPass
from ivc_export.lowering.precision.widen_residuals import WidenResidualsPass
from ivc_export.lowering.tensorrt.plugin import KERNELS
from samples.make_sample import make_checkpoint
from samples.tiny import TINY

Passes = Callable[[], Sequence[ir.passes.PassBase]]

PASSES: dict[str, Passes] = {name: one.passes for name, one in LOWERINGS.items()} | {
    "float16 as TensorRT gets it": lambda: (
        RetypeFloatsPass("float16"),
        ScaleResidualsPass(),
        WidenResidualsPass(),
        NarrowAnglesPass(),
    ),
    "accuracy of packed products": lambda: (SetAccuracyPass(4),),
    "packed products of query, key and value": lambda: (RotateTogetherPass(),),
    "packed products of 8 bits": lambda: (SplitBytesPass(),),
    "retyped to what it is": lambda: (RetypeFloatsPass("float32"), WidenResidualsPass(), WidenFloatsPass()),
    "retyped and widened": lambda: (RetypeFloatsPass("bfloat16"), WidenFloatsPass(), WidenFloatsPass()),
}
"""Every lowering's passes, and those on dtypes."""

ONCE = {ScaleResidualsPass: "a graph in scale is scaled again"}
"""Passes that are not to be applied twice."""

WITHOUT_CONDITIONS = {
    "PackProjectionsPass": "it packs what reads the same rows, and leaves the rest as it was",
    "TurnHeadsPass": "it splits heads that the kernel takes, and leaves the rest as it was",
    "ScaleResidualsPass": "it refuses, in a sentence to the user, what it cannot scale while it follows the stream",
}
"""Passes that take any graph and promise nothing of all graphs."""


@pytest.fixture(scope="module", params=[*families.names(), "internvl3_5"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp(request.param)
    return export(ExportRecipe(make_checkpoint(folder / "checkpoint", TINY[request.param]), folder / "bundle"))


def graphs(bundle: Bundle) -> dict[str, ir.Model]:
    """Portable: those of the bundle, and the joined one."""
    found: dict[str, ir.Model] = {name: bundle.graph(name) for name in GRAPH_NAMES}
    return found | {"decode": join_decode(bundle.graph("prefix"), bundle.graph("decoder"))}


def content(model: ir.Model) -> bytes:
    found: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return found


def own_passes() -> dict[str, type]:
    """Every pass of the package, by name."""
    found = {}
    for module in pkgutil.walk_packages(lowering.__path__, f"{lowering.__name__}."):
        for name, value in vars(import_module(module.name)).items():
            if isinstance(value, type) and issubclass(value, ir.passes.PassBase) and value.__module__ == module.name:
                found[name] = value
    return found


@pytest.mark.parametrize("name", PASSES)
def test_modified_says_whether_the_graph_is_another(bundle: Bundle, name: str) -> None:
    for graph, model in graphs(bundle).items():
        before = content(model)
        for one in PASSES[name]():
            result = one(model)
            after = content(result.model)
            assert result.modified == (after != before), (graph, type(one).__name__)
            before = after


@pytest.mark.parametrize("name", PASSES)
def test_a_second_time_changes_nothing(bundle: Bundle, name: str) -> None:
    for graph, model in graphs(bundle).items():
        for one in PASSES[name]():
            one(model)
            if type(one) not in ONCE:
                before = content(model)
                assert not one(model).modified, (graph, type(one).__name__)
                assert content(model) == before
        before = content(model)
        for one in PASSES[name]() if name in LOWERINGS else ():
            if type(one) not in ONCE:
                assert not one(model).modified, (graph, type(one).__name__)
        assert content(model) == before


def test_every_pass_is_tried_and_says_what_it_leaves() -> None:
    passes = own_passes()
    tried = {type(one).__name__ for make in PASSES.values() for one in make()}
    assert len(passes) > 10 and passes.keys() <= tried
    assert {name for name, one in passes.items() if "ensures" not in vars(one)} == WITHOUT_CONDITIONS.keys()


def test_passes_refuse_what_they_cannot_take(golden_bundle: Bundle) -> None:
    with pytest.raises(ir.passes.PreconditionError, match="does not write its caches in place"):
        CompactCachesPass()(golden_bundle.graph("prefix"))
    masked = golden_bundle.graph("prefix")
    mask = next(node for node in masked.graph if node.op_type == "CausalMask").outputs[0]
    other = ir.node("Not", [mask])
    masked.graph.insert_after(mask.producer(), other)  # type: ignore[arg-type]
    for user in [user for user in mask.consumers() if user is not other]:
        user.replace_input_with(5, other.outputs[0])
    with pytest.raises(ir.passes.PreconditionError, match="has a mask of its own"):
        UseFusedAttentionPass()(masked)


def with_toy(bundle: Bundle) -> ir.Model:
    """A prefix whose hidden states go through a function that no table names."""
    body = onnx.parser.parse_function('<domain: "ivc", opset_import: ["" : 17]> Toy (x) => (y) { y = Add (x, x) }')
    model = bundle.graph("prefix")
    toy = ir.serde.deserialize_function(body)
    model.functions[toy.identifier()] = toy
    value = next(v for v in model.graph.inputs if v.name == "inputs_embeds")
    users = tuple(value.uses())
    call = ir.node("Toy", [value], domain=IVC_DOMAIN, name="toy")
    call.outputs[0].name = "toy"
    model.graph.insert_before(model.graph[0], call)
    for user, index in users:
        user.replace_input_with(index, call.outputs[0])
    return model


@pytest.mark.parametrize("name", LOWERINGS)
def test_a_function_that_no_table_names_is_an_error(golden_bundle: Bundle, name: str) -> None:
    with pytest.raises(ir.passes.PreconditionError, match="toy: there is no function ivc::Toy"):
        lower(with_toy(golden_bundle), name)


def test_a_function_that_nothing_replaces_is_an_error(golden_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is in the table of functions: lowerings that inline take it, others must say that they leave it."""
    monkeypatch.setitem(functions.RESULTS, "Toy", 0)
    assert not [node for node in lower(with_toy(golden_bundle), "native").graph if node.domain == IVC_DOMAIN]
    with pytest.raises(ir.passes.PostconditionError, match="toy: ivc::Toy is neither replaced nor inlined"):
        lower(with_toy(golden_bundle), "portable")
    leaky = replace(LOWERINGS["ort-cuda"], passes=lambda: (InlinePass(kept=("Attention",)),))
    with pytest.raises(ir.passes.PostconditionError, match="ivc::Attention is neither replaced nor inlined"):
        leaky.apply(golden_bundle.graph("prefix"))


@pytest.mark.parametrize("name", sorted({*LOWERINGS} - {"portable"}))
def test_a_graph_that_was_not_lowered_breaks_the_contract(golden_bundle: Bundle, name: str) -> None:
    info = golden_bundle.manifest.graphs["prefix"]
    with pytest.raises(AssertionError, match="which this lowering does not leave"):
        LOWERINGS[name].verify("prefix", golden_bundle.graph("prefix"), info)


def test_lowerings_leave_functions_that_there_are(golden_bundle: Bundle) -> None:
    bodies = {name for name in functions.RESULTS if function(name)}
    for name, one in LOWERINGS.items():
        assert one.functions <= bodies | KERNELS | LIBRARY, name

"""A family with a decoder block of its own, in every runtime, against PyTorch."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.graphs import graph_info
from ivc_export.contract.names import GRAPH_NAMES, GraphName
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.exporter.estimate import Size, estimate_bundle
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.pictures import Visual
from ivc_export.lowering import LOWERINGS, lower
from ivc_export.lowering.join_decode import join_decode
from ivc_export.runtime.interface import Session
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.onnxruntime.cuda import FusedSession
from ivc_export.tensorrt.graphs import typed
from ivc_export.verify.reference import fill, ivc_tokens, token_scores
from samples.make_sample import make_checkpoint
from samples.tiny import TOKENS
from tests.conftest import LOGIT_TOLERANCE
from tests.families import layered
from tests.runtime.test_tensorrt import opened
from tests.tensorrt.test_tensorrt_operators import TABLE, check
from tests.tensorrt.test_tensorrt_operators import typed as inferred
from tests.tensorrt.test_tensorrt_rtx import compiled

CUT, RATIO = 3, 0.4
SIZES = [16, 24, 8]
"""Of a head's values: as keys are, larger, smaller."""
HALF = 1e-2
"""Logits in float16: rounding to 11 bits after every operator; 3.6e-3 measured."""


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        known = families.names()
        patch.setattr(families, "names", lambda: (*known, "layered"))
        patch.setitem(sys.modules, "ivc_export.families.layered", layered)
        patch.setitem(TOKENS, "layered", TOKENS["qwen2_vl"])
        yield


def exported(folder: Path, value_dim: int, dtype: FloatName = "float32") -> Bundle:
    config = {"architectures": ["Layered"], "model_type": "layered", "value_dim": value_dim}
    checkpoint = make_checkpoint(folder / "checkpoint", config, dtype)
    return export(ExportRecipe(checkpoint, folder / "bundle", layer=CUT, max_visual=64))


@pytest.fixture(scope="module", params=SIZES)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, registered: None) -> Bundle:
    return exported(tmp_path_factory.mktemp("layered"), request.param)


class Layered:
    """The model in PyTorch, float32, with IVC-Prune at CUT."""

    def __init__(self, bundle: Bundle) -> None:
        (file,) = (bundle.folder / "weights").glob("*.safetensors")
        self.weights = {name: tensor.float() for name, tensor in load_file(file).items()}
        self.values = bundle.manifest.decoder.value_dim
        self.caches = [(torch.zeros(2, 0, 16), torch.zeros(2, 0, self.values)) for _ in range(5)]
        self.next_position = 0
        self.kept = torch.zeros(0)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        deviation = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        weight: torch.Tensor = self.weights[f"{name}.weight"]
        return weight * (x / deviation)

    def turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = positions[:, None] * 1e4 ** (-torch.arange(8) / 8)
        a, b = x[..., :8], x[..., 8:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def layer(self, i: int, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        name, rows = f"model.layers.{i}", len(x)
        normed = self.norm(x, f"{name}.input_layernorm")
        q, k, v = (
            self.linear(normed, f"{name}.self_attn.{part}_proj").reshape(rows, -1, size).transpose(0, 1)
            for part, size in (("q", 16), ("k", 16), ("v", self.values))
        )
        q = self.turn(self.norm(q, f"{name}.self_attn.q_norm"), positions)
        k = self.turn(self.norm(k, f"{name}.self_attn.k_norm"), positions)
        keys, values = torch.cat([self.caches[i][0], k], 1), torch.cat([self.caches[i][1], v], 1)
        self.caches[i] = (keys, values)
        score = q @ keys.repeat_interleave(2, 0).mT / 4
        hidden = torch.ones(rows, keys.shape[1], dtype=torch.bool).triu(keys.shape[1] - rows + 1)
        share = score.masked_fill(hidden, -torch.inf).softmax(-1)
        y = (share @ values.repeat_interleave(2, 0)).transpose(0, 1).reshape(rows, -1)
        x = x + self.linear(y, f"{name}.self_attn.o_proj")
        normed = self.norm(x, f"{name}.post_attention_layernorm")
        if i % 2:
            y = self.linear(torch.nn.functional.gelu(self.linear(normed, f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        else:
            gate, up = (self.linear(normed, f"{name}.mlp.{part}_proj") for part in ("gate", "up"))
            y = self.linear(torch.nn.functional.silu(gate) * up, f"{name}.mlp.down_proj")
        return x + y

    def run(self, tokens: Sequence[int], pictures: Sequence[Visual] = ()) -> torch.Tensor:
        """Logits of the last row; `kept` are the rows that went on."""
        ids = torch.tensor(tokens)
        x = self.weights["model.embed_tokens.weight"][ids]
        visual = torch.nonzero((ids == 503) & bool(pictures))[:, 0]
        seen = [torch.tensor(p.inputs["pixel_values"]).reshape(p.grid.visual, -1) for p in pictures]
        if pictures:
            x[visual] = self.linear(torch.cat(seen), "visual.merger")
        positions = self.next_position + torch.arange(len(ids))
        self.next_position += len(ids)
        old = self.caches[0][0].shape[1]
        for i in range(CUT):
            x = self.layer(i, x, positions)
            if pictures and i < layered.DEEPSTACK:
                x[visual] += self.linear(torch.cat(seen), f"visual.deepstack.{i}")
        self.kept = torch.arange(len(ids))
        if pictures:
            score, seeds = token_scores(self.caches[CUT - 1][1][:, old:], visual, self.kept[int(visual[-1]) + 2 :], 100)
            blocks = torch.split(torch.arange(len(visual)), [p.grid.visual for p in pictures])
            best = [ivc_tokens(positions[None, visual[b]], 1e4, 16, 0.1) for b in blocks]
            ranked = [(rank, int(b[t])) for b, own in zip(blocks, best, strict=True) for rank, t in enumerate(own)]
            budget = sum(max(1, round(RATIO * p.grid.visual)) for p in pictures)
            chosen = visual[fill(score, seeds.tolist(), [token for _, token in sorted(ranked)], budget)]
            self.kept = torch.cat([torch.nonzero(ids != 503)[:, 0], chosen]).sort().values
            left = torch.cat([torch.arange(old), old + self.kept])
            for i in range(CUT):
                self.caches[i] = (self.caches[i][0][:, left], self.caches[i][1][:, left])
        x, positions = x[self.kept], positions[self.kept]
        for i in range(CUT, 5):
            x = self.layer(i, x, positions)
        return self.linear(self.norm(x[-1], "model.norm"), "lm_head")


def picture(bundle: Bundle, width: int, height: int, seed: int) -> Visual:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return families.preparation(bundle.manifest).picture(PIL.Image.fromarray(noise), 503)


def follow(session: Session, bundle: Bundle, tolerance: float, choose: bool = True) -> None:
    """Two pictures, decode steps, a turn of text, a third picture; what is kept equals PyTorch's, or is replayed."""
    first, second, third = (picture(bundle, *size) for size in ((140, 196, 1), (84, 84, 2), (112, 140, 3)))

    def shown(one: Visual) -> list[int]:
        return [500, *one.tokens, 501]

    turns: list[tuple[list[int], list[Visual]]] = [
        ([1, 2, *shown(first), 3, *shown(second), 7, 8, 9, 10], [first, second]),
        *(([token], []) for token in (20, 503, 22)),
        ([11, 12, 13], []),
        ([*shown(third), 14, 15, 16], [third]),
        ([23], []),
    ]
    model, found = Layered(bundle), session.converse(RATIO)
    for tokens, pictures in turns:
        wanted = model.run(tokens, pictures)
        step = found.run(tokens, pictures, None if choose or not pictures else model.kept.numpy())
        if pictures:
            np.testing.assert_array_equal(step.keep_index, model.kept)
        assert np.abs(step.logits - wanted.numpy()).max() < tolerance
    assert found.cache.length == model.caches[0][0].shape[1]
    size = 2 if session.dtype == "float16" else 4
    assert found.cache.bytes_used == size * sum(c.numel() for c in itertools.chain.from_iterable(model.caches))


def test_the_cpu_provider_equals_pytorch(bundle: Bundle) -> None:
    follow(OnnxSession(bundle, threads=1), bundle, LOGIT_TOLERANCE)


def test_graphs_for_the_cuda_provider_equal_pytorch(bundle: Bundle) -> None:
    follow(FusedSession(bundle, "cpu"), bundle, LOGIT_TOLERANCE)


def test_engines_equal_pytorch(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    session, device = opened(bundle, monkeypatch, max_visual=64)
    follow(session, bundle, LOGIT_TOLERANCE)
    device.check()


@pytest.mark.parametrize("session", ["cpu", "fused", "engines"])
def test_float16_weights_keep_close(session: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU widens them to float32; engines compute in float16, of which the tolerance is."""
    bundle = exported(tmp_path, 24, "float16")
    if session == "engines":
        follow(opened(bundle, monkeypatch, max_visual=64, dtype="float16")[0], bundle, HALF, choose=False)
    elif session == "fused":
        follow(FusedSession(bundle, "cpu"), bundle, LOGIT_TOLERANCE)
    else:
        follow(OnnxSession(bundle, threads=1), bundle, LOGIT_TOLERANCE)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_lowered_graphs_keep_the_contract(bundle: Bundle, lowering: str) -> None:
    m, record = bundle.manifest, LOWERINGS[lowering]
    for name in GRAPH_NAMES:
        record.verify(name, lower(bundle.graph(name), lowering), m.graphs[name])
    sizes = (m.decoder, m.rotary, m.selection, m.preprocessing)
    decode = lower(join_decode(bundle.graph("prefix"), bundle.graph("decoder")), lowering)
    record.verify("decode", decode, graph_info("decode", m.dtype, *sizes, m.selection_layer))


def test_projections_are_packed_where_values_are_as_keys_are(bundle: Bundle) -> None:
    decode = lower(join_decode(bundle.graph("prefix"), bundle.graph("decoder")), "ort-cuda")
    packed = [name for name in decode.graph.initializers if name.endswith("/packed")]
    attends = sum(node.op_type == "GroupQueryAttention" for node in decode.graph)
    assert (len(packed), attends) == ((5, 5) if bundle.manifest.decoder.value_dim == 16 else (0, 0))


def test_estimates_know_the_size_of_values(bundle: Bundle) -> None:
    found = estimate_bundle(bundle, [Size(140, 196)])
    (one,) = found.pictures
    row = 4 * 5 * 2 * (16 + bundle.manifest.decoder.value_dim)
    assert one.pruned.cache_bytes == row * (one.text_tokens + one.kept_tokens)
    weights = load_file(next((bundle.folder / "weights").glob("*.safetensors")))
    assert found.weight_bytes == sum(4 * tensor.numel() for tensor in weights.values())


def test_a_cut_above_the_last_added_features_is_refused(bundle: Bundle) -> None:
    checkpoint = bundle.folder.parent / "checkpoint"
    with pytest.raises(UserError, match="this model has 5 layers, so --layer takes 2 to 4"):
        export(ExportRecipe(checkpoint, bundle.folder.parent / "other", layer=1))


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_tensorrt_reads_the_graphs(bundle: Bundle, name: GraphName) -> None:
    """8.6 by its parser's table; TensorRT-RTX compiles them, with residual sums as ivc-build gives them to it."""
    check(inferred(lower(bundle.graph(name), "native")), TABLE["8.6"])
    model = lower(typed(bundle, name, "float16"), "native")
    check(inferred(model), TABLE["8.6"])
    assert compiled(model, bundle.folder, name, "SM86").nbytes > 0

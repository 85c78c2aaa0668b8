"""What a folder or a repository is, is told in one sentence, before weights are read or downloaded."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from ivc_export import cli
from ivc_export.checkpoint.kinds import METHODS, TAKEN
from samples.make_sample import make_checkpoint
from samples.tiny import TINY

COMMIT = "c" * 40
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Prepare = Callable[[Path], object]


def config(**changes: Any) -> Prepare:
    """config.json with these keys, or without those that are None."""

    def prepare(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return prepare


def quantisation(**settings: Any) -> Prepare:
    return config(quantization_config=settings)


def beside(name: str, content: object) -> Prepare:
    return lambda folder: (folder / name).write_text(json.dumps(content))


def instead(*names: str, keep: Iterable[str] = ()) -> Prepare:
    """Files in the place of the weights, and of all but `keep` if that is given."""

    def prepare(folder: Path) -> None:
        for path in list(folder.iterdir()):
            if path.name == SINGLE or (keep and path.name not in keep):
                path.unlink()
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"GGUF")

    return prepare


def lora(folder: Path, base: str | None = "Qwen/Qwen2-VL-2B-Instruct") -> None:
    instead("adapter_model.safetensors", keep=["tokenizer.json"])(folder)
    beside("adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": base})(folder)


def original(model_type: str) -> Prepare:
    """config.json as the original LLaVA code writes it."""
    keys = {"model_type": model_type, "architectures": ["LlavaLlamaForCausalLM"], "hidden_size": 64}
    return beside("config.json", keys | {"num_hidden_layers": 4, "mm_vision_tower": "openai/clip-vit-large-patch14"})


def text_alone(folder: Path) -> None:
    beside("config.json", {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 64})(folder)


def nested(folder: Path) -> None:
    """The folder above: of the hub's cache, say."""
    inner = folder / "snapshots" / COMMIT
    inner.mkdir(parents=True)
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(inner / path.name)


def sharded(folder: Path, files: tuple[str, str] = ("model-00001-of-00002", "model-00002-of-00002")) -> None:
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(tensors)
    halves = {f"{file}.safetensors": names[start::2] for start, file in enumerate(files)}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    beside(INDEX, {"weight_map": {name: file for file, part in halves.items() for name in part}})(folder)


def index(**names: str) -> Prepare:
    """An index of these tensors alone, and no weights."""

    def prepare(folder: Path) -> None:
        (folder / SINGLE).unlink()
        beside(INDEX, {"weight_map": names})(folder)

    return prepare


WEIGHTS = (SINGLE, "model-00001-of-00002.safetensors", "pytorch_model.bin", "model.gguf", "adapter_model.safetensors")
WHOLE = {"visual.x": "model-1.safetensors", "model.layers.0.x": "model-1.safetensors"}
MADE = "give the checkpoint that it was made from"

TOLD: list[tuple[str, Prepare, str]] = [  # by names of files and by JSON files
    (
        "AutoRound",
        quantisation(quant_method="auto-round", bits=4),
        f"is quantised (AutoRound, 4 bits, by quantization_config of config.json), but {TAKEN}: {MADE}",
    ),
    (
        "AWQ without a group",
        quantisation(quant_method="awq", bits=4),
        "is quantised (AWQ, with group_size missing), but this version reads AWQ with a group_size of 16 and more",
    ),
    (
        "AWQ of another layout",
        quantisation(quant_method="awq", bits=4, group_size=128, version="gemv"),
        "(AWQ, with version 'gemv'), but this version reads AWQ with version 'gemm' or 'GEMM': give another",
    ),
    (
        "GPTQ in 3 bits",
        quantisation(quant_method="gptq", bits=3, group_size=128),
        "is quantised (GPTQ, with bits 3), but this version reads GPTQ with bits 4 or 8: give another checkpoint",
    ),
    (
        "GPTQ of another layout",
        quantisation(quant_method="gptq", bits=4, group_size=128, checkpoint_format="marlin"),
        "with checkpoint_format 'marlin'), but this version reads GPTQ with checkpoint_format 'gptq' or 'gptq_v2'",
    ),
    (
        "GPTQ of layers of their own",
        quantisation(quant_method="gptq", bits=4, group_size=128, dynamic={"+:.*down.*": {"bits": 8}}),
        "this version reads GPTQ with one setting for all layers, and layers left out (-:): give another",
    ),
    (
        "compressed-tensors, activations too",
        quantisation(quant_method="compressed-tensors", format="int-quantized"),
        "is quantised (compressed-tensors, int-quantized, by",
    ),
    (
        "compressed-tensors without groups",
        quantisation(quant_method="compressed-tensors", format="pack-quantized"),
        "(compressed-tensors, with config_groups missing), but this version reads compressed-tensors with an object as",
    ),
    (
        "older compressed-tensors",
        config(compression_config={"quant_method": "compressed-tensors"}),
        "(compressed-tensors, by compression_config of",
    ),
    ("FP8 of FBGEMM", quantisation(quant_method="fbgemm_fp8"), "is quantised (FP8, by"),
    (
        "FP8 without blocks",
        quantisation(quant_method="fp8"),
        "(FP8, with weight_block_size missing), but this version reads FP8 with two sizes as weight_block_size",
    ),
    (
        "bitsandbytes, 4 bits",
        quantisation(quant_method="bitsandbytes", load_in_4bit=True),
        "is quantised (bitsandbytes, 4 bits, by",
    ),
    ("bitsandbytes, 8 bits", quantisation(load_in_8bit=True, load_in_4bit=False), "is quantised (8 bits, by"),
    ("HQQ", quantisation(quant_method="hqq"), "is quantised (HQQ, by"),
    ("ModelOpt", quantisation(quant_method="modelopt", quant_algo="NVFP4"), "is quantised (ModelOpt, NVFP4, by"),
    (
        "ModelOpt's own file",
        beside("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}),
        "is quantised (NVFP4, by hf_quant_config.json)",
    ),
    (
        "AutoGPTQ's own file",
        beside("quantize_config.json", {"bits": 4, "group_size": 128}),
        "is quantised (4 bits, by quantize_config.json)",
    ),
    ("AutoAWQ's own file", beside("quant_config.json", {"w_bit": 4}), "is quantised (4 bits, by quant_config.json)"),
    (
        "MLX",
        config(quantization={"group_size": 64, "bits": 4}),
        "is quantised (4 bits, by quantization of config.json)",
    ),
    ("the text alone", config(text_config={"quantization_config": {"quant_method": "hqq"}}), "is quantised (HQQ, by"),
    (
        "two ways",
        config(
            quantization_config={"quant_method": "awq", "bits": 4, "group_size": 32},
            text_config={"quantization_config": {"quant_method": "gptq"}},
        ),
        "is quantised in two ways, by quantization_config of config.json and of a part of it",
    ),
    ("an unknown method", quantisation(quant_method="new\nest" * 99), "is quantised (new?estnew?est"),
    ("a method without a name", quantisation(group_size=[]), "is quantised (by a method without a name, by"),
    ("a method that is no object", config(quantization_config="awq"), "is quantised (awq, by"),
    ("LoRA", lora, "is an adapter (LORA of Qwen/Qwen2-VL-2B-Instruct), not a whole model: merge it into its model"),
    ("LoRA of nothing", lambda f: lora(f, None), "is an adapter (LORA of nothing known)"),
    ("LoRA beside a model", beside("adapter_config.json", {}), "holds an adapter beside a model (adapter_config.json)"),
    ("pickles", instead("pytorch_model.bin", "training_args.bin"), "holds only pickled weights (pytorch_model.bin)"),
    ("pickled shards", instead("pytorch_model-00001-of-00002.bin"), "holds only pickled weights"),
    (
        "the publisher's pickles",
        instead("consolidated.00.pth", keep=["tokenizer.json"]),
        "only pickled weights (consolidated",
    ),
    ("GGUF", instead("model-Q4_K_M.gguf", "mmproj.gguf", keep=["README.md"]), "(mmproj.gguf is a GGUF file)"),
    ("ONNX", instead("onnx/model.onnx"), f"is an ONNX export of another program (onnx): {MADE}"),
    (
        "ONNX in one folder",
        instead("decoder.onnx", "vision.onnx"),
        "is an ONNX export of another program (decoder.onnx)",
    ),
    ("OpenVINO", instead("openvino_language_model.xml", "openvino_language_model.bin"), "is an export for OpenVINO"),
    ("TensorFlow", instead("tf_model.h5"), "holds no PyTorch weights (tf_model.h5)"),
    ("diffusers", beside("model_index.json", {}), "is a pipeline of diffusers"),
    ("original LLaVA", original("llava"), "in the layout of the original LLaVA code (it names mm_vision_tower)"),
    ("original LLaVA, renamed", original("llava_llama"), "give a checkpoint such as llava-hf/llava-1.5-7b-hf"),
    ("LLaVA on another model", original("llava_mistral"), "in the layout of the original LLaVA code"),
    (
        "text alone",
        text_alone,
        "a text-only model of type 'qwen2', which has no visual tokens to prune: give a vision-language",
    ),
    ("the folder above", nested, f"has no config.json, but TMP/folder/snapshots/{COMMIT} has one: give that folder"),
    (
        "an index that leads away",
        index(a="../checkpoint/model.safetensors"),
        "names '../checkpoint/model.safetensors', which is not a safetensors file beside it",
    ),
    ("an index to the root", index(a="/etc/passwd"), "names '/etc/passwd', which is not a safetensors file"),
    ("an index of pickles", index(a="pytorch_model.bin"), "names 'pytorch_model.bin', which is not a safetensors file"),
    (
        "an index of PEFT's names",
        index(**{"base_model.model.x": "model-1.safetensors"}),
        "holds tensors such as base_model.model.x, which are named by PEFT",
    ),
    (
        "an index of packed weights",
        index(**WHOLE, **{"model.q_proj.qweight": "model-1.safetensors"}),
        "is quantised (GPTQ or AWQ, by the tensor model.q_proj.qweight)",
    ),
    (
        "an index without a head",
        index(**WHOLE),
        "has no lm_head.weight, and tie_word_embeddings of its config.json is not set",
    ),
    ("an index of text", index(**{"model.layers.0.x": "model-1.safetensors"}), "holds a language model without"),
    ("an index of vision", index(**{"visual.x": "model-1.safetensors"}), "holds a vision encoder without"),
]


def tensors(
    rename: Callable[[str], str] = str, without: str = "\0", added: Mapping[str, npt.NDArray[Any]] | None = None
) -> Prepare:
    """The weights under other names, without those that begin so, and with others."""

    def prepare(folder: Path) -> None:
        stored = load_file(folder / SINGLE)
        kept = {rename(name): array for name, array in stored.items() if not name.startswith(without)}
        save_file(kept | dict(added or {}), folder / SINGLE)

    return prepare


def float8(folder: Path) -> None:
    """One matrix in 8 bits, as stored: NumPy and safetensors share no such dtype."""
    path = folder / SINGLE
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    name = "model.layers.0.mlp.up_proj.weight"
    entry = header[name]
    entry["dtype"], entry["shape"] = "F8_E4M3", [4 * entry["shape"][0], entry["shape"][1]]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def twice(folder: Path) -> None:
    sharded(folder)
    first, second = sorted(folder.glob("model-*.safetensors"))
    name, array = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: array}, second)


def unnamed(folder: Path) -> None:
    """The index of an unfinished copy names the first shard alone."""
    sharded(folder)
    stored = json.loads((folder / INDEX).read_text())["weight_map"]
    beside(INDEX, {"weight_map": {k: v for k, v in stored.items() if "00001" in v} | WHOLE_HERE})(folder)


WHOLE_HERE = dict.fromkeys(("visual.x", "model.layers.0.x", "lm_head.weight"), "model-00001-of-00002.safetensors")


def no_index(folder: Path) -> None:
    sharded(folder)
    (folder / INDEX).unlink()


def lfs(folder: Path) -> None:
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def pipe(folder: Path) -> None:
    (folder / SINGLE).unlink()
    os.mkfifo(folder / SINGLE)


LAYER = "model.layers.0.self_attn.q_proj"
SEEN: list[tuple[str, Prepare, str]] = [  # by the headers of weights
    (
        "PEFT's names",
        tensors(lambda name: f"base_model.model.{name}"),
        "such as base_model.model.lm_head.weight, which are named by PEFT",
    ),
    (
        "an unmerged adapter",
        tensors(added={f"{LAYER}.lora_A.default.weight": np.ones((4, 64), np.float32)}),
        "and its adapter is not merged",
    ),
    ("a wrapper's names", tensors(lambda name: f"module.{name}"), "which are named by a wrapper of PyTorch's"),
    ("a compiler's names", tensors(lambda name: f"_orig_mod.{name}"), "which are named by torch.compile"),
    (
        "packed without a word",
        tensors(added={f"{LAYER}.qweight": np.ones((64, 8), np.int32)}),
        "is quantised (GPTQ or AWQ, by the tensor",
    ),
    (
        "scaled without a word",
        tensors(added={f"{LAYER}.weight_scale_inv": np.ones((1, 1), np.float32)}),
        "is quantised (FP8, by the tensor",
    ),
    (
        "bitsandbytes without a word",
        tensors(added={f"{LAYER}.weight.absmax": np.ones(8, np.float32)}),
        "is quantised (bitsandbytes, by",
    ),
    (
        "integers without a word",
        tensors(added={f"{LAYER}.weight": np.ones((64, 64), np.int8)}),
        f"is quantised ({LAYER}.weight is I8)",
    ),
    ("8 bits without a word", float8, "is quantised (model.layers.0.mlp.up_proj.weight is F8_E4M3)"),
    (
        "64 bits",
        tensors(added={"model.norm.weight": np.ones(64, np.float64)}),
        "model.norm.weight in model.safetensors is F64, but other tensors are float32: give one in float32",
    ),
    (
        "no head",
        tensors(without="lm_head."),
        "has no lm_head.weight, and tie_word_embeddings of its config.json is not set: set it to true",
    ),
    ("no vision encoder", tensors(without="visual."), "holds a language model without a vision encoder"),
    ("no language model", tensors(without="model.layers."), "holds a vision encoder without"),
    ("a tensor in two shards", twice, "model-00001-of-00002.safetensors and model-00002-of-00002.safetensors of"),
    (
        "a shard that no index names",
        unnamed,
        f"holds model-00002-of-00002.safetensors, and no {INDEX} names it: download both again",
    ),
    (
        "shards without an index",
        no_index,
        f"holds model-00001-of-00002.safetensors, and no {INDEX} names it: download both again",
    ),
    ("Git LFS", lfs, "is a Git LFS pointer, not the file itself: run git lfs pull"),
    ("a pipe", pipe, "model.safetensors is not a regular file"),
]


@pytest.fixture
def folder(sample_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sample_checkpoint, tmp_path / "folder"))


def told(folder: Path, *options: str, capsys: pytest.CaptureFixture[str], model: str | None = None) -> str:
    """Export, which must not be; returns the one sentence."""
    output = folder.parent / "out"
    assert cli.ivc_export(["--model", model or str(folder), "--output", str(output), *options]) == 2
    out, said = capsys.readouterr()
    assert out == "" and said.startswith("error: ") and len(said.splitlines()) == 1, said
    assert not output.exists()
    return said.replace(str(folder.parent), "TMP")


@pytest.mark.parametrize(("prepare", "sentence"), [row[1:] for row in TOLD], ids=[row[0] for row in TOLD])
def test_names_and_json_files_tell(
    folder: Path, prepare: Prepare, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(folder)
    for options in (["--dry-run"], []):
        assert sentence in told(folder, *options, capsys=capsys)


@pytest.mark.parametrize(("prepare", "sentence"), [row[1:] for row in SEEN], ids=[row[0] for row in SEEN])
def test_tensors_tell(folder: Path, prepare: Prepare, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(folder)
    assert sentence in told(folder, capsys=capsys)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("model.gguf", "model.gguf is for llama.cpp (model.gguf is a GGUF file)"),
        ("pytorch_model.bin", "holds only pickled weights (pytorch_model.bin)"),
        ("model.safetensors", "model.safetensors is not a folder: give a checkpoint folder"),
    ],
)
def test_a_file_in_the_place_of_a_folder(
    tmp_path: Path, name: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(b"")
    assert sentence in told(tmp_path / name, capsys=capsys)


def test_a_bundle_is_no_checkpoint(sample_bundle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = told(tmp_path / "none", model=str(sample_bundle.folder), capsys=capsys)
    assert "is a bundle, which ivc-export wrote: give the checkpoint that it was made from" in said


@pytest.mark.parametrize(("prepare", "sentence"), [row[1:] for row in TOLD], ids=[row[0] for row in TOLD])
def test_a_hubs_repository_tells_before_weights_are_downloaded(
    folder: Path, prepare: Prepare, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(folder)
    asked = fake_hub(folder, monkeypatch)
    said = told(folder, model="owner/model", capsys=capsys)
    if prepare is nested:  # a repository has no such layout
        assert "owner/model on the hub has no config.json" in said
    else:
        assert sentence in said
        assert "owner/model" in said or "config.json" in said
    assert "*.json" in asked
    assert not [name for name in WEIGHTS for pattern in asked if fnmatch.fnmatchcase(name, pattern)]


def fake_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """huggingface_hub gives the files in `folder`; returns the patterns that it will be asked for."""
    asked: list[str] = []
    snapshot = folder.parent / "cache" / COMMIT

    def download(repo: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        snapshot.mkdir(parents=True, exist_ok=True)
        for pattern in allow_patterns:
            for path in folder.glob(pattern):
                shutil.copy(path, snapshot)
        return str(snapshot)

    def tree(self: object, repo: str, revision: str) -> list[SimpleNamespace]:
        assert (repo, revision) == ("owner/model", COMMIT)
        return [SimpleNamespace(path=str(path.relative_to(folder))) for path in folder.rglob("*")]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_tree", tree)
    return asked


def test_what_is_not_told_exports(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of other kinds beside the weights, and a shard of an older count: stock loads these, too."""
    sharded(folder)
    for name in ("model.gguf", "model.onnx", "openvino_model.xml", "pytorch_model.bin", "tf_model.h5", "training.pt"):
        (folder / name).write_bytes(b"")
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"")
    config(quantization_config=None, quantization="none")(folder)
    asked = fake_hub(folder, monkeypatch)
    for model in (str(folder), "owner/model"):
        output = folder.parent / model.rpartition("/")[2].replace("folder", "local")
        assert cli.ivc_export(["--model", model, "--output", str(output), "--quiet"]) == 0
    assert asked[-2:] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_a_tied_model_needs_no_head(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", TINY["qwen2_vl"] | {"tie_word_embeddings": True})
    assert "lm_head.weight" not in load_file(checkpoint / SINGLE)
    assert cli.ivc_export(["--model", str(checkpoint), "--output", str(tmp_path / "out"), "--quiet"]) == 0


def test_methods_are_those_that_transformers_reads() -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert set(METHODS) - {"modelopt", "nvfp4"} <= set(AUTO_QUANTIZER_MAPPING)

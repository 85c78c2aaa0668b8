"""Every way it can go wrong: one sentence that says what to do, exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
import PIL.Image
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer

from ivc_export import cli
from ivc_export.bundle.bundle import Bundle
from samples.make_sample import make_checkpoint
from samples.tiny import TINY
from tests.conftest import SHAPES, Golden

NORM = "model.norm.weight"


class Place(NamedTuple):
    """Where a row of the table plays: folders of its own, which it may damage."""

    tmp: Path
    checkpoint: Path
    bundle: Path
    patch: pytest.MonkeyPatch


Prepare = Callable[[Place], object]


def nothing(place: Place) -> None:
    pass


# what a checkpoint can be


def rewrite(place: Place, **changes: Any) -> None:
    """Change config.json; None removes a key."""
    path = place.checkpoint / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def rewrite_vision(place: Place, **changes: Any) -> None:
    rewrite(place, vision_config={**TINY["qwen2_vl"]["vision_config"], **changes})


def write(place: Place, name: str, content: bytes) -> None:
    (place.checkpoint / name).write_bytes(content)


def drop(place: Place, name: str) -> None:
    file = place.checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(name)
    save_file(tensors, file)


def replace(place: Place, name: str, array: Any) -> None:
    file = place.checkpoint / "model.safetensors"
    save_file(load_file(file) | {name: array}, file)


def truncate(file: Path, left_out: int = 1000) -> None:
    file.write_bytes(file.read_bytes()[:-left_out])


def shards(place: Place) -> list[Path]:
    """Split the checkpoint into two shards and an index."""
    whole = place.checkpoint / "model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, place.checkpoint / file)
    index(place, {"weight_map": {name: file for file, part in halves.items() for name in part}})
    return [place.checkpoint / file for file in halves]


def index(place: Place, content: dict[str, Any]) -> None:
    (place.checkpoint / "model.safetensors").unlink()
    (place.checkpoint / "model.safetensors.index.json").write_text(json.dumps(content))


def header(place: Place, content: object, size: int | None = None, data: int = 64) -> None:
    """A safetensors file with this header, and a length of it that may be a lie."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    length = (len(text) if size is None else size).to_bytes(8, "little")
    write(place, "model.safetensors", length + text + bytes(data))


def entry(*offsets: int, shape: tuple[int, ...] = (8,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


UNREADABLE = "model.safetensors cannot be read"
UNDESCRIBED = "do not describe a model"

CHECKPOINTS: list[tuple[str, Prepare, str]] = [
    ("no config.json", lambda p: (p.checkpoint / "config.json").unlink(), "has no config.json"),
    ("config is no JSON", lambda p: write(p, "config.json", b"{"), "not valid JSON"),
    ("unknown model type", lambda p: rewrite(p, model_type="qwen9_vl"), "'qwen9_vl' of config.json is not supported"),
    ("its nearest names", lambda p: rewrite(p, model_type="qwen2_v"), "this version exports qwen2_vl"),
    ("no model type", lambda p: rewrite(p, model_type=None), "model type None of config.json is not supported"),
    ("no hidden size", lambda p: rewrite(p, hidden_size=None), "must have three numbers whose sum is 1024"),
    ("heads do not divide", lambda p: rewrite(p, hidden_size=62), "inconsistent (hidden_size is 62"),
    ("groups do not divide", lambda p: rewrite(p, num_key_value_heads=3), "inconsistent (num_attention_heads is 4"),
    ("vision heads do not divide", lambda p: rewrite_vision(p, num_heads=3), "inconsistent (vision_config.embed_dim"),
    ("no heads", lambda p: rewrite(p, num_attention_heads=0), "num_attention_heads 0 of config.json"),
    ("no vision heads", lambda p: rewrite_vision(p, num_heads=0), "vision_config.num_heads 0 of config.json"),
    ("no vision layers", lambda p: rewrite_vision(p, depth=0), "vision_config.depth 0 of config.json"),
    ("negative layers", lambda p: rewrite(p, num_hidden_layers=-1), "num_hidden_layers -1 of config.json"),
    ("a billion layers", lambda p: rewrite(p, num_hidden_layers=10**9), "num_hidden_layers 1000000000 of config.json"),
    ("infinite epsilon", lambda p: rewrite(p, rms_norm_eps=float("inf")), "rms_norm_eps inf of config.json"),
    ("a word for a number", lambda p: rewrite_vision(p, mlp_ratio="a"), "vision_config.mlp_ratio 'a' of config.json"),
    ("a word for a token", lambda p: rewrite(p, image_token_id="x"), "image_token_id 'x' of config.json"),
    ("stop tokens", lambda p: write(p, "generation_config.json", b'{"eos_token_id": ["a"]}'), UNDESCRIBED),
    ("picture settings", lambda p: write(p, "preprocessor_config.json", b'{"size": "large"}'), "size 'large' of"),
    ("settings no object", lambda p: write(p, "preprocessor_config.json", b"[]"), "should hold a JSON object"),
    ("template no text", lambda p: write(p, "chat_template.jinja", b"\xff"), "chat_template.jinja is damaged (it"),
    ("sections", lambda p: rewrite(p, rope_scaling={"type": "mrope", "mrope_section": [2, 3]}), "mrope_section"),
    ("yarn", lambda p: rewrite(p, rope_scaling={"type": "yarn", "factor": 4}), "rope_scaling.type 'yarn' of"),
    ("sliding window", lambda p: rewrite(p, use_sliding_window=True, max_window_layers=0), "sliding-window"),
    ("no weights", lambda p: (p.checkpoint / "model.safetensors").unlink(), "model.safetensors is missing"),
    ("truncated weights", lambda p: truncate(p.checkpoint / "model.safetensors"), UNREADABLE),
    ("empty weights", lambda p: write(p, "model.safetensors", b""), UNREADABLE),
    ("missing shard", lambda p: shards(p)[1].unlink(), "model-2.safetensors is missing: download the whole checkpoint"),
    ("truncated shard", lambda p: truncate(shards(p)[0]), "model-1.safetensors cannot be read"),
    ("empty shard", lambda p: shards(p)[0].write_bytes(b""), "model-1.safetensors cannot be read"),
    ("index without shards", lambda p: index(p, {}), "names no shards"),
    ("index with a list", lambda p: index(p, {"weight_map": ["a"]}), "names no shards"),
    ("index with nulls", lambda p: index(p, {"weight_map": {"a": None}}), "names no shards"),
    ("header of 2^63 bytes", lambda p: header(p, {}, size=1 << 63), UNREADABLE),
    ("header beyond the file", lambda p: header(p, {}, size=10_000), UNREADABLE),
    ("header of 99 MB", lambda p: header(p, {}, size=99_000_000), UNREADABLE),
    ("header no JSON", lambda p: header(p, b"\xff\xfe{"), UNREADABLE),
    ("header a list", lambda p: header(p, []), UNREADABLE),
    ("nested header", lambda p: header(p, b'{"a":' + b"[" * 50_000), UNREADABLE),
    ("overlapping tensors", lambda p: header(p, {"a": entry(0, 32), "b": entry(16, 48)}), UNREADABLE),
    ("tensors beyond the file", lambda p: header(p, {"a": entry(0, 32), "b": entry(32, 9_000_000)}), UNREADABLE),
    ("offsets backwards", lambda p: header(p, {"a": entry(32, 0)}), UNREADABLE),
    ("negative extents", lambda p: header(p, {"a": entry(0, 64, shape=(-4, -4))}), UNREADABLE),
    ("extents that overflow", lambda p: header(p, {"a": entry(0, 64, shape=(1 << 62, 1 << 62))}), UNREADABLE),
    ("unknown dtype", lambda p: header(p, {"a": entry(0, 64, dtype="F17")}), UNREADABLE),
    ("bytes without tensor", lambda p: header(p, {"a": entry(0, 32)}, data=99), UNREADABLE),
    ("missing tensor", lambda p: drop(p, NORM), "no tensor model.norm.weight"),
    ("extra tensor", lambda p: replace(p, "model.layers.4.x", np.ones(3, np.float32)), "describe 1 tensors"),
    ("extra layer", lambda p: rewrite(p, num_hidden_layers=3), "describe 12 tensors"),
    ("misshapen tensor", lambda p: replace(p, NORM, np.ones(3, np.float32)), "has shape [3], but config.json says"),
    ("mixed dtypes", lambda p: replace(p, NORM, np.ones(64, np.float16)), "convert them all with --dtype"),
    (
        "integer weights",
        lambda p: save_file({"x": np.ones(9, np.int64)}, p.checkpoint / "model.safetensors"),
        "weights are I64",
    ),
]  # fmt: skip


# what an export can be asked


def fail(place: Place, target: object, name: str, error: Exception) -> None:
    def raising(*arguments: object, **options: object) -> None:
        raise error

    place.patch.setattr(target, name, raising)


def full(place: Place) -> None:
    usage = shutil.disk_usage(place.tmp)._replace(free=1000)
    place.patch.setattr(shutil, "disk_usage", lambda path: usage)


def unreachable(place: Place) -> None:
    fail(place, huggingface_hub, "snapshot_download", LocalEntryNotFoundError("offline"))


def occupied(place: Place) -> None:
    (place.tmp / "out").mkdir()
    (place.tmp / "out" / "thesis.txt").write_text("years of work")


def large_weight(place: Place) -> None:
    replace(place, NORM, np.full(64, 1e5, np.float32))


EXPORTS: list[tuple[str, Prepare, list[str], str]] = [
    ("ratio 0", nothing, ["--ratio", "0"], "ratio 0.0 is out of range"),
    ("ratio 1.5", nothing, ["--ratio", "1.5"], "ratio 1.5 is out of range"),
    ("ratio -1", nothing, ["--ratio", "-1"], "ratio -1.0 is out of range"),
    ("ratio nan", nothing, ["--ratio", "nan"], "ratio nan is out of range"),
    ("ratio a half", nothing, ["--ratio", "half"], "invalid float value: 'half': ivc-export --help"),
    ("layer 0", nothing, ["--layer", "0"], "layer 0 is out of range: this model has 4 layers, so --layer takes 1 to 3"),
    ("layer N", nothing, ["--layer", "4"], "layer 4 is out of range"),
    ("one visual token", nothing, ["--max-visual", "1"], "max_visual 1 is too small"),
    ("unknown dtype", nothing, ["--dtype", "int4"], "invalid choice: 'int4'"),
    ("unknown option", nothing, ["--prune", "0.5"], "unrecognized arguments: --prune 0.5"),
    ("linked and converted", nothing, ["--weights", "link", "--dtype", "float16"], "another dtype cannot be linked"),
    ("beyond float16", large_weight, ["--dtype", "float16"], "up to 1e+05, but the largest value of float16 is 65504"),
    ("existing output", occupied, [], "exists and is not a bundle: name another output folder"),
    ("existing bundle", nothing, ["--output", "BUNDLE"], "replace it with --force"),
    ("output in a file", nothing, ["--output", "PICTURE/b"], "nothing can be written beside"),
    ("output in /proc", nothing, ["--output", "/proc/nowhere/b"], "nothing can be written beside"),
    ("read-only output", lambda p: fail(p, os, "mkdir", OSError(errno.EROFS, "Read-only file system")), [],
     "(Read-only file system): name another output"),
    ("full disk", full, [], "has 1.0 kB free: free some space"),
    ("disk fills up", lambda p: fail(p, shutil, "copyfile", OSError(errno.ENOSPC, "No space left on device")), [],
     "No space left on device: check the path, its permissions and the free space"),
    ("no model", nothing, ["--model", "/nowhere"], "/nowhere is neither a folder nor an alias"),
    ("an empty name", nothing, ["--model", ""], "has no config.json"),
    ("a file", nothing, ["--model", "PICTURE"], "is not a folder"),
    ("name too long", nothing, ["--model", f"TMP/{'n' * 300}"], "File name too long"),
    ("markup", nothing, ["--model", "TMP/x[/b]:smile:"], "x[/b]:smile: is neither a folder nor an alias"),
    ("unknown alias", nothing, ["--model", "qwen2-vl-3b"], "an alias such as qwen2"),
    ("hub without access", unreachable, ["--model", "owner/model"], "the hub cannot be reached: check the connection"),
    ("revision of a folder", nothing, ["--revision", "main"], "leave out --revision"),
]  # fmt: skip


# what a bundle and a question can be


def manifest(place: Place, **changes: Any) -> None:
    path = place.bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def leaving(place: Place) -> None:
    """The weight file's entry points out of the bundle, at a file that exists."""
    path = place.bundle / "manifest.json"
    content = path.read_text().replace("weights/model.safetensors", "../checkpoint/model.safetensors")
    path.write_text(content)


def null_byte(place: Place) -> None:
    path = place.bundle / "manifest.json"
    path.write_text(path.read_text().replace("prefix.onnx", "prefix\\u0000.onnx"))


def embedding(place: Place, **changes: Any) -> None:
    stored = json.loads((place.bundle / "manifest.json").read_text())["embedding"]
    manifest(place, embedding=stored | changes)


def other_header(place: Place) -> None:
    """Weights of the same size, that another tool wrote over the linked file."""
    path = place.bundle / "weights" / "model.safetensors"
    content = path.read_bytes()
    changed = content.replace(b'"model.layers.0.mlp.up_proj.weight"', b'"model.layers.9.mlp.up_proj.weight"')
    assert content != changed and len(content) == len(changed)
    path.write_bytes(changed)


def foreign_tokenizer(place: Place) -> None:
    path = str(place.bundle / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.add_tokens([AddedToken(f"<word{i}>") for i in range(20)])
    tokenizer.save(path)


def silent_template(place: Place) -> None:
    (place.bundle / "chat_template.jinja").write_text("{{ messages[0].content[-1].text }}<|image_pad|><|vision_end|>")


def last_text(place: Place) -> None:
    (place.bundle / "chat_template.jinja").write_text("{{ messages[-1].content[-1].text }}")


def stored(**settings: Any) -> Prepare:
    return lambda place: (place.bundle / "generation_config.json").write_text(json.dumps(settings))


def picture(size: tuple[int, int], mode: str = "RGB", **options: Any) -> Prepare:
    name = f"picture.{options.pop('format', 'png')}"
    return lambda place: PIL.Image.new(mode, size).save(place.tmp / name, **options)


def frames(place: Place) -> None:
    first, *others = [PIL.Image.new("L", (30, 30), colour) for colour in (0, 99, 200)]
    first.save(place.tmp / "picture.gif", save_all=True, append_images=others)


def half_picture(place: Place) -> None:
    whole = SHAPES.read_bytes()
    (place.tmp / "picture.png").write_bytes(whole[: len(whole) // 2])


ASK = ["--prompt", "Where?"]
STORED = ["--sampling", "checkpoint"]
PNG = ["--image", "TMP/picture.png", *ASK]

RUNS: list[tuple[str, Prepare, list[str], str]] = [
    ("no bundle", lambda p: (p.bundle / "manifest.json").unlink(), ASK, "is not a bundle (it has no manifest.json)"),
    ("corrupt manifest", lambda p: truncate(p.bundle / "manifest.json", 100), ASK, "manifest.json is damaged"),
    ("manifest no object", lambda p: (p.bundle / "manifest.json").write_text("[]"), ASK, "manifest.json is damaged"),
    ("binary manifest", lambda p: (p.bundle / "manifest.json").write_bytes(b"\xff"), ASK, "manifest.json is damaged"),
    ("a field too many", lambda p: manifest(p, surprise=1), ASK, "was made by a newer ivc-export (surprise"),
    ("newer manifest", lambda p: manifest(p, schema_version=99), ASK, "schema version 99, .* upgrade ivc-export"),
    ("older manifest", lambda p: manifest(p, schema_version=0), ASK, "schema version 0, .* export the model again"),
    ("manifest leaves the bundle", leaving, ASK, "which is outside the bundle"),
    ("null byte in a path", null_byte, ASK, "which is outside the bundle"),
    ("embeddings beyond the file", lambda p: embedding(p, offset=10**9), ASK, "is damaged (the embedding table"),
    ("embeddings before the file", lambda p: embedding(p, offset=-8), ASK, "is damaged (embedding.offset"),
    ("missing graph", lambda p: (p.bundle / "prefix.onnx").unlink(), ASK, "prefix.onnx is missing"),
    ("damaged graph", lambda p: (p.bundle / "prefix.onnx").write_bytes(b"x"), ASK, "is not the graph that was"),
    ("weights shrank", lambda p: truncate(p.bundle / "weights" / "model.safetensors"), ASK, "but the manifest says"),
    ("weights changed", other_header, ASK, "changed after the export"),
    ("no tokenizer", lambda p: (p.bundle / "tokenizer.json").unlink(), ASK, "has no tokenizer.json"),
    ("ids beyond the vocabulary", foreign_tokenizer, ["--prompt", "a <word19>"], "beyond the vocabulary of 512"),
    ("no question", nothing, [], "there is no question"),
    ("empty prompt", nothing, ["--prompt", ""], "the prompt is empty"),
    ("blank prompt", nothing, ["--prompt", " \n"], "the prompt is empty"),
    ("prompt no text", nothing, ["--prompt", "x\udcff"], "is not UTF-8 text"),
    ("image tokens", nothing, ["--prompt", "<|image_pad|>"], "write no image tokens"),
    ("image tokens beside a picture", nothing, ["--prompt", "<|image_pad|>", "--image", "PICTURE"], "write no image"),
    ("no text after the picture", silent_template, ["--image", "PICTURE", *ASK], "no text follows the picture"),
    ("missing picture", nothing, PNG, "there is no picture at"),
    ("a folder", nothing, ["--image", "TMP", *ASK], "there is no picture at"),
    ("corrupt picture", half_picture, PNG, "cannot be read as a picture"),
    ("no picture", lambda p: (p.tmp / "picture.png").write_text("hello"), PNG, "cannot be read as a picture"),
    ("one pixel", picture((1, 1)), PNG, "is a single pixel, which shows nothing"),
    ("32 bits", picture((30, 30), "F", format="tif"), ["--image", "TMP/picture.tif", *ASK], "mode F: convert it to"),
    ("CIELAB", picture((30, 30), "LAB", format="tif"), ["--image", "TMP/picture.tif", *ASK], "mode LAB: convert it to"),
    ("animated", frames, ["--image", "TMP/picture.gif", *ASK], "has 3 frames: give one frame"),
    ("100 megapixels", picture((10_000, 10_000), "1"), PNG, "has 100 megapixels, but the limit is 80"),
    ("elongated", picture((3000, 10)), PNG, "too elongated"),
    ("ratio nan", nothing, [*ASK, "--ratio", "nan"], "ratio nan is out of range"),
    ("ratio 0", nothing, [*ASK, "--ratio", "0"], "ratio 0.0 is out of range"),
    ("no tokens", nothing, [*ASK, "--max-tokens", "0"], "max tokens 0 is out of range"),
    ("a mark too many", nothing, ["--image", "PICTURE", "--prompt", "<image>, <image>?"], "has 2 <image> marks, but"),
    ("a mark and no picture", nothing, ["--prompt", "<image>?"], "has 1 <image> marks, but there are 0 pictures"),
    ("marks alone", nothing, ["--image", "PICTURE", "--prompt", " <image> "], "the prompt is empty"),
    ("no system", last_text, [*ASK, "--system", "Be brief."], "takes no system message: leave it out"),
    ("system no text", nothing, [*ASK, "--system", "x\udcff"], "is not UTF-8 text"),
    ("image tokens in the system", nothing, [*ASK, "--system", "<|image_pad|>"], "write no image tokens"),
    ("temperature nan", nothing, [*ASK, "--temperature", "nan"], "temperature nan is out of range"),
    ("top-k below 0", nothing, [*ASK, "--top-k", "-1"], "top-k -1 is out of range: give 0 (all tokens) or more"),
    ("top-k a half", nothing, [*ASK, "--top-k", "0.5"], "invalid int value: '0.5': ivc-run --help"),
    ("top-p 0", nothing, [*ASK, "--top-p", "0"], "top-p 0.0 is out of range"),
    ("no penalty", nothing, [*ASK, "--repetition-penalty", "0"], "repetition penalty 0.0 is out of range"),
    ("unknown sampling", nothing, [*ASK, "--sampling", "best"], "invalid choice: 'best'"),
    ("beams", stored(num_beams=4), [*ASK, *STORED], "sets num_beams to 4, which this version does not support"),
    ("a word", stored(do_sample=True, temperature="hot"), [*ASK, *STORED], "'hot', which is not a number"),
    ("half a top-k", stored(do_sample=True, top_k=1.5), [*ASK, *STORED], "sets top_k to 1.5, which is not a number"),
    ("stored top-p 2", stored(do_sample=True, top_p=2), [*ASK, *STORED], "top-p 2 is out of range"),
    ("stored penalty -1", stored(repetition_penalty=-1), [*ASK, *STORED], "repetition penalty -1 is out of range"),
    ("sampling no object", lambda p: (p.bundle / "generation_config.json").write_text("[]"), ASK, "hold a JSON object"),
    ("no stored sampling", lambda p: (p.bundle / "generation_config.json").unlink(), [*ASK, *STORED], "is missing, so"),
    ("nothing to show", nothing, [*ASK, "--show", "TMP/kept.png"], "no picture for --show"),
    ("show in no folder", nothing, ["--image", "PICTURE", *ASK, "--show", "TMP/no/kept.png"], "does not exist"),
    ("show in no format", nothing, ["--image", "PICTURE", *ASK, "--show", "TMP/kept.no"], "does not end in"),
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, sample_checkpoint: Path, sample_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Place:
    shutil.copytree(sample_checkpoint, tmp_path / "checkpoint")
    shutil.copytree(sample_bundle.folder, tmp_path / "bundle")
    return Place(tmp_path, tmp_path / "checkpoint", tmp_path / "bundle", monkeypatch)


def told(
    command: Callable[[list[str]], int], arguments: list[str], place: Place, capsys: pytest.CaptureFixture[str]
) -> str:
    """Run, and return the one sentence; everything in the folder is as before."""
    before = {path: path.stat().st_mtime_ns for path in place.tmp.rglob("*")}
    words = {"TMP": place.tmp, "BUNDLE": place.bundle, "PICTURE": SHAPES}
    parts = [argument.partition("/") for argument in arguments]
    capsys.readouterr()
    assert command([f"{words.get(first, first)}{slash}{rest}" for first, slash, rest in parts]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1, err
    assert {path: path.stat().st_mtime_ns for path in place.tmp.rglob("*")} == before
    return err


@pytest.mark.parametrize(("prepare", "sentence"), [row[1:] for row in CHECKPOINTS], ids=[row[0] for row in CHECKPOINTS])
def test_checkpoints(place: Place, prepare: Prepare, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(place)
    arguments = ["--model", str(place.checkpoint), "--output", str(place.tmp / "out")]
    assert sentence in told(cli.ivc_export, arguments, place, capsys)


@pytest.mark.parametrize(("prepare", "options", "sentence"), [r[1:] for r in EXPORTS], ids=[r[0] for r in EXPORTS])
def test_exports(
    place: Place, prepare: Prepare, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(place)
    arguments = ["--model", str(place.checkpoint), "--output", str(place.tmp / "out"), *options]
    assert sentence in told(cli.ivc_export, arguments, place, capsys)


@pytest.mark.parametrize(("prepare", "options", "sentence"), [r[1:] for r in RUNS], ids=[r[0] for r in RUNS])
def test_questions(
    place: Place, prepare: Prepare, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(place)
    message = told(cli.ivc_run, [str(place.bundle), *options], place, capsys)
    first, _, second = sentence.partition(" .* ")
    assert first in message and second in message


def test_a_bundle_without_a_tokenizer(
    golden: Golden, golden_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.ivc_run([str(golden_bundle.folder), *ASK]) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err


def limited(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    program = "import sys; from ivc_export import cli; sys.exit(cli.ivc_export(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, **options)


def test_files_that_may_not_grow(place: Place) -> None:
    """A write that fails half way: the limit is reached within the weights."""
    limit = (place.checkpoint / "model.safetensors").stat().st_size // 2
    arguments = ["--model", str(place.checkpoint), "--output", str(place.tmp / "out"), "--quiet"]
    done = limited(arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "File too large" in done.stderr
    assert sorted(path.name for path in place.tmp.iterdir()) == ["bundle", "checkpoint"]


@pytest.mark.parametrize(("size", "sentence"), [("100k", "free: free some space"), ("30k", "No space left on device")])
@pytest.mark.parametrize("option", ["rw", "ro"])
def test_a_disk_that_is_really_full_or_read_only(place: Place, size: str, option: str, sentence: str) -> None:
    """A file system of its own, where the kernel lets us mount one: too small for the weights, or for the graphs."""
    disk = place.tmp / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o {option},size={size} tmpfs {disk}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    program = "import sys; from ivc_export import cli; sys.exit(cli.ivc_export(sys.argv[1:]))"
    export = f"{sys.executable} -c '{program}' --model {place.checkpoint} --output {disk}/out --quiet"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mount} && {export}; echo $?; ls -A {disk}"], capture_output=True, text=True
    )
    assert done.stdout == "2\n", done
    assert len(done.stderr.splitlines()) == 1
    assert ("(Read-only file system): name another output" if option == "ro" else sentence) in done.stderr


def test_the_list_is_long_enough() -> None:
    assert len(CHECKPOINTS) + len(EXPORTS) + len(RUNS) > 100


def test_a_good_checkpoint_passes(tmp_path: Path) -> None:
    """The rows above start from what works."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    place = Place(tmp_path, checkpoint, tmp_path, pytest.MonkeyPatch())
    shards(place)
    assert cli.ivc_export(["--model", str(checkpoint), "--output", str(tmp_path / "out"), "--quiet"]) == 0

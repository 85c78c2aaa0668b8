"""What the C++ runtime computes on the host, against Python: pictures, ids, prompts, positions, priorities, plans."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import math
import os
import random
import shutil
import struct
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from tokenizers import Tokenizer, normalizers
from tokenizers.decoders import DecodeStream

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.manifest import Manifest, constants_sha256
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe, Quantisation
from ivc_export.families.pictures import Grid, Visual
from ivc_export.runtime.chat import Chat, FollowUp
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.pictures import open_picture
from ivc_export.runtime.plan import plan_run
from ivc_export.runtime.processor import Processor
from ivc_export.selection.method import Method
from ivc_export.text.sampling import Sampler, Sampling
from ivc_export.text.segments import conversation
from samples.make_sample import make_checkpoint
from samples.tiny import TINY
from tests.conftest import SHAPES
from tests.native.cpp_runtime import HostProgram, build, digest, shared

ROOT = Path(__file__).parents[2]
OTHER = SHAPES.with_name("scene-1.png")
SAMPLE = ROOT / "samples" / "spatial-vl"
SANITIZED = "-DCMAKE_CXX_FLAGS=-O1 -fsanitize=address,undefined -fno-sanitize-recover=all"
REAL = os.environ.get("IVC_TOKENIZERS")


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProgram]:
    """Built by g++ with sanitizers, so that every test here runs under them."""
    ready = os.environ.get("IVC_HOST_TEST")  # a command that starts a build of one's own
    command = ready.split() if ready else [build(shared(tmp_path_factory, "cpp-gcc"), SANITIZED) / "ivc_host_test"]
    found = HostProgram(command)
    yield found
    found.close()


# --- pictures


def noise(width: int, height: int, channels: int, seed: int) -> PIL.Image.Image:
    """A picture of slopes and noise."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    slopes = np.stack([(x * 7 + y * (3 + i)) % 256 for i in range(channels)], -1)
    values = np.clip(slopes + generator.integers(-60, 60, slopes.shape), 0, 255).astype(np.uint8)
    return PIL.Image.fromarray(values.squeeze(-1) if channels == 1 else values)


SIZES = [(2, 1), (1, 7), (3, 3), (17, 40), (64, 64), (100, 37), (255, 256), (300, 200), (33, 190), (640, 48)]


def pictures(folder: Path) -> list[Path]:
    """Sixty files, RGB and grey, as PNG and as JPEG of several qualities and samplings."""
    found = []
    for seed, (width, height) in enumerate(SIZES):
        for channels in (1, 3):
            image = noise(width, height, channels, seed)
            path = folder / f"{seed}-{channels}.png"
            image.save(path)
            for quality, sampling in ((95, "4:4:4"), (60, ("4:2:0", "4:2:2", "4:1:1")[seed % 3])):
                other = path.with_suffix(f".{quality}.jpg")
                image.save(other, quality=quality, **({"subsampling": sampling} if channels == 3 else {}))
                found.append(other)
            found.append(path)
    return found


def check_pixels(program: HostProgram, path: Path) -> None:
    image = open_picture(path)
    assert program.ask("image", path=str(path)) == {"size": [*image.size], "pixels": digest(np.asarray(image))}, path


def test_pixels_of_sixty_pictures_equal_pillows(program: HostProgram, tmp_path: Path) -> None:
    paths = pictures(tmp_path)
    assert len(paths) == 60
    for path in paths:
        check_pixels(program, path)


def exif(orientation: int) -> PIL.Image.Exif:
    found = PIL.Image.Exif()
    found[0x0112] = orientation
    return found


def xmp(orientation: int) -> bytes:
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="{orientation}"/>'.encode()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def sixteen(colour: int, channels: int) -> bytes:
    """A PNG of 16 bits a sample."""
    values = np.random.default_rng(0).integers(0, 65536, (5, 7 * channels)).astype(">u2")
    values[0] = np.arange(7 * channels) * 50
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 7, 5, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def stored(image: PIL.Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


def palette(colours: int) -> PIL.Image.Image:
    return noise(40, 30, 3, 1).quantize(colours)


def rgba() -> PIL.Image.Image:
    return noise(40, 30, 4, 2)


def turned(orientation: int, form: str) -> bytes:
    return stored(noise(9, 5, 3, orientation), format=form, exif=exif(orientation))


def of_colours(colours: int, bits: int) -> bytes:
    return stored(palette(colours), format="PNG", bits=bits)


KINDS: dict[str, Callable[[], bytes]] = {
    **{f"jpeg turned by {n}": partial(turned, n, "JPEG") for n in range(10)},
    **{f"png turned by {n}": partial(turned, n, "PNG") for n in (3, 6)},
    **{f"palette of {n}": partial(of_colours, n, bits) for n, bits in ((2, 1), (4, 2), (16, 4), (200, 8))},
    **{f"16 bits, colour {c}": partial(sixteen, c, n) for c, n in ((0, 1), (2, 3), (4, 2), (6, 4))},
    "grey jpeg, turned": lambda: stored(noise(9, 5, 1, 1), format="JPEG", exif=exif(8)),
    "jpeg turned by XMP": lambda: stored(noise(9, 5, 3, 1), format="JPEG", xmp=xmp(6)),
    "EXIF before XMP": lambda: stored(noise(9, 5, 3, 1), format="JPEG", exif=exif(3), xmp=xmp(6)),
    "progressive": lambda: stored(noise(80, 50, 3, 1), format="JPEG", progressive=True, quality=70),
    "cmyk": lambda: stored(rgba().convert("RGB").convert("CMYK"), format="JPEG"),
    "one bit": lambda: stored(noise(21, 9, 1, 3).convert("1"), format="PNG"),
    "transparent palette": lambda: stored(palette(9), format="PNG", transparency=3),
    "alpha": lambda: stored(rgba(), format="PNG"),
    "grey and alpha": lambda: stored(rgba().convert("LA"), format="PNG"),
    "transparent colour": lambda: stored(noise(9, 9, 3, 1), format="PNG", transparency=(1, 2, 3)),
    "transparent grey": lambda: stored(noise(9, 9, 1, 1), format="PNG", transparency=4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_every_kind_become_rgb_as_in_python(program: HostProgram, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture"
    path.write_bytes(KINDS[kind]())
    check_pixels(program, path)


def interlaced() -> bytes:
    """A PNG of one row in Adam7's order, written out."""
    header = struct.pack(">IIBBBBB", 8, 1, 8, 0, 0, 0, 1)
    passes = ([0], [64], [32, 96], [16, 48, 80, 112])
    data = b"".join(b"\0" + bytes(values) for values in passes)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def test_interlaced_pictures_are_put_together(program: HostProgram, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(interlaced())
    check_pixels(program, path)


PNG = b"\x89PNG\r\n\x1a\n"
BAD_PICTURES: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "is neither JPEG nor PNG: convert it"),
    "a text": (lambda: b"no picture", "is neither JPEG nor PNG"),
    "a gif": (lambda: stored(noise(5, 5, 1, 0), format="GIF"), "is neither JPEG nor PNG"),
    "one pixel": (lambda: stored(noise(1, 1, 3, 0), format="PNG"), "is a single pixel"),
    "a short png": (lambda: stored(noise(50, 50, 3, 0), format="PNG")[:-200], "cannot be read as a picture"),
    "a short jpeg": (lambda: stored(noise(50, 50, 3, 0), format="JPEG")[:-200], "the file is truncated"),
    "a head of a jpeg": (lambda: b"\xff\xd8\xff\xe0", "cannot be read as a picture"),
    "a huge png": (
        lambda: PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 0, 0, 0, 0)) + chunk(b"IDAT", b""),
        "has more than 80 megapixels: scale it down",
    ),
    "animated": (
        lambda: stored(noise(5, 5, 3, 0), format="PNG", save_all=True, append_images=[noise(5, 5, 3, 1)]),
        "has several frames: give one frame as a picture",
    ),
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_bad_pictures_are_told_in_one_sentence(program: HostProgram, tmp_path: Path, kind: str) -> None:
    make, message = BAD_PICTURES[kind]
    path = tmp_path / "picture"
    path.write_bytes(make())
    with pytest.raises(UserError):
        if kind == "a gif":
            raise UserError("Python reads it")
        open_picture(path)
    found = program.refusal("image", path=str(path))
    assert found.startswith(str(path)) and message in found


FILTERS = ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


@pytest.mark.parametrize("filter_name", FILTERS)
def test_pictures_are_resized_as_pillow_does(program: HostProgram, tmp_path: Path, filter_name: str) -> None:
    kernel = PIL.Image.Resampling[filter_name.upper()]
    for seed, (width, height) in enumerate(SIZES):
        image, path = noise(width, height, 3, seed), tmp_path / f"{seed}.png"
        image.save(path)
        for w, h in ((width, height), (28, 56), (width * 3 + 1, max(1, height // 2)), (1, 1), (97, height)):
            wanted = image.resize((w, height), kernel).resize((w, h), kernel)
            if filter_name == "nearest":
                wanted = image.resize((w, h), kernel)
            found = program.ask("resize", path=str(path), width=w, height=h, filter=filter_name)
            assert found == digest(np.asarray(wanted)), (width, height, w, h)


def test_large_pictures_are_resized_in_parts(program: HostProgram, tmp_path: Path) -> None:
    """By several threads, each of which takes some rows."""
    image, path = noise(900, 700, 3, 0), tmp_path / "large.png"
    image.save(path)
    for width, height in ((1100, 700), (900, 1101), (1001, 997)):
        wanted = image.resize((width, 700), PIL.Image.Resampling.BICUBIC).resize(
            (width, height), PIL.Image.Resampling.BICUBIC
        )
        found = program.ask("resize", path=str(path), width=width, height=height, filter="bicubic")
        assert found == digest(np.asarray(wanted)), (width, height)


# --- every family


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    found = {}
    for name in TINY:
        folder = tmp_path_factory.mktemp(name)
        checkpoint = make_checkpoint(folder / "checkpoint", TINY[name])
        found[name] = export(ExportRecipe(checkpoint, folder / "bundle"))
        if name in FASTV:
            recipe = ExportRecipe(checkpoint, folder / "fastv", method="fastv")
            found[f"{name}, fastv"] = export(recipe)
    return found


FASTV = ("qwen2_vl", "internvl", "deepseek_vl_v2")
"""Of each kind of preprocessing one, whose bundle is also exported with that method."""
KINDS_OF_BUNDLE = [*TINY, *(f"{name}, fastv" for name in FASTV)]


def test_every_family_is_compared() -> None:
    assert {TINY[name]["model_type"] for name in TINY} == {*families.names()}


def sides(grid: Grid) -> list[int]:
    """A grid as the program writes it."""
    top, left, bottom, right = grid.content or (0, 0, 0, 0)
    return [grid.rows, grid.columns, grid.tile, *((left, top, right, bottom) if grid.content else ())]


@pytest.mark.parametrize("name", KINDS_OF_BUNDLE)
def test_every_familys_pictures_are_made_ready_as_in_python(
    program: HostProgram, bundles: dict[str, Bundle], tmp_path: Path, name: str
) -> None:
    bundle = bundles[name]
    processor = Processor(bundle)
    program.ask("bundle", path=str(bundle.folder))
    for seed, (width, height) in enumerate([(64, 64), (100, 37), (300, 200), (33, 190), (640, 448), (29, 900)]):
        path = tmp_path / f"{seed}.png"
        noise(width, height, 3 if seed % 2 else 1, seed).save(path)
        wanted = processor.picture(path)
        found = program.ask("prepare", path=str(path))
        grid = wanted.grid
        assert found["grid"] == sides(grid)
        assert found["shape"] == [*wanted.inputs["pixel_values"].shape]
        assert found["pixels"] == digest(wanted.inputs["pixel_values"])
        assert found["positions"] == digest(wanted.inputs.get("patch_position", np.zeros(0, np.int32)))
        assert found["source"] == wanted.inputs.get("token_source", np.zeros(0, np.int32)).tolist()
        assert found["covered"] == [*processor.extents((width, height), grid)["covered"]]
        shown = {(row, column): token for (row, column), token in zip(grid.cells.tolist(), grid.detail, strict=True)}
        assert found["cells"] == [shown[row, column] for row in range(grid.rows) for column in range(grid.columns)]
    path = tmp_path / "long.png"
    noise(3100, 1, 1, 0).save(path)
    assert "is too elongated: crop it to an aspect ratio below" in program.refusal("prepare", path=str(path))


@pytest.mark.parametrize("name", KINDS_OF_BUNDLE)
def test_every_familys_prompts_are_those_of_its_chat_template(
    program: HostProgram, bundles: dict[str, Bundle], name: str
) -> None:
    bundle = bundles[name]
    processor, chat, source = Processor(bundle), bundle.manifest.chat, random.Random(7)
    assert chat is not None
    program.ask("bundle", path=str(bundle.folder))
    for number in range(24):
        messages = conversation(processor.template, chat, number % 4, source)
        given = [{"role": m["role"], "parts": parts_of(m["content"])} for m in messages]
        wanted = processor.render(messages)
        assert program.ask("render", messages=given) == wanted
        count = sum(part is None for one in given for part in one["parts"])
        grids = [shapes_of(bundle.manifest)[i % 2] for i in range(count)]
        pictures = [Visual({}, grid, bundle.manifest.tokens.image) for grid in grids]
        arguments = {"messages": given, "grids": [sides(g) for g in grids], "begin": number % 2 == 0}
        try:
            ids = processor.encode(wanted, pictures, begin=number % 2 == 0)
        except UserError as error:
            assert program.refusal("prompt", **arguments) == str(error)
        else:
            assert program.ask("prompt", **arguments) == ids


def parts_of(content: Any) -> list[str | None]:
    if isinstance(content, str):
        return [content]
    return [part["text"] if part["type"] == "text" else None for part in content]


@pytest.mark.parametrize("name", KINDS_OF_BUNDLE)
def test_every_familys_runs_are_planned_as_in_python(
    program: HostProgram, bundles: dict[str, Bundle], name: str
) -> None:
    m = bundles[name].manifest
    program.ask("bundle", path=str(bundles[name].folder))
    shapes, source = shapes_of(m), random.Random(0)
    for _ in range(40):
        grids = [source.choice(shapes) for _ in range(source.choice([0, 1, 1, 2, 3]))]
        tokens: list[int] = []
        for grid in grids:
            tokens += [source.randrange(400) for _ in range(source.randrange(4))] + [m.tokens.image] * grid.visual
        tokens += [source.randrange(400) for _ in range(source.choice([1, 2, 3, 9]))]
        start, ratio = source.choice([0, 77]), source.choice([1.0, 0.5, 0.3, 0.025])
        method = Method(source.choice(["ivc-prune", "foreground", "random"]), source.randrange(1 << 31))
        if m.selection.method == "fastv":
            method = Method("fastv")
        question = source.choice([0, 0, len(tokens) - 2])
        arguments = {
            "tokens": tokens,
            "grids": [sides(g) for g in grids],
            "start": start,
            "ratio": ratio,
            "question": question,
            "method": method.name,
            "seed": method.seed,
        }
        try:
            wanted = plan_run(m, tokens, grids, start, ratio, method, question)
        except UserError as error:
            assert program.refusal("plan", **arguments).split(" ")[:4] == str(error).split(" ")[:4]
            continue
        found = program.ask("plan", **arguments)
        assert found.pop("keep_count") == wanted.keep_count and found.pop("next_position") == wanted.next_position
        assert found.pop("position_ids") == wanted.position_ids.ravel().tolist()
        for key in ("visual_index", "text_index", "query_index", "ivc_priority"):
            assert found.pop(key) == getattr(wanted, key).tolist(), (key, arguments)
        tiles = dict.fromkeys(("thumbnail_index", "tile_map", "candidate_index"), np.zeros(0, np.int32))
        assert found == {key: values.tolist() for key, values in (tiles | dict(wanted.tiles)).items()}


def shapes_of(m: Manifest) -> list[Grid]:
    """Grids of pictures that a bundle may be shown, no two at the beginning alike where there are several."""
    p = m.preprocessing
    if p.kind == "patches":
        return [Grid(4, 5), Grid(1, 1), Grid(12, 12), Grid(24, 17), Grid(3, 31)]
    side = p.tile_side
    if p.kind == "views":
        shown = [(0, 0, side, side), (1, 0, 3, side), (0, 2, side, 3)]
        shapes = [(side, side), (2 * side, 3 * side), (side, 4 * side)]
        return [Grid(*shape, side, content=box) for shape, box in zip(shapes, shown, strict=True)]
    if not families.of(m.family).tiles:
        return [Grid(side, side)] * 2
    return [Grid(side, side, side), Grid(2 * side, 3 * side, side), Grid(side, 4 * side, side)]


def test_sha256_of_pieces_is_that_of_the_whole(program: HostProgram) -> None:
    generator = random.Random(0)
    for size in (0, 1, 55, 56, 63, 64, 65, 119, 128, 1000):
        whole = generator.randbytes(size)
        for cuts in ([], [0], [size], sorted(generator.choices(range(size + 1), k=5))):
            pieces = [whole[a:b].hex() for a, b in itertools.pairwise([0, *cuts, size])]
            assert program.ask("sha256", pieces=pieces) == hashlib.sha256(whole).hexdigest(), (size, cuts)


def test_embeddings_are_read_as_the_bundle_has_them(program: HostProgram, tmp_path: Path, bundles: Any) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    for dtype in ("float32", "float16", "bfloat16"):
        bundle = export(ExportRecipe(checkpoint, tmp_path / dtype, dtype=dtype))
        check_embeddings(program, bundle)
    assert "has no embedding" in program.refusal("embed", tokens=[-1])


def check_embeddings(program: HostProgram, bundle: Bundle) -> None:
    program.ask("bundle", path=str(bundle.folder))
    tokens = [0, 7, bundle.manifest.decoder.vocab_size - 1]
    assert program.ask("embed", tokens=tokens) == digest(bundle.embed(np.array(tokens, np.int32)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group", [32, 128])
def test_packed_embeddings_are_read_as_in_python(
    program: HostProgram, tmp_path: Path, dtype: FloatName, group: int
) -> None:
    """With several blocks a row, and with one that its 64 values do not fill."""
    checkpoint, rounding = make_checkpoint(tmp_path / "checkpoint"), Quantisation(None, group, embeddings="int8")
    bundle = export(ExportRecipe(checkpoint, tmp_path / "bundle", dtype=dtype, quantisation=rounding))
    assert bundle.manifest.embedding.packed is not None and bundle.manifest.embedding.packed.block == group
    check_embeddings(program, bundle)
    for place, value, message in (
        ("block", 8, "embedding.packed.block is 8, but must be 16 to 128"),
        ("scales", 2**50, "the embedding table is not within its file"),
        ("dtype", "uint8", "embedding.packed.dtype is 'uint8', which this version does not know"),
        ("surprise", 1, "was made by a newer ivc-export (embedding.packed.surprise is unknown)"),
    ):
        manifest = json.loads((bundle.folder / "manifest.json").read_text())
        manifest["embedding"]["packed"][place] = value
        edited = copy_of(bundle, tmp_path / place, manifest)
        assert message in program.refusal("bundle", path=str(edited))


def copy_of(bundle: Bundle, folder: Path, manifest: dict[str, Any]) -> Path:
    """A copy of a bundle with another manifest, sealed."""
    shutil.copytree(bundle.folder, folder)
    manifest["constants_sha256"] = constants_sha256(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_halves_are_ieees(program: HostProgram) -> None:
    halves = np.arange(65536, dtype=np.uint32).astype(np.uint16).view(np.float16)
    numbers = ~np.isnan(halves)
    values = [0.1, -3.3, 65504.0, 65519.9, 65520.0, 1e-8, 5.96e-8, 2.98e-8, 6.1e-5, -1e30, 1.0004883]
    with np.errstate(over="ignore"):
        wanted = np.array(values, np.float32).astype(np.float16).view(np.uint16).tolist()
    assert program.ask("to_halves", values=values) == wanted
    some = halves[numbers].astype(np.float32)
    assert (
        program.ask("to_halves", values=some[::37].tolist()[:1000])
        == halves[numbers][::37][:1000].view(np.uint16).tolist()
    )


def test_tokens_are_drawn_as_in_python(program: HostProgram) -> None:
    generator = np.random.default_rng(3)
    logits = (3 * generator.standard_normal((40, 300))).astype(np.float32)
    for temperature, top_p, top_k, penalty, seed in (
        (0.0, 1.0, 0, 1.0, 0),
        (1.0, 1.0, 0, 1.0, 0),
        (0.7, 0.9, 0, 1.0, 12345),
        (1.3, 1.0, 7, 1.1, 2**40 + 3),
        (0.9, 0.5, 50, 1.5, 7),
    ):
        sampler = Sampler(Sampling(temperature, top_p, seed, top_k=top_k, repetition_penalty=penalty))
        wanted = [sampler.draw(row) for row in logits]
        options = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
        found = program.ask("draw", logits=logits.tolist(), repetition_penalty=penalty, **options)
        assert found == wanted
    for bad in ([math.inf, 1.0], [-math.inf, -math.inf]):
        options = {"temperature": 0, "top_p": 1, "top_k": 0, "seed": 0, "repetition_penalty": 1}
        numbers = [[1e39 if x > 0 else -1e39 for x in bad]]  # beyond float32: infinite there
        assert "the model gives NaN logits" in program.refusal("draw", logits=numbers, **options)


# --- text

SCRIPTS = [
    (0x20, 0x7F),
    (0xA0, 0x250),
    (0x300, 0x370),
    (0x370, 0x590),
    (0x590, 0x700),
    (0x900, 0xE80),
    (0x1100, 0x1200),
]
SCRIPTS += [(0x1E00, 0x2070), (0x2070, 0x2C00), (0x3000, 0x3100), (0x4E00, 0x9FA6), (0xAC00, 0xD7A4), (0xF900, 0xFB50)]
SCRIPTS += [(0xFB50, 0xFFF0), (0x10300, 0x10450), (0x1D100, 0x1D800), (0x1F300, 0x1F700), (0x20000, 0x2A6D7)]
CODE = "def f(x):\n\treturn {'a': x[0] ** 2}  # ok\n"
WORDS = ["the", "don't", "I'LL", "we've", "  two", "x\r\ny", "\n\n\n", "\t \t", "123456", "3.14", CODE, "ſ's", "K'T"]
WORDS += ["<|im_start|>", "<|im_end|>", "<|image_pad|>", "</s>", "<s>", "<unk>", "<|endoftext|>", "<|im", "▁", "<0x41>"]
WORDS += ["👩‍👩‍👧", "🇩🇪", "é", "e\u0301", "한", "가", "ﬁ", "Å", "\u0344", "\u180e", "\u00a0", "\u2028", "\x85"]


def random_text(source: random.Random) -> str:
    """Text of every script, emoji, control characters, special tokens and code."""
    pieces = []
    for _ in range(source.randrange(1, 9)):
        kind = source.randrange(6)
        if kind < 2:
            pieces.append(source.choice(WORDS))
        elif kind == 2:
            pieces.append("".join(chr(source.randrange(32)) for _ in range(source.randrange(4))))
        elif kind == 3:
            pieces.append(bytes(source.randrange(256) for _ in range(source.randrange(9))).decode("utf-8", "replace"))
        else:
            first, end = source.choice(SCRIPTS)
            points = (source.randrange(first, end) for _ in range(source.randrange(1, 12)))
            pieces.append("".join(chr(p) for p in points if assigned(p)))
    return source.choice(["", " "]).join(pieces)


def assigned(point: int) -> bool:
    """Whether a code point is assigned in Unicode 14, so that what is known of it does not change."""
    return unicodedata.category(chr(point)) != "Cn"


def check_tokenizer(program: HostProgram, path: Path, texts: int) -> None:
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    program.ask("tokenizer", path=str(path))
    source = random.Random(1)
    for number in range(texts):
        text = random_text(source)
        begin = number % 2 == 0
        wanted = tokenizer.encode(text, add_special_tokens=begin).ids
        found = program.ask("encode", text=text.encode().hex(), begin=begin)
        assert found == wanted, text
        if number % 3 == 0:
            places = [i for i in range(len(text)) if not unicodedata.combining(text[i])]  # no mark moves across them
            place = source.choice([*places, len(text)])
            ends = tokenizer.encode(text, add_special_tokens=begin).offsets
            before = next((i for i, (_, end) in enumerate(ends) if end > place), len(ends))
            arguments = {"text": text.encode().hex(), "place": len(text[:place].encode()), "begin": begin}
            assert program.ask("before", **arguments) == before, (text, place)
        if number % 5:
            continue
        some = wanted if number % 10 else [source.randrange(tokenizer.get_vocab_size()) for _ in range(20)]
        assert program.ask("decode", ids=some) == tokenizer.decode(some, skip_special_tokens=True), some
        stream = DecodeStream(skip_special_tokens=True)
        pieces = [piece for piece in (stream.step(tokenizer, token) for token in wanted) if piece]
        assert "".join(program.ask("stream", ids=wanted)) == "".join(pieces)


def test_ids_equal_those_of_tokenizers(program: HostProgram) -> None:
    check_tokenizer(program, SAMPLE / "tokenizer.json", 5000)


@pytest.mark.skipif(REAL is None, reason="IVC_TOKENIZERS names no folder of real tokenizers")
@pytest.mark.parametrize("name", ["qwen3", "llama2"])
def test_ids_of_real_tokenizers_equal_those_of_tokenizers(program: HostProgram, tmp_path: Path, name: str) -> None:
    path = tmp_path / "tokenizer.json"
    with gzip.open(Path(str(REAL)) / f"{name}.tokenizer.json.gz") as packed:
        path.write_bytes(packed.read())
    check_tokenizer(program, path, 5000)


def test_text_is_normalised_as_in_tokenizers(program: HostProgram) -> None:
    normalizer = normalizers.NFC()
    points = [p for p in range(0x80, 0x30000) if assigned(p) and not 0xD800 <= p < 0xE000]
    source = random.Random(0)
    for start in range(0, len(points), 2000):
        text = "".join(map(chr, points[start : start + 2000]))
        mixed = "".join(chr(source.choice(points)) + chr(source.randrange(0x300, 0x345)) for _ in range(300))
        assert program.ask("nfc", text=text + mixed) == normalizer.normalize_str(text + mixed)


def test_what_is_no_text_is_refused(program: HostProgram) -> None:
    program.ask("tokenizer", path=str(SAMPLE / "tokenizer.json"))
    for data in (b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80", b"\xe0\x80\x80"):
        assert program.refusal("encode", text=data.hex()) == "the prompt is not UTF-8 text: write it in UTF-8"
    assert program.ask("encode", text="") == []


STRANGE: list[tuple[str, Any, str]] = [
    ("model.type", "Unigram", "model.type is 'Unigram', which this version does not know"),
    ("model.vocab", [], "model.vocab is not an object"),
    ("model.vocab", {"a": -1}, "model.vocab holds an invalid id"),
    ("model.merges", ["ab"], "model.merges has an entry that is not a pair"),
    ("model.merges", [["h", "nowhere"]], "model.merges names a token that is not in the vocabulary"),
    ("model.dropout", 0.5, "model.dropout is out of range"),
    ("normalizer", {"type": "Lowercase"}, "normalizer.type is 'Lowercase', which this version does not know"),
    ("pre_tokenizer", {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": "("}}, "cannot be read"),
    ("pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer.type is 'Whitespace'"),
    ("decoder", {"type": "CTC"}, "decoder.type is 'CTC'"),
    ("decoder", {"type": "Metaspace", "replacement": ""}, "decoder.replacement is not a single character"),
    (
        "pre_tokenizer",
        {"type": "Metaspace", "replacement": "ab"},
        "pre_tokenizer.replacement is not a single character",
    ),
    ("post_processor", {"type": "BertProcessing"}, "post_processor.type is 'BertProcessing'"),
    ("added_tokens", [{"id": 2**40, "content": "x"}], "added_tokens.0.id is 1099511627776"),
]


@pytest.mark.parametrize(("place", "value", "message"), STRANGE)
def test_tokenizers_of_other_kinds_are_refused(
    program: HostProgram, tmp_path: Path, place: str, value: Any, message: str
) -> None:
    content = json.loads((SAMPLE / "tokenizer.json").read_text())
    *folders, last = place.split(".")
    part = content
    for name in folders:
        part = part[name]
    part[last] = value
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert message in program.refusal("tokenizer", path=str(path))


def test_the_c_api_takes_null_for_a_mistake(program: HostProgram) -> None:
    place = "pointer for the result"
    missing = ("folder", place, "path", "pixels", "", place, "bundle", "chat")
    for said, what in zip(program.ask("c_api"), missing, strict=True):
        wanted = f"there is no {what} (NULL was given): give one" if what else "the picture's rows overlap"
        assert said.startswith(wanted)


# --- conversations

QUESTIONS: tuple[tuple[str, list[Path]], ...] = (
    ("Where is the ring?", [SHAPES]),
    ("And the square?", []),
    (" And\nhere? <image>", [OTHER]),
    ("A again?", []),
)
SHORT = Sampling(max_tokens=6)


@pytest.mark.parametrize("follow_up", ["again", "compacted"])
@pytest.mark.parametrize("name", TINY)
def test_conversations_go_on_as_in_python(
    program: HostProgram, bundles: dict[str, Bundle], name: str, follow_up: FollowUp
) -> None:
    chat = Chat(OnnxSession(bundles[name]), sampling=SHORT, follow_up=follow_up)
    turns, wanted = list[dict[str, Any]](), list[dict[str, Any]]()
    for question, pictures in QUESTIONS:
        turns.append({"question": question, "images": [str(path) for path in pictures], "draws": []})
        drawn = chat.tokens if follow_up == "compacted" and chat.tokens and chat.finish == "length" else []
        try:
            said = "".join(chat.ask(question, pictures))
        except UserError as error:
            wanted.append({"error": str(error)})
            continue
        assert chat.step is not None
        run, looks = chat.step.run, chat.conversation.timings.runs["vision"]
        turns[-1]["draws"] = [*([0] if drawn else []), *chat.tokens]  # the last id's own run draws, too
        wanted.append(
            {
                "answer": said,
                "prompt": run.tokens.tolist(),
                "query_index": run.query_index.tolist(),
                "position_ids": run.position_ids.ravel().tolist(),
                "looks": looks,
                "tokens": chat.tokens,
            }
        )
    program.ask("bundle", path=str(bundles[name].folder))
    arguments = {"follow_up": follow_up, "max_tokens": SHORT.max_tokens, "turns": turns}
    assert program.ask("chat", **arguments) == wanted


def test_a_conversation_that_outgrows_what_runs_it_says_what_to_do(program: HostProgram, sample_bundle: Bundle) -> None:
    program.ask("bundle", path=str(sample_bundle.folder))
    turns = [{"question": question, "images": [], "draws": [1]} for question in ("Where?", "And now?" * 90, "And?")]
    for follow_up, more in (
        ("again", ", or continue on the compacted cache (--follow-up compacted)"),
        ("compacted", ""),
    ):
        found = program.ask("chat", follow_up=follow_up, max_tokens=1, turns=turns, most=150)
        assert found[1] == {"error": f"these caches hold 150 rows: build larger ones{more}"}
        assert "error" not in found[2]
    (alone,) = program.ask("chat", follow_up="again", max_tokens=1, turns=turns[1:2], most=150)
    assert alone == {"error": "these caches hold 150 rows: build larger ones"}
    assert "there is no follow-up 'never': choose again or compacted" in program.refusal(
        "chat", follow_up="never", max_tokens=1, turns=[]
    )


# --- bundles


@pytest.mark.parametrize("name", KINDS_OF_BUNDLE)
def test_every_familys_bundle_opens(program: HostProgram, bundles: dict[str, Bundle], name: str) -> None:
    program.ask("bundle", path=str(bundles[name].folder))


BAD_BUNDLES: list[tuple[str, Any, str]] = [
    ("schema_version", 1, "has schema version 1, but this library reads "),
    ("decoder.head_dim", None, "decoder.head_dim is not a whole number"),
    ("decoder.head_dim", 0.5, "decoder.head_dim is not a whole number"),
    ("decoder.head_dim", 7, "decoder.head_dim is 7, but must be 1 to 4096 in steps of 2"),
    ("decoder.layers", 10**6, "decoder.layers is 1000000, but must be 2 to 1000"),
    ("decoder.heads", 3, "decoder does not fit the other fields"),
    ("rotary.sections", [1, 1, 4096], "rotary does not fit the other fields"),
    ("rotary.theta", 0, "rotary.theta is out of range"),
    ("selection_layer", 1000, "selection_layer does not fit the other fields"),
    ("selection.method", "slowv", "selection.method is 'slowv', which this version does not know"),
    ("selection.whole_layers", [3, 3], "selection does not fit the other fields"),
    ("preprocessing.kind", "frames", "preprocessing.kind is 'frames'"),
    ("preprocessing.resample", "cubic", "preprocessing.resample is 'cubic'"),
    ("preprocessing.std", [1, 1], "preprocessing.std does not have three entries"),
    ("preprocessing.max_pixels", 2**30, "preprocessing does not fit the other fields"),
    ("tokens.image", 2**31 - 1, "tokens.image is 2147483647"),
    ("video.token", 503, "video.token does not fit the other fields"),
    ("video.min_frames", 0, "video.min_frames is 0"),
    ("decoder.rms_norm_epsilon", 0, "decoder.rms_norm_epsilon is out of range"),
    ("embedding.dtype", "uint8", "embedding.dtype does not fit the other fields"),
    ("embedding.surprise", 1, "was made by a newer ivc-export (embedding.surprise is unknown)"),
    ("weights.0.surprise", 1, "was made by a newer ivc-export (weights.0.surprise is unknown)"),
    ("weight_formats", {"lm_head": {"format": "int3"}}, "weight_formats.lm_head.format is 'int3', which this version"),
    ("embedding.file", "../outside", "is in ../outside, which is not one of its weight files"),
    ("embedding.file", "config.json", "which is not one of its weight files"),
    ("embedding.offset", -1, "embedding.offset is -1"),
    ("embedding.offset", 2**50, "the embedding table is not within its file"),
    ("weights.0.file", "../outside", "names '../outside', which is outside the bundle or a link to a place outside it"),
    ("weights.0.file", "/etc/hostname", "which is outside the bundle"),
    ("weights.0.file", "link", "which is outside the bundle"),
    ("weights.0.file", "circle", "which is outside the bundle"),
    ("weights.0.file", "pipe", "is not a regular file"),
    ("weights.0.file", "absent", "is missing"),
    ("weights.0.size", 5, "but the manifest says 5"),
    ("weights.0.header_sha256", "0" * 64, "changed after the export (its header differs)"),
    ("graphs.prefix.sha256", "0" * 64, "is not the graph that was exported"),
    ("graphs.prefix.file", "../outside", "names '../outside'"),
    ("chat.begin", {"before": 3, "behind": ""}, "chat.begin.before is not a text"),
    ("news", 1, "was made by a newer ivc-export (news is unknown)"),
]


@pytest.mark.parametrize(("place", "value", "message"), BAD_BUNDLES)
def test_a_bundle_is_trusted_with_nothing(
    program: HostProgram, sample_bundle: Bundle, tmp_path: Path, place: str, value: Any, message: str
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(sample_bundle.folder, folder)
    (tmp_path / "outside").write_bytes(bytes(10**6))
    for name, target in (("link", "../outside"), ("circle", "circle")):
        if value == name:
            (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe")
    manifest = json.loads((folder / "manifest.json").read_text())
    *folders, last = place.split(".")
    part = manifest
    for name in folders:
        part = part[int(name) if name.isdecimal() else name]
    part[last] = value
    manifest["constants_sha256"] = constants_sha256(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert message in program.refusal("bundle", path=str(folder))


def test_links_that_leave_a_bundle_are_refused(program: HostProgram, sample_bundle: Bundle, tmp_path: Path) -> None:
    """Of whatever name: a runtime opens what graphs name."""
    folder = shutil.copytree(sample_bundle.folder, tmp_path / "bundle")
    (folder / "more.safetensors").symlink_to("/etc/hostname")
    assert "names 'more.safetensors', which is outside the bundle" in program.refusal("bundle", path=str(folder))
    killed = shutil.copytree(sample_bundle.folder, tmp_path / ".bundle.partial-1")
    assert "was left by an export that was killed" in program.refusal("bundle", path=str(killed))


HEADERS: list[tuple[Any, str]] = [
    (b"{", "is damaged (it is not valid JSON"),
    ([], "is damaged (it is not an object)"),
    ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, "has tensors that do not end where the file ends"),
    ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 4]}}, "a.shape does not fit the number of bytes"),
    ({"a": {"dtype": "U8", "shape": [2**62, 4, 0], "data_offsets": [0, 0]}}, "a.shape.0 is 4611686018427387904"),
    ({"a": {"dtype": "F32", "shape": [64, 64], "data_offsets": [0, 8]}}, "a.shape does not fit the number of bytes"),
    ({"a": {"dtype": "X8", "shape": [8], "data_offsets": [0, 8]}}, "a.dtype is a type that is not known"),
    ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [8, 4]}}, "a.data_offsets.1 is 4, but must be 8 to"),
    (
        {name: {"dtype": "U8", "shape": [6], "data_offsets": [i, i + 6]} for i, name in ((0, "a"), (2, "b"))},
        "has tensors with gaps or overlaps between them",
    ),
]


@pytest.mark.parametrize(("header", "message"), HEADERS)
def test_headers_say_where_all_bytes_belong(
    program: HostProgram, sample_bundle: Bundle, tmp_path: Path, header: Any, message: str
) -> None:
    manifest = json.loads((sample_bundle.folder / "manifest.json").read_text())
    folder = copy_of(sample_bundle, tmp_path / "bundle", manifest)
    stored = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "other.safetensors"
    path.write_bytes(struct.pack("<Q", len(stored)) + stored + bytes(8))
    entry = {"file": path.name, "size": path.stat().st_size, "header_sha256": hashlib.sha256(stored).hexdigest()}
    manifest["weights"].insert(0, entry)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert message in program.refusal("bundle", path=str(folder))


def test_texts_are_hashed_as_python_writes_them(program: HostProgram, sample_bundle: Bundle, tmp_path: Path) -> None:
    manifest = json.loads((sample_bundle.folder / "manifest.json").read_text())
    manifest["chat"]["assistant_open"] = '\x7f\x01"\\\n\u00e9\u2028\U0001f600\x7f\x7f'
    program.ask("bundle", path=str(copy_of(sample_bundle, tmp_path / "bundle", manifest)))


BAD_VIEWS: list[tuple[str, Any, str]] = [
    ("preprocessing.shapes", [], "preprocessing.shapes is empty"),
    ("preprocessing.shapes", [[1, 1, 1]], "preprocessing.shapes.0 has more than 2 entries"),
    ("preprocessing.shapes", [[0, 1]], "preprocessing.shapes.0.0 is 0, but must be 1 to 256"),
    ("preprocessing.shapes", [[200, 200]], "preprocessing does not fit the other fields"),
    ("preprocessing.fill", 256, "preprocessing.fill is 256"),
    ("preprocessing.token_side", 0, "preprocessing.token_side is 0"),
    ("selection.views", False, "selection does not fit the other fields"),
    ("selection.row_fraction", 2, "selection.row_fraction is out of range"),
    ("rotary.sections", [1, 1, 1], "rotary does not fit the other fields"),
]


@pytest.mark.parametrize(("place", "value", "message"), BAD_VIEWS)
def test_so_are_bundles_of_two_views(
    program: HostProgram, bundles: dict[str, Bundle], tmp_path: Path, place: str, value: Any, message: str
) -> None:
    manifest = json.loads((bundles["deepseek_vl_v2"].folder / "manifest.json").read_text())
    record, field = place.split(".")
    manifest[record][field] = value
    path = copy_of(bundles["deepseek_vl_v2"], tmp_path / "bundle", manifest)
    assert message in program.refusal("bundle", path=str(path))


def test_an_edited_manifest_is_known_by_its_hash(program: HostProgram, sample_bundle: Bundle, tmp_path: Path) -> None:
    text = (sample_bundle.folder / "manifest.json").read_text()
    path = tmp_path / "manifest.json"
    path.write_text(text.replace('"default_ratio": 0.5', '"default_ratio": 0.25'))
    assert "was edited after the export" in program.refusal("manifest", path=str(path))
    for content in ("", "{", "[" * 100_000, '{"a":' * 100_000, "{} {}", '{"a": "\\u00', "[]", "1e999", '"\xff"'):
        path.write_text(content, encoding="latin-1")
        assert "is damaged" in program.refusal("manifest", path=str(path))

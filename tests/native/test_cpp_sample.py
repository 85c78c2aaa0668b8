"""What the C++ program computes on the host, against ours, and what it refuses. Its TensorRT part needs a GPU."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ivc_export.bundle.bundle import Bundle
from ivc_export.families.pictures import Grid
from ivc_export.runtime.plan import plan_run
from ivc_export.verify.testdata import write_testdata
from tests.native.test_plugin_builds import CACHE, MISSING, cmake

SAMPLE = Path(__file__).parents[2] / "samples" / "cpp"
READY = ("CUDA: ", "./vision.plan cannot be read: ")  # all is well but for the GPU, or but for the engines
PICTURE = ["--pixels", "testdata/prefill/vision/inputs/pixel_values.bin", "--grid"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    path = tmp_path_factory.mktemp("plan") / "plan"
    build = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", str(SAMPLE / "plan_test.cpp"), "-o", str(path)]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if subprocess.run([*build, *sanitizers], capture_output=True).returncode != 0:  # not every compiler has them
        subprocess.run(build, check=True)
    return path


def complaint(*command: object) -> str:
    """What a program says that exits with code 2 after one sentence."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr.removeprefix("error: ").removesuffix("\n")


def planned(
    program: Path, bundle: Bundle, tokens: list[int], grid: Grid | None, start: int, ratio: float
) -> subprocess.CompletedProcess[str]:
    rows, columns = (grid.rows, grid.columns) if grid else (0, 0)
    words = [bundle.folder / "manifest.json", start, ratio, rows, columns, *tokens]
    return subprocess.run([program, *map(str, words)], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("grid", "start", "ratio"),
    [
        (None, 0, 0.5),
        (None, 77, 0.5),
        (Grid(4, 5), 0, 0.5),
        (Grid(12, 12), 3, 0.3),
        (Grid(24, 17), 40, 0.025),
        (Grid(1, 1), 0, 0.1),
    ],
)
def test_the_cpp_program_plans_as_we_do(
    sample_bundle: Bundle, program: Path, grid: Grid | None, start: int, ratio: float
) -> None:
    image = sample_bundle.manifest.tokens.image
    tokens = [1, 500, *[image] * (grid.visual if grid else 0), 501, 7, 8, 9]
    for prompt in (tokens, tokens[:3], [5]) if grid is None else (tokens, tokens[:-3]):
        plan = plan_run(sample_bundle.manifest, np.array(prompt, np.int32), [grid] if grid else [], start, ratio)
        done = planned(program, sample_bundle, prompt, grid, start, ratio)
        assert done.returncode == 0, done.stderr
        found = [np.array(line.split(), float) for line in done.stdout.split("\n")[:6]]
        counts = np.array([plan.keep_count, plan.next_position])
        wanted: list[npt.NDArray[np.generic]] = [plan.position_ids.ravel(), plan.visual_index, plan.text_index]
        wanted += [plan.query_index, plan.ivc_priority, counts]
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("decoder", "head_dim"), None, "decoder.head_dim in FILE is not a number: copy or make it again"),
        (("decoder", "head_dim"), 1e300, "decoder.head_dim in FILE is not a whole number from 0 on: "),
        (("decoder", "head_dim"), 0.5, "decoder.head_dim in FILE is not a whole number from 0 on: "),
        (("rotary", "sections"), {}, "rotary.sections in FILE is not a list: "),
        (("rotary", "sections"), [], "the manifest's rotary.sections names no axis: "),
        (("rotary", "theta"), math.nan, "rotary.theta in FILE is not a number: "),
        (("selection", "ivc_fraction"), 7, "selection.ivc_fraction in FILE is not a number from 0 to 1: "),
        (("tokens",), [], "FILE lacks tokens.image: copy or make it again"),
        (
            ("decoder", "head_dim"),
            2**31 - 2,
            f"the manifest's decoder.head_dim is {2**31 - 2}, which no model has (1 to ",
        ),
        (("decoder", "head_dim"), 7, "the manifest's decoder.head_dim is 7, which no model has (1 to 4096, even): "),
        (("decoder", "layers"), 10**6, "the manifest's decoder.layers is 1000000, which no model has (2 to 1000): "),
        (("decoder", "hidden_size"), 0, "the manifest's decoder.hidden_size is 0, which no model has "),
        (("decoder", "vocab_size"), 2**31 - 1, "the manifest's decoder.vocab_size is "),
        (("decoder", "heads"), 3, "the manifest's decoder.kv_heads does not fit: "),
        (("selection", "query_offset"), 2**31 - 1, f"the manifest's selection.query_offset is {2**31 - 1}, which "),
        (("selection", "query_offset"), -1, "selection.query_offset in FILE is not a whole number from 0 on: "),
        (("preprocessing", "patch_size"), 2**30, "the manifest's preprocessing.patch_size is "),
        (("preprocessing", "merge_size"), 65, "the manifest's preprocessing.merge_size is 65, which no model has "),
        (("preprocessing", "temporal_patch_size"), 0, "the manifest's preprocessing.temporal_patch_size is 0, "),
        (("max_visual",), 16385, "the manifest's max_visual is 16385, which no model has (1 to 16384): "),
        (("selection_layer",), 1000, "the manifest's selection_layer does not fit: export the model again"),
        (("rotary", "sections"), [1, 1, 1], "the manifest's rotary.sections does not fit: "),
        (("rotary", "sections"), [4, 4, 4, 4], "the manifest's rotary.sections does not fit: "),
        (("rotary", "theta"), 0, "the manifest's rotary.theta does not fit: "),
        (("rotary", "theta"), 1e300, "the manifest's rotary.theta does not fit: "),
        (("tokens", "image"), 2**31 - 1, "the manifest's tokens.image does not fit: "),
        (("tokens", "stop"), [2**31 - 1], "the manifest's tokens.stop does not fit: "),
    ],
)
def test_a_damaged_manifest_is_named(
    sample_bundle: Bundle, program: Path, tmp_path: Path, place: tuple[str, ...], value: object, message: str
) -> None:
    path = tmp_path / "manifest.json"
    manifest = json.loads((sample_bundle.folder / "manifest.json").read_text())
    field = manifest if len(place) == 1 else manifest[place[0]]
    field[place[-1]] = value
    path.write_text(json.dumps(manifest))
    words = [path, 0, 0.5, 2, 2, 1, *[sample_bundle.manifest.tokens.image] * 4, 5]
    assert complaint(program, *words).startswith(message.replace("FILE", str(path)))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("embedding", "file"), "../outside", "BUNDLE has '../outside', which is outside the bundle or a link that "),
        (("embedding", "file"), "/etc/hostname", "BUNDLE has '/etc/hostname', which is outside the bundle or a link "),
        (("embedding", "file"), "link", "BUNDLE has 'link', which is outside the bundle or a link that leaves it: "),
        (
            ("embedding", "file"),
            "circle",
            "BUNDLE has 'circle', which is outside the bundle or a link that leaves it: ",
        ),
        (("embedding", "file"), "pipe", "BUNDLE/pipe cannot be read: see that it is there and not empty"),
        (("embedding", "file"), ".", "BUNDLE/. cannot be read: see that it is there and not empty"),
        (("embedding", "file"), "absent", "BUNDLE/absent cannot be read: see that it is there and not empty"),
        (("embedding", "file"), "short", "short ends early: copy the bundle again"),
        (("embedding", "file"), 5, "embedding.file in BUNDLE/manifest.json is not text: "),
        (("embedding", "offset"), -1, "the manifest's embedding.offset is no place in a file: export the model again"),
        (("embedding", "offset"), 0.5, "the manifest's embedding.offset is no place in a file: "),
        (("embedding", "offset"), 2**64, "the manifest's embedding.offset is no place in a file: "),
        (("embedding", "offset"), 2**53, "model.safetensors ends early: copy the bundle again"),
        (("embedding", "dtype"), "int8", "the manifest's embedding does not fit its decoder: export the model again"),
        (("embedding", "shape"), [1], "the manifest's embedding does not fit its decoder: "),
        (("embedding", "shape"), [7, 7], "the manifest's embedding does not fit its decoder: "),
        (("schema_version",), 1, "the manifest is of another version: export the model again"),
        (
            ("selection", "method"),
            "fastv",
            "this program chooses tokens by ivc-prune, and the bundle by fastv: use ivc-run",
        ),
        (
            ("decoder", "value_dim"),
            8,
            "this program takes values of the keys' size, and adds nothing to pictures' rows, ",
        ),
        (
            ("decoder", "deepstack"),
            1,
            "this program takes values of the keys' size, and adds nothing to pictures' rows, ",
        ),
        (("selection", "whole_layers"), [0], "this program compacts every cache, and qwen2_vl keeps some whole: use "),
    ],
)
def test_a_bundle_that_reaches_outside_or_beyond_its_files_is_refused(
    sample_bundle: Bundle, program: Path, tmp_path: Path, place: tuple[str, ...], value: object, message: str
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(sample_bundle.folder, folder)
    (tmp_path / "outside").write_bytes(bytes(10**6))
    (folder / "link").symlink_to("../outside")
    (folder / "circle").symlink_to("circle")
    (folder / "short").write_bytes(bytes(10))
    os.mkfifo(folder / "pipe")
    manifest = json.loads((folder / "manifest.json").read_text())
    (manifest if len(place) == 1 else manifest[place[0]])[place[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    file = Path(sample_bundle.manifest.embedding.file).name
    found = complaint(program, "--bundle", folder, 1)
    assert found.startswith(message.replace("BUNDLE", str(folder)).replace("model.safetensors", file)) or file in found


def test_files_that_are_no_json_are_named(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    for content, at in (
        ("", 0),
        ('{"decoder": {"lay', 17),
        ("[" * 1_000_000, 64),
        ('{"a":' * 100_000, 5 * 64),
        ("{} {}", 3),
        ('{"a": "\\u00', 11),
        ('{"a": "\\', 8),
    ):
        path.write_text(content)
        done = subprocess.run([program, path, "0", "1", "0", "0", "1"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (2, f"error: {path} is no JSON at byte {at}: copy or make it again\n")


def test_files_that_are_too_large_or_no_files_are_refused(program: Path, tmp_path: Path) -> None:
    large, pipe = tmp_path / "large.json", tmp_path / "pipe.json"
    large.write_text(" " * (4 << 20) + "{}")
    os.mkfifo(pipe)
    run = (0, 1, 0, 0, 1)
    assert complaint(program, large, *run) == f"{large} is larger than 4194304 bytes: copy or make it again"
    for path in (pipe, tmp_path):
        assert complaint(program, path, *run) == f"{path} is not a regular file: check the path"
    assert complaint(program, tmp_path / "absent", *run) == f"{tmp_path / 'absent'} cannot be read: check the path"


def test_embeddings_are_read_as_the_bundle_has_them(sample_bundle: Bundle, program: Path) -> None:
    tokens = [0, 7, sample_bundle.manifest.decoder.vocab_size - 1]
    command = [program, "--bundle", sample_bundle.folder, *tokens]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    values, pixels = (np.array(line.split(), np.float32) for line in done.stdout.splitlines())
    np.testing.assert_array_equal(values, sample_bundle.embed(np.array(tokens, np.int32)).ravel())
    p = sample_bundle.manifest.preprocessing
    assert p.kind == "patches" and pixels == [6 * p.merge_size**2 * p.patch_dim]
    assert complaint(*command, -1).startswith("token id -1 has no embedding: ")


@pytest.mark.parametrize(
    ("logits", "token"),
    [
        ("1 3 2 3", 1),
        ("-inf 3 -inf", 1),
        ("nan 3 2", -1),
        ("1 3 nan", -1),
        ("1 nan 3 2", -1),
        ("1 inf 2", -1),
        ("-inf -inf", -1),
        ("", -1),
    ],
)
def test_logits_that_are_no_numbers_give_no_token(program: Path, logits: str, token: int) -> None:
    done = subprocess.run([program, "--logits", *logits.split()], capture_output=True, text=True, check=True)
    assert int(done.stdout) == token


def test_shapes_beyond_any_memory_are_refused(program: Path) -> None:
    done = subprocess.run([program, "--count", "3", "0", "5"], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
    for shape in ([2**40, 2**40], [2, -1], [2**62, 4], [-1, 0]):
        assert complaint(program, "--count", *shape).startswith("a tensor's shape fits no memory: ")


def test_damaged_manifests_are_answered_or_refused(sample_bundle: Bundle, program: Path, tmp_path: Path) -> None:
    """Seeded mutants, under sanitizers: no crash, no undefined behaviour, no more than a sentence."""
    folder, generator = tmp_path / "bundle", random.Random(0)
    shutil.copytree(sample_bundle.folder, folder)
    path = folder / "manifest.json"
    whole = path.read_text()
    numbers = list(re.finditer(r"-?\d[\d.e+-]*", whole))
    values = [
        "-1",
        "0",
        "1e999",
        "-1e-9",
        str(2**31 - 1),
        str(2**31),
        str(2**63),
        "4096",
        "NaN",
        "null",
        '""',
        "[]",
        "{}",
    ]
    codes = set()
    for turn in range(60):
        if turn % 3:
            found = generator.choice(numbers)
            mutant = whole[: found.start()] + generator.choice(values) + whole[found.end() :]
        else:
            at, length = generator.randrange(len(whole)), generator.randrange(1, 40)
            mutant = whole[:at] + generator.choice(("", '"', "{", "]", "\\", whole[-length:])) + whole[at + length :]
        path.write_text(mutant)
        image = sample_bundle.manifest.tokens.image
        for words in (["--bundle", folder, 1], [path, 0, 0.5, 2, 2, 1, *[image] * 4, 2, 3, 4]):
            done = subprocess.run([program, *map(str, words)], capture_output=True, text=True, timeout=60)
            codes.add(done.returncode)
            assert done.returncode == 0 or (done.returncode, done.stderr.count("\n")) == (2, 1), (mutant, done.stderr)
    assert codes == {0, 2}


def test_runs_that_cannot_be_are_refused(sample_bundle: Bundle, program: Path) -> None:
    m = sample_bundle.manifest
    picture, one = [m.tokens.image, 5], Grid(1, 1)
    for tokens, grid, start, ratio, message in (
        ([1, -1], None, 0, 0.5, "token id -1 is beyond the vocabulary of "),
        ([m.decoder.vocab_size], None, 0, 0.5, f"token id {m.decoder.vocab_size} is beyond the vocabulary of "),
        (
            [1, 1],
            None,
            m.decoder.max_positions - 1,
            0.5,
            f"the conversation reaches position {m.decoder.max_positions + 1}",
        ),
        ([1, 1], None, 2**31 - 1, 0.5, f"the conversation reaches position {2**31 + 1}"),
        ([1, *[m.tokens.image] * 6], Grid(2, 3), 2**31 - 2, 0.5, f"the conversation reaches position {2**31 + 2}"),
        ([], None, 0, 0.5, "there is no prompt: give some tokens"),
        (picture, Grid(129, 128), 0, 0.5, "a picture has no 129 rows of 128 visual tokens: "),
        (picture, Grid(1, 0), 0, 0.5, "a picture has no 1 rows of 0 visual tokens: "),
        (picture, Grid(65536, 65536), 0, 0.5, "a picture has no 65536 rows of 65536 visual tokens: "),
        (picture, Grid(2, 1), 0, 0.5, "the prompt holds 1 image tokens and the picture gives 2: "),
        *((picture, one, 0, ratio, f"ratio {ratio:f} is out of range: ") for ratio in (0, -1, 1.5, math.nan)),
    ):
        done = planned(program, sample_bundle, tokens, grid, start, ratio)
        assert done.returncode == 2, message
        assert done.stderr.startswith(f"error: {message}")


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole program. What it says before it looks for a GPU is tested where it can be built."""
    if MISSING:
        pytest.skip(f"there is no {' and no '.join(MISSING)}")
    folder = tmp_path_factory.mktemp("sample")
    configured = subprocess.run(
        ["cmake", "-S", SAMPLE, "-B", folder, "-DCMAKE_CUDA_ARCHITECTURES=86"], capture_output=True, text=True
    )
    if "TensorRT_LIBRARY-NOTFOUND" in (folder / CACHE).read_text():
        pytest.skip("TensorRT is not installed (TENSORRT_ROOT names it)")
    assert configured.returncode == 0, configured.stderr
    cmake("--build", folder, "--target", "ivc_sample", "-j", "1")
    return folder / "ivc_sample"


@pytest.fixture
def bundle(sample_bundle: Bundle, tmp_path: Path) -> Path:
    """A bundle with test data, of which a test may damage a file, and a record of engines."""
    folder = tmp_path / "bundle"
    shutil.copytree(sample_bundle.folder, folder)
    write_testdata(Bundle.load(folder))
    record = {"capacity": 4096, "graphs": "native", "recipe": {"plugin": None}}
    (folder / "build.json").write_text(json.dumps(record))
    return folder


def refusal(sample: Path, bundle: Path, *words: str) -> str:
    """What the program says before it exits with code 2."""
    done = subprocess.run([sample, ".", ".", *words], cwd=bundle, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    return done.stderr.removeprefix("error: ").removesuffix("\n")


def test_files_that_are_no_file_of_the_bundle_are_named(sample: Path, bundle: Path) -> None:
    assert refusal(sample, bundle, "--testdata").startswith(READY)
    index = json.loads((bundle / "testdata" / "index.json").read_text())
    tokens = ["--tokens", ",".join(map(str, index["prompt_tokens"]))]
    rows, columns = (str(index["grid"][name]) for name in ("rows", "columns"))
    assert refusal(sample, bundle, *tokens, *PICTURE, rows, columns).startswith(READY)
    pixels = bundle / PICTURE[1]
    size = pixels.stat().st_size
    takes = f" takes {size * 2}: give the grid that the picture was cut into"
    assert refusal(sample, bundle, *tokens, *PICTURE, str(int(rows) * 2), columns).endswith(takes)
    os.truncate(pixels, size - 4)
    assert refusal(sample, bundle, "--testdata").startswith(f"./{PICTURE[1]} has {size - 4} bytes, and a grid of ")
    os.truncate(pixels, 0)
    assert refusal(sample, bundle, "--testdata") == f"./{PICTURE[1]} cannot be read: see that it is there and not empty"
    assert refusal(sample, bundle, *tokens, "--pixels", ".", "--grid", "1", "1").startswith(". cannot be read: ")

    manifest = json.loads((bundle / "manifest.json").read_text())
    weights = bundle / manifest["embedding"]["file"]
    whole = weights.read_bytes()
    weights.unlink()  # it is a hard link
    end = manifest["embedding"]["offset"] + manifest["decoder"]["vocab_size"] * manifest["decoder"]["hidden_size"]
    weights.write_bytes(whole[:end])
    assert refusal(sample, bundle, *tokens) == f"{manifest['embedding']['file']} ends early: copy the bundle again"


def test_bundles_that_the_program_cannot_run_are_refused(sample: Path, bundle: Path) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"family": "internvl", "preprocessing": {"kind": "tiles"}}))
    message = "this program takes models that cut pictures into patches, and internvl cuts them into tiles: use ivc-run"
    assert refusal(sample, bundle, "--testdata") == message
    path.write_text('{"schema_version": 1}')
    assert refusal(sample, bundle, "--testdata") == "the manifest is of another version: export the model again"


def test_engines_that_call_the_plugin_ask_for_it(sample: Path, bundle: Path) -> None:
    path = bundle / "build.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"graphs": "plugin", "recipe": {"plugin": "/opt/ivc.so"}})
    )
    message = "the engines call the plugin: give --plugin /opt/ivc.so, or where it lies now"
    assert refusal(sample, bundle, "--testdata") == message
    assert refusal(sample, bundle, "--testdata", "--plugin", "./ivc.so").startswith(
        "the plugin does not load: ./ivc.so: "
    )
    path.unlink()
    assert refusal(sample, bundle, "--testdata") == "./build.json cannot be read: check the path"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: ivc_sample BUNDLE ENGINES --testdata | --tokens 1,2,3 [--pixels FILE --grid R C]"),
        (["--quiet"], "there is no option --quiet"),
        (["--tokens"], "a value is missing behind --tokens"),
        (["--tokens", ""], "there is no prompt: give --testdata or --tokens"),
        (["--tokens", "1,,2"], "--tokens takes numbers, not ''"),
        (["--tokens", "1,x"], "--tokens takes numbers, not 'x'"),
        (["--tokens", "1,-2"], "--tokens takes whole numbers from 0 on, not -2"),
        (["--tokens", "1", "--max-tokens", "many"], "--max-tokens takes numbers, not 'many'"),
        (["--tokens", "1", "--max-tokens", "0"], "--max-tokens takes whole numbers from 1 on, not 0"),
        (["--tokens", "1", "--max-tokens", "1e10"], "--max-tokens takes whole numbers from 1 on, not 1e10"),
        (["--tokens", "1", *PICTURE, "2", "0"], "--grid takes whole numbers from 1 on, not 0"),
        (["--tokens", "1", *PICTURE[:2]], "a picture takes both --pixels and --grid"),
        (["--tokens", "1", "--grid", "2", "2"], "a picture takes both --pixels and --grid"),
        (["--tokens", "1", "--ratio", "half"], "--ratio takes numbers, not 'half'"),
    ],
)
def test_options_that_cannot_be_are_refused(sample: Path, tmp_path: Path, words: list[str], message: str) -> None:
    assert refusal(sample, tmp_path, *words) == message

"""Mutants of a bundle and of a checkpoint, each of which a command answers about or refuses in one sentence.

    python -m tests.cli.fuzz FOLDER --seed 1 --count 1000

FOLDER: from `prepare`. A line for each mutant goes to standard output before it is tried, and one for each fault; a
crash or a hang ends the process.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import io
import json
import os
import random
import resource
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import onnx

from ivc_export import cli
from ivc_export.bundle.bundle import Bundle
from ivc_export.bundle.recording import Key, Recording, identity
from ivc_export.checkpoint.folder import header_sha256
from ivc_export.contract.calibration import Calibration, MeasuredDecoder, Trial
from ivc_export.contract.manifest import constants_sha256
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.files import read_object
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.verify.testdata import RecordingSession, make_prompt
from samples.make_sample import draw_shapes, make_checkpoint

SECONDS = 60
"""For one mutant: many times what the slowest takes."""
MEMORY = 8 << 30
SECRET = "years of work"

NUMBERS = (0, -1, 1, 2, 3, 7, 255, 1 << 15, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 64, 10**30)
FLOATS = (0.0, -0.5, 1e-45, 1e38, 1e308, float("inf"), float("-inf"), float("nan"))
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    "",
    "x",
    "\0",
    "../outside",
    "\ud800",
    "a" * 9999,
    [],
    {},
    [[]],
    [None],
    {"": 1},
)
SNIPPETS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10 ** 10 }}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% include 'x' %}",
    "{{ messages[99].x.y }}",
    "{{ raise_exception('no') }}",
    "{{ ''.__class__ }}",
    "{% if %}",
    "<|image_pad|>",
    "\x1b[31m",
)  # fmt: skip

Command = Callable[[Sequence[str] | None], int]


def prepare(folder: Path) -> None:
    """A checkpoint, a bundle of it with a recorded run, a calibration and a picture, in `folder`."""
    checkpoint = make_checkpoint(folder / "checkpoint")
    (checkpoint / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": None})
    )
    record(export(ExportRecipe(checkpoint, folder / "bundle")))
    (folder / "inputs").mkdir()
    draw_shapes().resize((60, 60)).save(folder / "inputs" / "picture.png")
    trial = Trial(layer=2, ratio=0.5, divergence=0.1, agreement=1.0, overlap=None, saved=0.2)
    sizes = Bundle.load(folder / "bundle").manifest.decoder
    found = Calibration(
        family="qwen2_vl",
        decoder=MeasuredDecoder(layers=sizes.layers, hidden_size=sizes.hidden_size),
        layer=2,
        ratio=0.5,
        answers=1,
        trials=(trial,),
        versions={},
    )
    (folder / "inputs" / "calibration.json").write_text(found.model_dump_json())


def record(bundle: Bundle) -> None:
    """Leave a run in a bundle, as ivc-check --against does, but of the bundle itself."""
    image = draw_shapes().resize((60, 60))
    _, tokens, picture = make_prompt(bundle, image)
    session = RecordingSession(OnnxSession(bundle))
    conversation = session.converse()
    drawn = int(conversation.run(tokens, [picture]).logits.argmax())
    session.stage = "decode-1"
    conversation.run([drawn])
    tensors = {key: a for key, a in session.tensors.items() if key.role == "outputs"}
    tensors = {key: a for key, a in tensors.items() if key.stage == "prefill" or key.name == "logits"}
    embeds = Key("prefill", "vision", "outputs", "image_embeds")
    tensors[embeds] = tensors[embeds].reshape(-1, tensors[embeds].shape[-1])
    facts = {
        "model": identity(bundle.manifest),
        "checkpoint": "checkpoint",
        "ratio": conversation.ratio,
        "prompt_tokens": tokens,
        "drawn_tokens": [drawn],
        "versions": {},
        "pictures": ["picture-0.png"],
    }
    folder = bundle.folder / "report" / "reference"
    Recording(facts, tensors).write(folder)
    image.save(folder / "picture-0.png")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value within a JSON value, but of at most 50 entries of each list or object."""
    found = [path]
    entries = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, part in entries[:25] + entries[25:][-25:]:
        found += places(part, (*path, key))
    return found


def mutate_json(path: Path, chance: random.Random) -> str:
    """Replace a value by another of some type, or remove it."""
    content = json.loads(path.read_text(encoding="utf-8"))
    keys = chance.choice(places(content)[1:] or [()])
    if not keys:
        content = chance.choice(VALUES)
    else:
        whole = content
        for key in keys[:-1]:
            whole = whole[key]
        old = whole[keys[-1]]
        if chance.random() < 0.15 and isinstance(whole, dict):
            del whole[keys[-1]]
        elif isinstance(old, int | float) and chance.random() < 0.7:
            whole[keys[-1]] = chance.choice(NUMBERS if isinstance(old, int) or chance.random() < 0.3 else FLOATS)
        else:
            whole[keys[-1]] = chance.choice((*VALUES, *NUMBERS[:6], *FLOATS[-2:]))
    path.write_bytes(json.dumps(content).encode("utf-8", "surrogatepass"))
    return f"another value at {keys}"


def mutate_graph(path: Path, chance: random.Random) -> str:
    """Change a node, a tensor or an input of a graph."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    nodes = [*graph.node, *(node for function in model.functions for node in function.node)]
    node, tensor = chance.choice(nodes), chance.choice(graph.initializer)
    what = chance.randrange(9)
    if what == 0:
        node.op_type = chance.choice(nodes).op_type
    elif what == 1 and node.input:
        node.input[chance.randrange(len(node.input))] = chance.choice(["", chance.choice(nodes).output[0], "x"])
    elif what == 2 and node.attribute:
        attribute = chance.choice(node.attribute)
        attribute.i = chance.choice([-1, 0, 5, 99, (1 << 62)])
        attribute.ints[:] = [chance.choice([-9, 0, 5, 1 << 62]) for _ in attribute.ints]
    elif what == 3 and tensor.dims:
        tensor.dims[chance.randrange(len(tensor.dims))] = chance.choice([0, 1, -1, 1 << 40, (1 << 63) - 1])
    elif what == 4 and tensor.external_data:
        chance.choice(tensor.external_data).value = chance.choice(["", "-1", "0", "4", "x", "../outside", "9" * 30])
    elif what == 5:
        tensor.data_type = chance.randrange(40)
    elif what == 6:
        graph.node.remove(chance.choice(graph.node))
    elif what == 7:
        model.opset_import[0].version = chance.choice([0, 1, 13, 99, 1 << 40])
    else:
        graph.node.add().CopyFrom(node)
    path.write_bytes(model.SerializeToString())
    return f"another graph ({what})"


def mutate_bytes(path: Path, chance: random.Random) -> str:
    """Damage a file anyhow."""
    content = bytearray(path.read_bytes())
    what = chance.choice(("truncate", "flip", "insert", "zeros", "empty", "grow"))
    if what == "truncate":
        del content[chance.randrange(len(content) + 1) :]
    elif what == "flip":
        for _ in range(chance.choice((1, 1, 5, 50))):
            content[chance.randrange(min(len(content), 4096) if chance.random() < 0.5 else len(content))] ^= (
                1 << chance.randrange(8)
            )
    elif what == "insert":
        at = chance.randrange(len(content) + 1)
        content[at:at] = bytes(chance.randrange(256) for _ in range(chance.choice((1, 8, 99))))
    elif what == "zeros":
        at = chance.randrange(len(content) + 1)
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    elif what == "empty":
        content.clear()
    else:
        content += bytes(chance.choice((1, 4096)))
    path.write_bytes(content)
    return what


def mutate_text(path: Path, chance: random.Random) -> str:
    """Write a snippet into a template."""
    text = path.read_text(encoding="utf-8")
    at = chance.randrange(len(text) + 1)
    path.write_text(text[:at] + chance.choice(SNIPPETS) + text[at:], encoding="utf-8")
    return "a snippet"


def replace_file(path: Path, chance: random.Random) -> str:
    """Put something else in a file's place."""
    outside = next(parent / "outside" for parent in path.parents if (parent / "outside").is_dir())
    what = chance.choice(("nothing", "folder", "pipe", "link", "loop", "device", "sparse", "elsewhere", "nested"))
    if what == "elsewhere":
        shutil.move(path, outside / path.name)
        path.symlink_to(outside / path.name)
        return what
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what in ("link", "loop", "device"):
        path.symlink_to({"link": "nowhere", "loop": path.name, "device": "/dev/zero"}[what])
    elif what == "sparse":
        with path.open("wb") as stream:
            stream.truncate(1 << 42)
    elif what == "nested":
        path.write_text("[" * 100_000)
    return what


def mend_hashes(bundle: Path, chance: random.Random) -> None:
    """Give the manifest of a mutant the hashes of what is there, so that what is behind is reached."""
    path = bundle / "manifest.json"
    try:
        content = read_object(path, "")
        for graph in content["graphs"].values():
            file = bundle / graph["file"]
            if file.is_file() and file.stat().st_size < 1 << 24:  # some were made sparse, and are terabytes
                graph["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        if chance.random() < 0.5:
            for weights in (entry for entry in content["weights"] if (bundle / entry["file"]).is_file()):
                weights["size"] = (bundle / weights["file"]).stat().st_size
                weights["header_sha256"] = header_sha256(bundle / weights["file"])
        content["constants_sha256"] = constants_sha256(content)
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    path.write_text(json.dumps(content))


def mutate(folder: Path, chance: random.Random) -> str:
    """Damage one file of `folder`, and say how."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    recorded = [path for path in files if "report" in path.parts and (path.suffix != ".bin" or chance.random() < 0.1)]
    files = recorded if recorded and chance.random() < 0.15 else [path for path in files if "report" not in path.parts]
    path = chance.choice(files)
    ways = [mutate_bytes, replace_file]
    if path.suffix == ".json":
        ways += [mutate_json] * 4
    elif path.suffix == ".onnx":
        ways += [mutate_graph] * 3
    elif path.suffix == ".jinja":
        ways += [mutate_text] * 2
    how = chance.choice(ways)(path, chance)
    if folder.name == "bundle" and chance.random() < 0.8:
        mend_hashes(folder, chance)
    return f"{path.relative_to(folder)}: {how}"


def told(command: Command, arguments: list[str], answers: tuple[int, ...] = (0,)) -> tuple[int, str | None]:
    """Run a command; its exit code, and what is wrong with the outcome if anything is."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = command(arguments)
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    if "Traceback" in err.getvalue():
        return code, f"a traceback: {err.getvalue()}"
    if code in answers:
        return code, f"errors beside an answer: {errors}" if errors else None
    if code != 2 or len(errors) != 1 or len(errors[0]) > 2000 or not err.getvalue().endswith(f"{errors[0]}\n"):
        return code, f"exit {code}, {err.getvalue()[:2000]!r}"
    return code, None


def try_mutant(base: Path, work: Path, seed: int) -> tuple[str, str | None]:
    """Make a mutant in `work`, use it, and say what it was, and what is wrong with the outcome if anything is."""
    chance = random.Random(seed)
    (work / "outside").mkdir(parents=True)
    (work / "outside" / "thesis.txt").write_text(SECRET)
    kind = chance.choices(("bundle", "checkpoint", "inputs"), (6, 3, 1))[0]
    shutil.copytree(base / kind, work / kind)
    what = f"{kind}/{mutate(work / kind, chance)}"
    print(f"{seed}: {what}", flush=True)
    inputs = work / kind if kind == "inputs" else base / "inputs"
    picture = ["--image", str(inputs / "picture.png")] if chance.random() < 0.7 or kind == "inputs" else []
    run = ["--prompt", "Where?", "--max-tokens", "2", *picture]
    if kind == "checkpoint" or "calibration" in what:
        model = work / kind if kind == "checkpoint" else base / "checkpoint"
        arguments = ["--model", str(model), "--output", str(work / "out")]
        arguments += ["--calibration", str(inputs / "calibration.json")] if "calibration" in what else []
        code, problem = told(cli.ivc_export, arguments)
        left = [path.name for path in work.iterdir() if path.name not in (kind, "outside", "out")]
        if not problem and (left or (work / "out").exists() != (code == 0)):
            problem = f"exit {code}, and left are {left}"
        if not problem and code == 0:
            _, problem = told(cli.ivc_run, [str(work / "out"), *run])
    elif "/report/" in what:
        _, problem = told(cli.ivc_check, [str(work / kind), "--onnx-only"], (0, 1))
    elif kind == "bundle" and chance.random() < 0.15:
        _, problem = told(cli.ivc_check, [str(work / kind), "--weights"])
    else:
        _, problem = told(cli.ivc_run, [str((work if kind == "bundle" else base) / "bundle"), *run])
    if (work / "outside" / "thesis.txt").read_text() != SECRET:
        problem = "something outside was written"
    return what, problem


def main() -> int:
    """Try the mutants; 1 if an outcome is neither an answer nor a sentence."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=500)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    faulthandler.enable()
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # plots take longer than all else
    faults = 0
    for seed in range(options.seed, options.seed + options.count):
        work = options.folder / f"mutant-{seed}"
        shutil.rmtree(work, ignore_errors=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            what, problem = try_mutant(options.folder, work, seed)
        except Exception as error:  # what escapes a command is a fault of it
            what, problem = "", f"{type(error).__name__}: {error}"
            traceback.print_exc(file=sys.stdout)
        finally:
            faulthandler.cancel_dump_traceback_later()
            shutil.rmtree(work, ignore_errors=True)
        if problem:
            faults += 1
            print(f"FAULT {seed}: {what}: {problem}", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

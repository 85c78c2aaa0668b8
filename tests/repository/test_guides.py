"""Tables and files on the guides name options that are there, with their defaults."""

from __future__ import annotations

import ast
import importlib
import json
import re
from dataclasses import fields

from ivc_export import Sampling
from ivc_export.cli.replicas import command_line
from ivc_export.families.patch_settings import Videos
from ivc_export.runtime.backends import BACKENDS
from tests.repository.pages import ROOT, blocks, read
from tests.repository.test_commands import COMMANDS
from tools.results import result


def rows(page: str, heading: str) -> dict[str, str]:
    """First cell to the rest of the line, of the first table behind a heading."""
    behind = read(ROOT / "docs" / page).split(f"{heading}\n")[1]
    lines = behind[behind.index("\n|") :].strip().split("\n\n")[0].splitlines()[2:]
    return {first.strip(' `"'): rest for first, _, rest in (line.strip("| ").partition(" | ") for line in lines)}


def named(cell: str) -> set[str]:
    """What a cell has between backticks."""
    return {*re.findall(r"`([\w-]+)`", cell)}


def test_the_page_on_python_has_every_backend_and_its_options() -> None:
    found = {name: named(rest.partition(" | ")[0]) for name, rest in rows("python.md", "## Other runtimes").items()}
    assert found == {name: {*record.options, *record.libraries} for name, record in BACKENDS.items()}


def test_the_page_on_python_has_every_field_of_sampling_and_its_default() -> None:
    found = {name: float(rest.partition(" | ")[0]) for name, rest in rows("python.md", "## Sample tokens").items()}
    assert found == {field.name: field.default for field in fields(Sampling)}


def test_rays_file_has_options_that_ivc_serve_takes() -> None:
    (block,) = (block for block in blocks(read(ROOT / "docs" / "scaling.md")) if block.language == "yaml")
    (application,) = importlib.import_module("yaml").safe_load(block.text)["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    COMMANDS["ivc-serve"].parse_args(command_line(application["args"]))


def test_lmms_evals_arguments_are_those_of_the_model() -> None:
    """Its module needs lmms-eval, so it is read and not imported."""
    (model,) = (
        node
        for node in ast.walk(ast.parse(read(ROOT / "ivc_export" / "evaluate" / "model.py")))
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    taken = {argument.arg for argument in model.args.args} - {"self", "batch_size", "max_batch_size", "device"}
    *own, options = rows("scaling.md", "## Benchmarks on many GPUs")
    assert named(" ".join(f"`{one}`" for one in own)) == taken
    known = {option for record in BACKENDS.values() for option in (*record.options, *record.libraries)}
    listed = named(f"`{options.removesuffix('...').strip('`, ')}`")
    assert {"threads", "plugin"} <= listed <= known


def test_the_page_on_video_has_options_of_ivc_run() -> None:
    options = COMMANDS["ivc-run"]._option_string_actions
    found = rows("video.md", "# Video")
    assert {*found} == {"--video", "--fps", "--max-frames", "--show", "--json"} <= {*options}


def test_the_page_on_video_has_the_defaults_of_checkpoints_that_name_none() -> None:
    text = " ".join(read(ROOT / "docs" / "video.md").split())
    settings = Videos()
    assert f"They are {settings.fps:g} frames a second and at most {settings.max_frames} frames, unless it says" in text


def test_the_longest_answer_of_lmms_eval_is_the_models() -> None:
    (longest,) = re.findall(r"^LONGEST = (\d+)$", read(ROOT / "ivc_export" / "evaluate" / "model.py"), re.MULTILINE)
    assert f"`max_new_tokens` (default {int(longest):,})" in read(ROOT / "docs" / "scaling.md")


def test_the_page_on_weights_has_the_samples_columns_and_the_exported_parameters() -> None:
    text = " ".join(read(ROOT / "docs" / "weights.md").split())
    config = json.loads(read(ROOT / "samples" / "spatial-vl" / "config.json"))
    columns = config.get("text_config", config)["intermediate_size"]
    assert f"Spatial-VL has layers of {columns} columns, so it takes 16" in text
    assert columns % 16 == 0 and columns % 32
    assert f"{result('rounding_speed-cpu')['parameters'] / 1e9:.1f} B parameters" in text

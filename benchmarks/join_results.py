"""Joins the files of several runs on one GPU into the two results files that pages read.

    python -m benchmarks.join_results generate TURNS --profile FILE --beside FILE --long FILE [--note TEXT ...]
    python -m benchmarks.join_results packed TURNS --without FILE --profile FILE [--note TEXT ...]

generate: files of benchmarks.gpu_generate. TURNS has the rows; the others may be left out: a run with --profile, one
with PyTorch beside, and one of long answers if that one had none (--long). Writes benchmarks/results/generate-GPU.json.
packed: files of benchmarks.cuda_packed with and without our library, and one {"first": kernels, "decode": kernels} of
weights in 4 bits, as gpu_generate.kernels gives them. Writes benchmarks/results/cuda_packed-GPU.json.
Places of files in commands become names, and long answers keep their first tokens only.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PLACES = {"--checkpoint": "CHECKPOINT", "--packed": "PACKED", "--folder": None, "--output": None, "--seconds": None}
"""What stands for the value of an option in a command. None leaves the option out."""
LIBRARY = "--op-library"
SHOWN = 32
"""Tokens of a long answer that a results file holds."""


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = p.add_subparsers(dest="kind", required=True)
    for kind, others in (("generate", ("profile", "beside", "long")), ("packed", ("without", "profile"))):
        one = kinds.add_parser(kind)
        one.add_argument("turns", type=Path)
        for other in others:
            one.add_argument(f"--{other}", type=Path)
        one.add_argument("--note", action="append", default=[], help="a remark, may be repeated")
        one.add_argument("--output", type=Path, help="the JSON file (default: in benchmarks/results)")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    """Join and write."""
    options = parser().parse_args(arguments)
    joined = {"generate": join_generate, "packed": join_packed}[options.kind](options)
    stem = {"generate": "generate", "packed": "cuda_packed"}[options.kind]
    output = options.output or RESULTS / f"{stem}-{short_name(joined)}.json"
    output.write_text(json.dumps(joined, indent=1) + "\n", encoding="utf-8")
    print(output, file=sys.stderr)


def read(path: Path | None) -> dict[str, Any] | None:
    """A run's file, with its command and its answers as they are to be kept; None where none is given."""
    if path is None:
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "command" in content:
        content["command"] = without_places(content["command"])
    for row in content["rows"] if isinstance(content.get("rows"), list) else ():
        del row["tokens"][SHOWN:]
    return content


def without_places(command: str) -> str:
    """A command by which everybody can run the same."""
    words, found = shlex.split(command), list[str]()
    while words:
        word = words.pop(0)
        if word == LIBRARY:
            found += [word, Path(words.pop(0)).name]
        elif word in PLACES:
            words.pop(0)
            name = PLACES[word]
            found += [] if name is None else [word, name]
        else:
            found.append(word)
    return shlex.join(found)


def some(content: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Some parts of a file."""
    return {name: content[name] for name in names if content.get(name)}


def join_generate(options: argparse.Namespace) -> dict[str, Any]:
    """Files of gpu_generate."""
    found = read(options.turns)
    assert found is not None
    if profile := read(options.profile):
        found["profiles"] = profile["profiles"]
        found["profile_command"] = profile["command"]
    for name in ("beside", "long"):
        if other := read(getattr(options, name)):
            found[name] = some(other, "command", "settings", "sides", "rows", "failures")
            if "long" in other and options.long is None:
                found["long"] = {"command": other["command"], **other["long"]}
    return found | some({"notes": options.note}, "notes")


def join_packed(options: argparse.Namespace) -> dict[str, Any]:
    """Files of cuda_packed."""
    found = read(options.turns)
    assert found is not None
    if without := read(options.without):
        found["without_library"] = some(without, "command", "rounds", "rows")
    if profile := read(options.profile):
        packed = list(found["rows"])[-1]
        parts = {"first_token": profile["first"], "decode": profile["decode"]}
        found["profile"] = {"what": packed, "decoded_tokens": found["decoded_tokens"], **parts}
    return found | some({"notes": options.note}, "notes")


def short_name(content: Mapping[str, Any]) -> str:
    """h200 of NVIDIA H200."""
    gpu = content.get("gpu") or {}
    words = str(gpu.get("name") if isinstance(gpu, dict) else gpu).split()
    return next((word.lower() for word in words if re.search(r"\d", word)), "gpu")


if __name__ == "__main__":
    main()

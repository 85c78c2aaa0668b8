"""Answers of the C++ runtime on Spatial-VL's bundle against Python's, token by token and row by row.

    python -m samples.cpp_agreement --bundle BUNDLE --program BUILD/ivc-cpp --output FILE

The bundle is exported with --dtype float32, which both compute in.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ivc_export.bundle.bundle import Bundle
from ivc_export.runtime.backends import open_session
from ivc_export.runtime.chat import Chat, Sampling
from samples.spatial.held_out import held_out
from samples.spatial.questions import TASKS

RATIOS = (1.0, 0.5)
LONGEST_ANSWER = 20


def main() -> None:
    """Ask both the same questions, and write how many answers are the same."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bundle", type=Path, required=True)
    p.add_argument("--program", type=Path, required=True)
    p.add_argument("--count", type=int, default=200)
    p.add_argument("--output", type=Path, default=Path("cpp-agreement.json"))
    options = p.parse_args()
    examples = held_out("test", math.ceil(options.count / len(TASKS)))[: options.count]
    session = open_session(Bundle.load(options.bundle))
    found: dict[str, Any] = {
        "backend": session.backend,
        "dtype": session.dtype,
        "questions": len(examples),
        "ratios": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        requests: list[dict[str, Any]] = []
        for number, example in enumerate(examples):
            example.picture.save(Path(folder) / f"{number}.png")
            requests += [
                {"image": [f"{folder}/{number}.png"], "prompt": example.question.text, "ratio": r} for r in RATIOS
            ]
        lines = "".join(json.dumps(request) + "\n" for request in requests)
        command = [options.program, options.bundle, "--requests", "--max-tokens", str(LONGEST_ANSWER)]
        done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        same = {ratio: {"answers": 0, "tokens": 0, "kept_rows": 0} for ratio in RATIOS}
        for request, answer in zip(requests, answers, strict=True):
            chat = Chat(session, request["ratio"], sampling=Sampling(max_tokens=LONGEST_ANSWER))
            text = "".join(chat.ask(request["prompt"], [Path(request["image"][0])]))
            assert chat.step is not None
            counts = same[request["ratio"]]
            counts["answers"] += text == answer["answer"]
            counts["tokens"] += chat.tokens == answer["tokens"]
            counts["kept_rows"] += chat.step.keep_index.tolist() == answer["keep_index"]
    found["ratios"] = {str(ratio): counts for ratio, counts in same.items()}
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""Compare the answers of the C++ runtime on Spatial-VL's bundle with Python's, token by token, and time both.

    python -m samples.cpp_agreement --bundle BUNDLE --program BUILD/ivc-cpp --output FILE
    python -m samples.cpp_agreement --bundle BUNDLE --program BUILD/ivc-cpp --backend tensorrt --questions FOLDER ...

On onnxruntime-cpu, both compute in float32: export the bundle with --dtype float32. On tensorrt, both run the same
engines. FOLDER is one that samples.agreement has recorded; without it questions are drawn, which needs torch. Both are
asked in turns in one run. Kept rows are compared, too. The seconds are of whole answers, from the picture's file on.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from ivc_export.bundle.bundle import Bundle
from ivc_export.runtime.backends import BACKENDS, DEFAULT, open_session
from ivc_export.runtime.chat import Chat, Sampling
from samples.agreement import INDEX, LONGEST_ANSWER, RATIOS

COUNTS = ("answers", "tokens", "kept_rows")
WARM = 3
"""Questions at the beginning whose times are left out."""


class Program:
    """The running program, which answers a request a line."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """What it says to a question."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def most_bytes(self) -> int:
        """The most host memory that it has held."""
        return resident(self._process.pid)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def resident(pid: int | str) -> int:
    """The most host memory that a process has held, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def device_bytes(backend: str) -> int:
    """Memory of the device that is taken; 0 without one."""
    if BACKENDS[backend].device != "cuda":
        return 0
    runtime: Any = importlib.import_module("cuda.bindings.runtime")
    _, free, total = runtime.cudaMemGetInfo()
    return int(total - free)


def questions(folder: Path | None, count: int, drawn: Path) -> list[tuple[str, Path, str]]:
    """Questions, the files of their pictures, and second questions about these, or "".

    Pictures are written to `drawn` where no folder has them; second questions are known there alone.
    """
    if folder is not None:
        rows = json.loads((folder / INDEX).read_text(encoding="utf-8"))["questions"][:count]
        return [(row["question"], folder / row["picture"], "") for row in rows]
    from samples.spatial.held_out import held_out
    from samples.spatial.questions import TASKS

    found = []
    for number, example in enumerate(held_out("test", math.ceil(count / len(TASKS)))[:count]):
        example.picture.save(drawn / f"{number}.png")
        found.append((example.question.text, drawn / f"{number}.png", example.second.text))
    return found


def count_equal(counts: dict[str, int], wanted: str, chat: Chat, found: dict[str, Any]) -> None:
    """Count what of the program's answer equals the chat's last."""
    assert chat.step is not None
    counts["answers"] += wanted == found["answer"]
    counts["tokens"] += chat.tokens == found["tokens"]
    counts["kept_rows"] += chat.step.keep_index.tolist() == found["keep_index"]


def main() -> None:
    """Ask both the same questions, and write how many answers are the same."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bundle", type=Path, required=True, help="bundle of Spatial-VL")
    p.add_argument("--program", type=Path, required=True, help="path of ivc-cpp")
    p.add_argument("--backend", choices=("onnxruntime-cpu", "tensorrt"), default=DEFAULT, help="runtime of both")
    p.add_argument("--plugin", type=Path, help="libivc_plugin.so, if the engines were built with it")
    p.add_argument("--questions", type=Path, metavar="FOLDER", help="questions that samples.agreement recorded")
    p.add_argument("--count", type=int, default=200, help="number of questions (default: 200)")
    p.add_argument("--output", type=Path, default=Path("cpp-agreement.json"), help="file of the results")
    options = p.parse_args()
    libraries = {} if options.plugin is None else {"plugin": options.plugin}
    command = [str(options.program.resolve()), str(options.bundle), "--requests", "--backend", options.backend]
    command += ["--max-tokens", str(LONGEST_ANSWER)]
    command += [] if options.plugin is None else ["--plugin", str(options.plugin)]
    with tempfile.TemporaryDirectory() as folder:
        asked = questions(options.questions, options.count, Path(folder))
        empty = device_bytes(options.backend)
        program = Program(command)
        program.ask({"image": [str(asked[0][1])], "prompt": asked[0][0], "ratio": 1.0})
        held = {"cpp": device_bytes(options.backend) - empty}
        session = open_session(Bundle.load(options.bundle), options.backend, **libraries)
        ratios = {}
        for ratio in RATIOS:
            same, later = dict.fromkeys(COUNTS, 0), dict.fromkeys(COUNTS, 0)
            seconds = dict[str, list[float]](cpp=[], python=[])
            differing = []
            for text, picture, second in asked:
                start = time.perf_counter()
                found = program.ask({"image": [str(picture)], "prompt": text, "ratio": ratio})
                between = time.perf_counter()
                chat = Chat(session, ratio, sampling=Sampling(max_tokens=LONGEST_ANSWER))
                wanted = "".join(chat.ask(text, [picture]))
                seconds["cpp"].append(between - start)
                seconds["python"].append(time.perf_counter() - between)
                count_equal(same, wanted, chat, found)
                if chat.tokens != found["tokens"]:
                    differing.append({"question": text, "cpp": found["answer"], "python": wanted})
                if second:
                    whole = program.ask({"image": [str(picture)], "prompt": text, "ratio": ratio, "then": [second]})
                    count_equal(later, "".join(chat.ask(second)), chat, whole["then"][0])
            medians = {side: round(statistics.median(values[WARM:] or values), 5) for side, values in seconds.items()}
            ratios[str(ratio)] = {
                **same,
                "second_questions": later,
                "differing": differing,
                "seconds_an_answer": medians,
            }
            print(
                f"ratio {ratio}: {same} of {len(asked)} identical, then {later}, {medians} seconds per answer",
                flush=True,
            )
        held["python"] = device_bytes(options.backend) - empty - held["cpp"]
        host = {"cpp": program.most_bytes(), "python": resident("self")}
        program.close()
    content = {
        "backend": session.backend,
        "dtype": session.dtype,
        "versions": session.versions,
        "questions": len(asked),
        "ratios": ratios,
        "host_bytes": host,
        "device_bytes": held,
    }
    options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

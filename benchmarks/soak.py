"""Does memory grow with the number of prompts? Many questions about pictures to one session, each in a new chat.

    python -m benchmarks.soak [--prompts N]

`repeated` asks three questions again and again. `varied` adds four words to each that no other prompt has: tokenizers
caches up to 10,000 words. `words_alone` gives such words to a tokenizer and to nothing else, five times as many, so
that its cache is full before the end. Readings are what the process holds (its resident set) and how many Python
objects there are, after garbage is collected and free memory is given back (malloc_trim).

Writes benchmarks/results/soak-cpu.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import platform
import random
import string
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.runtime.chat import Chat, Sampling
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.processor import Processor

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "soak-cpu.json"
SAMPLE = ROOT / "samples" / "spatial-vl"
PICTURES = [ROOT / "samples" / "pictures" / f"scene-{number}.png" for number in (1, 2, 3)]
QUESTIONS = ("Find the large green moon.", "What color is the star?", "How many yellow objects are there?")
SAMPLING = Sampling(max_tokens=4)
WARMUP = 60
READINGS = 5


def resident() -> int:
    """Bytes of this process in memory, once what is free is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def reading(prompts: int) -> dict[str, int]:
    """What is held after so many prompts."""
    return {"prompts": prompts, "rss_bytes": resident(), "python_objects": len(gc.get_objects())}


def soak(ask: Callable[[int], object], prompts: int) -> dict[str, Any]:
    """Readings at the beginning, after WARMUP prompts more, and on the way to `prompts` behind these."""
    for number in range(WARMUP):
        ask(number)
    readings, start = [reading(0)], time.perf_counter()
    for number in range(1, prompts + 1):
        ask(WARMUP + number)
        if number % (prompts // READINGS) == 0:
            readings.append(reading(number))
    last = readings[-1]
    grown = {name: last[name] - readings[0][name] for name in ("rss_bytes", "python_objects")}
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "readings": readings,
        "growth": grown,
        "rss_bytes_a_prompt": round(grown["rss_bytes"] / prompts, 1),
    }


def new_words() -> Iterator[str]:
    """Words of eight letters that have not been said before, or hardly ever."""
    generator = random.Random(0)
    while True:
        yield "".join(generator.choices(string.ascii_lowercase, k=8))


def main() -> None:
    """Measure and write."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompts", type=int, default=1000)
    options = p.parse_args()
    if options.prompts < READINGS:
        p.error(f"--prompts takes {READINGS} or more")
    with tempfile.TemporaryDirectory() as folder:
        bundle = export(ExportRecipe(SAMPLE, Path(folder) / "bundle"))
        session, words = OnnxSession(bundle), new_words()

        def repeated(number: int) -> str:
            chat = Chat(session, sampling=SAMPLING)
            return "".join(chat.ask(QUESTIONS[number % 3], [PICTURES[number % 3]]))

        def varied(number: int) -> str:
            chat = Chat(session, sampling=SAMPLING)
            question = f"{QUESTIONS[number % 3]} {' '.join(itertools.islice(words, 4))}"
            return "".join(chat.ask(question, [PICTURES[number % 3]]))

        alone = Processor(bundle).tokenizer
        found = {
            "repeated": soak(repeated, options.prompts),
            "varied": soak(varied, options.prompts),
            "words_alone": soak(lambda _: alone.encode(" ".join(itertools.islice(words, 4))), 5 * options.prompts),
        }
    content = {
        "command": f"python -m benchmarks.soak --prompts {options.prompts}",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {name: version(name) for name in ("onnxruntime", "tokenizers", "jinja2", "numpy", "pillow")},
        "python": platform.python_version(),
        "model": SAMPLE.relative_to(ROOT).as_posix(),
        "pictures": [picture.name for picture in PICTURES],
        "tokens_an_answer": SAMPLING.max_tokens,
        "warmup_prompts": WARMUP,
        **found,
    }
    print(json.dumps(content, indent=2))
    RESULT.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

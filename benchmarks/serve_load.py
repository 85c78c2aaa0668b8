"""A server under load on loopback: is every answer that of a single run, how long does one take, does memory grow?

    python -m benchmarks.serve_load [--requests N] [--clients N] [--minutes M]

Requests of many kinds in a drawn order: pictures and text, whole and streamed, second questions, clients that leave
after their first text, and malformed ones. A client that is told 429 asks again a moment later. Then, with one client,
the time to the first text through the server and of a Chat in this process, by turns.

Writes benchmarks/results/serve-load.json, or with --minutes serve-soak.json: as many requests as that time takes from 4
clients, and the slope of the resident set over the last half with its 95% interval.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.runtime.chat import Chat, Sampling
from ivc_export.runtime.interface import Session
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from samples.make_sample import make_checkpoint

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PICTURES = [ROOT / "samples" / "pictures" / f"scene-{number}.png" for number in (1, 2, 3)]
QUESTIONS = ("Find the large green moon.", "What color is the star?", "How many yellow objects are there?")
TOKENS = 8
MALFORMED = (b"{", b'{"model": "load"}', b'{"model": "other", "messages": [{"role": "user", "content": "?"}]}')


@dataclass(frozen=True)
class Asked:
    """A request, and what a Chat says to it; None where it is malformed. leaves: whether its client does."""

    body: bytes
    wanted: str | None
    leaves: bool = False


@dataclass
class Outcome:
    """What became of the requests. seconds: of the attempts that were answered."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    readings: list[tuple[float, int]] = field(default_factory=list)


def user(text: str, picture: Path | None = None) -> dict[str, Any]:
    """A message of the user."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if picture is not None:
        data = base64.b64encode(picture.read_bytes()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    return {"role": "user", "content": content}


def mixture(session: Session) -> list[Asked]:
    """All kinds of requests, with the answers of single runs."""
    found = [Asked(body, None) for body in MALFORMED]
    for question, picture in [*zip(QUESTIONS, PICTURES, strict=True), ("How are you?", None)]:
        chat = Chat(session, sampling=Sampling(max_tokens=TOKENS))
        first = "".join(chat.ask(question, [picture] if picture else []))
        second = "".join(chat.ask("Where is it?"))
        messages: list[dict[str, Any]] = [user(question, picture)]
        later = [*messages, {"role": "assistant", "content": first}, user("Where is it?")]
        for stream in (False, True):
            for told, wanted in ((messages, first), (later, second)):
                content = {"model": "load", "messages": told, "max_tokens": TOKENS, "stream": stream}
                found.append(Asked(json.dumps(content).encode(), wanted))
        found.append(Asked(found[-2].body, first, leaves=True))
    return found


def ask(port: int, asked: Asked, first_text: Callable[[], object] = lambda: None) -> str:
    """What becomes of one request; "wrong" is an answer that is none of a single run.

    first_text: is called when it comes.
    """
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request("POST", "/v1/chat/completions", asked.body, {"Content-Type": "application/json"})
        with connection.getresponse() as answer:
            if answer.status == 429:
                return "busy"
            if answer.status != 200:
                error = json.loads(answer.read())["error"]
                fine = asked.wanted is None and error["type"] == "invalid_request_error"
                return "malformed" if fine else "wrong"
            if not answer.headers["Content-Type"].startswith("text/event-stream"):
                said = json.loads(answer.read())["choices"][0]["message"]["content"]
                return "answered" if said == asked.wanted else "wrong"
            said = ""
            for line in answer:
                if line.startswith(b"data: {"):
                    text = json.loads(line[6:])["choices"][0]["delta"].get("content")
                    if text:
                        said += text
                        first_text()
                        if asked.leaves:
                            return "left"
            return "answered" if said == asked.wanted else "wrong"


def load(
    port: int, kinds: Sequence[Asked], clients: int, more: Callable[[int], bool], resident: Callable[[], int]
) -> Outcome:
    """Let `clients` ask at once, while there are `more` requests; the n-th one is drawn from seed n."""
    outcome, lock, begun = Outcome(), threading.Lock(), time.perf_counter()
    numbers = iter(range(10**9))

    def client() -> None:
        while True:
            with lock:
                number = next(numbers)
            if not more(number):
                return
            start, kind = time.perf_counter(), random.Random(number).choice(kinds)
            result = ask(port, kind)
            while result == "busy":
                with lock:
                    outcome.counts["told to wait"] += 1
                time.sleep(0.05)
                start, result = time.perf_counter(), ask(port, kind)
            with lock:
                outcome.counts[result] += 1
                if result == "answered":
                    outcome.seconds.append(time.perf_counter() - start)
                if number % 10 == 0:
                    outcome.readings.append((time.perf_counter() - begun, resident()))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcome


def slope(readings: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """Of the resident set over the last half, bytes a minute, by least squares with a 95% interval.

    Readings follow each other closely, so the interval is of the means of 20 stretches.
    """
    half = readings[-1][0] / 2
    late = np.array([reading for reading in readings if reading[0] >= half], float)
    parts = np.array([part.mean(axis=0) for part in np.array_split(late, min(20, len(late)))])
    x, y = parts[:, 0] / 60, parts[:, 1]
    middle = x - x.mean()
    gradient = float(middle @ y / (middle @ middle))
    rest = y - y.mean() - gradient * middle
    error = math.sqrt(float(rest @ rest) / max(1, len(x) - 2) / float(middle @ middle))
    return {
        "bytes_a_minute": round(gradient),
        "interval": [round(gradient - 2.1 * error), round(gradient + 2.1 * error)],
        "bytes_at_half_and_end": [round(y[0]), round(y[-1])],
    }


def summary(outcome: Outcome) -> dict[str, Any]:
    """Outcomes, times and memory."""
    times = sorted(outcome.seconds)
    return {
        "outcomes": dict(outcome.counts),
        "seconds": {f"p{part}": round(times[min(len(times) - 1, len(times) * part // 100)], 3) for part in (50, 95)},
        "resident_set_over_the_last_half": slope(outcome.readings),
    }


def first_texts(port: int, session: Session, asked: Mapping[str, Any], picture: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds to the first text, through the server and of a Chat here, by turns; pictures are new each time."""
    found: dict[str, list[float]] = {"server": [], "chat": []}
    question = asked["messages"][0]["content"][-1]["text"]
    for number in range(rounds):
        data = picture.read_bytes() + bytes([number])  # another file to the server's cache, the same picture
        url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        message = {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": url}}, *user(question)["content"]],
        }
        body = json.dumps({"model": "load", "messages": [message], "max_tokens": 2, "stream": True}).encode()
        times: list[float] = []
        start = time.perf_counter()
        ask(port, Asked(body, ""), lambda times=times: times.append(time.perf_counter()))  # type: ignore[misc]
        found["server"].append(1000 * (times[0] - start))
        start = time.perf_counter()
        pieces = Chat(session, sampling=Sampling(max_tokens=2)).ask(question, [picture])
        next(pieces)
        found["chat"].append(1000 * (time.perf_counter() - start))
        pieces.close()  # type: ignore[attr-defined]
    medians = {name: round(statistics.median(times), 2) for name, times in found.items()}
    return medians | {"rounds": rounds, "difference": round(medians["server"] - medians["chat"], 2)}


@contextmanager
def server(bundle: Path) -> Iterator[tuple[int, int]]:
    """ivc-serve on a port of its own: port and process id."""
    code = "import sys; from ivc_export.cli import ivc_serve; sys.exit(ivc_serve(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(bundle), "--port", "0", "--name", "load"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        place = None
        while place is None:
            place = re.search(r"serving load at http://127.0.0.1:(\d+)", process.stderr.readline())
        time.sleep(1)
        try:
            yield int(place[1]), process.pid
        finally:
            process.terminate()


def resident_set(process: int) -> int:
    """Bytes of a process in memory."""
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Measure and write."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--requests", type=int, default=1000)
    p.add_argument("--clients", type=int, default=32)
    p.add_argument("--minutes", type=float, help="of a tiny model, in the place of --requests")
    options = p.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = make_checkpoint(folder / "tiny") if options.minutes else ROOT / "samples" / "spatial-vl"
        bundle = export(ExportRecipe(checkpoint, folder / "bundle", dtype="float32"))
        session = OnnxSession(bundle)
        kinds = mixture(session)
        with server(bundle.folder) as (port, process):
            begun = time.perf_counter()
            minutes_wanted, count = float(options.minutes or 0), int(options.requests)

            def more(number: int) -> bool:
                soaking = minutes_wanted > 0
                return time.perf_counter() - begun < 60 * minutes_wanted if soaking else number < count

            clients = 4 if options.minutes else options.clients
            found = summary(load(port, kinds, clients, more, lambda: resident_set(process)))
            minutes = (time.perf_counter() - begun) / 60
            if not options.minutes:
                asked = json.loads(next(k.body for k in kinds if k.wanted is not None))
                found["milliseconds_to_first_text"] = first_texts(port, session, asked, PICTURES[0], 60)
    report = {
        "command": "python -m benchmarks.serve_load" + (f" --minutes {options.minutes:g}" if options.minutes else ""),
        "model": "a tiny Qwen2-VL" if options.minutes else "samples/spatial-vl, float32",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs shared with other work",
        "clients": clients,
        "minutes": round(minutes, 1),
        **found,
    }
    path = RESULTS / ("serve-soak.json" if options.minutes else "serve-load.json")
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

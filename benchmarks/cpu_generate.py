"""An answer on the CPU: this runtime on onnxruntime against stock transformers on PyTorch, on the same cores.

    python -m benchmarks.cpu_generate [--rounds N] [--profile]

Both sides take turns in one process, so that what else the machine does meets both; each figure is the median over
rounds, each ratio the median of the rounds' own ratios. transformers is called as lean as it can be: its forward with
SDPA attention, the cache, and logits of the last row alone, without the bookkeeping of generate(). It does not prune,
so it is the peer at every ratio. Preprocessing is left out on both sides.

Writes benchmarks/results/cpu_generate.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.pictures import Visual
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from samples.make_sample import make_checkpoint
from samples.tiny import TINY

RESULT = Path(__file__).parent / "results" / "cpu_generate.json"
RATIOS = (1.0, 0.5)
PICTURE, TEXT = (448, 336), 40  # 16 x 12 visual tokens, 40 others
FIFTH = TINY["qwen2_vl"] | {  # 0.2 B parameters: 97 M in layers, 25 M in embeddings, 97 M in vision
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "tie_word_embeddings": True,
    "vision_config": TINY["qwen2_vl"]["vision_config"]
    | {"depth": 12, "embed_dim": 768, "hidden_size": 768, "mlp_ratio": 4, "num_heads": 12},
}
MODELS = {"tiny": (TINY["qwen2_vl"], 64), "0.2B": (FIFTH, 12)}  # configuration, tokens to decode


class Transformers:
    """A checkpoint on stock transformers, float32, SDPA attention."""

    def __init__(self, checkpoint: Path) -> None:
        self.model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        ).eval()

    @torch.inference_mode()
    def answer(self, tokens: list[int], picture: Visual, count: int) -> tuple[float, float, list[int]]:
        """Seconds to the first token, seconds a token after it, and the tokens."""
        ids, merge = torch.tensor([tokens]), 2
        is_image = (ids == self.model.config.image_token_id).int()
        grid = torch.tensor([[1, picture.grid.rows * merge, picture.grid.columns * merge]])
        pixels = torch.from_numpy(picture.inputs["pixel_values"][0])
        start = time.perf_counter()
        found = self.model(
            input_ids=ids,
            mm_token_type_ids=is_image,
            pixel_values=pixels,
            image_grid_thw=grid,
            use_cache=True,
            logits_to_keep=1,
        )
        drawn = [int(found.logits[0, -1].argmax())]
        first = time.perf_counter() - start
        position = self.model.model.get_rope_index(ids, mm_token_type_ids=is_image, image_grid_thw=grid)[0].max() + 1
        start = time.perf_counter()
        for step in range(count):
            found = self.model(
                input_ids=torch.tensor([drawn[-1:]]),
                position_ids=(position + step).expand(3, 1, 1),
                past_key_values=found.past_key_values,
                use_cache=True,
            )
            drawn.append(int(found.logits[0, -1].argmax()))
        return first, (time.perf_counter() - start) / count, drawn


def ours(session: OnnxSession, ratio: float, tokens: list[int], picture: Visual, count: int) -> tuple[Any, ...]:
    """The same of a bundle on onnxruntime, and the seconds of each stage."""
    conversation = HostConversation(session, ratio)
    start = time.perf_counter()
    step = conversation.run(tokens, [picture])
    drawn = [int(step.logits.argmax())]
    first = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(count):
        step = conversation.run(drawn[-1:])
        drawn.append(int(step.logits.argmax()))
    return first, (time.perf_counter() - start) / count, drawn, conversation.timings


def prompt(bundle: Bundle) -> tuple[list[int], Visual]:
    """A picture of noise with text before and behind it."""
    import PIL.Image

    m, generator = bundle.manifest, np.random.default_rng(0)
    noise = PIL.Image.fromarray(generator.integers(0, 256, (PICTURE[1], PICTURE[0], 3), np.uint8))
    picture = families.preparation(m).picture(noise, m.tokens.image)
    words = generator.integers(0, 400, TEXT - 2).tolist()
    image = [m.tokens.vision_start, *[m.tokens.image] * picture.grid.visual, m.tokens.vision_end]
    return [*words[:14], *image, *words[14:]], picture


def measure(name: str, threads: int, rounds: int, profile: bool) -> list[dict[str, Any]]:
    """A row for each ratio."""
    config, count = MODELS[name]
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(Path(folder) / "checkpoint", config)
        bundle = export(ExportRecipe(checkpoint, Path(folder) / "bundle"))
        peer, session = Transformers(checkpoint), OnnxSession(bundle, threads)
        tokens, picture = prompt(bundle)
        parameters = sum(parameter.numel() for parameter in peer.model.parameters())
        sides: dict[str, Callable[[], tuple[Any, ...]]] = {"transformers": lambda: peer.answer(tokens, picture, count)}
        for ratio in RATIOS:
            sides[f"ratio {ratio}"] = lambda ratio=ratio: ours(session, ratio, tokens, picture, count)  # type: ignore[misc]
        seen: dict[str, list[tuple[Any, ...]]] = {side: [] for side in sides}
        for number in range(rounds + 1):  # the first warms up
            order = list(sides) if number % 2 else list(sides)[::-1]
            for side in order:
                found = sides[side]()
                if number:
                    seen[side].append(found)
            if number:
                print(
                    name,
                    threads,
                    {side: [round(1000 * x, 1) for x in seen[side][-1][:2]] for side in sides},
                    flush=True,
                )
        if seen["transformers"][0][2] != seen["ratio 1.0"][0][2]:
            raise AssertionError("unpruned answers differ")
        if profile:
            timings = seen["ratio 1.0"][-1][3]
            print({k: round(1000 * v / timings.runs[k], 2) for k, v in timings.seconds.items()})
        facts = {"model": name, "parameters": parameters, "threads": threads, "prompt_tokens": len(tokens)}
        facts |= {"visual_tokens": picture.grid.visual, "decoded_tokens": count}
        return [facts | {"ratio": ratio} | compared(seen["transformers"], seen[f"ratio {ratio}"]) for ratio in RATIOS]


def compared(peer: list[tuple[Any, ...]], own: list[tuple[Any, ...]]) -> dict[str, Any]:
    """Medians of both sides, and the median of how many times faster ours was in each round."""

    def pair(index: int, digits: int) -> dict[str, float]:
        a, b = ([found[index] for found in side] for side in (peer, own))
        return {
            "transformers_ms": round(1000 * statistics.median(a), digits),
            "onnxruntime_ms": round(1000 * statistics.median(b), digits),
            "times_faster": round(statistics.median(x / y for x, y in zip(a, b, strict=True)), 2),
        }

    return {"time_to_first_token": pair(0, 1), "per_token": pair(1, 2)}


def main() -> None:
    """Measure and write."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--models", nargs="*", default=list(MODELS))
    p.add_argument("--profile", action="store_true", help="print the stages of the last unpruned round")
    options = p.parse_args()
    cores, before = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    rows = [
        found
        for name in options.models
        for threads in sorted({cores, 1}, reverse=True)
        for found in measure(name, threads, options.rounds, options.profile)
    ]
    for found in rows:
        print(found)
    content = {
        "command": "python -m benchmarks.cpu_generate",
        "machine": f"{platform.machine()}, {cores} cores",
        "load_average": {"before": round(before, 2), "after": round(os.getloadavg()[0], 2)},
        "versions": {name: version(name) for name in ("onnxruntime", "torch", "transformers", "numpy")},
        "torch_blas": torch.__config__.show().partition("BLAS_INFO=")[2].partition(",")[0],
        "dtype": "float32",
        "rounds": options.rounds,
        "rows": rows,
    }
    if set(options.models) == set(MODELS):
        RESULT.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

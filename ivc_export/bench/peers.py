"""Runs a checkpoint on stock transformers, as a bundle's peer, with as little overhead as possible. Needs torch.

Positions are computed beforehand, logits are those of the last row only, and nothing of generate() runs. Every timed
region ends when the device is idle. Peers do not prune.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from ivc_export import families
from ivc_export.bench.prompts import Prompt
from ivc_export.bench.sides import Answer, visual_part
from ivc_export.bundle.bundle import Bundle
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.runtime.plan import plan_run

NOTHING: Mapping[str, Any] = {}


class TorchPeer:
    """A peer with SDPA attention and a cache that grows. model: see load."""

    name = "torch-eager"
    prunes = False
    notes = "transformers, SDPA attention, DynamicCache"

    def __init__(self, bundle: Bundle, model: Any) -> None:
        self.bundle, self.model = bundle, model
        self.device = model.device.type
        self.dtype: FloatName = "bfloat16" if self.device == "cuda" else "float32"
        self.decoder: Any = self.model.model.language_model

    def rest(self) -> None:
        """Wait until the device is idle."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def answer(self, prompt: Prompt, ratio: float, count: int) -> Answer:
        """As Side.answer."""
        m = self.bundle.manifest
        plan = plan_run(m, np.array(prompt.tokens, np.int32), [prompt.picture.grid], 0, 1.0)
        positions = torch.from_numpy(plan.position_ids).long().to(self.device)
        after = [torch.full((len(positions), 1, 1), plan.next_position + i, device=self.device) for i in range(count)]
        stock = families.preparation(m).stock_inputs(prompt.picture)
        inputs = {name: torch.from_numpy(array) for name, array in stock.items()}
        visual = torch.from_numpy(plan.visual_index).long()
        cache = self.cache(len(prompt.tokens) + count)
        self.rest()
        start = time.perf_counter()
        embeds = self.decoder.embed_tokens(torch.tensor([prompt.tokens], device=self.device))
        features, added = self.vision({name: tensor.to(self.device) for name, tensor in inputs.items()})
        embeds[0, visual.to(self.device)] = features
        if added:
            mask = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=self.device)
            mask[0, visual.to(self.device)] = True
            added["visual_pos_masks"] = mask
        self.rest()
        middle = time.perf_counter()
        token = self.prefill(embeds, without_axes(positions), cache, added)
        tokens = [int(token)]
        end = time.perf_counter()
        stages, steps = {"vision": middle - start, "prefill": end - middle}, []
        rows = len(prompt.tokens)
        size = m.decoder.layers * rows * m.decoder.row_values * (2 if "16" in self.dtype else 4)
        for position in after:
            before = time.perf_counter()
            token = self.step(token, without_axes(position), cache)
            tokens.append(int(token))  # waits for the device
            steps.append(time.perf_counter() - before)
        return Answer(stages, end - start, steps, tokens, size, round(size * visual_part(m, prompt, prompt.visual)))

    def cache(self, capacity: int) -> Any:
        """An empty cache."""
        return transformers.DynamicCache(config=self.decoder.config)

    def vision(self, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Visual tokens [visual, hidden], and other features of the pictures that the decoder takes, if any."""
        found = self.model.model.get_image_features(**inputs)

        def rows(parts: Iterable[Any]) -> Any:
            return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).to(getattr(torch, self.dtype))

        deepstack = [rows(parts) for parts in getattr(found, "deepstack_features", None) or ()]
        return rows(found.pooler_output), {"deepstack_visual_embeds": deepstack} if deepstack else {}

    def forward(self, embeds: Any, positions: Any, cache: Any, added: Mapping[str, Any] = NOTHING) -> Any:
        """Run the decoder over embeds [1, rows, hidden], and draw the next token, int64 [1]. added: see vision."""
        found = self.decoder(
            inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True, **added
        )
        return self.model.lm_head(found.last_hidden_state[:, -1]).argmax(dim=-1)

    def prefill(self, embeds: Any, positions: Any, cache: Any, added: Mapping[str, Any]) -> Any:
        """Run the prefill and draw the first token."""
        return self.forward(embeds, positions, cache, added)

    def step(self, token: Any, positions: Any, cache: Any) -> Any:
        """The token after `token`."""
        return self.forward(self.decoder.embed_tokens(token[None]), positions, cache)


class CompiledPeer(TorchPeer):
    """The same with a static cache of exactly the rows that an answer needs, and with decode steps by torch.compile.

    mode="reduce-overhead" replays decode steps as a CUDA graph. The vision encoder runs eagerly, because it reads grids
    on the host. compile_prefill: also compile the decoder's prefill, without CUDA graphs. This takes as long again for
    each size.
    """

    name = "torch-compiled"

    def __init__(self, bundle: Bundle, model: Any, compile_prefill: bool = False) -> None:
        super().__init__(bundle, model)
        self.compile_prefill = compile_prefill
        self._capacity = 0
        self._cache: Any = None
        self._step: Callable[..., Any] = super().step
        self._prefill: Callable[..., Any] = super().prefill

    @property
    def notes(self) -> str:  # type: ignore[override]
        """Remarks on how it runs, and on whether a whole step was compiled."""
        prefill = "by torch.compile" if self.compile_prefill else "eager"
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        return (
            "transformers, SDPA attention, StaticCache of prompt and answer; decode step by torch.compile, "
            f"reduce-overhead, with {breaks} graph breaks; prefill {prefill}, vision eager"
        )

    def cache(self, capacity: int) -> Any:
        """The same cache for all answers of one size, emptied, because a CUDA graph uses its addresses."""
        if capacity != self._capacity:
            torch._dynamo.reset()
            self._capacity = capacity
            self._cache = transformers.StaticCache(config=self.decoder.config, max_cache_len=capacity)
            self._step = torch.compile(super().step, mode="reduce-overhead", dynamic=False)
            if self.compile_prefill:
                self._prefill = torch.compile(super().prefill, dynamic=False)
                sizes = self.bundle.manifest.decoder
                if hasattr(self._cache, "early_initialization"):  # a compiled prefill may not allocate
                    self._cache.early_initialization(
                        1, sizes.kv_heads, sizes.head_dim, getattr(torch, self.dtype), torch.device(self.device)
                    )
        self._cache.reset()
        return self._cache

    def prefill(self, embeds: Any, positions: Any, cache: Any, added: Mapping[str, Any]) -> Any:
        """Run the prefill and draw the first token."""
        return self._prefill(embeds, positions, cache, added).clone()

    def step(self, token: Any, positions: Any, cache: Any) -> Any:
        """The token after `token`."""
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return self._step(token, positions, cache).clone()  # the graph's own memory is written again


def without_axes(positions: Any) -> Any:
    """Positions [axes, 1, rows] as transformers takes them: without the first axis if there is only one."""
    return positions if len(positions) > 1 else positions[0]


def load(checkpoint: Path) -> Any:
    """Load a stock model with SDPA attention: in bfloat16 on the GPU, or in float32 on the CPU if there is no GPU.

    Raises:
        UserError: transformers cannot load it.
    """
    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    try:
        model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
        return model.eval().to(device)
    except Exception as error:  # transformers and its libraries raise almost anything
        reason = str(error).splitlines()[0]
        raise UserError(
            f"transformers cannot load {checkpoint} ({reason}): give the checkpoint that was exported, in "
            "transformers' layout"
        ) from error


PEERS: dict[str, Callable[..., TorchPeer]] = {"torch-eager": TorchPeer, "torch-compiled": CompiledPeer}

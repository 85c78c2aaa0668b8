"""IVC-Prune and FastV on stock transformers models in PyTorch: the reference for all bundles.

It shares no code with the graphs. Positions come from transformers, and the selection is written again in PyTorch. The
layers are transformers' own modules, called one by one with a cache that is compacted in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

from ivc_export.contract.manifest import Scored, Selection, SelectionRule
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.verify.attended import attention_of_last_row
from ivc_export.verify.dequantised import dequantised, quantisation
from ivc_export.verify.drawn import splitmix64
from ivc_export.verify.reference_picture import ReferencePicture, features, fill_views, joined, scores_of_views
from ivc_export.verify.two_views import TwoViewsOfExperts


@dataclass(frozen=True)
class ReferenceLayout:
    """How transformers can load a checkpoint that it does not support.

    config: config.json. tensors: turns a stored name and tensor into names and tensors.
    """

    config: Mapping[str, Any]
    tensors: Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class ReferenceTurn:
    """The result of one run. Keys and values are by layer, of the kept rows, [1, kv_heads, M, head_dim].

    image_embeds: [visual, hidden] of all pictures; deepstack: the same for what is added after each of the first
    layers, if anything is; hidden_states: [1, S, hidden] at the cut; full_keys, full_values: of the layers below the
    cut, before compaction; scored: the values by which visual tokens are scored, [1, kv_heads, S, D]; logits: [vocab]
    of the last row; margins: [rows], for layers with experts, how far each row's last chosen expert was ahead of the
    next.
    """

    image_embeds: torch.Tensor | None
    deepstack: list[torch.Tensor]
    hidden_states: torch.Tensor
    full_keys: list[torch.Tensor]
    full_values: list[torch.Tensor]
    scored: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    token_score: torch.Tensor
    seed_index: torch.Tensor
    keep_index: torch.Tensor
    logits: torch.Tensor
    margins: Mapping[int, torch.Tensor]


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}


def unquantised(folder: Path) -> tuple[Any, Any]:
    """transformers' configuration of a checkpoint as if its weights were floats, and the class of its model."""
    config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    for part in (config, *(part for part in vars(config).values() if hasattr(part, "quantization_config"))):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    with torch.device("meta"):
        return config, type(transformers.AutoModelForImageTextToText.from_config(config))


OWN_MODELS: Mapping[str, Any] = {"TwoViewsOfExperts": TwoViewsOfExperts}
"""Models that transformers lacks, by their names in a layout's config.json."""


class Reference:
    """A stock model that prunes visual tokens at layer `selection_layer`, and keeps `ratio` of each picture's.

    It computes in float32 on the CPU with eager attention, whatever the checkpoint's dtype.

    dtype: weights are first rounded to it, as an export rounds them. packed: whether quantised layers stay packed, so
    that their scales are rounded and not their weights. rounded: weights that replace stored ones, by stored names.
    head: the weight of lm_head [vocab, hidden] if embeddings are tied and lm_head's weight is no longer theirs.

    Raises:
        UserError: transformers cannot load `folder`.
    """

    def __init__(
        self,
        folder: Path,
        selection_layer: int,
        ratio: float,
        rule: Selection,
        layout: ReferenceLayout | None = None,
        dtype: FloatName = "float32",
        packed: bool = True,
        rounded: Mapping[str, torch.Tensor] | None = None,
        head: torch.Tensor | None = None,
    ) -> None:
        transformers.utils.logging.disable_progress_bar()
        options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
        source: Path | None = folder
        loader: Any = transformers.AutoModelForImageTextToText
        narrow = getattr(torch, dtype)
        try:
            settings = quantisation(folder)
            if layout is not None or settings is not None or rounded:
                stored = stored_tensors(folder)
                exact: set[str] = set()
                if settings is not None:
                    stored, exact = dequantised(stored, settings, narrow if packed else torch.float32)
                stored, exact = stored | dict(rounded or {}), exact | set(rounded or {})
                state = {
                    own: part if packed and name in exact else part.to(narrow).float()
                    for name, tensor in stored.items()
                    for own, part in (layout.tensors(name, tensor) if layout else {name: tensor}).items()
                }
                if layout is not None:
                    name = layout.config["architectures"][0]
                    config = layout.config if name in OWN_MODELS else transformers.AutoConfig.for_model(**layout.config)
                    loader = OWN_MODELS.get(name) or getattr(transformers, name)
                else:
                    config, loader = unquantised(folder)
                options |= {"config": config, "state_dict": state}
                source = None
            self.model: Any = loader.from_pretrained(source, **options).eval()
            if source is not None and narrow != torch.float32:
                for parameter in self.model.parameters():
                    parameter.data = parameter.data.to(narrow).float()
        except Exception as error:  # transformers and its libraries raise almost anything
            reason = str(error).splitlines()[0]
            raise UserError(
                f"transformers cannot load {folder} ({reason}): give the checkpoint that was exported"
            ) from error
        if head is not None:
            self.model.lm_head.weight = torch.nn.Parameter(head)
        self.decoder: Any = self.model.model.language_model
        self.rule = rule
        self.restart(selection_layer, ratio)

    def restart(
        self,
        selection_layer: int,
        ratio: float,
        method: str | None = None,
        seed: int = 0,
        scored: Scored | None = None,
    ) -> None:
        """Forget the conversation, and prune at another layer and ratio, by the rule's method or another.

        scored: how visual tokens are scored; None takes the rule's way.
        """
        self.method, self.seed = self.rule.method if method is None else method, seed
        self.scored = scored or self.rule.scored
        self.selection_layer, self.ratio = selection_layer, ratio
        self.cache = transformers.DynamicCache(config=self.decoder.config)
        self.next_position = 0

    @torch.no_grad()
    def run(self, tokens: Sequence[int], pictures: Sequence[ReferencePicture] = (), question: int = 0) -> ReferenceTurn:
        """Run `tokens`, with those of pictures and videos, over the cache. Rows from `question` on may vote."""
        ids = torch.tensor([list(tokens)])
        kinds = torch.zeros_like(ids)  # 1 at a picture's tokens, 2 at a video's
        for kind, token in enumerate(("image_token_id", "video_token_id"), 1):
            if pictures:  # otherwise they are ordinary ids
                kinds[ids == getattr(self.model.config, token, -1)] = kind
        visual = torch.nonzero(kinds[0])[:, 0]
        embeds, images, deepstack = self.decoder.embed_tokens(ids), None, list[torch.Tensor]()
        if pictures:
            images, *deepstack = features(self.model.model, pictures, embeds.shape[-1])
            embeds[0, visual] = images
        positions = self._positions(ids, kinds, pictures) + self.next_position
        self.next_position = int(positions.max()) + 1
        past = [self.cache.get_seq_length(i) for i in range(len(self.decoder.layers))]
        added = [torch.zeros_like(embeds[0]).index_copy(0, visual, rows) for rows in deepstack]
        entering = self._layers(embeds, positions, range(self.selection_layer - 1), added)
        with attention_of_last_row(self.decoder.layers[self.selection_layer - 1].self_attn) as attended:
            hidden = self._layers(entering, positions, range(self.selection_layer - 1, self.selection_layer), added)
        full_keys = [self.cache.layers[i].keys[:, :, past[i] :] for i in range(self.selection_layer)]
        full_values = [self.cache.layers[i].values[:, :, past[i] :] for i in range(self.selection_layer)]
        scored = full_values[-1] if self.scored == "values" else self._unnormed_values(entering)
        rows = torch.arange(ids.shape[1])
        if self.method == "fastv":
            seen = visual if pictures else rows[:1]
            score, seeds = attended[0][past[self.selection_layer - 1] + seen], rows[:0]
            budget = self._budget(pictures) if pictures else 1
            keep = torch.cat([rows[~torch.isin(rows, seen)], seen[fill(score, [], [], budget)]]).sort().values
        elif pictures:
            score, seeds, keep = self._select(scored[0], positions[:, 0], visual, pictures, question)
        else:
            score, seeds, keep = torch.ones(1), torch.zeros(1, dtype=torch.long), rows
        for i in range(self.selection_layer):
            if i not in self.rule.whole_layers:
                layer, kept = self.cache.layers[i], torch.cat([torch.arange(past[i]), past[i] + keep])
                layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
        above = range(self.selection_layer, len(self.decoder.layers))
        last = self._layers(hidden[:, keep], positions[:, :, keep], above, [rows_of[keep] for rows_of in added])
        logits = self.model.lm_head(self.decoder.norm(last[:, -1]))[0]
        return ReferenceTurn(
            image_embeds=images,
            deepstack=deepstack,
            hidden_states=hidden,
            full_keys=full_keys,
            full_values=full_values,
            scored=scored,
            keys=[layer.keys[:, :, start:] for start, layer in zip(past, self.cache.layers, strict=True)],
            values=[layer.values[:, :, start:] for start, layer in zip(past, self.cache.layers, strict=True)],
            token_score=score,
            seed_index=seeds,
            keep_index=keep,
            logits=logits,
            margins={
                number: layer.mlp.margins
                for number, layer in enumerate(self.decoder.layers)
                if hasattr(layer.mlp, "margins")
            },
        )

    def _positions(self, ids: torch.Tensor, kinds: torch.Tensor, pictures: Sequence[ReferencePicture]) -> torch.Tensor:
        """Rotary positions [axes, 1, S] from 0 on: transformers' own if a model has some, else the number of the row.

        kinds: 1 at a picture's tokens, 2 at a video's, as transformers numbers them.
        """
        if not hasattr(self.model.model, "get_rope_index"):
            return torch.arange(ids.shape[1])[None, None]
        geometry = {
            name: tensor
            for video in (False, True)
            for name, tensor in joined([picture for picture in pictures if picture.video == video]).items()
            if not name.startswith("pixel_values")
        }
        positions: torch.Tensor = self.model.model.get_rope_index(ids, mm_token_type_ids=kinds.int(), **geometry)[0]
        return positions

    def _budget(self, pictures: Sequence[ReferencePicture]) -> int:
        """Number of visual tokens to keep."""
        return sum(max(1, round(self.ratio * sum(picture.blocks))) for picture in pictures)

    def _layers(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        numbers: range,
        added: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Run the layers `numbers` over hidden [1, rows, hidden]. Every row attends to the cache and to earlier rows.

        added: [rows, hidden], what is added after each of the model's first layers.
        """
        rows = hidden.shape[1]
        rotary = self.decoder.rotary_emb(hidden, positions if len(positions) > 1 else positions[0])
        for number in numbers:
            past = self.cache.get_seq_length(number)
            mask = torch.full((rows, past + rows), torch.finfo(torch.float32).min).triu(past + 1)[None, None]
            hidden = self.decoder.layers[number](
                hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=self.cache, use_cache=True
            )
            if number < len(added):
                hidden = hidden + added[number]
        return hidden

    def _unnormed_values(self, entering: torch.Tensor) -> torch.Tensor:
        """The product of the last full layer's value weights with its input rows [1, S, hidden], without its norm.

        Returns [1, kv_heads, S, D].
        """
        attention = self.decoder.layers[self.selection_layer - 1].self_attn
        values: torch.Tensor = attention.v_proj(entering)
        return values.reshape(*values.shape[:2], -1, attention.head_dim).transpose(1, 2)

    def _select(
        self,
        values: torch.Tensor,
        positions: torch.Tensor,
        visual: torch.Tensor,
        pictures: Sequence[ReferencePicture],
        question: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Score, seeds and kept rows by IVC-Prune.

        values: [kv_heads, S, D], what is scored; positions: [axes, S].
        """
        assert isinstance(self.rule, SelectionRule)
        rows = torch.arange(values.shape[1])
        queries = rows[max(question, int(visual[-1]) + 1 + self.rule.query_offset) :]
        text = torch.ones(values.shape[1], dtype=torch.bool)
        text[visual] = False
        shown: list[int] = []  # for rules with tiles: the thumbnail token that shows the same place, of each token
        separators: list[int] = []
        candidates: list[int] = []
        for picture in pictures if self.rule.tiles or self.rule.views else ():
            start = len(shown)
            shown += [start + token for token in picture.shown]
            separators += [start + token for token in picture.separators]
            candidates += [start + token for token in picture.candidates]
        queries = queries if len(queries) else rows[-1:]
        blocks = [block for picture in pictures for block in picture.blocks_of(self.rule)]
        first = {"ivc-prune": self._coordinates, "random": self._drawn}.get(self.method)
        coordinates, budget = first(positions[:, visual], blocks) if first else [], self._budget(pictures)
        if self.rule.views:
            score, seeds = scores_of_views(values, visual, queries, self.rule.seed_divisor, shown, candidates)
            chosen = visual[fill_views(score, seeds.tolist(), coordinates, budget, shown, candidates, separators)]
        else:
            others = rows[text] if self.rule.softmax == "all" else rows[:0]
            score, seeds = token_scores(values, visual, queries, self.rule.seed_divisor, others, shown)
            chosen = visual[fill(score, seeds.tolist(), coordinates, budget, shown)]
        return score, seeds, torch.cat([rows[text], chosen]).sort().values

    def _coordinates(self, positions: torch.Tensor, blocks: Sequence[tuple[int, float]]) -> list[int]:
        """IVC tokens, the best of each block first. positions: [axes, L], of the visual tokens."""
        theta = self.decoder.config.rope_parameters["rope_theta"]
        size = 2 * len(self.decoder.rotary_emb.inv_freq)  # how many values of a head are rotated
        parts = torch.split(torch.arange(positions.shape[1]), [tokens for tokens, _ in blocks])
        ranked = []  # (rank within its block, token)
        for part, (_, fraction) in zip(parts, blocks, strict=True):
            best = ivc_tokens(positions[:, part], theta, size, fraction)
            ranked += [(rank, int(part[token])) for rank, token in enumerate(best)]
        return [token for _, token in sorted(ranked)]

    def _drawn(self, positions: torch.Tensor, blocks: Sequence[tuple[int, float]]) -> list[int]:
        """All visual tokens in a drawn order."""
        numbers = splitmix64(self.seed)
        drawn = [(next(numbers), token) for token in range(positions.shape[1])]
        return [token for _, token in sorted(drawn, reverse=True)]


def token_scores(
    values: torch.Tensor,
    visual: torch.Tensor,
    queries: torch.Tensor,
    seed_divisor: int,
    others: torch.Tensor | None = None,
    shown: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [L] and seeds of visual tokens. values: [kv_heads, S, value_dim]. Source: arXiv 2602.03060, section 3.3.

    others: rows that share votes with the visual tokens. shown: see `fill`; only tokens of thumbnails are seeds.
    """
    rows = visual if others is None else torch.cat([visual, others])

    def votes(queries: torch.Tensor) -> torch.Tensor:
        shares = torch.softmax(values[:, queries] @ values[:, rows].mT / values.shape[-1] ** 0.5, dim=-1)
        return shares.mean(dim=0)[:, : len(visual)]

    by_text = votes(queries)
    order = torch.argsort(by_text.mean(dim=0), descending=True, stable=True).tolist()
    allowed = [token for token in order if not shown or shown[token] == token]
    seeds = torch.tensor(allowed[: max(1, round(len(allowed) / seed_divisor))])
    return torch.cat([by_text, votes(visual[seeds])]).mean(dim=0), seeds


def ivc_tokens(positions: torch.Tensor, theta: float, head_dim: int, fraction: float) -> list[int]:
    """IVC tokens of one picture, best first: by mean cosine and mean sine in turn. positions: [axes, L].

    Source: arXiv 2602.03060, section 3.2.
    """
    frequencies = theta ** (-2.0 * torch.arange(head_dim // 2, dtype=torch.float64) / head_dim)
    angles = positions[:, :, None].double() * frequencies
    count = round(fraction * positions.shape[1])
    lists = [
        torch.argsort(torch.round(part.mean(dim=(0, 2)), decimals=9), descending=True, stable=True)[:count].tolist()
        for part in (angles.cos(), angles.sin())
    ]
    return list(dict.fromkeys(token for pair in zip(*lists, strict=True) for token in pair))


def fill(
    score: torch.Tensor, seeds: list[int], coordinates: list[int], budget: int, shown: Sequence[int] = ()
) -> torch.Tensor:
    """The first `budget` visual tokens of: seeds, IVC tokens, all others by score.

    shown: for pictures in tiles, the token of the thumbnail that shows the same place as each token (a thumbnail's
    token shows itself). The thumbnails' tokens then have their share of the budget. Those of the share that are not IVC
    tokens, and the tiles' tokens in their places, come first. Then come the thumbnails' others, then the tiles' others.
    """
    rest = torch.argsort(score, descending=True, stable=True).tolist()
    if shown:
        thumbnails = [token for token in rest if shown[token] == token]
        share = budget * len(thumbnails) // len(shown)
        ivc = {token for token in coordinates if shown[token] == token}
        foreground = {*[token for token in thumbnails if token not in ivc][: max(0, share - len(ivc))]}
        rest = [*[token for token in rest if shown[token] in foreground], *thumbnails, *rest]
    return torch.tensor(list(dict.fromkeys([*seeds, *coordinates, *rest]))[:budget])

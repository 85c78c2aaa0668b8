"""DeepSeek-VL2 in PyTorch, which transformers lacks: SigLIP over two views of a picture, and a decoder of experts.

It is written for comparison, not for speed. Modules have the names of the tensors in DeepSeek-VL2's checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional

VISION_EPSILON = LATENT_EPSILON = 1e-6


class EncoderLayer(nn.Module):
    """A block of a vision transformer (Dosovitskiy et al. 2021, section 3.1)."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=VISION_EPSILON) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, patches, width]."""
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        share = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.attn["proj"]((share @ v).transpose(1, 2).flatten(2))
        inner = functional.gelu(self.mlp["fc1"](self.norm2(x)), approximate="tanh")
        return x + self.mlp["fc2"](inner)  # type: ignore[no-any-return]


class VisionModel(nn.Module):
    """SigLIP's features of tiles [B, 3, pixels, pixels]: [B, width, side, side]."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        width, patch = sizes["width"], sizes["patch"]
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.pos_embed = nn.Parameter(torch.zeros(1, (sizes["image"] // patch) ** 2, width))
        layers = [EncoderLayer(width, sizes["heads"], sizes["mlp_size"]) for _ in range(sizes["layers"])]
        self.blocks = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width, eps=VISION_EPSILON)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """The last layer's, normed."""
        patches = self.patch_embed["proj"](pixels)
        x = patches.flatten(2).mT + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mT.reshape(patches.shape)  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """A gated MLP (Shazeer 2020, eq. 6)."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(size, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., size]."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """Each row's chosen experts, and the experts that all rows share (DeepSeekMoE, arXiv 2401.06066, section 3).

    margins: of the last rows, [rows], how far the last chosen expert's score exceeded the first other's.
    """

    def __init__(self, size: int, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.settings, count, inner = settings, settings["experts"], settings["inner"]
        self.experts = nn.ModuleList(Mlp(size, inner) for _ in range(count))
        self.gate = nn.Linear(size, count, bias=False)
        if settings["bias"]:
            self.gate.e_score_correction_bias = nn.Parameter(torch.zeros(count))
        if settings["shared"]:
            self.shared_experts = Mlp(size, settings["shared"] * inner)
        self.margins = torch.zeros(0)

    def route(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts of each row, the best first, and their weights, [rows, chosen] each."""
        logits, chosen = self.gate(rows), self.settings["chosen"]
        scores = logits.sigmoid() if self.settings["sigmoid"] else logits.softmax(-1)
        choice = scores + self.gate.e_score_correction_bias if self.settings["bias"] else scores
        ranked = torch.sort(choice, dim=-1, descending=True, stable=True)
        others = ranked.values[:, chosen] if chosen < choice.shape[1] else torch.full((len(rows),), -torch.inf)
        self.margins = ranked.values[:, chosen - 1] - others
        weights = scores.gather(-1, ranked.indices[:, :chosen])
        if self.settings["normalise"]:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ranked.indices[:, :chosen], weights * self.settings["factor"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [1, rows, size]."""
        (rows,) = x
        indices, weights = self.route(rows)
        y = self.shared_experts(rows) if self.settings["shared"] else torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, place = torch.nonzero(indices == number, as_tuple=True)
            y[row] += expert(rows[row]) * weights[row, place, None]
        return y[None]


Angles = tuple[torch.Tensor, torch.Tensor]


def turned(x: torch.Tensor, angles: Angles) -> torch.Tensor:
    """Rotate the pairs (j, j + size / 2) of x [1, heads, rows, size] (Su et al. 2021, section 3.4.2)."""
    a, b = x.chunk(2, -1)
    cos, sin = (part[:, None] for part in angles)
    return x * cos + torch.cat([-b, a], -1) * sin


class Attention(nn.Module):
    """Attention over a cache. Subclasses compute queries, keys and values."""

    def __init__(self, number: int, sizes: Mapping[str, Any]) -> None:
        super().__init__()
        self.number, self.sizes = number, sizes
        self.o_proj = nn.Linear(sizes["heads"] * sizes["value_dim"], sizes["hidden_size"], bias=False)

    def parts(self, x: torch.Tensor, angles: Angles) -> Sequence[torch.Tensor]:
        """Query, key and value of rows x [1, rows, hidden]: [1, heads, rows, size] each, rotated."""
        raise NotImplementedError

    def forward(
        self, x: torch.Tensor, angles: Angles, mask: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is added to rows x [1, rows, hidden], and to what they attend, [1, heads, rows, past + rows].

        mask: [1, 1, rows, past + rows], which is added to scores.
        """
        q, k, v = self.parts(x, angles)
        keys, values = cache.update(k, v, self.number)
        group = q.shape[1] // keys.shape[1]
        keys, values = (part.repeat_interleave(group, 1) for part in (keys, values))
        share = (q @ keys.mT / q.shape[-1] ** 0.5 + mask).softmax(-1)
        return self.o_proj((share @ values).transpose(1, 2).flatten(2)), share


class PlainAttention(Attention):
    """One weight each for queries, keys and values."""

    def __init__(self, number: int, sizes: Mapping[str, Any]) -> None:
        super().__init__(number, sizes)
        hidden, heads, kv_heads = sizes["hidden_size"], sizes["heads"], sizes["kv_heads"]
        self.q_proj = nn.Linear(hidden, heads * sizes["head_dim"], bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * sizes["head_dim"], bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * sizes["value_dim"], bias=False)

    def parts(self, x: torch.Tensor, angles: Angles) -> Sequence[torch.Tensor]:
        """See Attention.parts."""
        q = self.q_proj(x).unflatten(-1, (self.sizes["heads"], -1)).transpose(1, 2)
        k, v = (f(x).unflatten(-1, (self.sizes["kv_heads"], -1)).transpose(1, 2) for f in (self.k_proj, self.v_proj))
        return turned(q, angles), turned(k, angles), v


class AttentionByLatents(Attention):
    """Keys and values from one latent vector for each row (DeepSeek-V2, arXiv 2405.04434, section 2.1), expanded."""

    def __init__(self, number: int, sizes: Mapping[str, Any], latent: Mapping[str, Any]) -> None:
        super().__init__(number, sizes)
        self.rotary, self.keys = latent["rotary"], latent["keys"]
        hidden, heads, head = sizes["hidden_size"], sizes["heads"], sizes["head_dim"]
        if latent["queries"]:
            self.q_a_proj = nn.Linear(hidden, latent["queries"], bias=False)
            self.q_a_layernorm = nn.RMSNorm(latent["queries"], eps=LATENT_EPSILON)
            self.q_b_proj = nn.Linear(latent["queries"], heads * head, bias=False)
        else:
            self.q_proj = nn.Linear(hidden, heads * head, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.keys + self.rotary, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(self.keys, eps=LATENT_EPSILON)
        self.kv_b_proj = nn.Linear(self.keys, heads * (head - self.rotary + sizes["value_dim"]), bias=False)

    def parts(self, x: torch.Tensor, angles: Angles) -> Sequence[torch.Tensor]:
        """See Attention.parts. Neighbouring values are rotated, and put half the part's size apart."""
        heads, plain = self.sizes["heads"], self.sizes["head_dim"] - self.rotary
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if hasattr(self, "q_a_proj") else self.q_proj(x)
        q = q.unflatten(-1, (heads, -1)).transpose(1, 2)
        latent, key = self.kv_a_proj_with_mqa(x).split([self.keys, self.rotary], -1)
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (heads, -1)).transpose(1, 2)
        k, v = expanded.split([plain, self.sizes["value_dim"]], -1)
        query, key = (
            turned(part.unflatten(-1, (-1, 2)).mT.flatten(-2), angles) for part in (q[..., plain:], key[:, None])
        )
        return torch.cat([q[..., :plain], query], -1), torch.cat([k, key.expand(-1, heads, -1, -1)], -1), v


class DecoderLayer(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, number: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        sizes, experts, latent = config["decoder"], config["experts"], config["latent"]
        size, epsilon = sizes["hidden_size"], sizes["rms_norm_epsilon"]
        self.self_attn = AttentionByLatents(number, sizes, latent) if latent else PlainAttention(number, sizes)
        dense = number < experts["dense"]
        self.mlp = Mlp(size, sizes["intermediate_size"]) if dense else Experts(size, experts)
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(size, eps=epsilon) for _ in range(2))

    def forward(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor,
        position_embeddings: Angles,
        past_key_values: Any,
        use_cache: bool = True,
    ) -> torch.Tensor:
        """Called as transformers' layers are. x: [1, rows, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), position_embeddings, attention_mask, past_key_values)[0]
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Rotary(nn.Module):
    """Rotary angles of positions [1, rows]: cosines and sines [1, rows, size]."""

    def __init__(self, size: int, theta: float) -> None:
        super().__init__()
        self.inv_freq = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size).float()

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> Angles:
        """x: for its dtype, which is float32."""
        angles = positions[..., None].float() * self.inv_freq
        both = torch.cat([angles, angles], -1)
        return both.cos(), both.sin()


class Decoder(nn.Module):
    """The language model's parts, as transformers' decoders name them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        sizes, latent = config["decoder"], config["latent"]
        self.config = transformers.LlamaConfig(num_hidden_layers=sizes["layers"], rope_theta=config["theta"])
        self.embed_tokens = nn.Embedding(sizes["vocab_size"], sizes["hidden_size"])
        self.layers = nn.ModuleList(DecoderLayer(number, config) for number in range(sizes["layers"]))
        self.norm = nn.RMSNorm(sizes["hidden_size"], eps=sizes["rms_norm_epsilon"])
        self.rotary_emb = Rotary(latent["rotary"] if latent else sizes["head_dim"], config["theta"])


class TwoViewsOfExperts(nn.Module):
    """The whole model, with the interface of transformers' models of pictures and text.

    config: its sizes, as a family's stock_layout gives them.
    """

    unused = ("vision.attn_pool.",)
    """Name beginnings of tensors that it does not take."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        sizes, vision = config["decoder"], config["vision"]
        hidden = sizes["hidden_size"]
        self.config = SimpleNamespace(image_token_id=config["image_token_id"])
        self.vision = VisionModel(vision)
        steps = [nn.Linear(4 * vision["width"], hidden), nn.GELU(), nn.Linear(hidden, hidden)]
        self.projector = nn.ModuleDict({"layers": nn.Sequential(*steps)})
        self.image_newline, self.view_seperator = (nn.Parameter(torch.zeros(hidden)) for _ in range(2))
        decoder, head = Decoder(config), nn.Linear(hidden, sizes["vocab_size"], bias=False)
        self.language = nn.ModuleDict({"model": decoder, "lm_head": head})

    @staticmethod
    def from_pretrained(
        source: None, config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor], **options: Any
    ) -> TwoViewsOfExperts:
        """A model with these weights, in float32, with the interface of transformers.

        Raises:
            RuntimeError: the weights are another model's.
        """
        model = TwoViewsOfExperts(config)
        taken = {name: tensor.float() for name, tensor in state_dict.items() if not name.startswith(model.unused)}
        if config["decoder"]["tied_embeddings"]:
            taken.setdefault("language.lm_head.weight", taken["language.model.embed_tokens.weight"])
        model.load_state_dict(taken, assign=True)
        return model

    @property
    def model(self) -> TwoViewsOfExperts:
        """The object with language_model and get_image_features."""
        return self

    @property
    def language_model(self) -> nn.Module:
        """The decoder."""
        return self.language["model"]

    @property
    def lm_head(self) -> nn.Module:
        """Rows [rows, hidden] to logits."""
        return self.language["lm_head"]

    def forward(
        self,
        input_ids: torch.Tensor,
        output_attentions: bool = False,
        use_cache: bool = False,
        **pictures: torch.Tensor,
    ) -> SimpleNamespace:
        """Logits [1, rows, vocab] of tokens [1, rows], in one call, and by layer to what the rows attend.

        pictures: the inputs of get_image_features.
        """
        decoder: Any = self.language_model
        x, rows = decoder.embed_tokens(input_ids), input_ids.shape[1]
        x[input_ids == self.config.image_token_id] = torch.cat(self.get_image_features(**pictures).pooler_output)
        angles = decoder.rotary_emb(x, torch.arange(rows)[None])
        mask = torch.full((rows, rows), torch.finfo(torch.float32).min).triu(1)[None, None]
        cache = transformers.DynamicCache(config=decoder.config)
        attentions: list[torch.Tensor] = []
        for layer in decoder.layers:
            hook = layer.self_attn.register_forward_hook(lambda module, given, gave: attentions.append(gave[1]))
            x = layer(x, mask, angles, cache)
            hook.remove()
        return SimpleNamespace(logits=self.lm_head(decoder.norm(x)), attentions=attentions)

    def get_image_features(self, pixel_values: torch.Tensor, tile_shapes: torch.Tensor) -> SimpleNamespace:
        """Visual tokens [visual, hidden] of each picture, as pooler_output.

        pixel_values: [tiles, 3, pixels, pixels], of all pictures. tile_shapes: columns and rows of each one's tiles.
        """
        features = self.vision(pixel_values)
        odd = features.shape[-1] % 2
        blocks = functional.unfold(functional.pad(features, (0, odd, 0, odd)), 2, stride=2)
        side = (features.shape[-1] + odd) // 2
        tiles = self.projector["layers"](blocks.mT).unflatten(1, (side, side))
        found, first = [], 0
        for columns, rows in tile_shapes.tolist():
            detail = tiles[first + 1 : first + 1 + rows * columns].unflatten(0, (rows, columns))
            detail = detail.transpose(1, 2).flatten(2, 3).flatten(0, 1)
            parts = [self._with_row_ends(tiles[first]), self.view_seperator[None], self._with_row_ends(detail)]
            found.append(torch.cat(parts))
            first += 1 + rows * columns
        return SimpleNamespace(pooler_output=found)

    def _with_row_ends(self, view: torch.Tensor) -> torch.Tensor:
        """A view [rows, columns, hidden] row by row, with a separator behind each row."""
        ends = self.image_newline.expand(len(view), 1, -1)
        return torch.cat([view, ends], 1).flatten(0, 1)

"""Qwen2-VL in PyTorch, batched, with explicit visibility: to train a small one, and to evaluate it.

Parameters carry the names of Qwen2-VL's checkpoints, so that a state dict is a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samples.spatial.language import TOKEN, VOCABULARY

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "hidden_size": 256,
    "intermediate_size": 528,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 100.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "max_position_embeddings": 4096,
    "max_window_layers": 8,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
    "vocab_size": VOCABULARY,
    "bos_token_id": TOKEN["<|endoftext|>"],
    "eos_token_id": TOKEN["<|im_end|>"],
    "vision_start_token_id": TOKEN["<|vision_start|>"],
    "vision_end_token_id": TOKEN["<|vision_end|>"],
    "vision_token_id": TOKEN["<|vision_pad|>"],
    "image_token_id": TOKEN["<|image_pad|>"],
    "video_token_id": TOKEN["<|video_pad|>"],
    "vision_config": {
        "model_type": "qwen2_vl",
        "depth": 5,
        "embed_dim": 192,
        "hidden_size": 256,
        "num_heads": 6,
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
    },
}
"""config.json of Spatial-VL. The small rope_theta gives 60 positions angles that differ."""
PATCH, MERGE, CHANNELS = 14, 2, 3
EPSILON = 1e-6


@dataclass(frozen=True)
class Angles:
    """Cosines and sines of rotary angles, [B, 1, rows, head_dim], both halves of a head the same."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate x [B, heads, rows, head_dim] by halves."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-second, first], dim=-1) * self.sin


def vision_angles(rows: int, columns: int, head_dim: int, device: torch.device) -> Angles:
    """Angles of the patches of a picture of rows x columns visual tokens, in the order of `patches_of`."""
    high, wide = torch.meshgrid(torch.arange(rows * MERGE), torch.arange(columns * MERGE), indexing="ij")
    order = torch.stack([high, wide], dim=-1).view(rows, MERGE, columns, MERGE, 2).transpose(1, 2).reshape(-1, 2)
    quarter = head_dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    angles = (order[:, :, None] * frequencies).flatten(1).repeat(1, 2)[None, None].to(device)
    return Angles(angles.cos(), angles.sin())


def text_angles(positions: Tensor, config: Mapping[str, Any]) -> Angles:
    """M-RoPE angles. positions: [3, B, rows]. Source: arXiv 2409.12191, section 2.1."""
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    half = head_dim // 2
    frequencies = config["rope_theta"] ** (-torch.arange(half, device=positions.device).float() / half)
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(config["rope_scaling"]["mrope_section"]))
    angles = (positions[axis.to(positions.device)].permute(1, 2, 0) * frequencies).repeat(1, 1, 2)[:, None]
    return Angles(angles.cos(), angles.sin())


def patches_of(pixels: Tensor) -> Tensor:
    """Patches [B, N, 3 * 14 * 14] of pictures [B, 3, height, width], the four patches of a visual token together."""
    batch, channels, height, width = pixels.shape
    step = PATCH * MERGE
    parts = pixels.view(batch, channels, height // step, MERGE, PATCH, width // step, MERGE, PATCH)
    return parts.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(batch, -1, channels * PATCH * PATCH)


class RmsNorm(nn.Module):
    """Root-mean-square norm in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)).type_as(x)


class VisionAttention(nn.Module):
    """Every patch of a picture sees every other."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        """x: [B, N, size]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(angles.rotate(q).type_as(v), angles.rotate(k).type_as(v), v)
        return self.proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class VisionMlp(nn.Module):
    """Two layers with the quick GELU between."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(size, inner), nn.Linear(inner, size)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, size]."""
        inner = self.fc1(x)
        return self.fc2(inner * torch.sigmoid(1.702 * inner))  # type: ignore[no-any-return]


class VisionBlock(nn.Module):
    """One layer of the encoder."""

    def __init__(self, size: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size, EPSILON), nn.LayerNorm(size, EPSILON)
        self.attn, self.mlp = VisionAttention(size, heads), VisionMlp(size, inner)

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        """x: [B, N, size]."""
        x = x + self.attn(self.norm1(x), angles)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class PatchEmbed(nn.Module):
    """A linear map of patches; a still picture fills both frames of a temporal patch."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(CHANNELS, size, (2, PATCH, PATCH), bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """patches: [B, N, 3 * 14 * 14]."""
        return F.linear(patches, self.proj.weight.sum(dim=2).flatten(1))


class Merger(nn.Module):
    """Four neighbouring patches become one visual token."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        inner = size * MERGE**2
        self.ln_q = nn.LayerNorm(size, EPSILON)
        self.mlp = nn.Sequential(nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, size] to [B, N / 4, hidden]."""
        return self.mlp(self.ln_q(x).unflatten(1, (-1, MERGE**2)).flatten(2))  # type: ignore[no-any-return]


class Visual(nn.Module):
    """The vision encoder."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        size, heads = config["embed_dim"], config["num_heads"]
        self.head_dim = size // heads
        self.patch_embed = PatchEmbed(size)
        self.blocks = nn.ModuleList(
            VisionBlock(size, heads, size * config["mlp_ratio"]) for _ in range(config["depth"])
        )
        self.merger = Merger(size, config["hidden_size"])

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pictures of one size [B, 3, height, width] to [B, L, hidden]."""
        rows, columns = (side // (PATCH * MERGE) for side in pixels.shape[2:])
        angles = vision_angles(rows, columns, self.head_dim, pixels.device)
        x = self.patch_embed(patches_of(pixels))
        for block in self.blocks:
            x = block(x, angles)
        return self.merger(x)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        size, self.heads, self.kv_heads = (
            config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
        )
        kv_size = size // self.heads * self.kv_heads
        self.q_proj, self.k_proj = nn.Linear(size, size), nn.Linear(size, kv_size)
        self.v_proj, self.o_proj = nn.Linear(size, kv_size), nn.Linear(size, size, bias=False)

    def project(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, heads or kv_heads, rows, head_dim], the first two rotated."""
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        return angles.rotate(q).type_as(v), angles.rotate(k).type_as(v), v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """Attend. k, v: [B, kv_heads, slots, head_dim]; visible: bool [B, 1, rows, slots]."""
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(size, inner, bias=False), nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, rows, size]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """One layer of the decoder."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        size = config["hidden_size"]
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(size), RmsNorm(size)
        self.self_attn, self.mlp = Attention(config), Mlp(size, config["intermediate_size"])

    def forward(self, x: Tensor, angles: Angles, visible: Tensor) -> Tensor:
        """A run without a cache."""
        x = x + self.self_attn.mix(*self.self_attn.project(self.input_layernorm(x), angles), visible)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = RmsNorm(config["hidden_size"])


class Network(nn.Module):
    """The whole model, with tied embeddings."""

    def __init__(self, config: Mapping[str, Any] = CONFIG) -> None:
        super().__init__()
        self.config = config
        self.visual, self.model = Visual(config["vision_config"]), Decoder(config)

    @property
    def layers(self) -> list[Layer]:
        """The decoder's layers."""
        return [layer for layer in self.model.layers if isinstance(layer, Layer)]

    def forward(self, embeds: Tensor, positions: Tensor, visible: Callable[[int], Tensor]) -> Tensor:
        """Last hidden states, normed.

        embeds: [B, S, hidden]; positions: [3, B, S]; visible: a layer's number to bool [B, 1, S, S].
        """
        angles = text_angles(positions, self.config)
        for number, layer in enumerate(self.layers):
            embeds = layer(embeds, angles, visible(number))
        return self.model.norm(embeds)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits over the vocabulary."""
        return F.linear(hidden, self.model.embed_tokens.weight)

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Seeded random weights: unit gain, smaller where a branch rejoins the residual stream."""
        generator = torch.Generator().manual_seed(seed)
        depth = {"visual": len(self.visual.blocks), "model": len(self.model.layers)}
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(float(not name.endswith("bias")))
                continue
            scale = 0.05 if "embed_tokens" in name else parameter[0].numel() ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight", "fc2.weight")):
                scale *= (2 * depth[name.split(".")[0]]) ** -0.5
            if name.endswith("merger.mlp.2.weight"):
                scale *= 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)

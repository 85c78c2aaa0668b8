"""The meaning of the axes of the graphs' tensors."""

from __future__ import annotations

AXES = {
    "B": "frames of one size, or a picture's tiles, in `vision`; the literal 1 in `prefix` and `decoder`",
    "S": "rows of this run: text and visual tokens",
    "L": "visual tokens of this run",
    "T": "other tokens of this run; S = L + T",
    "Q": "text rows that vote for visual tokens, at least 1",
    "M": "rows kept: M = T + keep_count",
    "P": "rows of a cache: its exact length, or a buffer's capacity",
    "W": "the same for a layer whose cache keeps every row",
    "H": "tokens of thumbnails in this run: the last tile of each picture, or its first view with the separators",
    "V": "those of them that show a picture, without separators and filling",
    "R": "rows for which logits are computed",
    "seeds": "visual tokens chosen as seeds: max(1, round(0.01 L)), half to even. With tiles, H replaces L. With "
    "views, V replaces L, and the number may be 0",
    "patches": "patches of one frame",
    "visual": "visual tokens of one frame: patches / merge_size^2, or tile_side^2. With views, of one picture",
    "height": "pixels along one side of a tile, for vision encoders of fixed size",
    "axes": "axes of a position: 3 for M-RoPE (time, row, column), else 1",
    "patch_dim": "values of one patch: channels x frames x height x width",
    "hidden": "hidden size",
    "kv_heads": "heads of keys and values",
    "head_dim": "values of one head of queries or keys",
    "value_dim": "values of one head of values",
    "vocab": "vocabulary size",
}

"""What the axes of the graphs' tensors are."""

from __future__ import annotations

AXES = {
    "B": "frames of one size, or a picture's tiles, in `vision`; the literal 1 in `prefix` and `decoder`",
    "S": "rows of this run: text and visual tokens",
    "L": "visual tokens of this run",
    "T": "the other tokens of this run; S = L + T",
    "Q": "text rows that vote for visual tokens, at least 1",
    "M": "rows kept: M = T + keep_count",
    "P": "rows of a cache: its exact length, or a buffer's capacity",
    "W": "the same of a layer whose cache keeps every row",
    "H": "thumbnail tokens of this run: the last tile of each picture, or its first view with the separators",
    "V": "thumbnail tokens of this run that show a picture, neither separators nor filling",
    "R": "rows whose logits are wanted",
    "seeds": "visual tokens chosen as seeds: max(1, round(0.01 L)), half to even; of H where there are tiles; "
    "of V where there are views, and then it may be 0",
    "patches": "patches of one frame",
    "visual": "visual tokens of one frame: patches / merge_size^2, or tile_side^2; where there are views, of a picture",
    "height": "pixels along a side of the fixed-size vision encoder's input",
    "axes": "axes of a position: 3 for M-RoPE (time, row, column), else 1",
    "patch_dim": "values of one patch: channels x frames x height x width",
    "hidden": "hidden size",
    "kv_heads": "heads of keys and values",
    "head_dim": "values of one head of queries or keys",
    "value_dim": "values of one head of values",
    "vocab": "vocabulary size",
}

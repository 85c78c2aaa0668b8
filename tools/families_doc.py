"""docs/families.md: what every family is, and what pruning saves with its published checkpoints."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from ivc_export import families
from ivc_export.contract.names import GraphName
from ivc_export.exporter.estimate import TEXT, Export, Size
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.family import Family
from tools.jetson_doc import jetson_lines

CONFIGS = Path(__file__).parent.parent / "tests" / "data" / "configs"
PICTURE = Size(1024, 768)
DECODER: tuple[GraphName, ...] = ("prefix", "decoder")


def families_doc() -> str:
    """The whole file."""
    width, height = PICTURE
    lines = [
        "# Families",
        "",
        "This page is generated from `ivc_export/families/` and the sizes of the published checkpoints, in "
        "`tests/data/configs/`: change those, then run `make generate`.",
        "",
        "The first table lists the checkpoints, with their selection layer and what pruning saves. The savings are "
        "computed, not measured, in the same way as `ivc-export --dry-run` computes them. The prompt has one picture "
        f"of {width} x {height} pixels and {TEXT} text tokens, at the family's default ratio.",
        "",
        "| column | meaning |",
        "| --- | --- |",
        "| k | the selection layer if the user names none. A * marks one that nobody has measured: none is published "
        "for that model, so it is taken in proportion from a model that has one |",
        "| ratio | the default fraction of visual tokens that is kept |",
        f"| visual tokens | those of the picture, at the default `--max-visual` of {ExportRecipe.max_visual:,} |",
        "| prefill saved | arithmetic of prefix and decoder in the prefill. The vision encoder and the layers below k "
        "see every token |",
        "| cache saved | bytes of keys and values in 16 bits |",
        "",
        "| `--model` | checkpoint | model_type | layers | k | ratio | visual tokens | prefill saved | cache saved |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    found = [families.of(name) for name in families.names()]
    lines += [row(family, alias, hub_id) for family in found for alias, hub_id in family.hub.items()]
    lines += ["", *jetson_lines()]
    for family in found:
        about = (importlib.import_module(f"ivc_export.families.{family.model_type}").__doc__ or "").strip()
        lines += ["", f"## {family.model_type}", "", about]
    return "\n".join(lines) + "\n"


def row(family: Family, alias: str, hub_id: str) -> str:
    """One checkpoint's line."""
    config = json.loads((CONFIGS / f"{alias}.json").read_text(encoding="utf-8"))
    model = family.read(config, None)
    layer, ratio = family.default_layer(model.decoder), family.default_ratio
    pictures = family.pictures(model.preprocessing.capped(ExportRecipe.max_visual))
    planned = Export.planned(family, model, pictures, layer.layer, layer.calibrated, "bfloat16")
    (picture,) = planned.estimate(ratio, [PICTURE]).pictures
    pruned, full = (sum(cost.flops[name] for name in DECODER) for cost in (picture.pruned, picture.unpruned))
    kept, cache = picture.pruned.cache_bytes, picture.unpruned.cache_bytes
    cells = [
        f"`{alias}`",
        hub_id,
        family.model_type,
        str(model.decoder.layers),
        f"{layer.layer}{'' if layer.calibrated else '*'}",
        f"{ratio:g}",
        f"{picture.visual_tokens:,}",
        f"{(full - pruned) / 1e12:.2f} of {full / 1e12:.2f} TFLOP ({picture.saved(*DECODER):.0%})",
        f"{(cache - kept) / 2**20:.1f} of {cache / 2**20:.1f} MiB ({picture.saved_cache:.0%})",
    ]
    return f"| {' | '.join(cells)} |"

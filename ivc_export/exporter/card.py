"""Writes the card of a bundle on the hub: the base model, how the bundle prunes, and how exact it is."""

from __future__ import annotations

from collections import Counter

from pydantic import Field

from ivc_export.bundle.bundle import Bundle
from ivc_export.bundle.recording import identity
from ivc_export.contract.manifest import Manifest
from ivc_export.contract.origin import Origin
from ivc_export.errors import UserError
from ivc_export.verify.baseline import StoredError, StoredErrors, read_stored

TAGS = ("ivc-prune", "visual-token-pruning", "onnx", "onnxruntime", "tensorrt")
PIPELINE = "image-text-to-text"
REPORT = "report/parity.json"


class CheckedError(StoredError):
    """A line of parity.json."""

    tolerance: float | None = Field(ge=0)
    passed: bool


class Checked(StoredErrors):
    """A parity.json."""

    comparisons: tuple[CheckedError, ...]
    kept_tokens: int
    passed: bool


def read_checked(bundle: Bundle) -> Checked | None:
    """Read the report of ivc-check in a bundle. None if there is none.

    Raises:
        UserError: the report is damaged, or of another model.
    """
    path = bundle.folder / REPORT
    if not path.exists():
        return None
    found: Checked = read_stored(path, Checked, "ivc-check --against")
    if found.model != identity(bundle.manifest):
        raise UserError(f"{path} is about another model: check the bundle again with ivc-check --against, or remove it")
    return found


def model_card(bundle: Bundle, origin: Origin, checked: Checked | None, repo: str) -> str:
    """README.md of the bundle at `repo`."""
    from huggingface_hub import ModelCardData  # takes a while to load

    m = bundle.manifest
    data = ModelCardData(
        base_model=origin.repo,
        license=origin.license,
        license_name=origin.license_name,
        license_link=origin.license_link,
        library_name="ivc-export",
        pipeline_tag=PIPELINE,
        tags=[*dict.fromkeys((*TAGS, *origin.tags))],
    )
    lines = [
        *("---", data.to_yaml(), "---", ""),
        *(f"# {repo.partition('/')[2]}", ""),
        f"{'A vision-language model' if origin.repo is None else linked(origin.repo)}, exported to ONNX with the "
        f"pruning of visual tokens inside. Layers from {m.selection_layer} on keep {m.default_ratio:.0%} of the visual "
        f"tokens. Made by ivc-export {m.versions['ivc-export']}.",
        *("", "| | |", "| --- | --- |"),
        *(f"| {name} | {value} |" for name, value in card_rows(m, origin)),
        *("", "## Parity with PyTorch", "", *parity(checked)),
        *("", "## Use", "", "```bash", 'pip install "ivc-export[cpu]"'),
        *(f'ivc-run {repo} --image picture.jpg --prompt "What is this?"', "```", ""),
    ]
    return "\n".join(lines)


def card_rows(m: Manifest, origin: Origin) -> list[tuple[str, str]]:
    """Rows of the card's first table."""
    formats = Counter(layer.format for layer in m.weight_formats.values())
    packed = ", ".join(f"{count} layers in {name}" for name, count in sorted(formats.items()))
    measured = (
        "It was calibrated" if m.calibrated else "It was not calibrated, so another layer may suit the model better"
    )
    found = [
        ("base model", None if origin.repo is None else linked(origin.repo)),
        ("commit of the base model", origin.commit),
        ("licence of the base model", licence(origin)),
        ("family", m.family),
        ("pruning method", m.selection.method),
        ("visual tokens are scored by", m.selection.scored if m.selection.method == "ivc-prune" else None),
        (
            "selection layer k",
            f"{m.selection_layer} of {m.decoder.layers}. Layers below it process every token. {measured}",
        ),
        ("ratio", f"{m.default_ratio:g} of the visual tokens are kept by default. Each run can set another ratio"),
        ("visual tokens of a picture", f"at most {m.max_visual}"),
        ("dtype", m.dtype),
        ("packed weights", packed or None),
        ("graphs", m.lowering),
    ]
    return [(name, value) for name, value in found if value is not None]


def licence(origin: Origin) -> str | None:
    """The base model's licence in words. None if it is not known."""
    parts = [part for part in (origin.license_name or origin.license, origin.license_link) if part]
    return ", ".join(part.replace("|", " ") for part in parts) or None


def linked(repo: str) -> str:
    """A model's name as a link to it."""
    return f"[{repo}](https://huggingface.co/{repo})"


def parity(checked: Checked | None) -> list[str]:
    """Lines on how exact the bundle is."""
    if checked is None:
        return [
            "Not checked. `ivc-check BUNDLE --against CHECKPOINT` compares the bundle with the base model on PyTorch."
        ]
    seed = "" if checked.method_seed is None else f" (seed {checked.method_seed})"
    lines = [
        f"`ivc-check` compared the bundle with the base model on PyTorch in float32: {checked.backend}, "
        f"{checked.dtype}, {checked.method}{seed} at ratio {checked.ratio:g}, {checked.kept_tokens} of "
        f"{checked.visual_tokens} visual tokens kept. {'Passed' if checked.passed else '**Failed**'}.",
        *("", "| | largest error | tolerance | |", "| --- | --- | --- | --- |"),
    ]
    for one in checked.comparisons:
        error, tolerance = ("equal" if x is None else f"{x:.1e}" for x in (one.error, one.tolerance))
        if not one.passed and one.error is None:
            error = "not equal"
        name = one.name.replace("|", " ")
        lines.append(f"| {name} | {error} | {tolerance} | {'ok' if one.passed else '**failed**'} |")
    return lines

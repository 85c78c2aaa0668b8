"""Tables of settings: the keys of a checkpoint's JSON files that change what its model computes.

A table is a record with one field for each key. Its default is the value that transformers takes if the key is missing
or null. Its type and bounds are the values that this version supports. Any other value is refused in one sentence. A
key that no table names changes nothing.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ivc_export.contract.preprocessing import Resample
from ivc_export.contract.records import Factor, Level
from ivc_export.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self  # Python 3.11's own

CONFIG = "config.json"
PROCESSOR = "the image processor's settings"
VIDEO_PROCESSOR = "the video processor's settings"

RESAMPLE: tuple[Resample, ...] = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Pillow's filters by their numbers."""


def square(value: Any) -> Any:
    """One length for a list of equal ones. Other values stay unchanged."""
    if not isinstance(value, list | tuple):
        return value
    if not value or any(length != value[0] for length in value):
        raise PydanticCustomError("square", "only squares are supported")
    return value[0]


def for_each_channel(value: Any) -> Any:
    """A number three times. Other values stay unchanged."""
    return (value,) * 3 if isinstance(value, int | float) else value


def backendless(value: Any) -> Any:
    """The name of an image processor's class, without the suffix for its backend."""
    return value.removesuffix("Fast").removesuffix("Pil") if isinstance(value, str) else value


IntList = Annotated[tuple[int, ...], Strict(False)]
Square = BeforeValidator(square)
Means = Annotated[tuple[Level, Level, Level], Strict(False), BeforeValidator(for_each_channel)]
Deviations = Annotated[tuple[Factor, Factor, Factor], Strict(False), BeforeValidator(for_each_channel)]
Backendless = BeforeValidator(backendless)

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Settings(BaseModel):
    """The base class of all tables."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="ignore", allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, content: Any) -> Any:
        """Treat null as a missing key, unless the table gives it a meaning."""
        if not isinstance(content, Mapping):
            raise PydanticCustomError("object", "it should be an object")
        means = {name for name, field in cls.model_fields.items() if types.NoneType in get_args(field.annotation)}
        return {key: value for key, value in content.items() if value is not None or key in means}

    @classmethod
    def read(cls, content: object, file: str = CONFIG, part: str = "") -> Self:
        """The values in `content`, with defaults for the rest.

        part: the part of the file, such as "vision_config".

        Raises:
            UserError: a value is not supported.
        """
        try:
            return cls.model_validate({} if content is None else content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, (*([part] if part else []), *first["loc"]))) or "the content"
            if first["type"] == "missing":
                raise UserError(f"{file} has no {key}: give the checkpoint's own {file}") from error
            known = f"this version supports {first['ctx']['expected']}" if first["type"] == "literal_error" else None
            refuse(key, first["input"], file, known or first["msg"].replace("Input", "it"), error)


class PictureSettings(Settings):
    """The keys of all image processors. Without rescaling and normalisation, pixels keep their levels.

    A switch that is null is off.
    """

    do_resize: Literal[True] = True
    resample: Literal[0, 1, 2, 3, 4, 5] = 3
    do_rescale: bool = True
    rescale_factor: Factor = 1 / 255
    do_normalize: bool = True
    image_mean: Means = CLIP_MEAN
    image_std: Deviations = CLIP_STD
    do_convert_rgb: Literal[True] = True

    @model_validator(mode="before")
    @classmethod
    def _null_switches_are_off(cls, content: Any) -> Any:
        if not isinstance(content, Mapping):
            return content
        return {key: False if value is None and key.startswith("do_") else value for key, value in content.items()}

    @property
    def scaling(self) -> dict[str, Any]:
        """The fields of contract.manifest.Scaling."""
        return {
            "rescale_factor": self.rescale_factor if self.do_rescale else 1.0,
            "mean": self.image_mean if self.do_normalize else (0.0, 0.0, 0.0),
            "std": self.image_std if self.do_normalize else (1.0, 1.0, 1.0),
            "resample": RESAMPLE[self.resample],
        }


One = Annotated[float, Field(ge=1, le=1)]


def refuse(key: str, value: object, file: str, known: str, cause: Exception | None = None) -> NoReturn:
    """Raise the sentence about a value that is not supported.

    known: what is supported, such as "this version supports 'silu'".
    """
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    raise UserError(f"{key} {text} of {file} is not supported: {known}") from cause


def inconsistent(problem: str) -> UserError:
    """The sentence on values of config.json that do not fit each other."""
    return UserError(f"config.json is inconsistent ({problem}): give the checkpoint's own config.json")


def required(config: Mapping[str, Any], key: str) -> Any:
    """`config[key]`.

    Raises:
        UserError: the key is missing.
    """
    if config.get(key) is None:
        raise UserError(f"config.json has no {key}: give the checkpoint's own config.json")
    return config[key]


def edges(size: Any, one_is_square: bool) -> dict[str, int]:
    """The edges of an image processor's `size` by name. It may be an object, two numbers, or one number.

    one_is_square: whether one number is height and width, or else the shorter side.

    Raises:
        UserError: it has none of these forms.
    """
    if isinstance(size, Mapping):
        named = {key: value for key, value in size.items() if value is not None}
    elif isinstance(size, list | tuple) and len(size) == 2:
        named = {"height": size[0], "width": size[1]}
    else:
        named = {"height": size, "width": size} if one_is_square else {"shortest_edge": size}
    if not named or not all(type(value) is int and 0 < value < 2**31 for value in named.values()):
        refuse("size", size, PROCESSOR, "give edges in pixels, above 0")
    return named


def check_edges(key: str, size: Any, wanted: Mapping[str, int], why: str) -> None:
    """Check that a `size` or `crop_size`, if there is one, is what the model's encoder takes.

    wanted: the edges that it must name; one number may stand for them.

    Raises:
        UserError: it is another.
    """
    if size is not None and edges(size, one_is_square="height" in wanted) != wanted:
        refuse(key, size, PROCESSOR, f"{why}, which is {dict(wanted)}")


def check_divides(*facts: tuple[str, int, int]) -> None:
    """Check for each (name, whole, part) that the part divides the whole.

    Raises:
        UserError: one does not.
    """
    for what, whole, part in facts:
        if whole % part:
            raise inconsistent(f"{what} is {whole}, which is not divisible by {part}")

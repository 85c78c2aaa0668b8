from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ivc_export.cli import Parser, build, check, export
from ivc_export.dtypes import FLOATS, cast
from ivc_export.errors import UserError

END = 65520.0  # halfway from 65504, float16's largest, to the next power of two
BFLOAT16_END = 3.3961775e38


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_values_round_as_numpy_rounds_them(stored: Any, name: Any) -> None:
    values = (np.random.default_rng(0).standard_normal(1000) * 100).astype(FLOATS[stored].numpy)
    found = cast(values, name, "x", "mend it")
    assert found.dtype == FLOATS[name].numpy
    np.testing.assert_array_equal(found, values.astype(np.float32).astype(FLOATS[name].numpy))
    assert cast(found, name, "x", "mend it") is found


@pytest.mark.parametrize(
    ("value", "dtype", "sentence"),
    [
        (END, "float16", "x has values up to 6.552e[+]04, but the largest value of float16 is 65504: mend it"),
        (-1e5, "float16", "x has values up to 1e[+]05"),
        (ml_dtypes.bfloat16(1e6), "float16", "x has values up to 9.994e[+]05"),
        (np.float64(1e300), "float16", "x has values up to 1e[+]300"),
        (BFLOAT16_END, "bfloat16", "but the largest value of bfloat16 is 3.3895e[+]38"),
    ],
)
def test_values_that_would_become_infinite_are_refused(value: Any, dtype: str, sentence: str) -> None:
    """Also beside values that are no numbers, which compare with nothing."""
    for others in ([0.0], [np.nan, np.inf]):
        values = np.array([value, *others], getattr(value, "dtype", np.float32))
        with pytest.raises(UserError, match=sentence):
            cast(values, dtype, "x", "mend it")


def test_values_that_round_into_the_range_are_kept() -> None:
    values = np.array([np.nextafter(np.float32(END), np.float32(0)), -65519, np.inf, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(cast(values, "float16", "x", ""), np.array([65504, -65504, np.inf, -np.inf, np.nan]))
    assert cast(np.array([], np.float32), "float16", "x", "").size == 0
    np.testing.assert_array_equal(cast(np.array([70000], np.int64), np.dtype(np.int32), "x", ""), [70000])


@pytest.mark.parametrize(("short", "name"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")])
def test_commands_take_short_names_for_long_ones(short: str, name: str) -> None:
    options: list[tuple[Parser, list[str]]] = [
        (export.parser(), ["--model", "m", "--dtype"]),
        (build.parser(), ["b", "--dtype"]),
    ]
    if name != "bfloat16":
        options.append((check.parser(), ["b", "--precision"]))
    for parser, given in options:
        option = given[-1].removeprefix("--")
        assert vars(parser.parse_args([*given, short])) == vars(parser.parse_args([*given, name]))
        assert vars(parser.parse_args([*given, short]))[option] == name

"""Stacks matrices that a checkpoint stores apart and that a graph takes as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ivc_export.checkpoint.folder import StoredTensor
from ivc_export.checkpoint.formats.weight_format import DerivedTensor
from ivc_export.checkpoint.weights import Weights
from ivc_export.errors import UserError


@dataclass(frozen=True)
class Stack:
    """Matrices of one shape, stacked along their rows.

    name, parts: canonical. shape: the stored shape of a part. transposed: whether each part is transposed first.
    """

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, int]
    transposed: bool

    def derived(self, weights: Weights) -> DerivedTensor:
        """The stacked tensor. No more than one part is in memory at a time.

        Raises:
            UserError: a part is missing, has another shape, or has another dtype.
        """
        sources = tuple(weights.find(part, self.shape) for part in self.parts)
        rows, columns = self.shape[::-1] if self.transposed else self.shape
        shape = (len(sources) * rows, columns)
        return DerivedTensor(self.name, weights.dtype, shape, sources, lambda: self._pieces(sources))

    def _pieces(self, sources: Iterable[StoredTensor]) -> Iterator[npt.NDArray[Any]]:
        for source in sources:
            if self.transposed:
                yield np.ascontiguousarray(np.concatenate(list(source.rows())).T)
            else:
                yield from source.rows()

    def split(self, stacked: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """The parts of such a tensor, by their names."""
        found = np.split(stacked, len(self.parts))
        return {
            name: np.ascontiguousarray(part.T if self.transposed else part)
            for name, part in zip(self.parts, found, strict=True)
        }


def with_stacks(weights: Weights, stacks: Iterable[Stack]) -> Weights:
    """The weights with stacks in the place of their parts.

    Raises:
        UserError: see Stack.derived; or parts are not plain floats.
    """
    stacks = list(stacks)
    for part in (part.removesuffix(".weight") for stack in stacks for part in stack.parts):
        if part in weights.formats:
            raise UserError(
                f"the checkpoint stores experts as {weights.formats[part].name} (such as {part}), which this "
                "version does not read: give the same model with experts in floats"
            )
    derived: Mapping[str, DerivedTensor] = {stack.name: stack.derived(weights) for stack in stacks}
    taken = {(source.file, source.name) for one in derived.values() for source in one.sources}
    others = {name: tensor for name, tensor in weights.tensors.items() if (tensor.file, tensor.name) not in taken}
    return replace(weights, tensors=others, derived={**weights.derived, **derived})

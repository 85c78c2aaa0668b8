"""Ways to choose visual tokens, one record each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ivc_export.contract.manifest import Manifest, SelectionRule
from ivc_export.errors import UserError
from ivc_export.graph.builder import Graph
from ivc_export.selection.baselines import foreground_priorities, random_priorities
from ivc_export.selection.ivc_prune import Floats, Ints, Selected, ivc_priorities, select
from ivc_export.selection.operators import select_tokens


@dataclass(frozen=True)
class SelectionMethod:
    """A way to choose visual tokens.

    host_plan: `ivc_priority` of a run with pictures, float32 [L], of the manifest, the visual tokens' positions int32
    [axes, L], the numbers of tokens that IVC tokens are chosen within, and a seed. A priority is 0, or at least 2;
    larger ones come first. operator: adds what chooses to the prefix graph. numpy: the same choice in NumPy.
    kinds: what kept tokens are, beside seeds: first those with a priority, last those without. drawn: whether the seed
    matters.

    Methods of one operator differ in priorities alone, so that one bundle serves them all.
    """

    host_plan: Callable[[Manifest, Ints, Sequence[int], int], Floats]
    kinds: tuple[str, ...]
    drawn: bool = False
    operator: Callable[[Graph, SelectionRule, ir.Value], tuple[ir.Value, ir.Value, ir.Value]] = select_tokens
    numpy: Callable[..., Selected] = select


METHODS = {
    "ivc-prune": SelectionMethod(ivc_priorities, kinds=("ivc", "foreground")),
    "foreground": SelectionMethod(foreground_priorities, kinds=("foreground",)),
    "random": SelectionMethod(random_priorities, kinds=("random",), drawn=True),
}


@dataclass(frozen=True)
class Method:
    """The method of a run. seed: of a drawn one, from 0 on and below 2^31.

    Raises:
        UserError: there is no such method, or the seed is out of range.
    """

    name: str = "ivc-prune"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise UserError(f"there is no method {self.name!r}: choose one of {', '.join(METHODS)}")
        if not 0 <= self.seed < 1 << 31:
            raise UserError(f"method seed {self.seed} is out of range: give 0 to {(1 << 31) - 1}")

    @property
    def record(self) -> SelectionMethod:
        """How it chooses."""
        return METHODS[self.name]

    @property
    def facts(self) -> dict[str, str | int | None]:
        """What reports say of it: `method`, and `method_seed`, which is None where nothing is drawn."""
        return {"method": self.name, "method_seed": self.seed if self.record.drawn else None}

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}" if self.record.drawn else self.name


IVC_PRUNE = Method()


def find_method(given: str | Method) -> Method:
    """A method by its name.

    Raises:
        UserError: there is none.
    """
    return given if isinstance(given, Method) else Method(given)

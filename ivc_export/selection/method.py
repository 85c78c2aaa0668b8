"""The selection methods, one record each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ivc_export.contract.manifest import Manifest, Selection
from ivc_export.errors import UserError
from ivc_export.selection.baselines import foreground_priorities, random_priorities
from ivc_export.selection.fastv import fastv_rule
from ivc_export.selection.ivc_prune import Blocks, Floats, Ints, ivc_priorities
from ivc_export.selection.operators import ATTENDED_OPERATOR, IVC_OPERATOR, Operator


@dataclass(frozen=True)
class SelectionMethod:
    """A way to choose visual tokens.

    host_plan: computes `ivc_priority` of a run with pictures, float32 [L], from the manifest, the visual tokens'
        positions int32 [axes, L], the blocks within which IVC tokens are chosen, and a seed. A priority is 0, or at
        least 2; larger ones come first.
    kinds: the kinds of kept tokens besides seeds: first those with a priority, last those without.
    drawn: whether the seed matters. operator: the operator in the prefix graph. exported_as: the method with which a
        bundle has to be exported. rule: gives the manifest's rule from a family's.

    Methods of one operator differ only in priorities, so one bundle serves them all.
    """

    host_plan: Callable[[Manifest, Ints, Blocks, int], Floats]
    kinds: tuple[str, ...]
    drawn: bool = False
    operator: Operator = IVC_OPERATOR
    exported_as: str = "ivc-prune"
    rule: Callable[[Selection], Selection] = lambda rule: rule

    @property
    def all_kinds(self) -> tuple[str, ...]:
        """All kinds of visual tokens."""
        seeds = ("seed",) if "seed_index" in self.operator.outputs else ()
        return (*seeds, *self.kinds, "pruned")


METHODS = {
    "ivc-prune": SelectionMethod(ivc_priorities, kinds=("ivc", "foreground")),
    "foreground": SelectionMethod(foreground_priorities, kinds=("foreground",)),
    "random": SelectionMethod(random_priorities, kinds=("random",), drawn=True),
    "fastv": SelectionMethod(
        foreground_priorities, kinds=("attended",), operator=ATTENDED_OPERATOR, exported_as="fastv", rule=fastv_rule
    ),
}


def exported_methods() -> tuple[str, ...]:
    """Methods with which a bundle can be exported. The others are chosen at run time."""
    return tuple(name for name, method in METHODS.items() if method.exported_as == name)


@dataclass(frozen=True)
class Method:
    """How a run chooses visual tokens.

    Attributes:
        name: "ivc-prune", "foreground", "random" or "fastv".
        seed: the seed of "random", from 0 on and below 2^31. The other methods draw nothing.

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
        """The method's record in METHODS."""
        return METHODS[self.name]

    @property
    def facts(self) -> dict[str, str | int | None]:
        """The entries of reports: `method`, and `method_seed`, which is None if nothing is drawn."""
        return {"method": self.name, "method_seed": self.seed if self.record.drawn else None}

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}" if self.record.drawn else self.name


IVC_PRUNE = Method()


def find_method(rule: Selection, given: str | Method | None) -> Method:
    """The method of a run on a bundle of this rule, by its name, or with a seed. None takes the bundle's own.

    Raises:
        UserError: there is no such method, or the bundle's graphs choose in another way.
    """
    method = given if isinstance(given, Method) else Method(rule.method if given is None else given)
    wanted = method.record.exported_as
    if wanted == rule.method:
        return method
    if rule.method == IVC_PRUNE.name:
        raise UserError(
            f"this bundle's graphs cannot select by {method.name}: export the model with ivc-export --method {wanted}"
        )
    raise UserError(
        f"this bundle was exported with --method {rule.method}, and its graphs select by that only: leave out "
        f"{method.name}, or export the model with ivc-export --method {wanted}"
    )

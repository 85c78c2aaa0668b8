"""The record that describes a runtime to commands, checks and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ivc_export.bundle.bundle import Bundle
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.runtime.interface import Session
from ivc_export.runtime.plan import Run
from ivc_export.runtime.probes import Ceilings, SelectionTimes
from ivc_export.runtime.tolerances import Tolerances


@dataclass(frozen=True)
class Backend:
    """A runtime, under the one name that every command and Python have for it.

    open: a bundle in it, `(bundle, **options)`; it imports what it needs itself. device: where that computes.
    tolerances: of its errors against the reference, by the dtype that it computes in.
    libraries: options of `open` that name a library, and what that is; commands have `--name LIB` for each.
    options: those that only Python has. exact: those of a session that is held against the reference.
    """

    name: str
    open: Callable[..., Session]
    device: Literal["cpu", "cuda"]
    tolerances: Mapping[FloatName, Tolerances] = field(default_factory=dict)
    libraries: Mapping[str, str] = field(default_factory=dict)
    options: frozenset[str] = frozenset()
    exact: Mapping[str, Any] = field(default_factory=dict)
    open_shown: Callable[..., Session] | None = None
    """As `open`, with every tensor that passes between the graphs in a prefill's Step; None where `open` does that."""
    check: Callable[..., None] = lambda bundle, **options: None
    """Raises UserError of what can be told without opening, `(bundle, **options)`."""
    before: Callable[[Bundle], str | None] = lambda bundle: None
    """What a user should know before a bundle opens."""
    after: Callable[[Session], str | None] = lambda session: None
    """What a user should know of an open session."""
    needs_capacity: bool = False
    """Whether it is fastest in caches of just the rows that an answer takes."""
    time_selection: Callable[[Session, Run, int], SelectionTimes] | None = None
    """Selection and compaction by themselves: of a session, a prefill's plan and the rows of the caches."""
    ceilings: Callable[[Session], Ceilings] | None = None
    """What its device does at best, measured by the runtime itself; None leaves that to onnxruntime."""

    def takes(self, option: str) -> bool:
        """Whether `open` has such an option."""
        return option in self.options or option in self.libraries

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Check that `open` has these options.

        Raises:
            UserError: it has not.
        """
        for option in options:
            if not self.takes(option):
                known = ", ".join(sorted({*self.options, *self.libraries})) or "none"
                raise UserError(f"{self.name} takes no {option}: leave it out (its options: {known})")

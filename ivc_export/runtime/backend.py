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
    """A runtime, under the name that commands and Python use.

    open: opens a bundle, `(bundle, **options)`; it imports what it needs itself. device: where the runtime computes.
    tolerances: of its errors against the reference, by the dtype in which it computes. libraries: options of `open`
    that name a library, with a description; commands have `--name LIB` for each. options: options of `open` that only
    Python has. exact: options of a session that is compared with the reference.
    """

    name: str
    open: Callable[..., Session]
    device: Literal["cpu", "cuda"]
    tolerances: Mapping[FloatName, Tolerances] = field(default_factory=dict)
    libraries: Mapping[str, str] = field(default_factory=dict)
    options: frozenset[str] = frozenset()
    exact: Mapping[str, Any] = field(default_factory=dict)
    open_shown: Callable[..., Session] | None = None
    """Like `open`, for sessions whose prefill Steps have every tensor between the graphs. None if `open` does that."""
    check: Callable[..., None] = lambda bundle, **options: None
    """Raises UserError for problems that can be found without opening, `(bundle, **options)`."""
    before: Callable[[Bundle], str | None] = lambda bundle: None
    """A remark for the user before a bundle is opened."""
    after: Callable[[Session], str | None] = lambda session: None
    """A remark for the user on an open session."""
    needs_capacity: bool = False
    """Whether it is fastest with caches of exactly the rows that an answer takes."""
    time_selection: Callable[[Session, Run, int], SelectionTimes] | None = None
    """Times selection and compaction alone: takes a session, a prefill's plan and the rows of the caches."""
    ceilings: Callable[[Session], Ceilings] | None = None
    """Measures the limits of its device. None leaves this to onnxruntime."""

    def takes(self, option: str) -> bool:
        """Whether `open` has such an option."""
        return option in self.options or option in self.libraries

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Check that `open` has these options.

        Raises:
            UserError: it does not have one of them.
        """
        for option in options:
            if not self.takes(option):
                known = ", ".join(sorted({*self.options, *self.libraries})) or "none"
                raise UserError(f"{self.name} takes no {option}: leave it out (its options: {known})")

"""The commands, one file each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from ivc_export.errors import UserError


def run_command(command: Callable[[Sequence[str] | None], int], arguments: Sequence[str] | None) -> int:
    """Run a command: a UserError becomes its sentence on standard error and exit code 2, Ctrl-C exit code 130."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        return command(arguments)
    except UserError as error:
        console.print(f"error: {error}", markup=False, style="red")
        return 2
    except KeyboardInterrupt:
        console.print("interrupted", markup=False)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141

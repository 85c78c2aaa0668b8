"""`optimum-cli export ivc`: ivc-export as a command of optimum, with the same options and the same result.

optimum loads the files under optimum/commands/register/. pyproject.toml installs a copy of this file there. optimum
loads it for each of its commands, so this file imports the export only when it runs.
"""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class IvcExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # mypy runs where there is no optimum
    """Passes its arguments on unchanged: options, help and errors are those of ivc-export."""

    COMMAND = CommandInfo(
        "ivc", "Export a vision-language model to ONNX graphs that prune visual tokens, as ivc-export does."
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Take all arguments, and parse none of them."""
        parser.prefix_chars = "\0"  # no argument contains it, so nothing is parsed as an option here
        parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def run(self) -> None:
        """Export, and exit as ivc-export does.

        Raises:
            SystemExit: always.
        """
        from ivc_export.cli import run_command

        sys.exit(run_command("export", self.args.arguments, prog="optimum-cli export ivc"))


REGISTER_COMMANDS = [(IvcExportCommand, ExportCommand)]

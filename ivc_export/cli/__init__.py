"""The commands, one file each. Their modules are imported late, so that Ctrl-C works while they load."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from ivc_export.errors import UserError

LONGEST = 1000
"""The most characters of an error."""
ENDING = (signal.SIGTERM, signal.SIGHUP)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are sentences like all others."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message}: {self.prog} --help lists the options")


class PlainConsole(Console):
    """A console that tells run_command if its reader has left. rich would exit with 1, which has another meaning for
    ivc-check."""

    def on_broken_pipe(self) -> None:
        """Raise the exception that rich handles.

        Raises:
            BrokenPipeError: always.
        """
        raise  # what rich is handling


def make_console(stderr: bool = True, quiet: bool = False) -> Console:
    """A console that prints text unchanged: no wrapping, no colours of its own, no emoji from a path."""
    return PlainConsole(stderr=stderr, soft_wrap=True, highlight=False, emoji=False, quiet=quiet)


def check_output(path: Path) -> None:
    """Check, before any work, that a file can be written.

    Raises:
        UserError: its folder is missing, a folder is in its place, or permissions forbid it.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"the folder of {path} does not exist: create it, or write the file elsewhere")
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file in it")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"{path} cannot be written: check its permissions, or write the file elsewhere")


def run_command(name: str, arguments: Sequence[str] | None, **more: str) -> int:
    """Run `command` of ivc_export.cli.`name` on `arguments`, or on the process's own, and return its exit code.

    more: other arguments of that function.

    A problem that the user can fix becomes one sentence on standard error and exit code 2. Ctrl-C gives exit code 130.
    Signals that end a process are handled as Ctrl-C is, with exit codes 143 (SIGTERM) and 129 (SIGHUP).
    """
    handlers = {number: signal.signal(number, end) for number in ENDING if signal.getsignal(number) == signal.SIG_DFL}
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # characters that a terminal cannot show become question marks
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # invalid text is reported where it is used, as for arguments
    given = sys.argv[1:] if arguments is None else arguments
    try:
        code: int = importlib.import_module(f"ivc_export.cli.{name}").command(given, **more)
        if sys.stdout is not None:  # it is None if it was closed
            sys.stdout.flush()
        return code
    except UserError as error:
        tell(str(error))
        return 2
    except MemoryError:
        tell("the machine has too little memory: close other programs, or use a smaller model or picture")
        return 2
    except RecursionError:
        tell("a file is nested too deeply to be read: download or create it again")
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # there is nothing left to flush to
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        tell(f"{where}{error.strerror or error}: check the path, its permissions and the free space")
        return 2
    except KeyboardInterrupt:
        make_console().print("interrupted")
        return 130
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def tell(sentence: str) -> None:
    """Print an error on one line, of limited length, without control sequences for terminals."""
    plain = "".join(character if character.isprintable() else " " for character in sentence)
    if len(plain) > LONGEST:
        plain = f"{plain[: LONGEST // 2]} ... {plain[-LONGEST // 2 :]}"  # the advice is at the end
    make_console().print(f"error: {plain}", markup=False, style="red")


def end(number: int, frame: object) -> None:
    """Unwind, so that nothing is left half-written, and exit with the code that shells use for the signal."""
    sys.exit(128 + number)


def ivc_export(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ivc-export."""
    return run_command("export", arguments)


def ivc_build(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ivc-build."""
    return run_command("build", arguments)


def ivc_calibrate(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ivc-calibrate."""
    return run_command("calibrate", arguments)


def ivc_run(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ivc-run."""
    return run_command("run", arguments)


def ivc_serve(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ivc-serve."""
    return run_command("serve", arguments)


def ivc_check(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ivc-check."""
    return run_command("check", arguments)


def ivc_bench(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ivc-bench."""
    return run_command("bench", arguments)

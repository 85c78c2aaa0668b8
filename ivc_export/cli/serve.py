"""ivc-serve: serves a bundle by OpenAI's HTTP protocol."""

from __future__ import annotations

import argparse
import importlib
import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from ivc_export import __version__
from ivc_export.bundle.bundle import Bundle
from ivc_export.cli import Parser, make_console
from ivc_export.cli.backends import add_backend_options, given_libraries
from ivc_export.cli.bundles import add_bundle_argument, given_bundle
from ivc_export.errors import UserError
from ivc_export.files import read_text
from ivc_export.runtime.backends import find_backend, open_session
from ivc_export.runtime.chat import FollowUp
from ivc_export.runtime.pictures import PIXELS


def parser() -> Parser:
    """The command's options."""
    p = Parser(
        prog="ivc-serve", description="Serve an exported model over OpenAI's HTTP protocol, with a page to try it."
    )
    add_bundle_argument(p)
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine alone)")
    p.add_argument("--port", type=int, default=8000, help="port to listen at, 0 for any (default: 8000)")
    p.add_argument("--name", help="name of the model (default: the bundle's folder)")
    p.add_argument("--api-key-file", type=Path, metavar="FILE", help="API keys that are accepted, one per line")
    p.add_argument(
        "--follow-up",
        choices=get_args(FollowUp),
        default="again",
        help="again prunes the whole conversation for each request (default); compacted keeps the pruned cache if a "
        "request continues the last one's conversation",
    )
    p.add_argument("--queue", type=int, default=16, help="requests that may wait; others get status 429 (default: 16)")
    p.add_argument("--max-tokens", type=int, default=1024, help="maximum tokens of an answer (default: 1024)")
    p.add_argument("--max-prompt", type=int, default=32_768, help="maximum tokens of a prompt (default: 32768)")
    p.add_argument("--max-body", type=int, default=32, metavar="MIB", help="maximum MiB of a request (default: 32)")
    p.add_argument(
        "--max-pixels", type=int, default=40, metavar="MP", help="maximum megapixels of a picture (default: 40)"
    )
    p.add_argument(
        "--keep-pictures",
        type=int,
        default=256,
        metavar="MIB",
        help="memory for embeddings of earlier pictures (default: 256)",
    )
    p.add_argument(
        "--allow-remote-images",
        action="store_true",
        help="fetch pictures from public http and https addresses",
    )
    add_backend_options(p)
    text = "number of sessions, such as 4, or a range that follows the load, such as 1-8; needs ivc-export[ray]"
    p.add_argument("--replicas", type=replicas, metavar="COUNT", help=text)
    p.add_argument("--replica-cpus", type=int, metavar="COUNT", help="CPU cores per replica (default: 1)")
    text = "GPUs per replica, or a fraction of one (default: 1 if the backend computes on a GPU)"
    p.add_argument("--replica-gpus", type=float, metavar="COUNT", help=text)
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def replicas(text: str) -> tuple[int, int]:
    """The least and the largest number of sessions, from COUNT or FROM-TO."""
    found = re.fullmatch(r"([1-9]\d{0,4})(?:-([1-9]\d{0,4}))?", text)
    least, most = (0, 0) if found is None else (int(found[1]), int(found[2] or found[1]))
    if not 0 < least <= most:
        raise argparse.ArgumentTypeError(
            f"{text[:100]} is not a number of replicas: give one such as 4, or a range such as 1-8"
        )
    return least, most


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line.

    Raises:
        UserError: an option is out of range, or does not fit another.
    """
    options = parser().parse_args(arguments)
    for name in ("queue", "max_tokens", "max_prompt", "max_body", "max_pixels", "keep_pictures"):
        least = 0 if name in ("queue", "keep_pictures") else 1
        if getattr(options, name) < least:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(options, name)} is out of range: give {least} or more"
            )
    if options.max_pixels * 1_000_000 > PIXELS:
        raise UserError(f"--max-pixels {options.max_pixels} is out of range: give at most {PIXELS // 1_000_000}")
    given_libraries(options, [options.backend])
    return options


def part(module: str) -> Any:
    """Import a module of ivc_export.serve.

    Raises:
        UserError: a package that it needs is missing.
    """
    try:
        return importlib.import_module(f"ivc_export.serve.{module}")
    except ImportError as error:
        raise UserError(f"ivc-serve needs more packages ({error}): install ivc-export[serve]") from error


def make_settings(options: argparse.Namespace) -> Any:
    """The ServerSettings of a command line.

    Raises:
        UserError: the file of keys cannot be read, or packages are missing.
    """
    return part("completions").ServerSettings(
        name=options.name or Path(options.bundle).resolve().name,
        queue=options.queue,
        keys=read_keys(options.api_key_file) if options.api_key_file else (),
        loopback=is_loopback(options.host),
        remote_images=options.allow_remote_images,
        most_body=options.max_body << 20,
        most_tokens=options.max_tokens,
    )


def open_worker(options: argparse.Namespace, bundle: Bundle, **more: Any) -> Any:
    """A Worker over the bundle of a command line. more: options of the session.

    Raises:
        UserError: the bundle cannot be opened, or packages are missing.
    """
    session = open_session(bundle, options.backend, **given_libraries(options, [options.backend]), **more)
    return part("worker").Worker(
        session,
        part("metrics").Metrics(),
        options.follow_up,
        options.max_pixels * 1_000_000,
        options.max_prompt,
        options.keep_pictures << 20,
    )


def address(host: str, port: int) -> str:
    """The address of a server."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def command(arguments: Sequence[str]) -> int:
    """Serve until a signal ends it."""
    options = parse(arguments)
    if options.replicas:
        code: int = importlib.import_module("ivc_export.cli.replicas").run(options)
        return code
    for name in ("replica_cpus", "replica_gpus"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for replicas: use it with --replicas, or leave it out")
    settings, server = make_settings(options), part("server")
    bundle, console = given_bundle(options), make_console()
    backend = find_backend(options.backend)
    sock = server.listen(options.host, options.port)
    with sock:
        note = backend.before(bundle)
        if note:
            console.print(note, markup=False)
        with console.status("opening the graphs"):
            worker = open_worker(options, bundle)
        note = backend.after(worker.session)
        if note:
            console.print(note, markup=False)
        console.print(f"serving {settings.name} at {address(*sock.getsockname()[:2])}", markup=False)
        running = server.make_server(worker, settings)
        try:
            running.run(sockets=[sock])
        except (KeyboardInterrupt, SystemExit):
            if not running.should_exit:
                raise
    return 0


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file.

    Raises:
        UserError: it has none, or cannot be read.
    """
    advice = "write one key per line"
    keys = tuple(line.strip() for line in read_text(path, advice).splitlines() if line.strip())
    if not keys:
        raise UserError(f"{path} has no key: {advice}")
    return keys


def is_loopback(host: str) -> bool:
    """Whether an address is only for this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

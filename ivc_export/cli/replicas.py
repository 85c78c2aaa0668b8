"""ivc-serve on Ray Serve: one session for each replica, on the GPUs of one or many machines."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ivc_export.cli import make_console
from ivc_export.cli.bundles import given_bundle
from ivc_export.cli.serve import address, make_settings, open_worker, parse, part
from ivc_export.errors import UserError
from ivc_export.runtime.backends import find_backend

NAME = "ivc"
"""Name of the application and of its deployment. Ray's own files set more options by it."""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1"}
"""Environment of Ray: it sends no statistics, and prints no stack trace if a signal ends us."""
SPARE = 8
"""How many requests a replica takes beyond its queue, to refuse them itself in our form, and to report that it is
alive."""


def app(arguments: Mapping[str, Any]) -> Any:
    """The application, for Ray's own commands and files: `serve run ivc_export.cli.replicas:app bundle=FOLDER`.

    arguments: ivc-serve's options by their names, without the dashes in front; true switches one on. Ray chooses the
        address; `host` says only whether this machine alone may send requests.

    Raises:
        UserError: they are not valid, or packages are missing.
    """
    return application(parse(command_line(arguments)))


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments of an application as options of ivc-serve."""
    line = []
    for name, value in arguments.items():
        option, said = f"--{name.replace('_', '-')}", str(value).lower()
        if name != "bundle" and said != "false":
            line.append(option if said == "true" else f"{option}={value}")
    return [*line, "--", str(arguments["bundle"])] if "bundle" in arguments else line


def load_ray(module: str) -> Any:
    """Import Ray, or a module of it.

    Raises:
        UserError: it is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"--replicas needs more packages ({error}): install ivc-export[ray]") from error


def application(options: argparse.Namespace) -> Any:
    """A deployment of replicas. Each opens the bundle and answers as ivc-serve does.

    Raises:
        UserError: packages are missing, or the bundle or the file of keys cannot be read, here or on another machine.
    """
    serve, server = load_ray("ray.serve"), part("app")
    for name, value in vars(options).items():
        if isinstance(value, Path):  # replicas run in Ray's folders
            setattr(options, name, value.resolve())
    if Path(options.bundle).exists():  # and is no id on the hub
        options.bundle = str(Path(options.bundle).resolve())
    make_settings(options)
    given_bundle(options)
    least, most = options.replicas or (1, 1)
    cpus, gpus = reserved(options)

    def replica() -> Any:
        threads = {"threads": cpus} if find_backend(options.backend).takes("threads") else {}
        worker = open_worker(options, given_bundle(options), **threads)
        return server.make_app(worker, make_settings(options))

    scale = {"num_replicas": least}
    if least < most:
        scale = {"autoscaling_config": {"min_replicas": least, "max_replicas": most}}
    deployment = serve.deployment(
        serve.ingress(replica)(),
        name=NAME,
        max_ongoing_requests=options.queue + 1 + SPARE,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        **scale,
    )
    return deployment.bind()


def reserved(options: argparse.Namespace) -> tuple[int, float]:
    """Cores and GPUs of a replica.

    Raises:
        UserError: one of them is out of range.
    """
    on_gpu = find_backend(options.backend).device == "cuda"
    cpus = 1 if options.replica_cpus is None else options.replica_cpus
    gpus = float(on_gpu) if options.replica_gpus is None else options.replica_gpus
    if cpus < 1:
        raise UserError(f"--replica-cpus {cpus} is out of range: give 1 or more")
    if not 0 <= gpus <= 1 or (on_gpu and not gpus):
        raise UserError(
            f"--replica-gpus {gpus:g} is out of range: a replica computes on one GPU, so give 1 or a fraction"
        )
    return cpus, gpus


def run(options: argparse.Namespace) -> int:
    """Serve until a signal ends it: in the cluster of RAY_ADDRESS, or else in one that is started on this machine.

    Raises:
        UserError: see `application`; or the cluster serves something already, the replicas do not fit the machine, the
            port cannot be used, or a replica cannot open the bundle.
    """
    if not options.port:
        raise UserError("--port 0 is out of range: replicas share one port, so give its number")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    ray, serve = load_ray("ray"), load_ray("ray.serve")
    logging.getLogger("ray.serve").setLevel("WARNING")
    built, console = application(options), make_console()
    note = find_backend(options.backend).before(given_bundle(options))
    if note:
        console.print(note, markup=False)
    started = False
    try:
        with console.status("starting the replicas"):
            where = os.environ.get("RAY_ADDRESS")
            if where:
                join(ray, where)
                there = serve.status()
                if there.proxies or there.applications:
                    raise UserError(
                        f"the cluster at {where} already runs Ray Serve: add an application to its file "
                        f"(import_path: {__name__}:app), or stop it with `serve shutdown`"
                    )
            else:
                part("server").listen(options.host, options.port).close()
                ray.init("local", logging_level="error", include_dashboard=False)
                check_room(options, ray.cluster_resources())
            logs = {"log_level": "WARNING", "enable_access_log": False}
            started = True
            serve.start(http_options={"host": options.host, "port": options.port}, logging_config=logs)
            try:
                serve.run(built, name=NAME, route_prefix="/", logging_config=logs)
            except RuntimeError as error:
                raise UserError(f"the replicas did not start: {error}") from error
        console.print(f"serving {make_settings(options).name} at {address(options.host, options.port)}", markup=False)
        signal.pause()
    except (KeyboardInterrupt, SystemExit):
        return 0
    finally:
        if started:
            stop(serve)
        ray.shutdown()
    return 0


def stop(serve: Any) -> None:
    """Delete our application, and stop the Ray Serve that we started. It stays if others use it by now."""
    if NAME in serve.status().applications:
        serve.delete(NAME)
    if not serve.status().applications:
        serve.shutdown()


def join(ray: Any, where: str) -> None:
    """Join a cluster.

    Raises:
        UserError: there is none, or it has another version of Ray or Python.
    """
    try:
        ray.init(where, logging_level="error")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"the cluster at {where} cannot be reached ({error}): start it with `ray start`, or unset RAY_ADDRESS to "
            "serve on this machine"
        ) from error


def check_room(options: argparse.Namespace, resources: Mapping[str, float]) -> None:
    """Check that a machine has what its replicas reserve. Otherwise Ray would wait for other machines.

    Raises:
        UserError: it has not.
    """
    least, _ = options.replicas
    for what, each, name in zip(("core", "GPU"), reserved(options), ("CPU", "GPU"), strict=True):
        wanted, there = least * each, resources.get(name, 0)
        if wanted > there:
            needs = f"{wanted:g} {what}{'s' * (wanted != 1)}"
            raise UserError(
                f"--replicas {least} needs {needs}, but this machine has {there:g}: give a smaller number, or start "
                "Ray on more machines first (ray start)"
            )

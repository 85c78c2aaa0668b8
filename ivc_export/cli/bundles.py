"""The argument that names a bundle, and the option for its revision."""

from __future__ import annotations

import argparse

from ivc_export.bundle.bundle import Bundle
from ivc_export.source.bundles import open_bundle


def add_bundle_argument(p: argparse.ArgumentParser) -> None:
    """Add the bundle, and --revision."""
    p.add_argument("bundle", help="folder that ivc-export wrote, or hub id of a bundle (owner/name)")
    p.add_argument("--revision", help="branch, tag or commit on the hub (default: its main branch)")


def given_bundle(options: argparse.Namespace) -> Bundle:
    """The bundle, downloaded if it is on the hub.

    Raises:
        UserError: see open_bundle.
    """
    return open_bundle(options.bundle, options.revision)

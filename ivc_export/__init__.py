"""Export large vision-language models with IVC-Prune inside, as ONNX graphs for TensorRT and onnxruntime.

The names in `__all__` are for programs. Names deeper in the package may change. A name is imported when it is first
used. So `import ivc_export` is fast, and Ctrl-C ends a command cleanly even while its modules load.
"""

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ivc_export.bundle.bundle import Bundle
    from ivc_export.errors import UserError
    from ivc_export.exporter.pipeline import export
    from ivc_export.exporter.recipe import ExportRecipe, Quantisation
    from ivc_export.runtime.backends import open_session
    from ivc_export.runtime.chat import Chat
    from ivc_export.runtime.videos import Video
    from ivc_export.selection.method import Method
    from ivc_export.source.bundles import open_bundle
    from ivc_export.text.sampling import Sampling

__version__ = "0.1.0"
__all__ = [
    "Bundle",
    "Chat",
    "ExportRecipe",
    "Method",
    "Quantisation",
    "Sampling",
    "UserError",
    "Video",
    "export",
    "open_bundle",
    "open_session",
]

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before onnxruntime is imported, which reads this once

if not TYPE_CHECKING:  # for mypy, a module with __getattr__ has every name
    _HOMES = {
        "Bundle": "bundle.bundle",
        "Chat": "runtime.chat",
        "ExportRecipe": "exporter.recipe",
        "Method": "selection.method",
        "Quantisation": "exporter.recipe",
        "Sampling": "text.sampling",
        "UserError": "errors",
        "Video": "runtime.videos",
        "export": "exporter.pipeline",
        "open_bundle": "source.bundles",
        "open_session": "runtime.backends",
    }

    def __getattr__(name):
        """A public name, out of the module that has it."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = found
        return found

    def __dir__():
        """Public names, imported or not."""
        return sorted({*globals(), *__all__})

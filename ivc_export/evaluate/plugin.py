"""The entry point `ivc` of the group lmms_eval.models, by which lmms-eval finds the model."""

from __future__ import annotations

import importlib
from typing import Any


def manifest() -> Any:
    """The model `ivc` for lmms-eval's registry. It is called while lmms-eval is being imported."""
    registry = importlib.import_module("lmms_eval.models.registry_v2")
    return registry.ModelManifest(model_id="ivc", chat_class_path="ivc_export.evaluate.model.BundleModel")

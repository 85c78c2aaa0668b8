"""Measurements; their results lie in results/."""

import ivc_export as ivc_export  # before onnxruntime, whose telemetry it switches off

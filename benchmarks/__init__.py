"""This repository's own measurements, with fixed models; their published results lie in results/.

What a user measures a bundle with is ivc_export/bench.
"""

import ivc_export as ivc_export  # before onnxruntime, whose telemetry it switches off

"""Export large vision-language models with IVC-Prune inside, as ONNX graphs for TensorRT and onnxruntime."""

import os

__version__ = "0.1.0"

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before onnxruntime is imported, which keeps what it finds here

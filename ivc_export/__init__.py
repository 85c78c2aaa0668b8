"""Export large vision-language models with IVC-Prune inside, as ONNX graphs for TensorRT and onnxruntime."""

__version__ = "0.1.0"

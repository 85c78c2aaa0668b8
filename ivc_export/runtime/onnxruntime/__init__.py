"""Sessions of onnxruntime, on its CPU and its CUDA provider."""

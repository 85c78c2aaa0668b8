"""Sessions of onnxruntime: its CPU and its CUDA provider."""

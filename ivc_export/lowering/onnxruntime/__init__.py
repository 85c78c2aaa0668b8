"""Passes to operators that onnxruntime's CUDA provider has kernels for."""

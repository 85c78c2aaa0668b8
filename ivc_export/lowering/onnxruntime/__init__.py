"""What onnxruntime's CUDA provider has kernels for."""

"""What TensorRT reads better than standard operators."""

"""Passes to forms that TensorRT handles better than the portable graphs."""

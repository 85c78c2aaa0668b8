"""Compares a bundle with PyTorch: the reference, its recording, the comparison."""

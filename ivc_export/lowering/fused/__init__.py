"""Fusions for the kernels of ours that several runtimes have."""

"""Measurements of a bundle: stages, memory, and the device's own limits, beside PyTorch."""

"""Measurements of a bundle: stages, memory, and the device's own limits, beside PyTorch: what `ivc-bench` does.

This repository's own measurements, with fixed models and published results, are in benchmarks/.
"""

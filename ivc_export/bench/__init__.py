"""Measures a bundle: times of stages, memory, and the limits of the device, beside PyTorch. `ivc-bench` uses it.

This repository's own measurements, with fixed models and published results, are in benchmarks/.
"""

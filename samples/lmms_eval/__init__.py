"""Spatial-VL's held-out questions as a task of lmms-eval, without a network."""

"""Spatial-VL: a small Qwen2-VL of our own, the pictures and questions it learned from, and its training."""

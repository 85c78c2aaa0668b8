"""Measurements; their results lie in results/."""

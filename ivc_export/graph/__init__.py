"""Builds graphs and counts their costs: nodes, layers, shapes."""

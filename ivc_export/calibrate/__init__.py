"""Finds the layer at which to prune, by a sweep over a user's examples."""

"""Passes that choose the dtype of a computation."""

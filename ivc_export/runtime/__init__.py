"""Runs a bundle: prompts and pictures become tensors; sessions, caches, generation."""

"""Bundles as a model of lmms-eval."""

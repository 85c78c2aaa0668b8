"""Finds a model in a folder, by an alias or on the hub, and reads its files."""

"""Builds TensorRT engines: recipe, profiles, memory, graphs, compilation, build, store."""

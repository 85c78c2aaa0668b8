"""TensorRT engines: recipe, profiles, footprint, graphs, compilation, build, store."""

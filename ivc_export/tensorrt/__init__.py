"""TensorRT engines: recipe, profiles, memory, build."""

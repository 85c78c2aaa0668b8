"""Running a bundle: prompts and pictures to tensors, sessions, caches, generation."""

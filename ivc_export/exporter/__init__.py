"""Makes a bundle of a checkpoint."""

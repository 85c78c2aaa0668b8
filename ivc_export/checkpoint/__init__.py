"""What is stored in a checkpoint: its files, its tensors, the hub."""

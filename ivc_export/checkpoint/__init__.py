"""What is stored in a checkpoint: its files and its tensors."""

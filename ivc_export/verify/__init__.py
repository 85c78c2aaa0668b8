"""A bundle against PyTorch: the reference, its record, the comparison."""

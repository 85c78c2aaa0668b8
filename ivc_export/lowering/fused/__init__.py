"""What several runtimes have kernels of ours for."""

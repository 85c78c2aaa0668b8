"""Which dtype computes what."""

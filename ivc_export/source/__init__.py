"""Where a model comes from: a folder, an alias or the hub, and what its files say."""

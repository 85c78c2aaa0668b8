"""Which layer to cut at: the sweep over a user's examples."""

"""A bundle on disk: its files, how it appears, and the checks of its contents."""

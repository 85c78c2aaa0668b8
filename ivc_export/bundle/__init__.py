"""A bundle on disk: its files, how it appears, what it is checked against."""

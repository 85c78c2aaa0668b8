"""A small model and pictures to try the commands on."""

"""Serves a bundle by OpenAI's HTTP protocol."""

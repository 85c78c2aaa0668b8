"""A bundle behind OpenAI's HTTP protocol."""

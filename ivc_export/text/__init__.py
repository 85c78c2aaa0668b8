"""Turns conversations into tokens, and logits into text: templates, tokenizers, sampling."""

"""How conversations become tokens, and logits text: templates, tokenizers, sampling."""

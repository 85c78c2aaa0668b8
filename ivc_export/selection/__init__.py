"""The selection of visual tokens: the rule in NumPy, and as operators."""

"""How visual tokens are chosen: the rule, in NumPy and as operators."""

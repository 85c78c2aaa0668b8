"""How graphs are built and counted: nodes, layers, shapes."""

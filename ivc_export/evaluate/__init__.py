"""Makes bundles a model of lmms-eval."""

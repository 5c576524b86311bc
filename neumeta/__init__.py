"""NeuMeta's shared core: what training and serving must agree on, and nothing of either."""

__version__ = "0.2.0"

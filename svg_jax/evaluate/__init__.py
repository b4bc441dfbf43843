"""Scores of checkpoints; `python -m svg_jax.evaluate --help`."""

"""Weights of the PyTorch release in and out."""

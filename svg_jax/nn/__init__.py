"""Layers that know no model: linear maps, norms, rotary embeddings, attention, stacks, networks as functions."""

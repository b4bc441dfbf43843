"""SVG-T2I in JAX: text-to-image diffusion in the feature space of a frozen vision model."""

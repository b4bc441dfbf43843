"""DPG-Bench (arXiv 2403.05135)."""

"""GenEval (arXiv 2310.11513)."""

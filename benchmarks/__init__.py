"""Speed and memory, measured: run one as `python -m benchmarks.NAME`; the results are in README.md."""

"""Our train step against PyTorch's at the same shape: `python -m benchmarks.train_step`.

One update = times and noise, forward, backward, clipping, AdamW, EMA; float32, all cores.
"""

from __future__ import annotations

from benchmarks.shape import Shape
from benchmarks.turns import compare, parser, table


def main() -> None:
    """Prints the table."""
    args = parser(__doc__, rounds=5, runs=4, warmup=2).parse_args()
    shape = Shape(batch=args.batch)
    print(
        table(
            compare("train_step", shape, args, check=["benchmarks.same_network"]),
            shape,
            run="step",
            unit="steps",
            units=1,
        )
    )


if __name__ == "__main__":
    main()

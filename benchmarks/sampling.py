"""Our sampler against the same loop in PyTorch at the same shape: `python -m benchmarks.sampling`.

One run draws a batch of latents: noise, then Euler steps with both halves of the guidance in one batch; float32, all
cores. Neither text encoder nor decoder takes part.
"""

from __future__ import annotations

from benchmarks.shape import Shape
from benchmarks.turns import compare, parser, table


def main() -> None:
    """Prints the table."""
    args = parser(__doc__, rounds=3, runs=1, warmup=1).parse_args()
    shape = Shape(batch=args.batch)
    facts = compare("sampling", shape, args, check=["benchmarks.same_network", "--latents"])
    print(table(facts, shape, run="batch", unit="images", units=shape.batch))


if __name__ == "__main__":
    main()

"""Features of FID against PyTorch's, in images/s: `python -m benchmarks.inception`.

Inception as pytorch-fid has it, the same random images and weights, float32, all cores. The resize to 299 px is with
it: ours on the host, as `python -m svg_jax.evaluate fid` does it, and PyTorch's in the network.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.inception_shape import Shape
from benchmarks.turns import compare, parser, table
from svg_jax.convert.rules import to_release
from svg_jax.convert.tables import INCEPTION
from svg_jax.evaluate.fid.features import extract, extractor_of, to_inception
from svg_jax.loading import Loaded
from svg_jax.models.inception import Inception
from svg_jax.nn.functional import Network
from svg_jax.parallel import make_mesh, replicated

VERSIONS = {"jax": jax.__version__}
MODULES = {"ours": "benchmarks.inception", "peer": "benchmarks.inception_peer"}
TOLERANCE = 1e-4  # of the largest feature
NETWORK = Network(lambda rngs: Inception(rngs=rngs))


def random_weights() -> dict[str, np.ndarray]:
    """Random ones that keep activations at one size, under our names."""
    generator = np.random.default_rng(1)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = generator.standard_normal(shape)
        if name.endswith("kernel"):
            return noise * np.sqrt(2.0 / np.prod(shape[:-1]))
        if name.endswith("running_var"):
            return 1.0 + 0.5 * np.tanh(noise)
        return float(name.endswith("scale")) + 0.1 * noise

    return {name: draw(name, shape.shape).astype(np.float32) for name, shape in sorted(NETWORK.shapes.items())}


def features(shape: Shape) -> tuple[Callable[[], np.ndarray], int]:
    """A function that makes the features of one batch, and the number of parameters."""
    mesh = make_mesh({"fsdp": -1}, jax.local_devices())
    params = jax.device_put(random_weights(), replicated(mesh))
    extractor = extractor_of(Loaded(NETWORK, params, {}), mesh, logits=False)
    images = shape.images

    def run() -> np.ndarray:
        resized = [to_inception(image) for image in images]
        size = extractor.at_once
        return np.concatenate(
            [extract(extractor, resized[i : i + size])["features"] for i in range(0, len(resized), size)]
        )

    return run, sum(value.size for value in params.values())


def check(shape: Shape) -> None:
    """Gives PyTorch our weights, and compares the features.

    Raises:
        SystemExit: They are not the same.
    """
    from benchmarks import inception_peer

    ours, _ = features(shape)
    peer, _ = inception_peer.features(shape, to_release(random_weights(), INCEPTION))
    found, expected = ours(), peer()
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    print(f"same weights; features differ by {error:.1e} of the largest")
    if error > TOLERANCE:
        raise SystemExit(f"the two networks are not the same: {found[0, :4]} and {expected[0, :4]}")


def main() -> None:
    """Prints the table."""
    arguments = parser(__doc__, rounds=8, runs=4, warmup=2)
    arguments.add_argument("--check", action="store_true", help="only compare the two networks")
    args: argparse.Namespace = arguments.parse_args()
    if args.check:
        check(Shape(batch=2))
        return
    shape = Shape(batch=args.batch)
    facts = compare("features", shape, args, check=["benchmarks.inception", "--check"], modules=MODULES)
    print(table(facts, shape, run="batch", unit="images", units=shape.batch, goal=0.7))


if __name__ == "__main__":
    main()

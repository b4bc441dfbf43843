from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.models.lpips import LPIPS, LPIPSConfig
from svg_jax.nn.functional import Network
from tests.evaluate.vectors import arrays, facts, lpips_weights
from tests.vectors import assert_close


@pytest.mark.golden
def test_lpips_with_weights_of_the_formula() -> None:
    """Of the pairs that `pair_source` names; their number is that of the expected values."""
    network = Network(lambda rngs: LPIPS(LPIPSConfig(), rngs=rngs))
    expected, pairs = facts("networks_formula"), arrays("recon_pairs")
    count = len(expected["lpips"])
    decoded, target = (jnp.asarray(pairs[name][:count]) for name in ("decoded", "target"))
    weights = lpips_weights(network.shapes)
    assert weights.keys() == network.shapes.keys()
    layers = jax.jit(lambda params, a, b: network(params).by_layer(jnp.clip(a, -1.0, 1.0), b))(weights, decoded, target)
    assert_close(layers.sum(axis=0), expected["lpips"], 1e-4)
    for found, wanted in zip(np.asarray(layers), expected["per_layer"], strict=True):
        assert_close(found, wanted, 1e-4)

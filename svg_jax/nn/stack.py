"""Equal layers, stacked on a leading axis and scanned: compile time does not grow with depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from svg_jax.nn.attention import RESULT
from svg_jax.nn.linear import sharded
from svg_jax.parallel import gathered

Layer = TypeVar("Layer", bound=nnx.Module)

LAYER_INPUT = "layer_input"
_policies = jax.checkpoint_policies


def _attention_results(primitive: Any, *args: Any, **params: Any) -> Any:
    """What fused attention gave: by its name, or, inside JAX's own function for cuDNN, by the primitive's."""
    named = _policies.save_only_these_names(RESULT)(primitive, *args, **params)
    return named or "dot_product_attention_fwd" in primitive.name


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name != "sharding_constraint"


# What the backward pass recomputes, from nothing to all of a layer. Gathered kernels are never kept: they would lie in
# memory whole, every layer's, so that even "none" gathers them again.
REMAT: dict[str, Callable[..., Any]] = {
    "none": _all_but_gathered,
    "dots": _policies.save_from_both_policies(  # keeps matrix products and attention, recomputes the rest
        _policies.dots_with_no_batch_dims_saveable, _attention_results
    ),
    "attention": _attention_results,  # keeps what fused attention gave, and the layer's input
    "full": _policies.nothing_saveable,  # keeps the input of each layer only
    "offload": _policies.save_and_offload_only_these_names(  # keeps that in the memory of the host
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def stacked(make: Callable[[nnx.Rngs], Layer], length: int, *, rngs: nnx.Rngs) -> Layer:
    """`length` layers in one module: every parameter has a leading axis, named `layers`."""
    if length < 1:
        raise ValueError(f"a stack needs at least one layer, got {length}")
    build = nnx.vmap(make, in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    layers = nnx.split_rngs(splits=length)(build)(rngs)
    for _, variable in nnx.to_flat_state(nnx.state(layers)):  # vmap names the axis of parameters with metadata only
        if not variable.get_metadata().get("out_sharding"):
            variable.set_metadata(**sharded("layers", *(None,) * (variable.get_value().ndim - 1)))
    return layers


def scan_layers(
    layers: nnx.Module,
    x: Array,
    *args: PyTree,
    per_layer: tuple[Array, ...] = (),
    stop: int | None = None,
    remat: str = "none",
    dtype: DTypeLike | None = None,
    collect: bool = False,
) -> tuple[Array, Array | None]:
    """x <- layer_i(x, *args, *per_layer[i]) for i = 0 .. stop - 1.

    Args:
        layers: A module made by `stacked`.
        x: The carried activations.
        args: The same for every layer.
        per_layer: Arrays whose leading axis is the layer.
        stop: How many layers to run, all by default; the others cost nothing.
        remat: A key of `REMAT`.
        dtype: What kernels are cast to before they are gathered, see `parallel.gathered`; None leaves them as they are.
        collect: Also return every layer's output, [stop, ...].
    """
    if remat not in REMAT:
        raise ValueError(f"unknown remat policy '{remat}': choose one of {', '.join(REMAT)}")
    graphdef, params = nnx.split(layers)
    length = jax.tree.leaves(params)[0].shape[0]

    def layer(x: Array, params: Any, extra: tuple[Array, ...]) -> Array:
        x = checkpoint_name(x, LAYER_INPUT)
        return nnx.merge(graphdef, _gathered(params, dtype))(x, *args, *extra)

    # Inside a scan nothing is shared to begin with, so nothing keeps the compiler from undoing the recomputation.
    layer = jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=False)

    def step(x: Array, scanned: Any) -> tuple[Array, Array | None]:
        x = layer(x, *scanned)
        return x, x if collect else None

    if stop is None or stop == length:
        return jax.lax.scan(step, x, (params, per_layer))

    def step_at(x: Array, i: Array) -> tuple[Array, Array | None]:  # indexing inside the loop copies one layer, not all
        return step(x, jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, i, keepdims=False), (params, per_layer)))

    return jax.lax.scan(step_at, x, jnp.arange(stop))


def recomputed(layer: Callable[[Array], PyTree], remat: str) -> Callable[[Array], PyTree]:
    """A layer that keeps no more than a policy of `REMAT` says for its backward pass."""
    if remat not in REMAT:
        raise ValueError(f"unknown remat policy '{remat}': choose one of {', '.join(REMAT)}")
    return layer if remat == "none" else jax.checkpoint(lambda x: layer(x), policy=REMAT[remat])


def _gathered(params: Any, dtype: DTypeLike | None) -> Any:
    """One layer's parameters as it uses them; vectors lie everywhere as they are."""
    flat = []
    for path, variable in nnx.to_flat_state(params):
        axes, value = variable.get_metadata().get("out_sharding")[1:], variable.get_value()
        if len(axes) > 1:
            variable = variable.replace(gathered(value, axes, dtype or value.dtype))
        flat.append((path, variable))
    return nnx.from_flat_state(flat)

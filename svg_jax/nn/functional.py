"""A network as a pure function of a flat dictionary of parameters.

`{"layers.attention.qkv.kernel": array, ...}`: the dotted path of a parameter in its module is its name everywhere, in
checkpoints, conversion rules, sharding rules and logs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

Params = dict[str, Array]
Axes = tuple[str | None, ...]
Module = TypeVar("Module", bound=nnx.Module)


def params_of(module: nnx.Module) -> Params:
    """The parameters of a module, by dotted path."""
    return {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param))}


class Network(Generic[Module]):
    """A module's structure without its numbers; nothing is allocated until `init`.

    >>> network = Network(lambda rngs: NextDiT(NextDiTConfig.tiny(), rngs=rngs))
    >>> params = jax.jit(network.init, out_shardings=...)(key)
    >>> velocity = network(params)(x, t, text, grid=grid, text_mask=mask)
    """

    def __init__(self, make: Callable[[nnx.Rngs], Module]) -> None:
        self._make = make
        # Under a mesh, NNX would take the logical axes for the mesh's.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            self._graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
        self._variables = dict(nnx.to_flat_state(state))

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every parameter."""
        return {_name(path): variable.get_value() for path, variable in self._variables.items()}

    @property
    def axes(self) -> dict[str, Axes]:
        """Logical axes of every parameter; unnamed ones are None."""
        return {
            _name(path): tuple(variable.get_metadata().get("out_sharding") or (None,) * variable.get_value().ndim)
            for path, variable in self._variables.items()
        }

    def init(self, key: PRNGKeyArray) -> Params:
        """Fresh parameters; pure, so `jax.jit(network.init, out_shardings=...)` makes them where they belong."""
        return params_of(self._make(nnx.Rngs(key)))

    def __call__(self, params: Params) -> Module:
        """The module with these parameters; cheap, to be called inside a jitted function.

        Raises:
            ValueError: The names or shapes are not this network's.
        """
        if problem := mismatch(self.shapes, params):
            raise ValueError(problem)
        flat = [(path, variable.replace(params[_name(path)])) for path, variable in self._variables.items()]
        return nnx.merge(self._graphdef, nnx.from_flat_state(flat))


def mismatch(expected: dict[str, jax.ShapeDtypeStruct], found: dict[str, jax.ShapeDtypeStruct] | Params) -> str | None:
    """One sentence on how `found` differs from `expected` in names and shapes, or None."""
    parts = []
    if missing := sorted(expected.keys() - found.keys()):
        parts.append(f"missing {_some(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        parts.append(f"unexpected {_some(unexpected)}")
    shapes = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name].shape) != tuple(expected[name].shape)
    ]
    if shapes:
        parts.append(f"shapes differ: {_some(shapes)}")
    return f"the parameters are of another architecture: {'; '.join(parts)}" if parts else None


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)


def _some(items: list[str], limit: int = 4) -> str:
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest > 0 else "")

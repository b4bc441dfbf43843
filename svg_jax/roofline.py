"""How fast a compiled step could be on a chip: what it computes, what it must send, and the time that this takes.

    bound = max(compute, overlapped) + exposed + DCN + state

    compute     FLOPs that the step executes, recomputation and frozen networks included, at the chip's bfloat16 peak
    overlapped  what asynchronous collectives send within a slice, at the bandwidth below
    exposed     what synchronous ones send: nothing runs beside them
    DCN         what goes between slices; taken as exposed, which is pessimistic
    state       optimiser state, parameters and average, read and written once, at the bandwidth of the memory

    model FLOPs utilisation (MFU) at the roofline = FLOPs of the model, without recomputation / (peak · bound)

(Williams, Waterman and Patterson 2009, "Roofline"; MFU: Chowdhery et al. 2022, "PaLM", appendix B.) It is a limit and
no forecast: it knows nothing of matrix units that are not full, of memory traffic other than the state's, and of
latency. A collective is taken to run along one axis of the torus, both ways around: 1/axes of a chip's bandwidth;
small slices, whose sides are not closed to rings, have less.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

from svg_jax.chips import Chip
from svg_jax.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that the parts of a step take at least, on one device; None: the chip's figure is not published."""

    compute: float
    overlapped: float
    exposed: float
    dcn: float | None
    state: float
    model_flops: float  # of one device, without recomputation
    peak_flops: float

    @property
    def bound(self) -> float:
        """Seconds of a step, at least."""
        return max(self.compute, self.overlapped) + self.exposed + (self.dcn or 0.0) + self.state

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation at the bound."""
        return self.model_flops / (self.peak_flops * self.bound)


def roofline(
    chip: Chip, sent: Iterable[Collective], *, executed_flops: float, model_flops: float, state_bytes: float
) -> Roofline:
    """The equations at the top.

    Args:
        chip: What the device can do.
        sent: The program's collectives.
        executed_flops: Of one device.
        model_flops: Of one device.
        state_bytes: Bytes of a device's state that a step reads and writes.
    """
    sent = list(sent)
    bandwidth = chip.ici_bandwidth / chip.torus_axes
    ici = {True: 0.0, False: 0.0}
    for one in sent:
        if not one.between_slices:
            ici[one.asynchronous] += one.total / bandwidth
    dcn = sum(one.total for one in sent if one.between_slices)
    return Roofline(
        compute=executed_flops / chip.peak_flops,
        overlapped=ici[True],
        exposed=ici[False],
        dcn=dcn / chip.dcn_bandwidth if chip.dcn_bandwidth else None if dcn else 0.0,
        state=2 * state_bytes / chip.memory_bandwidth,
        model_flops=model_flops,
        peak_flops=chip.peak_flops,
    )


def ideal_bytes(
    trained: float,
    frozen: float,
    *,
    item: int,
    devices: int,
    recomputed: bool,
    tensor: int = 1,
    micro_batches: int = 1,
) -> dict[str, float]:
    """The least that a device sends where every parameter is spread over all `devices`, and each uses 1/t of it.

    Each micro-batch gathers the parameters for the forward pass, again where the backward pass recomputes it, and
    reduce-scatters their gradients, all in the type of the computation; it gathers the frozen ones once:

        P · item · (1/t - 1/n) each,     frozen bytes · (1/t - 1/n)

    Args:
        trained: Parameters P that are trained.
        frozen: Bytes of the frozen ones that are gathered.
        item: Bytes of one number in the computation.
        devices: n.
        tensor: t, devices that share the work of a layer.
        recomputed: Whether the backward pass gathers anew.
        micro_batches: Parts of the batch that run one after the other.
    """
    once = micro_batches * (1 / tensor - 1 / devices)
    return {
        "forward": trained * item * once,
        "recomputation": trained * item * once if recomputed else 0.0,
        "gradients": trained * item * once,
        "frozen": frozen * once,
    }


def executed_flops(jaxpr: Jaxpr, *, unknown_trips: int = 1) -> float:
    """FLOPs of all matrix products and convolutions that a traced function executes, on all devices together.

    Those in loops count as often as the loops run, recomputation included: XLA's own count takes a loop's body once.
    Kernels written in Pallas count every block of their grid. Transposed strided convolutions count zeros too.

    Args:
        jaxpr: `jit(f).trace(...).jaxpr.jaxpr`.
        unknown_trips: How often a loop runs whose count is known only at run time.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            contracted = params["dimension_numbers"][0][0]
            total += 2.0 * math.prod(_shape(eqn.outvars[0])) * math.prod(_shape(eqn.invars[0])[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel = _shape(eqn.invars[1])
            features = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * math.prod(_shape(eqn.outvars[0])) * math.prod(kernel) / features
        elif name == "cond":
            total += max(executed_flops(branch.jaxpr, unknown_trips=unknown_trips) for branch in params["branches"])
        else:
            inside = sum(executed_flops(inner, unknown_trips=unknown_trips) for inner in _inner(params))
            total += inside * _times(name, params, unknown_trips)
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _times(name: str, params: Mapping[str, Any], unknown_trips: int) -> int:
    if name == "scan":
        return params["length"]
    if name == "while":
        return unknown_trips
    if name == "pallas_call":
        return math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
    if name == "shard_map":  # its shapes are those of one device
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return 1


def _inner(params: Mapping[str, Any]) -> list[Jaxpr]:
    found: list[Jaxpr] = []
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, ClosedJaxpr):
                found.append(one.jaxpr)
            elif isinstance(one, Jaxpr):
                found.append(one)
    return found


def device_bytes(tree: Any) -> int:
    """Bytes of abstract arrays with shardings that one device holds in its own memory."""

    def held(array: jax.ShapeDtypeStruct) -> int:
        if array.sharding.memory_kind in ("pinned_host", "unpinned_host"):
            return 0
        return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize

    return sum(held(array) for array in jax.tree.leaves(tree))


def read_arguments(jaxpr: Jaxpr, arguments: Any) -> Any:
    """The arguments, None where the program never reads one: it takes memory, and the compiler does not count it."""
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    leaves, structure = jax.tree.flatten(arguments)
    return jax.tree.unflatten(structure, [leaf if read else None for leaf, read in zip(leaves, used, strict=True)])

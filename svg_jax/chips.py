"""What one accelerator can do, as its maker publishes it, by the name that JAX gives it (`device_kind`).

Figures are of one JAX device. That is a chip, except TPU7x, of which JAX sees each chip as two devices, with half of
everything each. Peaks are dense bfloat16. Sources:

- TPU: the page of each version under https://cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x). They give the
  interconnect between chips (ICI) as the sum of both directions over all links of a chip: halved here, as for NVLink.
  v4's page gives none: six links of 50 GB/s each way, Jouppi et al. 2023 (arXiv 2304.01433, section 2).
  Data centre network (DCN): of the same pages a chip, v5e from its host's two 100 Gb/s ports over eight chips; none is
  published for v4.
- Usable memory of a TPU: what the compiler of libtpu 0.0.42 budgets, from its own message on a program too large.
- GPU: NVIDIA's data sheets of A100, H100 and H200 (SXM); peaks there are doubled by sparsity where marked so. Between
  hosts: one ConnectX port a GPU, 200 Gb/s in DGX A100 and 400 Gb/s in DGX H100 and H200 (their data sheets). Usable
  memory: the share that JAX takes unless told otherwise (XLA_PYTHON_CLIENT_MEM_FRACTION, 0.75).
"""

from __future__ import annotations

import dataclasses

GIB = 2**30

# Gathers of weights overlap with the layer before only with these; reduce-scatters stay synchronous. The option that
# does the same to all-reduces is left alone: with it and the last one, NaN has been reported on v6e. v5e overlaps 79%
# of the gathered bytes as it is.
OVERLAP: dict[str, bool] = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device."""

    name: str
    peak_flops: float  # bfloat16 FLOPs/s, without sparsity
    memory: float  # bytes
    usable_memory: float  # bytes that a program may use
    memory_bandwidth: float  # bytes/s
    ici_bandwidth: float  # bytes/s that it can send over all links to its neighbours together
    torus_axes: int  # over which those links are spread; 1 for a switch that reaches every neighbour at full speed
    dcn_bandwidth: float | None  # bytes/s that it can send to other slices or hosts; None: not published
    compiler_options: dict[str, bool] = dataclasses.field(default_factory=dict, hash=False)


CHIPS: dict[str, Chip] = {
    "TPU v4": Chip("v4", 275e12, 32 * GIB, 30.75 * GIB, 1200e9, 300e9, 3, None),
    "TPU v5 lite": Chip("v5e", 197e12, 16 * GIB, 15.75 * GIB, 819e9, 200e9, 2, 3.125e9),
    "TPU v5": Chip("v5p", 459e12, 95.74 * GIB, 95.74 * GIB, 2765e9, 600e9, 3, 6.25e9, OVERLAP),
    "TPU v6 lite": Chip("v6e", 918e12, 32 * GIB, 31.25 * GIB, 1638e9, 400e9, 2, 12.5e9, OVERLAP),
    "TPU7x": Chip("v7x", 2307e12 / 2, 96 * GIB, 94.75 * GIB, 7380e9 / 2, 300e9, 3, 6.25e9),
    "NVIDIA A100-SXM4-40GB": Chip("A100 40 GB", 312e12, 40 * GIB, 30 * GIB, 1555e9, 300e9, 1, 25e9),
    "NVIDIA A100-SXM4-80GB": Chip("A100 80 GB", 312e12, 80 * GIB, 60 * GIB, 2039e9, 300e9, 1, 25e9),
    "NVIDIA H100 80GB HBM3": Chip("H100", 989.4e12, 80 * GIB, 60 * GIB, 3350e9, 450e9, 1, 50e9),
    "NVIDIA H200": Chip("H200", 989.4e12, 141e9, 0.75 * 141e9, 4800e9, 450e9, 1, 50e9),
}


def chip_of(device_kind: str) -> Chip | None:
    """The row of a device; None for kinds that the table does not have, as a CPU."""
    return CHIPS.get(device_kind)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOPs/s of one JAX device."""
    chip = chip_of(device_kind)
    return None if chip is None else chip.peak_flops


def compiler_options(device_kind: str) -> dict[str, bool]:
    """What `jax.jit(..., compiler_options=...)` should be told for a device: the same in training and ahead of time."""
    chip = chip_of(device_kind)
    return {} if chip is None else dict(chip.compiler_options)


def libtpu_init_args(device_kind: str) -> str:
    """The same for a whole process, as the environment variable LIBTPU_INIT_ARGS takes it."""
    return " ".join(f"--{name}={str(value).lower()}" for name, value in compiler_options(device_kind).items())

"""TPUs that are not there, to compile for: libtpu knows every slice of every version."""

from __future__ import annotations

import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from svg_jax.chips import CHIPS, chip_of

# For libtpu, before it is loaded: ask no metadata server who we are, and let several processes compile at once.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def topology_devices(topology: str, slices: int = 1) -> list[jax.Device]:
    """The devices of `slices` of a topology such as v5e:16x16, none of which exist.

    Raises:
        ImportError: There is no libtpu.
        ValueError: There is no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError('compiling for TPUs needs their compiler, libtpu: run `pip install "svg_jax[aot]"`')
    if re.match(r"[abh]\d+", topology.lower()):
        raise ValueError(
            f"--topology={topology}: programs for GPUs compile only where there is one; TPUs are {_names()}"
        )
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", topology)
    if not found:
        raise ValueError(f"--topology={topology} is not VERSION:SHAPE, as in v5e:16x16 or v5p:4x4x4")
    version, shape = found[1].lower().replace("v7x", "tpu7x"), found[2]
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if version == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device, as Cloud TPU shows them
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=f"{version}:{shape}", **options)
    except jax.errors.JaxRuntimeError as error:
        if "external name" in str(error):
            raise ValueError(f"--topology={topology}: there is no such TPU, choose {_names()}") from error
        raise ValueError(
            f"--topology={topology} does not exist: the compiler knows slices of whole hosts, whose first two "
            "sides are multiples of 2, from v5e:2x2, v6e:2x2, v4:2x2x1, v5p:2x2x1 and tpu7x:2x2x1 on"
        ) from error
    devices: list[jax.Device] = list(description.devices)
    if (chip := chip_of(devices[0].device_kind)) is None:
        raise ValueError(f"--topology={topology}: nothing is known of its chips, choose {_names()}")
    if shape.count("x") + 1 != chip.torus_axes:
        raise ValueError(f"--topology={topology} does not exist: slices of {chip.name} have {chip.torus_axes} sides")
    return devices


def _names() -> str:
    return ", ".join(chip.name for kind, chip in CHIPS.items() if kind.startswith("TPU"))

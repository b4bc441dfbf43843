"""Strict settings for every test: eight fake CPU devices, no implicit promotion of dtype or rank."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of XLA's pool. A collective holds one a device until all devices have come; with as many threads as devices,
# two collectives at the same time may wait for each other for ever, and XLA aborts.
os.environ.setdefault("PJRT_NPROC", "32")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    # Of a machine with fewer cores than devices, and other tests beside: XLA aborts when a device comes 40 s late.
    os.environ["XLA_FLAGS"] += " --xla_cpu_collective_call_terminate_timeout_seconds=300"

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "svg_jax_test_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="module")
def uncached() -> Iterator[None]:
    """Programs for absent chips cannot be read back from JAX's cache: none are put there."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    yield
    jax.config.update(name, before)

"""The table of chips: names as JAX gives them, units that fit one another, options for the compiler."""

from __future__ import annotations

import pytest

from svg_jax.chips import CHIPS, GIB, chip_of, compiler_options, libtpu_init_args, peak_flops


@pytest.mark.parametrize("kind", CHIPS)
def test_figures_are_in_their_units(kind: str) -> None:
    chip = CHIPS[kind]
    assert 1e14 < chip.peak_flops < 1e16
    assert 8 * GIB < chip.usable_memory <= chip.memory < 512 * GIB
    assert 1e12 > chip.ici_bandwidth > 1e11
    assert 5e11 < chip.memory_bandwidth < 1e13
    assert chip.dcn_bandwidth is None or chip.dcn_bandwidth < chip.ici_bandwidth / 5
    assert chip.memory_bandwidth > chip.ici_bandwidth


def test_published_figures() -> None:
    v5e, v7x = CHIPS["TPU v5 lite"], CHIPS["TPU7x"]
    assert (v5e.name, v5e.peak_flops, v5e.usable_memory) == ("v5e", 197e12, 15.75 * GIB)
    assert 2 * v5e.ici_bandwidth == 400e9  # both directions
    assert v5e.dcn_bandwidth == 6.4e12 / 8 / 256  # 6.4 Tb/s a pod of 256
    assert 2 * v7x.peak_flops == 2307e12  # two devices a chip
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12


def test_other_devices_have_no_row() -> None:
    assert chip_of("cpu") is None
    assert peak_flops("cpu") is None
    assert compiler_options("cpu") == {}
    assert libtpu_init_args("cpu") == ""


def test_options_are_the_same_for_a_call_and_for_a_process() -> None:
    options = compiler_options("TPU v6 lite")
    arguments = libtpu_init_args("TPU v6 lite").split()
    assert arguments == [f"--{name}=true" for name in options]
    assert not any("fuse_all_reduce" in name for name in options)
    assert compiler_options("TPU v5 lite") == {}

from __future__ import annotations

import csv
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.evaluate.image_metrics import compared, psnr, ssim, stored
from svg_jax.evaluate.reconstruction_report import release_row
from tests.evaluate.vectors import arrays, facts
from tests.vectors import assert_close


@pytest.fixture(scope="module")
def pairs() -> dict[str, np.ndarray]:
    return arrays("recon_pairs")


@pytest.mark.golden
def test_stored_images_are_those_of_the_release(pairs: dict[str, np.ndarray]) -> None:
    for name in ("decoded", "target"):
        np.testing.assert_array_equal(stored(jnp.asarray(pairs[name])), pairs[f"{name}_u8"])


@pytest.mark.golden
def test_psnr_of_stored_images(pairs: dict[str, np.ndarray]) -> None:
    case = facts("recon_cases")
    expected = np.array([np.inf if value is None else value for value in case["psnr_per_image"]])
    found = np.asarray(psnr(jnp.asarray(pairs["decoded_u8"]), jnp.asarray(pairs["target_u8"])))
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(found), finite)
    assert_close(found[finite], expected[finite], 1e-5)


@pytest.mark.golden
def test_ssim_of_images_batches_and_all(pairs: dict[str, np.ndarray]) -> None:
    case = facts("recon_cases")
    found = np.asarray(jax.jit(ssim)(compared(jnp.asarray(pairs["decoded"])), jnp.asarray(pairs["target"])))
    assert_close(found, case["ssim_per_image"], 1e-5)
    batches = [found[first:last].mean() for first, last in case["batches"]]
    assert_close(batches, case["ssim_per_batch"], 1e-5)
    assert_close(np.mean(batches), case["ssim_reported"], 1e-5)


@pytest.mark.golden
def test_ssim_of_random_pairs() -> None:
    given = arrays("ssim_random")
    for pair in facts("recon_cases")["random_pairs"]:
        a, b = (jnp.asarray(given[f"{name}{pair['index']}"]) for name in "ab")
        assert_close(np.asarray(jax.jit(ssim)(a, b)).mean(), pair["ssim"], 1e-5, str(pair["index"]))


@pytest.mark.golden
def test_the_row_of_the_release(pairs: dict[str, np.ndarray]) -> None:
    case = facts("recon_cases")
    expected = dict(zip(*case["metrics_csv"], strict=True))
    values = psnr(jnp.asarray(pairs["decoded_u8"]), jnp.asarray(pairs["target_u8"]))
    mean = float(np.mean(np.asarray(values, np.float64)))
    text = release_row({"psnr": mean, "ssim": case["ssim_reported"], "rfid": 1.2341, "lpips": 0.10001})
    found = dict(zip(*csv.reader(io.StringIO(text)), strict=True))
    assert list(found) == list(expected)
    assert {name: found[name] for name in ("PSNR", "SSIM")} == {name: expected[name] for name in ("PSNR", "SSIM")}
    assert release_row({"ssim": 0.5}).splitlines()[1] == ",,,0.5"


def test_equal_images() -> None:
    x = jnp.linspace(-1.0, 1.0, 2 * 8 * 9 * 3).reshape(2, 8, 9, 3)
    assert_close(ssim(x, x), np.ones(2), 1e-6)
    assert np.isinf(psnr(stored(x), stored(x))).all()


def test_images_too_small_for_the_window() -> None:
    x = jnp.zeros((1, 5, 20, 3))
    with pytest.raises(ValueError, match=r"SSIM of 20 x 5 pixels: both sides need at least 6"):
        ssim(x, x)

"""Every way to compute attention equals the plain one, on one device and on a mesh, and is chosen where it can."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from svg_jax.nn.attention import attention, choose, chunked, cudnn
from svg_jax.nn.attention.masks import Mask, Segments
from svg_jax.parallel import AXES
from tests.vectors import assert_close

OTHERS = ["chunked", "tpu_splash"]  # what runs on a CPU beside the plain one
SAMPLES, TOKENS, HEADS, KV_HEADS, DIM = 2, 150, 24, 8, 96  # heads of the 2.6B model
VALID = np.ones((SAMPLES, TOKENS), bool)
VALID[0, 20:40] = VALID[0, -30:] = VALID[1, 3:10] = False  # text is padded, then the image
SEGMENTS = np.where(VALID, 1 + np.arange(TOKENS) // 7 % 3, 0).astype(np.int32)


@functools.cache
def arrays(dtype: str = "float32") -> tuple[jax.Array, ...]:
    """q, k, v and a gradient of the result."""
    keys = jax.random.split(jax.random.key(0), 4)
    return tuple(
        jax.random.normal(key, (SAMPLES, TOKENS, heads, DIM)).astype(dtype)
        for key, heads in zip(keys, (HEADS, KV_HEADS, KV_HEADS, HEADS), strict=True)
    )


def forward_and_backward(
    backend: str, q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array, **settings: Any
) -> Any:
    """The result, and the gradients of q, k and v."""

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
        out, pull = jax.vjp(functools.partial(attention, backend=backend, **settings), q, k, v)
        return out, *pull(dout)

    return [x.astype(jnp.float32) for x in run(q, k, v, dout)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CPU_BLOCK", (64, 40))


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"valid": VALID}, {"segments": SEGMENTS}, {"causal": True, "window": 40, "logit_softcap": 2.0, "scale": 0.2}],
    ids=lambda settings: "+".join(settings) or "plain",
)
def test_results_and_gradients_equal_the_plain_ones(backend: str, settings: dict[str, Any]) -> None:
    expected = forward_and_backward("xla", *arrays(), **settings)
    found = forward_and_backward(backend, *arrays(), **settings)
    there = VALID if "segments" in settings else np.ones_like(VALID)  # what padding sees among itself is not told
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert_close(np.asarray(a)[there], np.asarray(b)[there], 1e-5, name)


@pytest.mark.parametrize("backend", ["xla", *OTHERS])
def test_bfloat16(backend: str) -> None:
    expected = forward_and_backward("xla", *arrays(), valid=VALID)
    found = forward_and_backward(backend, *arrays("bfloat16"), valid=VALID)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert_close(a, b, 3e-2, name)


def mesh(**sizes: int) -> Mesh:
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@pytest.mark.parametrize("backend", ["xla", *OTHERS])
@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "context": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 4}, {"context": 8}],
    ids=lambda sizes: "x".join(f"{axis}{size}" for axis, size in sizes.items()),
)
def test_a_mesh_changes_nothing(backend: str, sizes: dict[str, int]) -> None:
    """Also where an axis does not divide: a batch of 2 by 8, or 150 tokens by 8."""
    expected = forward_and_backward("xla", *arrays(), valid=VALID)
    with jax.set_mesh(mesh(**sizes)):
        found = forward_and_backward(backend, *arrays(), valid=VALID)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert_close(a, b, 1e-5, name)


@pytest.mark.parametrize("backend", ["xla", *OTHERS])
def test_a_mesh_keeps_segments_apart(backend: str) -> None:
    """Also where the queries are split and the keys are not."""
    expected = forward_and_backward("xla", *arrays(), segments=SEGMENTS)
    with jax.set_mesh(mesh(data=2, context=2, tensor=2)):
        found = forward_and_backward(backend, *arrays(), segments=SEGMENTS)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert_close(np.asarray(a)[VALID], np.asarray(b)[VALID], 1e-5, name)


def test_on_a_mesh_each_device_has_its_part_only() -> None:
    with jax.set_mesh(mesh(data=2, context=2, tensor=2)):
        text = jax.jit(functools.partial(attention, valid=VALID)).lower(*arrays()[:3]).as_text()
    assert f"tensor<1x{TOKENS // 2}x{HEADS // 2}x{DIM}xf32>" in text
    assert f"tensor<1x{TOKENS}x{KV_HEADS // 2}x{DIM}xf32>" in text


def test_places_and_traced_windows_on_a_mesh() -> None:
    """Queries whose place matters are not split over `context`."""
    q, k, v, _ = arrays()
    positions = jnp.broadcast_to(jnp.arange(TOKENS)[::-1][None], (SAMPLES, TOKENS))
    run = jax.jit(lambda window: attention(q, k, v, positions=positions, causal=True, window=window, valid=VALID))
    expected = run(jnp.array(60))
    with jax.set_mesh(mesh(data=2, context=2, tensor=2)):
        assert_close(run(jnp.array(60)), expected, 1e-5)


def shapes(tokens: int, dtype: str = "bfloat16", dim: int = DIM, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of q and k."""
    return tuple(jax.ShapeDtypeStruct((batch, tokens, heads, dim), jnp.dtype(dtype)) for heads in (HEADS, KV_HEADS))


@pytest.mark.parametrize(
    ("platform", "like", "mask", "expected"),
    [
        ("tpu", shapes(4608), Mask(VALID), "tpu_splash"),
        ("tpu", shapes(4608, "float32"), Mask(causal=True, window=5), "tpu_splash"),
        ("tpu", shapes(4608), Mask(causal=True, window=np.array(5)), "chunked"),
        ("tpu", shapes(256), Mask(VALID), "xla"),
        ("gpu", shapes(256), Mask(VALID), "gpu_cudnn"),
        ("gpu", shapes(4608, "float32"), Mask(VALID), "chunked"),
        ("gpu", shapes(4608, dim=512), Mask(), "chunked"),
        ("gpu", shapes(256), Mask(VALID, causal=True), "xla"),
        ("gpu", shapes(1536), Mask(segments=Segments(SEGMENTS, SEGMENTS)), "xla"),
        ("tpu", shapes(1536), Mask(segments=Segments(SEGMENTS, SEGMENTS)), "tpu_splash"),
        ("cpu", shapes(1280, "float32"), Mask(VALID), "chunked"),
        ("cpu", shapes(64, "float32"), Mask(VALID), "xla"),
    ],
)
def test_the_choice(platform: str, like: tuple[Any, Any], mask: Mask, expected: str) -> None:
    assert choose(platform, *like, mask, None) == expected


@pytest.mark.parametrize(
    ("backend", "settings", "message"),
    [
        ("flash", {}, "unknown attention backend 'flash': choose auto, xla, chunked, tpu_splash, gpu_cudnn"),
        ("gpu_cudnn", {}, "'gpu_cudnn' cannot do this: it needs an NVIDIA GPU, this is a cpu"),
        ("tpu_splash", {"causal": True, "positions": np.zeros((SAMPLES, TOKENS), int)}, "it takes no `positions`"),
        ("tpu_splash", {"window": jnp.array(3)}, "a number that is known when it is compiled"),
    ],
)
def test_what_a_backend_cannot_do_is_refused(backend: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*arrays()[:3], backend=backend, **settings)


@pytest.mark.parametrize(
    ("like", "mask", "softcap", "message"),
    [
        (shapes(64, "float32"), Mask(), None, "it computes in bfloat16 or float16, not in float32"),
        (shapes(64, dim=100), Mask(), None, "a multiple of 8 and at most 128 channels, these have 100"),
        (shapes(64), Mask(causal=True), None, "it takes no mask but `valid`"),
        (shapes(64), Mask(segments=Segments(SEGMENTS, SEGMENTS)), None, "it takes no `segments`"),
        (shapes(64), Mask(), 50.0, "it has no soft cap"),
    ],
)
def test_what_cudnn_cannot_do(like: tuple[Any, Any], mask: Mask, softcap: float | None, message: str) -> None:
    assert message in str(cudnn.refusal("gpu", *like, mask, softcap))

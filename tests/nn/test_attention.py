"""Attention against a plain softmax in float64, one query at a time; see test_attention_backends.py for real sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import ArrayLike

from svg_jax.nn.attention import attention, attention_mask, chunked
from tests.vectors import assert_close

BATCH, QUERIES, HEADS, DIM = 2, 6, 4, 8
VALID = np.array([[True, True, False, True, True, False], [True] * 6])
SEGMENTS = np.array([[1, 1, 2, 3, 3, 3], [2, 1, 2, 1, 1, 2]], np.int32)  # apart, as text and image are, too


def arrays(kv_heads: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    q = draw.normal(size=(BATCH, QUERIES, HEADS, DIM)).astype(np.float32)
    k, v = draw.normal(size=(2, BATCH, QUERIES, kv_heads, DIM)).astype(np.float32)
    return q, k, v


def jitted(backend: str, q: ArrayLike, k: ArrayLike, v: ArrayLike, **settings: Any) -> jax.Array:
    return jax.jit(functools.partial(attention, backend=backend, **settings))(q, k, v)


@pytest.fixture(params=["xla", "chunked", "tpu_splash"])
def attend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., jax.Array]:
    """Each backend that runs on a CPU; the chunks are so small, and so uneven, that there are several."""
    monkeypatch.setattr(chunked, "CPU_BLOCK", (4, 5))
    return functools.partial(jitted, request.param)


@pytest.fixture(params=["xla", "chunked"])
def attend_anywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., jax.Array]:
    """Those that also take traced windows and positions."""
    monkeypatch.setattr(chunked, "CPU_BLOCK", (1, 4))
    return functools.partial(jitted, request.param)


def plain(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    valid: np.ndarray | None = None,
    segments: np.ndarray | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    logit_softcap: float | None = None,
) -> np.ndarray:
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, i, h in np.ndindex(q.shape[:3]):
        keys = [
            j
            for j in range(k.shape[1])
            if (valid is None or valid[b, j])
            and (segments is None or segments[b, j] == segments[b, i])
            and (not causal or j <= i)
            and (window is None or j > i - window)
        ]
        logits = k[b, keys, h // group].astype(np.float64) @ q[b, i, h] * (scale or DIM**-0.5)
        if logit_softcap:
            logits = logit_softcap * np.tanh(logits / logit_softcap)
        weights = np.exp(logits - logits.max())
        out[b, i, h] = weights / weights.sum() @ v[b, keys, h // group]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_query_heads_share_key_heads(attend: Callable[..., jax.Array], kv_heads: int) -> None:
    q, k, v = arrays(kv_heads)
    assert_close(attend(q, k, v), plain(q, k, v), 1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"valid": VALID},
        {"causal": True},
        {"window": 2},
        {"causal": True, "window": 3},
        {"scale": 1.7},
        {"logit_softcap": 0.5},
        {"valid": VALID, "causal": True, "window": 4, "scale": 3.0, "logit_softcap": 2.0},
        {"segments": SEGMENTS},
        {"segments": SEGMENTS, "causal": True, "window": 3, "logit_softcap": 2.0},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_masks_and_caps(attend: Callable[..., jax.Array], settings: dict[str, Any]) -> None:
    q, k, v = arrays()
    assert_close(attend(q, k, v, **settings), plain(q, k, v, **settings), 1e-5)


def test_the_window_may_be_traced(attend_anywhere: Callable[..., jax.Array]) -> None:
    q, k, v = arrays()
    windowed = jax.jit(lambda window: attend_anywhere(q, k, v, causal=True, window=window))
    for window in (1, 3):
        assert_close(windowed(window), plain(q, k, v, causal=True, window=window), 1e-5)
    assert windowed._cache_size() == 1


def test_other_numbers_of_keys_than_queries(attend: Callable[..., jax.Array]) -> None:
    q, k, v = arrays()
    assert_close(attend(q[:, :2], k, v, valid=VALID), plain(q[:, :2], k, v, valid=VALID), 1e-5)


def test_bfloat16_rounds_only_at_the_ends(attend: Callable[..., jax.Array]) -> None:
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in arrays())
    out = attend(q, k, v, valid=VALID)
    assert out.dtype == jnp.bfloat16
    assert_close(out.astype(jnp.float32), plain(*(np.asarray(x, np.float32) for x in (q, k, v)), valid=VALID), 3e-2)


def test_rows_without_a_valid_key_are_finite_and_leave_the_others_alone(attend: Callable[..., jax.Array]) -> None:
    q, k, v = arrays()
    nothing = np.stack([VALID[0], np.zeros_like(VALID[1])])

    def total(arguments: tuple[jax.Array, ...], rows: slice = slice(1)) -> jax.Array:
        return jnp.sum(attend(*arguments, valid=nothing)[rows] ** 2)

    out = attend(q, k, v, valid=nothing)
    assert bool(jnp.isfinite(out).all())
    assert_close(out[0], plain(q, k, v, valid=VALID)[0], 1e-5)
    for gradient in jax.grad(total)((q, k, v)):
        assert bool(jnp.isfinite(gradient).all())
        assert not np.asarray(gradient[1]).any()
    for gradient in jax.grad(total)((q, k, v), slice(2)):
        assert bool(jnp.abs(gradient[1]).max() < 10 * jnp.abs(gradient[0]).max())


def test_what_stands_in_masked_keys_changes_nothing(attend: Callable[..., jax.Array]) -> None:
    q, k, v = arrays()
    other = np.where(VALID[..., None, None], k, 50.0), np.where(VALID[..., None, None], v, -50.0)

    def run(k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, valid=VALID)

    np.testing.assert_array_equal(run(k, v), run(*map(jnp.asarray, other)))
    for gradient in jax.grad(lambda k, v: jnp.sum(run(k, v) ** 2), argnums=(0, 1))(k, v):
        assert np.asarray(gradient)[VALID].any()
        assert not np.asarray(gradient)[~VALID].any()


def test_what_other_segments_and_padding_hold_changes_nothing(attend: Callable[..., jax.Array]) -> None:
    """Bit for bit, and no gradient goes there: whatever is filled up inside a backend joins the padding."""
    q, k, v = arrays()
    segments = np.where(VALID, SEGMENTS, 0)
    own = segments == 1
    own[1] = False
    other = tuple(np.where(own[..., None, None], x, 50.0).astype(np.float32) for x in (q, k, v))

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, segments=segments)[own]

    np.testing.assert_array_equal(run(q, k, v), run(*map(jnp.asarray, other)))
    assert bool(jnp.isfinite(attend(*other, segments=segments)).all())
    for gradient in jax.grad(lambda *x: jnp.sum(run(*x) ** 2), argnums=(0, 1, 2))(q, k, v):
        assert np.asarray(gradient)[own].any()
        assert not np.asarray(gradient)[~own].any()


def test_segments_go_without_valid() -> None:
    q, k, v = arrays()
    with pytest.raises(ValueError, match="padding is segment 0"):
        attention(q, k, v, segments=SEGMENTS, valid=VALID)
    with pytest.raises(ValueError, match="as many queries as keys"):
        attention(q[:, :2], k, v, segments=SEGMENTS)


def test_no_mask_where_everything_is_visible() -> None:
    assert attention_mask(3, 3) is None


@pytest.mark.parametrize("window", [None, 2])
def test_queries_may_stand_anywhere_among_the_keys(
    attend_anywhere: Callable[..., jax.Array], window: int | None
) -> None:
    """Each row takes its own two of all six queries, and gets what they get among all."""
    q, k, v = arrays()
    everything = plain(q, k, v, causal=True, window=window)
    positions = np.array([[0, 3], [5, 2]])
    rows = np.arange(BATCH)[:, None]
    out = attend_anywhere(q[rows, positions], k, v, positions=positions, causal=True, window=window)
    assert_close(out, everything[rows, positions], 1e-5)


def test_heads_that_cannot_be_shared_are_refused() -> None:
    q, k, v = arrays(kv_heads=3)
    with pytest.raises(ValueError, match="4 query heads cannot share 3 key heads evenly"):
        attention(q, k, v)

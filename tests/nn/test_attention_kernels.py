"""What only one backend does: cuDNN's call, blocks and compilation of the TPU kernel, bounded memory of chunks."""

from __future__ import annotations

import functools
import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import NamedSharding

from svg_jax.nn import attention as package
from svg_jax.nn.attention import RESULT, attention, chunked, cudnn, splash
from svg_jax.nn.attention.masks import Mask
from svg_jax.nn.stack import REMAT
from svg_jax.parallel import BATCH, make_mesh
from svg_jax.topologies import topology_devices
from tests.nn.test_attention_backends import (
    DIM,
    HEADS,
    KV_HEADS,
    SAMPLES,
    TOKENS,
    VALID,
    arrays,
    forward_and_backward,
    mesh,
    shapes,
)
from tests.vectors import assert_close


@pytest.mark.parametrize("nothing", [False, True], ids=["some", "none"])
def test_cudnn_is_asked_the_right_question(nothing: bool) -> None:
    """No GPU here: JAX's plain implementation answers the same call, with keys moved to the front and counted."""
    valid = jnp.asarray(VALID).at[1].set(VALID[1] & (not nothing))
    settings: dict[str, Any] = {"scale": DIM**-0.5, "logit_softcap": None, "platform": "gpu", "implementation": "xla"}
    q, k, v, dout = arrays()

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        out, pull = jax.vjp(lambda q, k, v: cudnn.attend(q, k, v, Mask(valid), **settings), q, k, v)
        return out, *pull(dout)

    found, expected = run(q, k, v), forward_and_backward("xla", *arrays(), valid=valid)
    rows = slice(1) if nothing else slice(None)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert bool(jnp.isfinite(a).all())
        assert_close(a[rows], b[rows], 1e-5, name)
    assert cudnn.packed(k, v, valid)[2].tolist() == [TOKENS - 50, 1 if nothing else TOKENS - 7]


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "tensor": 4}], ids=["one device", "mesh"])
def test_cudnn_lowers_for_cuda(sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a mesh each device calls the kernel for its heads of its samples."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(package, "current_platform", lambda: "gpu")
    q, k, v, dout = arrays("bfloat16")
    with jax.set_mesh(mesh(**sizes)) if sizes else jax.set_mesh(mesh(data=8)):
        run = jax.jit(lambda *qkv: jax.vjp(functools.partial(attention, valid=VALID), *qkv)[1](dout))
        text = run.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @__cudnn\$(\w+)\(.*\) \{.*: \((tensor<\w+>), (tensor<\w+>)", text)
    batch, share = (SAMPLES // 2, 4) if sizes else (SAMPLES, 1)
    for name, (found, query, key) in zip(("fmhaSoftmax", "fmhaSoftmaxBackward"), calls, strict=True):
        assert found == name
        assert query == f"tensor<{batch}x{TOKENS}x{HEADS // share}x{DIM}xbf16>"
        assert key == f"tensor<{batch}x{TOKENS}x{KV_HEADS // share}x{DIM}xbf16>"


@pytest.mark.parametrize(("policy", "calls"), [("full", 2), ("dots", 1), ("attention", 1)])
def test_rematerialisation_may_keep_what_cudnn_gave(policy: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(package, "current_platform", lambda: "gpu")
    attend = jax.checkpoint(functools.partial(attention, backend="gpu_cudnn"), policy=REMAT[policy])
    q, k, v, _ = arrays("bfloat16")
    gradient = jax.make_jaxpr(jax.grad(lambda *qkv: jnp.sum(attend(*qkv).astype(jnp.float32))))(q, k, v)
    assert len(re.findall(r"= dot_product_attention_fwd", str(gradient))) == calls


def temporary_bytes(backend: str, tokens: int) -> int:
    """Of the forward and backward pass, less what any attention holds: a few arrays of the size of q."""
    q, k = shapes(tokens, "float32")

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(attention(q, k, v, backend=backend)))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k).compile()
    return compiled.memory_analysis().temp_size_in_bytes - 6 * q.size * q.dtype.itemsize


def test_memory_of_chunks_grows_with_the_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CPU_BLOCK", (512, 1024))
    block = HEADS // KV_HEADS * 512 * 1024 * 4
    assert temporary_bytes("xla", 4096) > 100 * block
    assert temporary_bytes("chunked", 4096) < 4 * block
    assert temporary_bytes("chunked", 16384) < 4 * block


def test_rematerialisation_may_keep_the_result_of_chunks_by_name() -> None:
    """Then no logit is made a second time before the backward pass makes its own."""
    q, k, v, _ = arrays()

    def exponentials(policy: Any) -> int:
        attend = jax.checkpoint(functools.partial(attention, backend="chunked"), policy=policy)
        return str(jax.make_jaxpr(jax.grad(lambda *qkv: jnp.sum(attend(*qkv))))(q, k, v)).count("= exp ")

    forgetful = exponentials(jax.checkpoint_policies.nothing_saveable)
    assert 0 < exponentials(jax.checkpoint_policies.save_only_these_names(RESULT)) < forgetful


@pytest.mark.parametrize(
    ("tokens", "size"), [(4608, 512), (1280, 640), (512, 512), (300, 384), (4101, 640), (2400, 640), (6, 128)]
)
def test_blocks_of_splash(tokens: int, size: int) -> None:
    assert splash.block(tokens) == size


@pytest.mark.usefixtures("uncached")
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, of the extra 'aot'")
def test_splash_compiles_for_a_real_topology() -> None:
    """At 1024 px, without memory for 4608 x 4608 logits. Its three kernels (forward, dq, dk and dv) run once each,
    though everything is forgotten but its result, kept by name.
    """
    chips = make_mesh({"fsdp": 4}, topology_devices("v5e:2x2"))
    given = *shapes(4608, batch=4), jax.ShapeDtypeStruct((4, 4608), bool)
    q, k, valid = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(chips, BATCH)) for x in given)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(RESULT))
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array) -> jax.Array:
        return attention(q, k, v, valid=valid)

    def loss(*given: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(attend(*given).astype(jnp.float32)))

    with jax.set_mesh(chips):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, valid).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    assert compiled.memory_analysis().temp_size_in_bytes < HEADS * 4608 * 4608 * 4 / 4

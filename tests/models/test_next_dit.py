"""Next-DiT against the release: intermediate values, mixed aspect ratios in one padded batch, gradients, bf16."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

from svg_jax.convert.rules import to_jax, to_release
from svg_jax.convert.tables import NEXT_DIT
from svg_jax.models.next_dit import NextDiT, NextDiTConfig, positions, sequence, time_sinusoids
from svg_jax.nn.functional import Network, Params
from svg_jax.nn.patches import patchify, token_mask, unpatchify
from svg_jax.nn.rotary import multi_axis
from svg_jax.nn.stack import scan_layers
from tests.vectors import Case, assert_close, cases

CASES = [name for name in cases("dit") if (Case.load(name).config.get("model") or {}).get("dim")]


@functools.cache
def load(
    name: str, dtype: str = "float32", remat: str = "none"
) -> tuple[Case, NextDiTConfig, Network[NextDiT], Params]:
    case = Case.load(name)
    config = NextDiTConfig.from_release(case.config["model"], dtype=dtype, remat=remat)
    network = Network(lambda rngs: NextDiT(config, rngs=rngs))
    params = {key: jnp.asarray(value) for key, value in to_jax(case.weights(), NEXT_DIT, network.shapes).items()}
    return case, config, network, params


def tokens(image: np.ndarray, patch: int) -> np.ndarray:
    """[C, H, W] -> [N, C * patch^2]."""
    return np.asarray(patchify(image.transpose(1, 2, 0)[None], patch)[0])


def image(x: Array, grid: tuple[int, int], patch: int) -> np.ndarray:
    """[N, C * patch^2] -> [C, H, W]."""
    return np.asarray(unpatchify(x[None, : grid[0] * grid[1]], grid, patch)[0]).transpose(2, 0, 1)


def pad_batch(images: list[np.ndarray], patch: int, budget: int, fill: float) -> tuple[np.ndarray, np.ndarray]:
    """Images of any shapes as one padded batch; the padding holds `fill`."""
    rows = [tokens(x, patch) for x in images]
    batch = np.full((len(rows), budget, rows[0].shape[-1]), fill, np.float32)
    for slot, row in zip(batch, rows, strict=True):
        slot[: len(row)] = row
    return batch, np.array([[x.shape[1] // patch, x.shape[2] // patch] for x in images], np.int32)


@functools.cache
def forward(name: str, dtype: str = "float32", remat: str = "none"):
    _, _, network, _ = load(name, dtype, remat)
    return jax.jit(lambda params, x, t, text, grid, mask: network(params)(x, t, text, grid=grid, text_mask=mask))


def run(name: str, images: list[np.ndarray], inputs: str, *, extra: int = 0, fill: float = 0.0, **settings: str):
    """Our network on the case's captions `inputs` and these images; returns one [C, H, W] array an image."""
    case, config, _, params = load(name, **settings)
    patch = config.patch_size
    budget = max(x.shape[1] * x.shape[2] for x in images) // patch**2 + extra
    batch, grid = pad_batch(images, patch, budget, fill)
    mask = case.inputs[f"{inputs}.cap_mask"].astype(bool)
    text = np.where(mask[..., None], case.inputs[f"{inputs}.cap_feats"], np.float32(fill))
    y = forward(name, **settings)(params, batch, case.inputs[f"{inputs}.t"], text, grid, mask)
    return [image(y[i], tuple(grid[i]), patch) for i in range(len(images))]


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_one_shape(name: str) -> None:
    case = load(name)[0]
    y = run(name, list(case.inputs["tensor.x"]), "tensor")
    assert_close(np.stack(y), case.outputs["tensor.y"], 1e-4)


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fill", [0.0, 30.0])
def test_mixed_aspect_ratios_in_one_padded_batch(name: str, fill: float) -> None:
    """The release packs tightly; fixed budgets with any padding content give the same valid outputs."""
    case = load(name)[0]
    count = len(case.config["list"]["sizes"])
    y = run(name, [case.inputs[f"list.x{i}"] for i in range(count)], "list", extra=3, fill=fill)
    for i in range(count):
        assert_close(y[i], case.outputs[f"list.y{i}"], 1e-4, f"image {i}")


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_conditional_and_unconditional_halves(name: str) -> None:
    case = load(name)[0]
    x = case.inputs["cfg.x"]
    half = list(x[: len(x) // 2])  # the release replaces the second half of x by the first
    y = run(name, half + half, "cfg")
    assert_close(np.stack(y), case.outputs["cfg.raw_cond_uncond"], 1e-4)


def layer(layers: nnx.Module, index: int) -> Any:
    """One layer of a stack."""
    graphdef, state = nnx.split(layers)
    return nnx.merge(graphdef, jax.tree.map(lambda p: p[index], state))


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["tensor", "list"])
def test_intermediate_values(name: str, kind: str) -> None:
    """Every stage on valid rows. Ours orders [text padded | image padded], the release [valid text, image, padding]."""
    case, config, network, params = load(name)
    expected = {key.removeprefix(f"{kind}.inter."): v for key, v in case.outputs.items() if ".inter." in key}
    images = (
        list(case.inputs["tensor.x"])
        if kind == "tensor"
        else [case.inputs[f"list.x{i}"] for i in range(len(case.config["list"]["sizes"]))]
    )
    batch, grid = pad_batch(images, config.patch_size, max(x[0].size for x in images) // config.patch_size**2, 0.0)
    mask = jnp.asarray(case.inputs[f"{kind}.cap_mask"].astype(bool))
    t = jnp.asarray(case.inputs[f"{kind}.t"])

    @jax.jit
    def stages(params, batch, text):
        model = network(params)
        text_tokens = mask.shape[1]
        ids = positions(jnp.asarray(grid), mask, batch.shape[1])
        cos, sin = multi_axis(ids, config.axes_dims, config.axes_lens)
        image_mask = token_mask(jnp.asarray(grid), batch.shape[1])
        out = {"position_ids": ids, "freqs_cos": cos, "freqs_sin": sin, "t_sinusoid": time_sinusoids(t)}
        time = out["t_embedder"] = model.t_embedder(t)
        text = out["cap_embedder"] = sequence(model.cap_embedder, text)
        image = out["x_embedder"] = model.x_embedder(batch)
        left = (cos[:, :text_tokens], sin[:, :text_tokens])
        right = (cos[:, text_tokens:], sin[:, text_tokens:])
        text, out["context_refiner"] = scan_layers(model.context_refiner, text, left, mask, collect=True)
        image, out["noise_refiner"] = scan_layers(model.noise_refiner, image, right, image_mask, time, collect=True)
        joint = jnp.concatenate([text, image], axis=1)
        valid = jnp.concatenate([mask, image_mask], axis=1)
        first = layer(model.layers, 0)
        scale1, gate1, scale2, _ = jnp.split(sequence(first.adaLN_modulation, time)[:, None], 4, axis=-1)
        branch = first.attention(first.attention_norm1(joint) * (1 + scale1), (cos, sin), valid)
        middle = joint + jnp.tanh(gate1) * first.attention_norm2(branch)
        out["layers.0.attention"] = branch
        out["layers.0.feed_forward"] = first.feed_forward(first.ffn_norm1(middle) * (1 + scale2))
        joint, out["layers"] = scan_layers(model.layers, joint, (cos, sin), valid, time, collect=True)
        out["final_layer"] = model.final_layer(joint, time)
        return out

    out = stages(params, batch, jnp.asarray(case.inputs[f"{kind}.cap_feats"]))
    for key in ("t_sinusoid", "t_embedder"):
        if key in expected:
            assert_close(out[key], expected[key], 1e-5, key)
    for i, (rows, cols) in enumerate(grid):
        captions, length, text_tokens = int(mask[i].sum()), int(rows * cols), mask.shape[1]
        joint = np.r_[0:captions, text_tokens : text_tokens + length]
        np.testing.assert_array_equal(out["position_ids"][i][joint], expected["position_ids"][i][: len(joint)])
        for key in ("freqs_cos", "freqs_sin"):
            assert_close(out[key][i][joint], expected[key][i][: len(joint)], 1e-5, key)
        assert_close(out["cap_embedder"][i][:captions], expected["cap_embedder"][i][:captions], 1e-5)
        assert_close(out["x_embedder"][i][:length], expected["x_embedder"][i][:length], 1e-5)
        for key in ("layers.0.attention", "layers.0.feed_forward"):
            assert_close(out[key][i][joint], expected[key][i][: len(joint)], 1e-4, key)
        assert_close(out["final_layer"][i][joint], expected["final_layer"][i][: len(joint)], 1e-4)
        for key, rows_of in (
            ("context_refiner", np.r_[:captions]),
            ("noise_refiner", np.r_[:length]),
            ("layers", joint),
        ):
            found = [j for j in range(len(out[key])) if f"{key}.{j}" in expected]
            assert found, key
            for j in found:
                reference = expected[f"{key}.{j}"][i][: len(rows_of)]
                assert_close(out[key][j][i][rows_of], reference, 1e-4, f"{key}.{j}")


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients(name: str, remat: str) -> None:
    """Gradients of the mean squared error, with everything stored and with everything recomputed."""
    case, config, network, params = load(name, remat=remat)
    x, grid = _exact(case, config)
    target, _ = _exact(case, config, case.inputs["grad.target"])
    mask = case.inputs["tensor.cap_mask"].astype(bool)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        y = network(params)(x, case.inputs["tensor.t"], case.inputs["tensor.cap_feats"], grid=grid, text_mask=mask)
        return jnp.mean(jnp.square(y - target))

    value, grads = loss({key: jnp.asarray(v) for key, v in params.items()})
    assert_close(value, case.outputs["grad.loss"], 1e-5)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in grads.values()))
    assert_close(norm, case.outputs["grad.global_norm"], 1e-4)
    released = to_release({key: np.asarray(g) for key, g in grads.items()}, NEXT_DIT)
    for key in case.config["grad"]["keys"]:
        assert_close(released[key], case.outputs[f"grad.{key}"], 1e-4, key)


def _exact(case: Case, config: NextDiTConfig, x: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    x = case.inputs["tensor.x"] if x is None else x
    return pad_batch(list(x), config.patch_size, x.shape[2] * x.shape[3] // config.patch_size**2, 0.0)


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_bfloat16(name: str) -> None:
    """bf16 compute over float32 parameters stays as near to float32 as the release's autocast does."""
    case = load(name)[0]
    y = np.stack(run(name, list(case.inputs["tensor.x"]), "tensor", dtype="bfloat16"))
    assert_close(y, case.outputs["tensor.y"], 3e-2)
    for released in (key for key in case.outputs if key.startswith("tensor.y_bf16")):
        assert_close(y, case.outputs[released], 6e-2, released)  # both are within 3e-2 of float32
    assert y.dtype == np.float32


@pytest.mark.parametrize(
    ("make", "millions"),
    [
        (NextDiTConfig.next_dit_0p8b, 800),
        (NextDiTConfig.next_dit_2p6b, 2600),
        (NextDiTConfig.next_dit_3b, 3700),
        (NextDiTConfig.next_dit_4b, 4900),
        (NextDiTConfig.next_dit_7b, 8500),
    ],
)
def test_released_sizes(make, millions: int) -> None:
    config = make()
    shapes = Network(lambda rngs: NextDiT(config, rngs=rngs)).shapes
    count = sum(int(np.prod(s.shape)) for s in shapes.values()) / 1e6
    assert abs(count - millions) < 0.15 * millions, count


def test_an_image_that_is_not_there_leaves_the_others_alone() -> None:
    config = NextDiTConfig(
        in_channels=4, text_dim=8, dim=16, num_layers=2, num_refiner_layers=1, num_heads=2, num_kv_heads=1,
        multiple_of=8, axes_dims=(4, 2, 2), axes_lens=(8, 8, 8),
    )  # fmt: skip
    network = Network(lambda rngs: NextDiT(config, rngs=rngs))
    params = jax.jit(network.init)(jax.random.key(0))
    params["final_layer.linear.kernel"] += 1.0
    x = jax.random.normal(jax.random.key(1), (2, 6, 4))
    t, text, mask = jnp.full((2,), 0.5), jnp.ones((2, 3, 8)), jnp.array([[True, True, False], [True, False, False]])
    velocity = jax.jit(lambda params, grid: network(params)(x, t, text, grid=grid, text_mask=mask))
    both = velocity(params, jnp.array([[2, 3], [2, 3]]))
    one = velocity(params, jnp.array([[2, 3], [0, 0]]))
    assert bool(jnp.isfinite(one).all())
    np.testing.assert_allclose(both[0], one[0], atol=1e-6)


def test_small_constants_that_tolerances_cannot_see() -> None:
    """Epsilons of the release: norms of queries and keys, of blocks, and of the last LayerNorm."""
    config = NextDiTConfig.next_dit_2p6b()
    assert (config.qk_norm_eps, config.norm_eps) == (1e-6, 1e-5)
    small = NextDiTConfig(
        in_channels=4, text_dim=8, dim=16, num_layers=1, num_refiner_layers=1, num_heads=2, num_kv_heads=1,
        multiple_of=8, axes_dims=(4, 2, 2), axes_lens=(8, 8, 8),
    )  # fmt: skip
    assert NextDiT(small, rngs=nnx.Rngs(0)).final_layer.norm.eps == 1e-6


def test_a_config_that_does_not_add_up_is_refused() -> None:
    with pytest.raises(ValueError, match=r"axes_dims \(8, 8, 8\).*head size dim / num_heads = 96"):
        NextDiTConfig(axes_dims=(8, 8, 8))
    with pytest.raises(ValueError, match="num_kv_heads 7"):
        NextDiTConfig(num_kv_heads=7)

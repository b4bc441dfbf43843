"""DINOv3 against the release: every intermediate value, padded mixed sizes, both formats, bf16, gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

from svg_jax.convert.rules import to_jax
from svg_jax.convert.tables import DINOV3, dinov3_transformers
from svg_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD, ViT, ViTConfig, ViTOutput, normalise_pixels
from svg_jax.nn.functional import Network, Params
from svg_jax.nn.patches import patchify
from tests.vectors import Case, assert_close, cases

MODELS = {name: Case.load(name).config["model"] for name in cases("dinov3_")}
HUB = [name for name, model in MODELS.items() if "embed_dim" in model]
TRANSFORMERS = [name for name, model in MODELS.items() if "hidden_size" in model]
TINY = ViTConfig(dim=16, num_layers=2, num_heads=2, hidden_dim=32, layer_scale=0.5, patch_size=4)


@functools.cache
def load(name: str, dtype: str = "float32") -> tuple[Case, Network[ViT], Params]:
    case = Case.load(name)
    if name in HUB:
        config, table = ViTConfig.from_release(case.config["model"], dtype=dtype), DINOV3
    else:
        config = ViTConfig.from_transformers(case.config["model"], dtype=dtype)
        table = dinov3_transformers(gated=config.gated, rope_base=config.rope_base)
    network = Network(lambda rngs: ViT(config, rngs=rngs))
    params = to_jax(case.weights(), table, network.shapes)
    return case, network, {key: jnp.asarray(value) for key, value in params.items()}


def images_of(case: Case) -> dict[str, np.ndarray]:
    """{"64x96": [B, H, W, 3]}, the height first."""
    images = {key.removeprefix("image_"): value.transpose(0, 2, 3, 1) for key, value in case.inputs.items()}
    assert images
    return images


def padded(images: dict[str, np.ndarray], patch: int, fill: float, extra: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """The first image of every size in one batch, `fill` in the empty slots; patches and grids."""
    rows = [np.asarray(patchify(value[:1], patch)[0]) for value in images.values()]
    batch = np.full((len(rows), max(map(len, rows)) + extra, rows[0].shape[-1]), fill, np.float32)
    for slot, row in zip(batch, rows, strict=True):
        slot[: len(row)] = row
    return batch, np.array([[v.shape[1] // patch, v.shape[2] // patch] for v in images.values()], np.int32)


@functools.cache
def network_outputs(name: str, dtype: str = "float32"):
    _, network, _ = load(name, dtype)
    return jax.jit(lambda params, patches, grid: network(params).outputs(patches, grid))


def check_padded(name: str, expected: dict[str, ViTOutput], fill: float) -> None:
    """Every image of a padded batch of all sizes gives the same tokens as alone."""
    case, network, params = load(name)
    images = images_of(case)
    patches, grid = padded(images, network(params).patch_size, fill)
    found = network_outputs(name)(params, patches, grid)
    for i, size in enumerate(images):
        tokens = grid[i].prod()
        assert_close(found.class_token[i], expected[size].class_token[0], 1e-4, f"{size} class token")
        assert_close(found.storage_tokens[i], expected[size].storage_tokens[0], 1e-4, f"{size} storage tokens")
        assert_close(found.patch_tokens[i, :tokens], expected[size].patch_tokens[0], 1e-4, f"{size} patch tokens")


@pytest.mark.golden
@pytest.mark.parametrize("name", HUB)
def test_every_intermediate_value_equals_the_release(name: str) -> None:
    case, network, params = load(name)

    @jax.jit
    def forward(params: Params, images: Array) -> dict[str, Array]:
        vit = network(params)
        batch, height, width = images.shape[:3]
        rows, cols = height // vit.patch_size, width // vit.patch_size
        grid = jnp.broadcast_to(jnp.asarray([[rows, cols]], jnp.int32), (batch, 2))
        patches = patchify(images, vit.patch_size)
        states = vit.hidden_states(patches, grid)
        x, rotary, valid = vit.embed(patches, grid)
        block = first_layer(vit.blocks)
        attn = block.attn(block.norm1(x), rotary, valid)
        normed = {"first": vit.split(vit.norm(states[1])), "last": vit.split(vit.norm(states[-1]))}
        out = vit.images(images)
        angles = vit.rope_embed(grid, rows * cols)[0]
        found = {
            "x_norm_clstoken": out.class_token,
            "x_storage_tokens": out.storage_tokens,
            "x_norm_patchtokens": out.patch_tokens,
            "inter.patch_embed_BHWC": vit.patch_embed(patches).reshape(batch, rows, cols, -1),
            "inter.block_0_attn": attn,
            "inter.block_0_mlp": block.mlp(block.norm2(x + block.ls1(attn))),
            "rope_sin": jnp.tile(jnp.sin(angles), (1, 2)),
            "rope_cos": jnp.tile(jnp.cos(angles), (1, 2)),
        }
        found |= {f"inter.block_{i}": state for i, state in enumerate(states[1:])}
        for place, tokens in normed.items():
            grids = tokens.patch_tokens.reshape(batch, rows, cols, -1)
            found[f"intermediate_layers_{place}_normed_BCHW"] = grids.transpose(0, 3, 1, 2)
        return found

    checked = set()
    for size, images in images_of(case).items():
        found = forward(params, images)
        for key in [key for key in case.outputs if key.startswith(f"{size}.") and "bf16" not in key]:
            assert_close(found[key.removeprefix(f"{size}.")], case.outputs[key], 1e-4, key)
            checked.add(key)
    assert checked == {key for key in case.outputs if "bf16" not in key}


def first_layer(stack: nnx.Module) -> nnx.Module:
    graphdef, state = nnx.split(stack)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], state))


@pytest.mark.golden
@pytest.mark.parametrize("fill", [0.0, 1e4, np.nan])
@pytest.mark.parametrize("name", HUB)
def test_sizes_mixed_in_one_padded_batch_equal_the_release(name: str, fill: float) -> None:
    case = load(name)[0]
    keys = ("x_norm_clstoken", "x_storage_tokens", "x_norm_patchtokens")
    expected = {size: ViTOutput(*(case.outputs[f"{size}.{key}"] for key in keys)) for size in images_of(case)}
    check_padded(name, expected, fill)


@pytest.mark.golden
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_weights_of_transformers_equal_its_outputs(name: str) -> None:
    case, network, params = load(name)
    expected = {}
    for size, images in images_of(case).items():
        vit = network(params)
        patches, grid = padded({size: images}, vit.patch_size, 0.0, extra=0)
        out = jax.jit(lambda params, images: network(params).images(images))(params, images)
        sequence = jnp.concatenate([out.class_token[:, None], out.storage_tokens, out.patch_tokens], axis=1)
        assert_close(sequence, case.outputs[f"{size}.last_hidden_state"], 1e-4, f"{size} last hidden state")
        assert_close(out.class_token, case.outputs[f"{size}.pooler_output"], 1e-4, f"{size} pooler output")
        states = jax.jit(lambda params, *args: network(params).hidden_states(*args))(params, patches, grid)
        for i, state in enumerate(states):
            assert_close(state, case.outputs[f"{size}.hidden_states_{i}"][:1], 1e-4, f"{size} state {i}")
        expected[size] = vit.split(case.outputs[f"{size}.last_hidden_state"])
    check_padded(name, expected, 1e4)


@pytest.mark.golden
@pytest.mark.parametrize("name", HUB)
def test_bfloat16_stays_near_the_release_under_autocast(name: str) -> None:
    case, network, params = load(name, "bfloat16")
    keys = [key for key in case.outputs if "bf16" in key]
    assert keys
    for key in keys:
        size, what = key.split(".", 1)
        assert what == "x_norm_patchtokens_bf16_autocast"
        out = jax.jit(lambda params, images: network(params).images(images))(params, images_of(case)[size])
        assert out.patch_tokens.dtype == jnp.float32
        assert_close(out.patch_tokens, case.outputs[key], 3e-2, key)


@functools.cache
def tiny() -> tuple[Network[ViT], Params]:
    network = Network(lambda rngs: ViT(TINY, rngs=rngs))
    return network, jax.jit(network.init)(jax.random.key(0))


def test_gradients_reach_what_acts_and_nothing_else() -> None:
    network, params = tiny()
    patches = jax.random.normal(jax.random.key(1), (2, 7, 48))
    grid = jnp.array([[2, 3], [1, 4]], jnp.int32)
    weights = jax.random.normal(
        jax.random.key(2), (2, 4, TINY.dim)
    )  # a plain sum of normalised features has no gradient

    def loss(params: Params, patches: Array) -> Array:
        return jnp.sum(network(params)(patches, grid)[:, :4] * weights)

    of_params, of_patches = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, patches)
    still = {name for name, gradient in of_params.items() if not np.any(gradient)}
    assert still == {"mask_token", "rope_embed.periods", "blocks.attn.qkv.bias_mask"}
    key_bias = of_params["blocks.attn.qkv.bias"][:, TINY.dim : 2 * TINY.dim]
    assert not np.any(key_bias), "the bias of the keys is masked"
    used = np.any(np.asarray(of_patches) != 0, axis=-1)
    np.testing.assert_array_equal(used, [[True] * 6 + [False], [True] * 4 + [False] * 3])


def test_a_slot_without_an_image_stays_finite() -> None:
    network, params = tiny()
    out = jax.jit(lambda params, patches, grid: network(params)(patches, grid))(
        params, np.full((2, 6, 48), np.nan, np.float32), np.array([[0, 0], [0, 0]], np.int32)
    )
    assert np.isfinite(out).all()


def test_stored_periods_are_used() -> None:
    network, params = tiny()
    patches, grid = jax.random.normal(jax.random.key(1), (1, 6, 48)), jnp.array([[2, 3]], jnp.int32)
    forward = jax.jit(lambda params: network(params)(patches, grid))
    other = params | {"rope_embed.periods": 2 * params["rope_embed.periods"]}
    assert np.abs(forward(params) - forward(other)).max() > 1e-4


def test_images_that_do_not_divide_are_cut() -> None:
    network, params = tiny()
    images = jax.random.normal(jax.random.key(1), (1, 11, 14, 3))
    forward = jax.jit(lambda params, images: network(params).images(images).patch_tokens)
    out = forward(params, images)
    assert out.shape == (1, 2 * 3, TINY.dim)
    assert_close(out, forward(params, images[:, :8, :12]), 1e-6)


def test_normalise_pixels_is_channel_fastest() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    expected = (image / 255.0 - np.array(IMAGENET_MEAN).reshape(1, 1, 1, 3)) / np.array(IMAGENET_STD).reshape(
        1, 1, 1, 3
    )
    found = normalise_pixels(patchify(jnp.asarray(image), 4))
    assert found.dtype == jnp.float32
    assert_close(found, patchify(jnp.asarray(expected, jnp.float32), 4), 1e-6)


# Parameters in millions as the model cards of DINOv3 give them.
@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (ViTConfig.vits16(), 21.6),
        (ViTConfig.vits16plus(), 28.7),
        (ViTConfig.vitb16(), 85.7),
        (ViTConfig.vitl16(), 303.1),
        (ViTConfig.vith16plus(), 840.6),
        (ViTConfig.vit7b16(), 6716.0),
    ],
    ids=["vits16", "vits16plus", "vitb16", "vitl16", "vith16plus", "vit7b16"],
)
def test_named_sizes_have_the_published_number_of_parameters(config: ViTConfig, millions: float) -> None:
    shapes = Network(lambda rngs: ViT(config, rngs=rngs)).shapes
    assert sum(np.prod(struct.shape) for struct in shapes.values()) / 1e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.golden
@pytest.mark.parametrize("name", HUB)
def test_kernels_carry_logical_axes(name: str) -> None:
    _, network, _ = load(name)
    axes = network.axes
    assert axes["blocks.attn.qkv.kernel"] == ("layers", "embed", "heads")
    assert axes["blocks.attn.proj.kernel"] == ("layers", "heads", "embed")
    for key, struct in network.shapes.items():
        assert len(axes[key]) == len(struct.shape), key
        assert not key.endswith("kernel") or "embed" in axes[key], key


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"embed_dim": 32, "depth": 1, "num_heads": 2, "norm_layer": "rmsnorm"}, "norm_layer"),
        ({"embed_dim": 32, "depth": 1, "num_heads": 2, "ffn_layer": "moe"}, "ffn_layer"),
        ({"embed_dim": 30, "depth": 1, "num_heads": 4}, "multiple of 4"),
        ({"embed_dim": 32, "depth": 1, "num_heads": 2, "pos_embed_rope_normalize_coords": "max"}, "normalize_coords"),
    ],
)
def test_what_no_published_model_has_is_refused(arguments: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ViTConfig.from_release(arguments)


def test_patches_of_another_size_are_refused() -> None:
    network, params = tiny()
    with pytest.raises(ValueError, match="patch_size 4 needs 48"):
        network(params)(jnp.zeros((1, 2, 768)), jnp.array([[1, 2]], jnp.int32))

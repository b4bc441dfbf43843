"""Is the peer's network ours, and its sampler? `python -m benchmarks.same_network --latents` moves its weights over and
compares the velocities, then what both draw from the same noise.
"""

from __future__ import annotations

import argparse

import jax
import numpy as np
import torch
from diffusers import Lumina2Transformer2DModel
from jaxtyping import Array

from benchmarks import ours, peer
from benchmarks.shape import Shape
from svg_jax.convert.rules import LINEAR, Filled, Rule, Table, Transform, to_jax
from svg_jax.models.next_dit import NextDiT
from svg_jax.nn.functional import Network, Params

TOLERANCE = 1e-4  # of the largest velocity, of the largest latent


def lumina2(shape: Shape) -> Table:
    """Names of diffusers' `Lumina2Transformer2DModel` on the left, ours on the right."""
    head_dim = shape.dim // shape.num_heads
    ends = np.cumsum([shape.dim, shape.num_kv_heads * head_dim])
    qkv = Transform(
        lambda *parts: np.concatenate([part.T for part in parts], axis=1),
        lambda fused: tuple(part.T for part in np.split(fused, ends, axis=1)),
    )
    stack, layer = "{stack:layers|noise_refiner|context_refiner}.{i}", "{stack:layers|noise_refiner|context_refiner}"
    unmodulated = Rule("context_refiner.{i}.norm1.weight", "context_refiner.attention_norm1.scale")
    norms = {
        "norm1.norm": "attention_norm1",
        "norm2": "attention_norm2",
        "ffn_norm1": "ffn_norm1",
        "ffn_norm2": "ffn_norm2",
        "attn.norm_q": "attention.q_norm",
        "attn.norm_k": "attention.k_norm",
    }
    maps = {
        f"{stack}.norm1.linear": f"{layer}.adaLN_modulation.1",
        f"{stack}.attn.to_out.0": f"{layer}.attention.out",
        **{f"{stack}.feed_forward.linear_{n}": f"{layer}.feed_forward.w{n}" for n in (1, 2, 3)},
        "x_embedder": "x_embedder",
        "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_caption_embed.caption_embedder.1": "cap_embedder.1",
        "norm_out.linear_1": "final_layer.adaLN_modulation.1",
        "norm_out.linear_2": "final_layer.linear",
    }
    return (
        unmodulated,
        Rule(tuple(f"{stack}.attn.to_{name}.weight" for name in "qkv"), f"{layer}.attention.qkv.kernel", qkv),
        *(Rule(f"{stack}.{theirs}.weight", f"{layer}.{name}.scale") for theirs, name in norms.items()),
        *(Rule(f"{theirs}.weight", f"{name}.kernel", LINEAR) for theirs, name in maps.items()),
        *(Rule(f"{theirs}.bias", f"{name}.bias") for theirs, name in maps.items()),
        Rule("time_caption_embed.caption_embedder.0.weight", "cap_embedder.0.scale"),
        Filled("norm_final.scale", np.ones, "the release has this norm in its files and never applies it"),
    )


def moved(shape: Shape) -> tuple[Lumina2Transformer2DModel, Network[NextDiT], Params]:
    """The peer's network with random weights, none of them zero, and ours with the same.

    Raises:
        ValueError: The networks differ in their parameters.
    """
    generator = np.random.default_rng(0)
    model = peer.network(shape).eval()
    with torch.no_grad():
        for param in model.parameters():
            param += 0.02 * torch.from_numpy(generator.standard_normal(param.shape, np.float32))
    network = ours.network(shape)
    params = to_jax({k: v.numpy() for k, v in model.state_dict().items()}, lumina2(shape), network.shapes)
    return model, network, jax.device_put(params)


def velocities_differ(
    shape: Shape, model: Lumina2Transformer2DModel, network: Network[NextDiT], params: Params
) -> float:
    """By how much at most, relative to the largest."""
    generator = np.random.default_rng(1)
    x = generator.standard_normal((shape.batch, shape.image_tokens, shape.in_channels), np.float32)
    text = generator.standard_normal((shape.batch, shape.text_tokens, shape.text_dim), np.float32)
    t = generator.uniform(size=shape.batch).astype(np.float32)
    mask = np.ones((shape.batch, shape.text_tokens), bool)
    grid = np.tile(np.array([[shape.rows, shape.cols]], np.int32), (shape.batch, 1))
    velocity = jax.jit(lambda params, *args: network(params)(*args, grid=grid, text_mask=mask))(params, x, t, text)
    with torch.no_grad():
        expected = model(
            as_image(x, shape), *map(torch.from_numpy, (t, text, mask.astype(np.int64))), return_dict=False
        )[0]
    return difference(velocity, expected)


def latents_differ(shape: Shape, model: Lumina2Transformer2DModel, network: Network[NextDiT], params: Params) -> float:
    """By how much at most, relative to the largest."""
    text = np.random.default_rng(2).standard_normal((2 * shape.batch, shape.text_tokens, shape.text_dim), np.float32)
    key = jax.random.key(0)
    latents = ours.jitted_draw(shape, network)(params, text, key)
    keys = [jax.random.fold_in(jax.random.fold_in(key, prompt), 0) for prompt in range(shape.batch)]
    noise = np.stack([jax.random.normal(key, (shape.image_tokens, shape.in_channels)) for key in keys])
    return difference(latents, peer.draw(model, torch.from_numpy(text), as_image(noise, shape)))


def as_image(x: np.ndarray, shape: Shape) -> torch.Tensor:
    """Tokens as the peer takes them, channels before rows and columns."""
    return torch.from_numpy(x).reshape(len(x), shape.rows, shape.cols, -1).permute(0, 3, 1, 2).contiguous()


def difference(found: Array, expected: torch.Tensor) -> float:
    """Between our tokens and the peer's image."""
    wanted = expected.permute(0, 2, 3, 1).reshape(found.shape).numpy()
    return float(np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max())


def main() -> None:
    """Prints the differences; fails if they are not rounding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", action="store_true", help="compare what the samplers draw, too")
    shape = Shape()
    both = moved(shape)
    found = {"velocities": velocities_differ(shape, *both)}
    if parser.parse_args().latents:
        found["latents"] = latents_differ(shape, *both)
    for name, value in found.items():
        print(f"same parameters; {name} differ by {value:.1e} of the largest (at most {TOLERANCE:g})")
    if max(found.values()) > TOLERANCE:
        raise SystemExit("the two networks are not the same: the comparison means nothing")


if __name__ == "__main__":
    main()

"""Is the peer's network ours? `python -m benchmarks.same_network` moves its weights over and compares velocities."""

from __future__ import annotations

import jax
import numpy as np
import torch

from benchmarks import ours, peer
from benchmarks.shape import Shape
from svg_jax.convert.rules import LINEAR, Filled, Rule, Table, Transform, to_jax

TOLERANCE = 1e-4  # of the largest velocity


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


def largest_difference(shape: Shape) -> float:
    """Between the two velocities, relative to the largest; the weights are random, none of them zero.

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

    x = generator.standard_normal((shape.batch, shape.image_tokens, shape.in_channels), np.float32)
    text = generator.standard_normal((shape.batch, shape.text_tokens, shape.text_dim), np.float32)
    t = generator.uniform(size=shape.batch).astype(np.float32)
    mask = np.ones((shape.batch, shape.text_tokens), bool)
    grid = np.tile(np.array([[shape.rows, shape.cols]], np.int32), (shape.batch, 1))
    velocity = jax.jit(lambda params, *args: network(params)(*args, grid=grid, text_mask=mask))(params, x, t, text)

    image = torch.from_numpy(x).reshape(shape.batch, shape.rows, shape.cols, -1).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model(image, *map(torch.from_numpy, (t, text, mask.astype(np.int64))), return_dict=False)[0]
    expected = expected.permute(0, 2, 3, 1).reshape(x.shape).numpy()
    return float(np.abs(np.asarray(velocity) - expected).max() / np.abs(expected).max())


def main() -> None:
    """Prints the difference; fails if it is not rounding."""
    difference = largest_difference(Shape())
    print(f"same parameters; velocities differ by {difference:.1e} of the largest (at most {TOLERANCE:g})")
    if difference > TOLERANCE:
        raise SystemExit("the two networks are not the same: the comparison means nothing")


if __name__ == "__main__":
    main()

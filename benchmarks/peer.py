"""The other side: Next-DiT as diffusers has it (Lumina-Image 2.0), trained and sampled by PyTorch."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import Lumina2Transformer2DModel

from benchmarks import shape as settings
from benchmarks.shape import Shape

VERSIONS = {"torch": torch.__version__, "diffusers": diffusers.__version__}


def network(shape: Shape) -> Lumina2Transformer2DModel:
    """The same architecture; the norms of queries and keys are set to the release's epsilon."""
    model = Lumina2Transformer2DModel(
        patch_size=1,
        in_channels=shape.in_channels,
        hidden_size=shape.dim,
        num_layers=shape.num_layers,
        num_refiner_layers=shape.num_refiner_layers,
        num_attention_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        axes_dim_rope=shape.axes_dims,
        axes_lens=(600, 512, 512),
        cap_feat_dim=shape.text_dim,
    )
    for name, module in model.named_modules():
        if name.endswith(("norm_q", "norm_k")):
            module.eps = 1e-6
    return model


def train_step(shape: Shape) -> tuple[Callable[[], Any], int]:
    """A function that makes one update, and the number of parameters."""
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    model = network(shape).train()
    return update_of(model)(shape), sum(p.numel() for p in model.parameters())


def update_of(model: Lumina2Transformer2DModel) -> Callable[[Shape], Callable[[], Any]]:
    """With the optimiser's state and the average made once: from a shape to a function that makes one update at it.

    Parameters are float32; where the shape says bfloat16, PyTorch casts each operation's inputs (autocast).
    """
    device = next(model.parameters()).device
    average = copy.deepcopy(model).requires_grad_(False)
    params, averages = list(model.parameters()), list(average.parameters())
    # Of AdamW's implementations the fused one is the fastest on a CPU.
    optimiser = torch.optim.AdamW(
        params,
        lr=settings.LEARNING_RATE,
        betas=settings.BETAS,
        eps=settings.EPS,
        weight_decay=settings.WEIGHT_DECAY,
        fused=True,
    )

    def at_shape(shape: Shape) -> Callable[[], float]:
        x1 = torch.randn(shape.batch, shape.in_channels, shape.rows, shape.cols, device=device)
        text = torch.randn(shape.batch, shape.text_tokens, shape.text_dim, device=device)
        mask = torch.ones(shape.batch, shape.text_tokens, dtype=torch.long, device=device)

        def update() -> float:
            t = torch.sigmoid(torch.randn(shape.batch, device=device))
            x0 = torch.randn_like(x1)
            at = t[:, None, None, None]
            with torch.autocast(device.type, torch.bfloat16, enabled=shape.dtype == "bfloat16"):
                velocity = model(at * x1 + (1 - at) * x0, t, text, mask, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(velocity.float(), x1 - x0)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, settings.CLIP)
            optimiser.step()
            torch._foreach_lerp_(averages, params, 1 - settings.EMA_DECAY)
            return loss.item()

        return update

    return at_shape


@torch.inference_mode()
def draw(model: Lumina2Transformer2DModel, text: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Noise [batch, channels, rows, cols] -> latents; `text` is that of both halves."""
    mask = torch.ones(text.shape[:2], dtype=torch.long)
    for i in range(settings.NUM_STEPS):
        t = torch.full((len(text),), i / settings.NUM_STEPS)
        both = model(torch.cat([x, x]), t, text, mask, return_dict=False)[0]
        conditional, unconditional = both.chunk(2)
        velocity = unconditional + settings.GUIDANCE_SCALE * (conditional - unconditional)
        limit = norm(conditional) / (norm(velocity) + 1e-12)
        x = x + velocity * limit.clamp(max=1.0) / settings.NUM_STEPS
    return x


def norm(x: torch.Tensor) -> torch.Tensor:
    """Of each sample."""
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)


def sampling(shape: Shape) -> tuple[Callable[[], Any], int]:
    """A function that draws one batch of latents, and the number of parameters."""
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    model = network(shape).eval()
    text = torch.randn(2 * shape.batch, shape.text_tokens, shape.text_dim)
    noise = (shape.batch, shape.in_channels, shape.rows, shape.cols)
    return lambda: draw(model, text, torch.randn(noise)), sum(p.numel() for p in model.parameters())

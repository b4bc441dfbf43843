"""The other side of `benchmarks.train_step`: Next-DiT as diffusers has it (Lumina-Image 2.0), trained by PyTorch."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

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


def train_step(shape: Shape) -> tuple[Callable[[], float], int]:
    """A function that makes one update and returns its loss, and the number of parameters."""
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    model = network(shape).train()
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
    x1 = torch.randn(shape.batch, shape.in_channels, shape.rows, shape.cols)
    text = torch.randn(shape.batch, shape.text_tokens, shape.text_dim)
    mask = torch.ones(shape.batch, shape.text_tokens, dtype=torch.long)

    def update() -> float:
        t = torch.sigmoid(torch.randn(shape.batch))
        x0 = torch.randn_like(x1)
        at = t[:, None, None, None]
        velocity = model(at * x1 + (1 - at) * x0, t, text, mask, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(velocity, x1 - x0)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, settings.CLIP)
        optimiser.step()
        torch._foreach_lerp_(averages, params, 1 - settings.EMA_DECAY)
        return loss.item()

    return update, sum(p.numel() for p in params)

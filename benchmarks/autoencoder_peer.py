"""The other side of `benchmarks.autoencoder`: Autoencoder-P and its losses in plain PyTorch modules.

The same step, with nothing computed twice: one forward pass of each network, pixel gradients through the last layer for
the adaptive weight, one backward pass of the decoder. Names are the release's.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.autoencoder_shape import Shape
from svg_jax.models.autoencoder import AutoencoderConfig
from svg_jax.models.decoder import DecoderConfig
from svg_jax.models.discriminator import DiscriminatorConfig
from svg_jax.models.lpips import SCALE, SHIFT, SLICES, LPIPSConfig
from svg_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD, ViTConfig

VERSIONS = {"torch": torch.__version__}


def named(**modules: nn.Module) -> nn.Module:
    """Modules under one name."""
    parent = nn.Module()
    for name, module in modules.items():
        parent.add_module(name.strip("_"), module)
    return parent


class ViTBlock(nn.Module):
    """Attention and SwiGLU, each before a norm and with layer scale."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, config.hidden_dim
        self.heads = config.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, config.norm_eps), nn.LayerNorm(dim, config.norm_eps)
        self.attn = named(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim))
        self.attn.qkv.register_buffer("bias_mask", torch.ones(3 * dim))
        self.mlp = named(w1=nn.Linear(dim, hidden), w2=nn.Linear(dim, hidden), w3=nn.Linear(hidden, dim))
        self.ls1, self.ls2 = nn.Module(), nn.Module()
        for scale in (self.ls1, self.ls2):
            scale.gamma = nn.Parameter(torch.full((dim,), config.layer_scale))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = F.linear(self.norm1(x), self.attn.qkv.weight, self.attn.qkv.bias * self.attn.qkv.bias_mask)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = ((t * cos + torch.cat([-t.chunk(2, -1)[1], t.chunk(2, -1)[0]], -1) * sin) for t in (q, k))
        x = x + self.ls1.gamma * self.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.ls2.gamma * self.mlp.w3(F.silu(self.mlp.w1(y)) * self.mlp.w2(y))


class Encoder(nn.Module):
    """DINOv3: images in [-1, 1] to features [B, C, h, w]."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = named(proj=nn.Conv2d(3, config.dim, config.patch_size, config.patch_size))
        self.cls_token = nn.Parameter(torch.randn(1, 1, config.dim))
        self.storage_tokens = nn.Parameter(torch.randn(1, config.num_storage_tokens, config.dim))
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        pairs = config.head_dim // 4
        self.periods = config.rope_base ** (torch.arange(pairs) / pairs)
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed.proj(((images + 1) / 2 - self.mean) / self.std)
        rows, cols = x.shape[2:]
        u = torch.cartesian_prod(*((torch.arange(n) + 0.5) / n * 2 - 1 for n in (rows, cols)))
        angles = (2 * math.pi * u[:, :, None] / self.periods).flatten(1).repeat(1, 2)
        front = torch.cat([self.cls_token, self.storage_tokens], 1).expand(len(x), -1, -1)
        angles = F.pad(angles, (0, 0, front.shape[1], 0))
        x = torch.cat([front, x.flatten(2).transpose(1, 2)], 1)
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin())
        return self.norm(x)[:, front.shape[1] :].transpose(1, 2).unflatten(2, (rows, cols))


def norm(channels: int) -> nn.GroupNorm:
    """In 32 groups."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(inside), nn.Conv2d(inside, outside, 3, padding=1)
        self.norm2, self.conv2 = norm(outside), nn.Conv2d(outside, outside, 3, padding=1)
        self.nin_shortcut = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return self.nin_shortcut(x) + y


class Attention(nn.Module):
    """One head over all places."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (project(y).flatten(2).transpose(1, 2) for project in (self.q, self.k, self.v))
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Decoder(nn.Module):
    """Features to pixels; `hidden` is what the last convolution sees."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        lowest = widths[-1]
        self.conv_in = nn.Conv2d(config.z_channels, lowest, 3, padding=1)
        self.mid = named(block_1=ResBlock(lowest, lowest), attn_1=Attention(lowest), block_2=ResBlock(lowest, lowest))
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            sizes = [widths[min(i + 1, len(widths) - 1)], *[width] * config.num_res_blocks]
            level = named(
                block=nn.ModuleList(ResBlock(size, width) for size in sizes),
                attn=nn.ModuleList(Attention(width) for _ in sizes if width is lowest and i == len(widths) - 1),
            )
            if i > 0:
                level.upsample = named(conv=nn.Conv2d(width, width, 3, padding=1))
            self.up.append(level)
        self.norm_out, self.conv_out = norm(widths[0]), nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def hidden(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        for i, level in reversed(list(enumerate(self.up))):
            for j, block in enumerate(level.block):
                x = block(x)
                x = level.attn[j](x) if len(level.attn) else x
            if i > 0:
                x = level.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return F.silu(self.norm_out(x))


class LPIPS(nn.Module):
    """Of images in [-1, 1]."""

    def __init__(self, config: LPIPSConfig) -> None:
        super().__init__()
        self.net, width = nn.Module(), 3
        for i, places in enumerate(SLICES):
            part = nn.ModuleDict()
            for place in places:
                part[str(place)] = nn.Conv2d(width, config.channels[i], 3, padding=1)
                width = config.channels[i]
            self.net.add_module(f"slice{i + 1}", part)
            self.add_module(f"lin{i}", named(model=nn.ModuleDict({"1": nn.Conv2d(width, 1, 1, bias=False)})))
        self.shift, self.scale = (torch.tensor(v)[:, None, None] for v in (SHIFT, SCALE))

    def features(self, x: Tensor) -> list[Tensor]:
        x, found = (x - self.shift) / self.scale, []
        for i in range(len(SLICES)):
            x = F.max_pool2d(x, 2) if i else x
            for conv in getattr(self.net, f"slice{i + 1}").values():
                x = F.relu(conv(x))
            found.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return found

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            of_a = self.features(a)
        heads = (getattr(self, f"lin{i}").model["1"] for i in range(len(SLICES)))
        layers = zip(heads, of_a, self.features(b), strict=True)
        return sum(head((x - y) ** 2).mean((1, 2, 3)) for head, x, y in layers)


def patch_discriminator(config: DiscriminatorConfig) -> nn.Module:
    """Logits of patches."""
    layers: list[nn.Module] = []
    width = 3
    for i in range(config.num_layers + 1):
        wider = config.channels * min(2**i, 8)
        layers.append(nn.Conv2d(width, wider, 4, 2 if i < config.num_layers else 1, 1, bias=i == 0))
        layers += [nn.BatchNorm2d(wider)] if i else []
        layers.append(nn.LeakyReLU(0.2))
        width = wider
    return named(main=nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1)))


class Networks(nn.Module):
    """All four."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        sizes, loss = AutoencoderConfig.svg_p(), shape.loss
        self.encoder = Encoder(sizes.encoder).requires_grad_(False)
        self.decoder = Decoder(sizes.decoder)
        assert loss.perceptual is not None and loss.discriminator is not None  # noqa: PT018
        self.perceptual_loss = LPIPS(loss.perceptual).requires_grad_(False)
        self.discriminator = patch_discriminator(loss.discriminator)


def gradients(model: Networks, x: Tensor, shape: Shape) -> tuple[dict[str, float], list[Tensor]]:
    """Terms of the loss, and gradients of the decoder's parameters and then of the discriminator's."""
    loss, decoder = shape.loss, model.decoder
    discriminate = model.discriminator.main
    with torch.no_grad():
        features = model.encoder(x)
    hidden = decoder.hidden(features)
    cut = hidden.detach().requires_grad_()
    pixels = decoder.conv_out(cut)
    y = pixels.detach().requires_grad_()
    last = list(decoder.conv_out.parameters())

    error = (x - y).abs() + loss.perceptual_weight * model.perceptual_loss(x, y)[:, None, None, None]
    nll = error.sum() / len(x)
    fake, real = discriminate(y), discriminate(x)
    generator = -fake.mean()
    (by_pixels,) = torch.autograd.grad(nll, y)
    (by_pixels_of_game,) = torch.autograd.grad(generator, y, retain_graph=True)
    against = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    of_discriminator = torch.autograd.grad(against, list(model.discriminator.parameters()))

    by_last = torch.autograd.grad(pixels, last, by_pixels, retain_graph=True)
    by_last_of_game = torch.autograd.grad(pixels, last, by_pixels_of_game, retain_graph=True)
    weight = loss.disc_weight * (by_last[0].norm() / (by_last_of_game[0].norm() + 1e-4)).clamp(0, 1e4)
    (by_hidden,) = torch.autograd.grad(pixels, cut, by_pixels + weight * by_pixels_of_game)
    rest = [p for name, p in decoder.named_parameters() if not name.startswith("conv_out.")]
    of_rest = torch.autograd.grad(hidden, rest, by_hidden)
    terms = {"nll": nll, "generator": generator, "discriminator": against, "weight": weight}
    of_last = [a + weight * b for a, b in zip(by_last, by_last_of_game, strict=True)]
    return {name: value.item() for name, value in terms.items()}, [*of_rest, *of_last, *of_discriminator]


def parameters(model: Networks) -> list[nn.Parameter]:
    """Those that are trained, in the order of `gradients`."""
    last = list(model.decoder.conv_out.parameters())
    rest = [p for name, p in model.decoder.named_parameters() if not name.startswith("conv_out.")]
    return [*rest, *last, *model.discriminator.parameters()]


def train_step(shape: Shape) -> tuple[Callable[[], float], int]:
    """A function that makes one update, and the number of trained parameters."""
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    # Channels last are the faster layout on a CPU.
    model = Networks(shape).to(memory_format=torch.channels_last)
    trained = parameters(model)
    averages = copy.deepcopy(trained)
    optimiser = torch.optim.Adam(trained, lr=shape.lr, betas=(0.5, 0.9), fused=True)
    images = torch.rand(shape.batch, 3, shape.resolution, shape.resolution) * 2 - 1
    images = images.contiguous(memory_format=torch.channels_last)

    def update() -> float:
        terms, found = gradients(model, images, shape)
        for parameter, gradient in zip(trained, found, strict=True):
            parameter.grad = gradient
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, trained, 1 - shape.ema)
        return terms["nll"]

    return update, sum(p.numel() for p in trained)

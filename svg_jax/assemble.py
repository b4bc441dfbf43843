"""From a config to networks and their frozen parameters, on a mesh."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import optax
from etils import epath
from ml_collections import ConfigDict

from data_pipelines.fingerprint import difference
from data_pipelines.images import MAX_RESOLUTION, crop_sizes
from data_pipelines.loader import MOST_PREFETCHED, MOST_THREADS, MOST_WORKERS
from data_pipelines.text import Tokenizer, full_prompt
from svg_jax import distributed
from svg_jax.adversarial import AutoencoderLoss, LossConfig
from svg_jax.autoencoder_steps import AutoencoderNetworks
from svg_jax.checkpoint import load_config
from svg_jax.config import check_numbers, flatten, from_config
from svg_jax.flow.names import lookup
from svg_jax.flow.solvers import SOLVERS
from svg_jax.models.autoencoder import DECODERS, Autoencoder, AutoencoderConfig
from svg_jax.models.encoders import encoder_config
from svg_jax.models.gemma2 import Gemma2, Gemma2Config
from svg_jax.models.next_dit import NextDiT, NextDiTConfig
from svg_jax.models.residual import ResidualConfig
from svg_jax.nn.attention import BACKENDS
from svg_jax.nn.functional import Network
from svg_jax.nn.stack import REMAT
from svg_jax.state import adamw, learning_rate
from svg_jax.steps import Networks

logger = logging.getLogger("svg_jax")

DTYPES = {"float32": None, "bfloat16": None, "float16": None}

# Far more than anybody needs: what is above it would use up memory, or wait for days, before it is found out.
AT_MOST = {
    "data.resolution": MAX_RESOLUTION,
    "data.num_threads": MOST_THREADS,
    "data.num_workers": MOST_WORKERS,
    "data.prefetch": MOST_PREFETCHED,
    "eval.fid_samples": 100_000,
    "eval.fid_batch_size": 100_000,
    "data.remote.timeout": 3600,
    "data.remote.retries": 10,
    "data.remote.backoff": 60,
}


def networks(config: ConfigDict) -> Networks:
    """The three networks of a text-to-image config; nothing is allocated.

    Raises:
        ValueError: Sizes do not fit one another, or a key is unknown.
    """
    model = dit_config(config.model)
    autoencoder = autoencoder_config(config.autoencoder)
    text = from_config(Gemma2Config, config.text.encoder)
    if model.in_channels != autoencoder.latent_channels:
        raise ValueError(
            f"model.in_channels is {model.in_channels} and the autoencoder's latents have "
            f"{autoencoder.latent_channels} channels: set --config.model.in_channels to that, and measure the "
            "statistics of latents that have none with `python -m svg_jax.latent_stats`"
        )
    if autoencoder.encoder.patch_size != autoencoder.patch_size:
        raise ValueError(
            f"the encoder's patches have {autoencoder.encoder.patch_size} pixels a side and those of a batch "
            f"{autoencoder.patch_size}: such an autoencoder reads whole images only, and no diffusion transformer can "
            "be trained on it here"
        )
    if model.text_dim != text.dim:
        raise ValueError(f"model.text_dim is {model.text_dim} and the text encoder's width {text.dim}: make them equal")
    return Networks(
        Network(lambda rngs: NextDiT(model, rngs=rngs)),
        Network(lambda rngs: Autoencoder(autoencoder, rngs=rngs)),
        Network(lambda rngs: Gemma2(text, rngs=rngs)),
    )


def check(config: ConfigDict, needs: str) -> None:
    """The values of a training config that nothing else would check before compiling.

    Args:
        config: What `--config` gave.
        needs: The section that only configs of this door have.

    Raises:
        ValueError: One is out of range or unknown; the message names it.
    """
    if needs not in config:
        raise ValueError(f"the config has no section '{needs}': it belongs to another door (configs/ says to which)")
    check_numbers(
        config,
        positive=(
            "num_train_steps", "batch_size", "micro_batches", "log_every", "checkpoint.keep", "optim.lr", "optim.eps",
            "optim.clip", "statistics.num_images", "text.max_tokens", "sample.num_steps", "sample.shift",
            "sample.batch_size", "data.resolution", "data.max_ratio", "data.pack", "text.max_tokens_packed",
            "model.num_heads", "model.num_kv_heads", "guard.max_skipped", "profile.steps", "cluster.timeout",
            "cluster.start_timeout", "data.remote.timeout", "eval.fid_samples",
        ),
        not_negative=(
            "optim.warmup_steps", "optim.weight_decay", "checkpoint.every", "checkpoint.keep_every", "sample.every",
            "data.num_threads", "data.num_workers", "data.prefetch", "data.remote.retries", "data.remote.backoff",
            "data.caption_dropout", "data.max_bad_fraction", "loss.disc_start", "loss.disc_weight", "loss.disc_factor",
            "loss.perceptual_weight", "autoencoder.decoder.num_res_blocks", "guard.spike_sigma", "profile.start",
            "eval.fid_every", "eval.fid_batch_size",
        ),
        at_most=AT_MOST,
    )  # fmt: skip
    for key in ("b1", "b2", "ema"):
        if not 0 <= config.optim[key] < 1:
            raise ValueError(f"config.optim.{key} is {config.optim[key]}: it must be from 0 to below 1")
    if config.data.path is None:
        raise ValueError('no data: name a .jsonl of {"path": ..., "prompt": ...} with --config.data.path')
    lookup("dtype", config.optim.mu_dtype or "float32", DTYPES)
    autoencoder_config(config.autoencoder)
    sections = [config.autoencoder.encoder, config.autoencoder.decoder]
    if config.autoencoder.get("residual"):
        sections.append(config.autoencoder.residual)
    if "loss" in config:
        loss_config(config.loss)
        sections.append(config.loss)
    if "model" in config:
        sections += [config.model, config.text.encoder]
        lookup("solver", config.sample.solver, SOLVERS)
        if config.text.system_prompt is not None:
            full_prompt("", config.text.system_prompt)
        check_positions(config, max(config.data.resolution, *crop_sides(config)))
        if config.text.max_tokens >= config.model.axes_lens[0]:
            raise ValueError(
                f"config.text.max_tokens is {config.text.max_tokens} and the model has {config.model.axes_lens[0]} "
                "caption positions: choose fewer tokens, or more positions in config.model.axes_lens"
            )
        check_packing(config)
    for section in sections:
        lookup("dtype", section.dtype, DTYPES)
        lookup("remat policy", section.get("remat", "none"), REMAT)
        lookup("attention", section.get("attention", "auto"), dict.fromkeys(("auto", *BACKENDS)))


def sampling_config(
    folder: str,
    *,
    autoencoder: str | None = None,
    text_encoder: str | None = None,
    tokenizer: str | None = None,
    dtype: str | None = None,
) -> tuple[str, ConfigDict]:
    """Where the diffusion transformer's checkpoint lies, and the config of everything that drawing needs.

    Args:
        folder: What `svg_jax.convert import --to` made, or the workdir of a training run.
        autoencoder: Workdir of another autoencoder than the one that the config names.
        text_encoder: Workdir of another text encoder.
        tokenizer: Folder of another tokeniser.
        dtype: Compute type of all networks; None leaves it as configured.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: It is of something else, or imported weights are not complete.
    """
    root = epath.Path(folder)
    imported = (root / "dit").exists()
    workdir = str(root / "dit") if imported else folder
    if imported:
        for kind, given in (("autoencoder", autoencoder), ("text_encoder", text_encoder)):
            if not given and not (root / kind).exists():
                raise ValueError(
                    f"{folder} has a diffusion transformer and no {kind.replace('_', ' ')}: bring it over with "
                    f"`python -m svg_jax.convert import FILE --to {folder}`"
                )
        autoencoder = autoencoder or str(root / "autoencoder")
        text_encoder = text_encoder or str(root / "text_encoder")
    config = ConfigDict(load_config(workdir))
    if "model" not in config:
        raise ValueError(f"{workdir} is no run of svg_jax.train: it has no diffusion transformer to draw with")
    with config.ignore_type():
        if autoencoder:
            config.autoencoder = ConfigDict({**_section(autoencoder, "autoencoder"), "checkpoint": autoencoder})
        if text_encoder:
            config.text.encoder = ConfigDict(_section(text_encoder, "text")["encoder"])
            config.text.checkpoint = text_encoder
            beside = epath.Path(text_encoder) / "tokenizer"
            config.text.tokenizer = str(beside) if beside.exists() else None
        if tokenizer:
            config.text.tokenizer = tokenizer
        if dtype:
            lookup("dtype", dtype, DTYPES)
            for section in (config.model, *config.autoencoder.values(), config.text.encoder):
                if isinstance(section, ConfigDict):
                    section.dtype = dtype
    return workdir, config


def _section(workdir: str, name: str) -> dict[str, Any]:
    config = load_config(workdir)
    if name not in config:
        raise ValueError(f"{workdir} holds no {name.replace('text', 'text encoder')}: name another folder")
    return config[name]


def check_tokenizer(config: ConfigDict, tokenizer: Tokenizer) -> None:
    """Tokeniser and text encoder must be of one model.

    Raises:
        ValueError: The text encoder's weights are named and no tokeniser is, or it has fewer tokens.
    """
    if config.text.checkpoint and not config.text.tokenizer:
        raise ValueError(
            f"the text encoder {config.text.checkpoint} is given without its tokeniser: name the folder of that, with "
            "--config.text.tokenizer in training and --tokenizer in sampling"
        )
    if tokenizer.vocab_size > config.text.encoder.vocab_size:
        raise ValueError(
            f"the tokeniser has {tokenizer.vocab_size} tokens and the text encoder "
            f"{config.text.encoder.vocab_size}: give both of one model"
        )


def make_paths_absolute(config: ConfigDict) -> None:
    """So that a checkpoint's config finds the frozen networks from any folder."""
    for section, key in (("autoencoder", "checkpoint"), ("text", "checkpoint"), ("text", "tokenizer")):
        path = config[section].get(key) if section in config else None
        if path and "://" not in path:
            config[section][key] = os.path.abspath(path)


def crop_sides(config: ConfigDict) -> list[int]:
    """Every side of the crops of a run, in pixels."""
    sizes = crop_sizes(config.data.resolution, patch_size(config), config.data.max_ratio)
    return [side for size in sizes for side in size]


def check_positions(config: ConfigDict, side: int) -> None:
    """Rows and columns of an image with this longest side, in pixels, must be positions that the model has.

    Raises:
        ValueError: They are not.
    """
    tokens, positions = side // patch_size(config), min(config.model.axes_lens[1:])
    if tokens > positions:
        raise ValueError(
            f"a side of {side} pixels is {tokens} tokens and config.model.axes_lens allows {positions}: "
            "choose a smaller size, or more positions"
        )


def check_packing(config: ConfigDict) -> None:
    """Several images in one sequence need a text budget, and an attention that can keep them apart.

    Raises:
        ValueError: One is missing, or unfit.
    """
    pack, budget, longest = config.data.pack, config.text.max_tokens_packed, config.text.max_tokens
    if pack == 1:
        return
    if budget is None or not pack <= budget <= pack * longest:
        raise ValueError(
            f"config.data.pack is {pack} and config.text.max_tokens_packed is {budget}: it is how many tokens {pack} "
            f"captions have together, from {pack} to {pack} x config.text.max_tokens = {pack * longest}"
        )
    if config.model.attention == "gpu_cudnn":
        raise ValueError(
            f"config.model.attention is 'gpu_cudnn', which cannot keep the {pack} images of a sequence apart: choose "
            "another, or 'auto', or config.data.pack=1"
        )


def reading(config: ConfigDict) -> dict[str, int]:
    """How batches are read ahead, as `data_pipelines.loader.make_loader` takes it; nothing else depends on it."""
    return {key: config.data[key] for key in ("num_threads", "num_workers", "prefetch")}


# What the order of the data, the randomness of a step and the meaning of a latent depend on.
FIXED = (
    "seed",
    "batch_size",
    "micro_batches",
    "data.resolution",
    "data.max_ratio",
    "data.random_crop",
    "data.caption_dropout",
    "data.pack",
    "text.max_tokens",
    "text.max_tokens_packed",
    "autoencoder.residual.match",
)


def check_resumed(config: ConfigDict, before: dict[str, Any]) -> None:
    """A run that goes on must see the data that it would have seen.

    Args:
        config: Of now.
        before: Of the checkpoint.

    Raises:
        ValueError: A value on which that depends has changed.
    """
    now, then = dict(flatten(config)), dict(flatten(ConfigDict(before)))
    for key in FIXED:
        if key in now and key in then and now[key] != then[key]:
            raise ValueError(
                f"config.{key} was {then[key]} when this run began and is {now[key]} now: set it back, or begin a new "
                "--workdir with --config.init_from"
            )


def check_data(fingerprint: Sequence[str], before: Mapping[str, Any] | None, timeout: float) -> None:
    """All processes must read the same data, and a run that goes on those that it began with.

    Args:
        fingerprint: Of the data that this process reads.
        before: What the checkpoint says of its data; None at the beginning.
        timeout: Seconds to wait for the other processes.

    Raises:
        ValueError: They do not.
    """
    first, *others = map(json.loads, distributed.everyone("the same data", json.dumps(fingerprint), timeout))
    for process, other in enumerate(others, start=1):
        if found := difference(first, other):
            raise ValueError(
                f"process {process} reads other data than process 0 ({found[1]} instead of {found[0]}): give all of "
                "them the same files"
            )
    if found := difference((before or {}).get("fingerprint") or fingerprint, fingerprint):
        raise ValueError(
            f"the data are not those that this run began with ({found[0]} then, {found[1]} now): name those "
            "with --config.data.path, or begin a new --workdir with --config.init_from"
        )


def dit_config(section: ConfigDict) -> NextDiTConfig:
    """From `config.model`."""
    return from_config(NextDiTConfig, section)


def autoencoder_config(section: ConfigDict) -> AutoencoderConfig:
    """From `config.autoencoder`."""
    family = section.decoder.get("family", "conv")
    decoder, _ = lookup("decoder family", family, DECODERS)
    residual = section.get("residual")
    return AutoencoderConfig(
        encoder_config(section.encoder),
        from_config(decoder, section.decoder),
        from_config(ResidualConfig, residual) if residual else None,
        section.get("resize", False),
    )


def loss_config(section: ConfigDict) -> LossConfig:
    """From `config.loss`."""
    return from_config(LossConfig, {key: value for key, value in section.items() if key != "lpips"})


def autoencoder_networks(config: ConfigDict) -> AutoencoderNetworks:
    """The networks of an autoencoder's training config; nothing is allocated."""
    sizes, loss = autoencoder_config(config.autoencoder), loss_config(config.loss)
    return AutoencoderNetworks(
        Network(lambda rngs: Autoencoder(sizes, rngs=rngs)), Network(lambda rngs: AutoencoderLoss(loss, rngs=rngs))
    )


def patch_size(config: ConfigDict) -> int:
    """Pixels a side for one latent."""
    return autoencoder_config(config.autoencoder).patch_size


def optimiser(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW as `config.optim` says, over `config.num_train_steps`."""
    values = config.optim.to_dict()
    names = ("lr", "schedule", "warmup_steps")
    schedule = learning_rate(num_train_steps=config.num_train_steps, **{name: values[name] for name in names})
    return adamw(schedule, **{name: values[name] for name in ("b1", "b2", "eps", "weight_decay", "clip", "mu_dtype")})

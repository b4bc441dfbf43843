r"""The demo's Autoencoder-R: 64 px scenes, patches of 8, a stand-in encoder of 12 channels and 4 residual ones.

python -m svg_jax.train_autoencoder --config=configs/tiny_autoencoder.py --workdir=out/demo/autoencoder \
    --config.data.path=out/demo/scenes/train/records.jsonl

Hardware: two CPU cores, two minutes.
Expected: reconstructions keep colour, count, position and shape (`make demo` prints the shares).
"""

import dataclasses

from ml_collections import ConfigDict

from configs import autoencoder_base
from svg_jax.models.residual import ResidualConfig


def get_config() -> ConfigDict:
    """Read by `--config`."""
    config = autoencoder_base.get_config()
    config.num_train_steps = 650
    config.batch_size = 16
    config.log_every = 20
    config.autoencoder.update(autoencoder())

    config.loss.perceptual_weight = 0.0  # there are no weights to download in the demo
    config.loss.disc_weight = 0.0
    config.loss.reduction = "mean"
    config.loss.dtype = "float32"

    config.data.resolution = 64
    config.data.random_crop = False
    config.data.num_threads = 1
    config.data.prefetch = 8
    config.statistics.num_images = 512

    config.optim.lr = 2e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 30
    config.optim.b1 = 0.9
    config.optim.b2 = 0.95
    config.optim.clip = 1.0
    config.optim.ema = 0.99

    config.checkpoint.every = 250
    config.sample.every = 250
    return config


def autoencoder() -> dict[str, dict[str, object]]:
    """Sizes of the tiny autoencoder, shared by the tiny diffusion configs."""
    encoder = {
        "dim": 12,
        "num_layers": 2,
        "num_heads": 1,
        "hidden_dim": 48,
        "gated": False,
        "patch_size": 8,
        "layer_scale": 0.1,
        "dtype": "float32",
    }
    residual = {
        "dim": 32,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 64,
        "out_channels": 4,
        "patch_size": 8,
        "layer_scale": 0.1,
    }
    decoder = {
        "z_channels": 16,
        "channels": 32,
        "channel_multipliers": (1, 1, 2, 3),
        "num_res_blocks": 0,
        "dtype": "float32",
    }
    return {"encoder": encoder, "residual": dataclasses.asdict(ResidualConfig(**residual)), "decoder": decoder}

"""Every value of an autoencoder training run, with what it means; the other files change a few of them."""

import dataclasses

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import base
from svg_jax.models.autoencoder import AutoencoderConfig


def get_config() -> ConfigDict:
    """Autoencoder-P at 256 px, with an L1 objective."""
    config = ConfigDict()
    config.seed = 0
    config.num_train_steps = 100_000  # (ours)
    config.batch_size = 512  # global (released: 8 GPUs x 64)
    config.init_from = placeholder(str)  # workdir whose autoencoder this run starts from
    config.log_every = 50  # steps

    config.autoencoder = ConfigDict(dataclasses.asdict(AutoencoderConfig.svg_p(dtype="bfloat16")))
    config.autoencoder.checkpoint = placeholder(str)  # with the encoder's weights; a random stand-in without

    config.data = ConfigDict()
    config.data.path = placeholder(str)  # .jsonl or .json of {"path": ..., "prompt": ...}; captions are not read
    config.data.root = placeholder(str)  # what relative image paths are relative to; the file's folder by default
    config.data.resolution = 256  # pixels a side of a centre crop
    config.data.max_bad_fraction = 0.01  # (ours) a run stops when more records than this cannot be read
    config.data.num_threads = 8
    config.data.prefetch = 8  # batches held on the host

    config.statistics = ConfigDict()
    config.statistics.num_images = 4096  # whose features give mean and standard deviation of the latents

    config.optim = ConfigDict()
    config.optim.lr = 1e-4  # (released)
    config.optim.schedule = "constant"  # (released); linear and cosine decay to zero
    config.optim.warmup_steps = 0
    config.optim.b1 = 0.5  # (released)
    config.optim.b2 = 0.9  # (released)
    config.optim.eps = 1e-8  # (released: the default of Adam)
    config.optim.weight_decay = 0.0
    config.optim.clip = 1e9  # (released: none)
    config.optim.ema = 0.999  # (ours)
    config.optim.ema_on_host = False  # keeps the average in the memory of the host
    config.optim.mu_dtype = placeholder(str)  # of the first moment: "bfloat16" halves it; by default as the parameters

    base.add_running(config)

    config.sample = ConfigDict()
    config.sample.every = 2000  # steps between grids of input | reconstruction; 0 for none
    return config

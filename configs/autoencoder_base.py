"""Every value of an autoencoder training run, with what it means; the other files change a few of them.

Values are marked (released) where the PyTorch release's training files state them, (ours) otherwise. Those files train
in float32 and start from no weights; here the compute type is bfloat16, and each size starts from the one before.
"""

import dataclasses

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import base
from svg_jax.adversarial import LossConfig
from svg_jax.models.autoencoder import AutoencoderConfig


def get_config(*, residual: bool = False) -> ConfigDict:
    """Autoencoder-P at 256 px, or with `residual` Autoencoder-R."""
    config = ConfigDict()
    config.seed = 0
    config.num_train_steps = 100_000  # (ours)
    config.batch_size = 512  # global (released: 8 GPUs with 64 each)
    config.init_from = placeholder(str)  # workdir whose autoencoder, and discriminator, this run starts from
    config.log_every = 50  # steps

    sizes = AutoencoderConfig.svg_r if residual else AutoencoderConfig.svg_p
    config.autoencoder = ConfigDict(dataclasses.asdict(sizes(dtype="bfloat16")))
    config.autoencoder.checkpoint = placeholder(str)  # with the encoder's weights; a random stand-in without

    # L1 + LPIPS + PatchGAN, see svg_jax/adversarial.py.
    config.loss = ConfigDict(dataclasses.asdict(LossConfig(dtype="bfloat16")))  # (released, but for the compute type)
    config.loss.lpips = placeholder(str)  # weights of LPIPS, converted; loss.perceptual_weight=0 trains without

    config.data = ConfigDict()
    # A .jsonl or .json of {"path": ..., ...}, a folder of images such as ImageNet's, or tfds:NAME/SPLIT; captions are
    # not read.
    config.data.path = placeholder(str)
    config.data.root = placeholder(str)  # what relative image paths are relative to; the file's folder by default
    config.data.resolution = 256  # pixels a side of a square crop
    config.data.max_ratio = 1.0  # of the sides of a crop; above 1, each batch has one of the sizes of that many pixels
    config.data.random_crop = True  # (released, for ImageNet) a random window instead of the centre
    config.data.max_bad_fraction = 0.01  # (ours) a run stops when more records than this cannot be read
    base.add_reading(config)

    config.statistics = ConfigDict()
    config.statistics.num_images = 4096  # whose features give mean and standard deviation of the latents

    config.optim = ConfigDict()
    config.optim.lr = 1e-4  # (released), of both sides
    config.optim.schedule = "constant"  # (released); linear and cosine decay to zero
    config.optim.warmup_steps = 0
    config.optim.b1 = 0.5  # (released)
    config.optim.b2 = 0.9  # (released)
    config.optim.eps = 1e-8  # (released: the default of Adam)
    config.optim.weight_decay = 0.0
    config.optim.clip = 1e9  # (released: none) global norm of the gradient, of both sides together
    config.optim.ema = 0.999  # (ours); 0: none
    config.optim.ema_on_host = False  # keeps the average in the memory of the host
    config.optim.mu_dtype = placeholder(str)  # of the first moment: "bfloat16" halves it; by default as the parameters

    base.add_running(config)

    config.sample = ConfigDict()
    config.sample.every = 2000  # steps between grids of input | reconstruction | difference; 0 for none
    return config


def at_native_ratios(config: ConfigDict) -> None:
    """1024 px at the images' own aspect ratios, the last stage of both autoencoders.

    The release's files for it are named 1024 and say `train_resol: 256`; its weights are called 1024 too. There are 51
    sizes, each compiled for training, and for the statistics where a residual branch is trained: these follow it at
    every save, a pass of encoder and branch over `config.statistics.num_images` images. A folder in
    JAX_COMPILATION_CACHE_DIR keeps what was compiled.
    """
    config.data.resolution = 1024
    config.data.max_ratio = 4.0  # (released)
    config.data.random_crop = False  # (released)
    config.loss.convention = "list"  # (released) the discriminator normalises each image alone
    config.batch_size = 32  # (ours; released: 8 GPUs with 3 each)
    save_memory(config)


def save_memory(config: ConfigDict) -> None:
    """Recomputes what is inside each block, for sizes above 256 px."""
    for section in (config.autoencoder.decoder, config.autoencoder.residual, config.loss):
        if section is not None:
            section.remat = "full"

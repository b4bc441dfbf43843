r"""Autoencoder-P at 512 px, from 256 px.

python -m svg_jax.train_autoencoder --config=configs/autoencoder_p_512.py --workdir=gs://BUCKET/autoencoder_p_512 \
    --config.data.path=imagenet/train --config.loss.lpips=weights/lpips \
    --config.init_from=gs://BUCKET/autoencoder_p_256

Hardware: the release had 8 GPUs (64 images each, and 16 by the name of its file). TPUs: see benchmarks/README.md.
Expected: the release publishes no losses. Ours: none yet, nobody has run it at full size.
"""

from ml_collections import ConfigDict

from configs import autoencoder_base


def get_config() -> ConfigDict:
    """Read by `--config`."""
    config = autoencoder_base.get_config()
    config.data.resolution = 512
    autoencoder_base.save_memory(config)
    config.batch_size = 128  # as the release's file for Autoencoder-R; that for P says 64 a GPU, and 16 in its name
    config.loss.convention = "list"  # (released, for P at this size)
    return config

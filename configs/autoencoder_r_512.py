r"""Autoencoder-R at 512 px, from 256 px.

python -m svg_jax.train_autoencoder --config=configs/autoencoder_r_512.py --workdir=gs://BUCKET/autoencoder_r_512 \
    --config.data.path=imagenet/train --config.loss.lpips=weights/lpips \
    --config.init_from=gs://BUCKET/autoencoder_r_256

Hardware: the release had 8 GPUs with 16 images each. TPUs: benchmarks/README.md has what is known.
Expected: the release publishes no losses. Ours: none yet, nobody has run it at full size.
"""

from ml_collections import ConfigDict

from configs import autoencoder_base


def get_config() -> ConfigDict:
    """Read by `--config`."""
    config = autoencoder_base.get_config(residual=True)
    config.data.resolution = 512
    autoencoder_base.save_memory(config)
    config.batch_size = 128  # (released: 8 GPUs with 16 each)
    return config

r"""Autoencoder-P at 256 px: decoder on frozen DINOv3 features, on ImageNet.

python -m svg_jax.train_autoencoder --config=configs/autoencoder_p_256.py --workdir=gs://BUCKET/autoencoder_p_256 \
    --config.data.path=imagenet/train --config.loss.lpips=weights/lpips \
    --config.autoencoder.checkpoint=weights/encoder

Hardware: the release had 8 GPUs with 64 images each. TPUs: benchmarks/README.md has what fits a chip.
Expected: the release publishes no losses. Ours: none yet, nobody has run it at full size.
"""

from ml_collections import ConfigDict

from configs import autoencoder_base


def get_config() -> ConfigDict:
    """Read by `--config`."""
    return autoencoder_base.get_config()

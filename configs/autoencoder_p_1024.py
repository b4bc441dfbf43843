r"""Autoencoder-P at 1024 px at native aspect ratios, from 512 px.

python -m svg_jax.train_autoencoder --config=configs/autoencoder_p_1024.py --workdir=gs://BUCKET/autoencoder_p_1024 \
    --config.data.path=train.jsonl --config.loss.lpips=weights/lpips \
    --config.init_from=gs://BUCKET/autoencoder_p_512

Hardware: the release had 8 GPUs with 3 images each. TPUs: benchmarks/README.md has what is known.
Expected: the release publishes no losses. Ours: none yet, nobody has run it at full size.
"""

from ml_collections import ConfigDict

from configs import autoencoder_base


def get_config() -> ConfigDict:
    """Read by `--config`."""
    config = autoencoder_base.get_config()
    autoencoder_base.at_native_ratios(config)
    return config

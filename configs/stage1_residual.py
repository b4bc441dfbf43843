r"""Stage 1 on the 392 channels of Autoencoder-R: 256 px, from scratch.

python -m svg_jax.train --config=configs/stage1_residual.py --workdir=gs://BUCKET/stage1_residual \
    --config.data.path=train.jsonl --config.autoencoder.checkpoint=weights/autoencoder_r \
    --config.text.checkpoint=weights/gemma2_2b --config.text.tokenizer=weights/gemma2_2b_tokenizer

Hardware: as stage 1.
Expected: nothing is published; the release trains its diffusion transformer on Autoencoder-P alone. The latents of one
image depend on the others of its batch (residual.match), unless that is set to per_image here and in sampling.
The statistics of its latents: `python -m svg_jax.latent_stats`.
"""

from ml_collections import ConfigDict

from configs import autoencoder_base, base


def get_config() -> ConfigDict:
    """Read by `--config`."""
    config = base.get_config()
    config.autoencoder = autoencoder_base.get_config(residual=True).autoencoder
    config.model.in_channels = 392
    return config

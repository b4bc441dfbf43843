r"""Stage 3: 1024 px, from stage 2.

python -m svg_jax.train --config=configs/stage3.py --workdir=gs://BUCKET/stage3 --config.init_from=gs://BUCKET/stage2 \
    --config.data.path=train.jsonl --config.autoencoder.checkpoint=weights/autoencoder_p \
    --config.text.checkpoint=weights/gemma2_2b --config.text.tokenizer=weights/gemma2_2b_tokenizer

Hardware: 4,096 image tokens a sample; a TPU v5e-256 takes 7.8 of its 15.8 GiB a chip (svg_jax.aot).
Expected: the release had 15M images here and publishes no losses. Ours: none yet.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Read by `--config`."""
    config = base.get_config()
    config.data.resolution = 1024
    config.batch_size = 512  # (inferred) as Lumina-Image 2.0 at 1024 px, arXiv 2503.21758
    config.num_train_steps = 150_000  # (ours) see base.py
    return config

r"""Stage 2: 512 px, from stage 1.

python -m svg_jax.train --config=configs/stage2.py --workdir=gs://BUCKET/stage2 --config.init_from=gs://BUCKET/stage1 \
    --config.data.path=train.jsonl --config.autoencoder.checkpoint=weights/autoencoder_p \
    --config.text.checkpoint=weights/gemma2_2b --config.text.tokenizer=weights/gemma2_2b_tokenizer

Hardware: as stage 1; a TPU v5e-256 takes 5.7 of its 15.8 GiB a chip (svg_jax.aot).
Expected: the release had the same 60M images as in stage 1 and publishes no losses. Ours: none yet.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Read by `--config`."""
    config = base.get_config()
    config.data.resolution = 512
    config.num_train_steps = 200_000  # (ours) see base.py
    return config

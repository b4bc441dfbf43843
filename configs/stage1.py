r"""Stage 1: 256 px, from scratch, on captioned images of any aspect ratio.

python -m svg_jax.train --config=configs/stage1.py --workdir=gs://BUCKET/stage1 \
    --config.data.path=train.jsonl --config.autoencoder.checkpoint=weights/autoencoder_p \
    --config.text.checkpoint=weights/gemma2_2b --config.text.tokenizer=weights/gemma2_2b_tokenizer

Hardware: released with 32 GPUs. A TPU v5e-256 takes 4.9 of its 15.8 GiB a chip for this batch (svg_jax.aot).
Expected: the release had 60M images here and publishes no losses. Ours: none yet, nobody has run it at full size.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Read by `--config`."""
    return base.get_config()

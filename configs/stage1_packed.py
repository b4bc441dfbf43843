r"""Stage 1 with four images in a sequence: 256 px, from scratch, at 1.7 times the images for the same FLOPs.

python -m svg_jax.train --config=configs/stage1_packed.py --workdir=gs://BUCKET/stage1 \
    --config.data.path=train.jsonl --config.autoencoder.checkpoint=weights/autoencoder_p \
    --config.text.checkpoint=weights/gemma2_2b --config.text.tokenizer=weights/gemma2_2b_tokenizer

Two thirds of a sequence of stage 1 are text slots, most of them padding. Here four captions share the slots of one and
a half; the order of the records, the batch and the loss of each image are those of stage 1.
Hardware: as stage 1, on up to 128 devices; a TPU v5e-128 takes 5.1 of its 15.8 GiB a chip (svg_jax.aot). On GPUs
attention does without cuDNN, which cannot keep images apart: measure first.
Expected: the losses of stage 1, but for captions that are cut: 2% of them at the lengths that benchmarks/packing.py
assumes.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Read by `--config`."""
    config = base.get_config()
    config.data.pack = 4
    config.text.max_tokens_packed = 768  # (ours) of four captions; longer ones are cut, the longest first
    return config

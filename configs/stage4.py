r"""Stage 4: 1024 px fine-tuning on selected images, from stage 3.

python -m svg_jax.train --config=configs/stage4.py --workdir=gs://BUCKET/stage4 --config.init_from=gs://BUCKET/stage3 \
    --config.data.path=selected.jsonl --config.autoencoder.checkpoint=weights/autoencoder_p \
    --config.text.checkpoint=weights/gemma2_2b --config.text.tokenizer=weights/gemma2_2b_tokenizer

Hardware: as stage 3.
Expected: published after this stage: GenEval 0.75, DPG-Bench 85.78 (1M images). Ours: none yet.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Read by `--config`."""
    config = base.get_config()
    config.data.resolution = 1024
    config.batch_size = 512  # (inferred) as Lumina-Image 2.0 at 1024 px, arXiv 2503.21758
    config.num_train_steps = 20_000  # (ours) see base.py
    return config

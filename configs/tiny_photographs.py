r"""Real photographs of every mode and shape through the trainer: mixed aspect ratios in each batch, one compilation.

python -m svg_jax.train --config=configs/tiny_photographs.py --workdir=out/demo/photographs \
    --config.data.path=out/demo/photographs_data/records.jsonl --config.text.tokenizer=out/demo/tokenizer \
    --config.autoencoder.checkpoint=out/demo/autoencoder

Hardware: two CPU cores, half a minute.
Expected: the loss falls from about 2; too few photographs to learn to draw.
"""

from ml_collections import ConfigDict

from configs import tiny_scenes


def get_config() -> ConfigDict:
    """Read by `--config`."""
    config = tiny_scenes.get_config()
    config.num_train_steps = 60
    config.batch_size = 16
    config.log_every = 5
    config.text.max_tokens = 48
    config.text.system_prompt = "base"
    config.optim.warmup_steps = 10
    config.checkpoint.every = 60
    config.sample.every = 0
    return config

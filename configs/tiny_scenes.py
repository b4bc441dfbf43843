r"""The demo's diffusion transformer: captioned scenes of coloured shapes at 64 px, 1.6M parameters.

python -m svg_jax.train --config=configs/tiny_scenes.py --workdir=out/demo/dit \
    --config.data.path=out/demo/scenes/train/records.jsonl --config.text.tokenizer=out/demo/tokenizer \
    --config.autoencoder.checkpoint=out/demo/autoencoder

Hardware: two CPU cores, six minutes.
Expected: generated scenes have the asked colour, shape, count and position (`make demo` prints the shares).
"""

from ml_collections import ConfigDict

from configs import base, tiny_autoencoder
from svg_jax.models.gemma2 import Gemma2Config


def get_config() -> ConfigDict:
    """Read by `--config`."""
    config = base.get_config()
    config.num_train_steps = 5000
    config.batch_size = 16
    config.log_every = 20
    config.autoencoder.update(tiny_autoencoder.autoencoder())

    config.text.encoder = base.section(Gemma2Config.tiny(vocab_size=512))
    config.text.max_tokens = 24
    config.text.system_prompt = "empty"

    config.model.update(
        in_channels=16,
        text_dim=64,
        dim=128,
        num_layers=4,
        num_refiner_layers=1,
        num_heads=4,
        num_kv_heads=4,
        multiple_of=32,
        ffn_dim_multiplier=2 / 3,
        axes_dims=(8, 12, 12),
        axes_lens=(64, 16, 16),
        dtype="float32",
        remat="none",
    )

    config.data.resolution = 64
    config.data.num_threads = 1
    config.data.prefetch = 8
    config.flow.shift = False

    config.optim.lr = 2e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 100
    config.optim.clip = 1.0
    config.optim.ema = 0.995

    config.checkpoint.every = 600
    config.sample.every = 600
    config.sample.num_steps = 20
    config.sample.solver = "euler"
    config.sample.guidance_scale = 4.0
    config.sample.renorm = 0.0
    config.sample.shift = 1.0
    config.sample.batch_size = 32
    config.sample.prompts = (
        "a red circle at the top left",
        "a blue square at the bottom right",
        "a green triangle at the top right",
        "two yellow circles at the top",
    )
    return config

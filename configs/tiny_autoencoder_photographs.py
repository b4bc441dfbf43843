r"""Autoencoder-P or -R on photographs of many shapes, with a discriminator in the last quarter; tiny.

python -m svg_jax.train_autoencoder --config=configs/tiny_autoencoder_photographs.py:r \
    --workdir=out/demo/autoencoder_photographs_r --config.data.path=out/demo/photographs_data/records.jsonl

`:p` leaves the residual branch out. The vision model has 4 channels: of a patch of 192 numbers it keeps the colour and
little else. As in the real one, detail is what the branch is for.
Hardware: two CPU cores, a few minutes.
Expected: with the branch, reconstructions are closer at equal steps (benchmarks/README.md).
"""

from ml_collections import ConfigDict

from configs import tiny_autoencoder


def get_config(kind: str = "r") -> ConfigDict:
    """Read by `--config`; `kind` is what stands after the colon, p or r."""
    if kind not in ("p", "r"):
        raise ValueError(f"configs/tiny_autoencoder_photographs.py:{kind}: say :p or :r")
    config = tiny_autoencoder.get_config()
    config.num_train_steps = 800
    config.autoencoder.encoder.update(dim=4, hidden_dim=16)
    config.autoencoder.residual.out_channels = 8  # (released)
    if kind == "p":
        with config.ignore_type():
            config.autoencoder.residual = None
    residual = config.autoencoder.residual
    config.autoencoder.decoder.z_channels = config.autoencoder.encoder.dim + (residual.out_channels if residual else 0)
    config.data.max_ratio = 3.0  # five sizes
    config.statistics.num_images = 64
    config.loss.disc_weight = 0.5
    config.loss.disc_channels = 16
    config.loss.disc_num_layers = 2
    config.loss.disc_start = 600
    config.optim.lr = 1e-3
    config.loss.convention = "list"
    config.checkpoint.every = 400
    config.sample.every = 400
    return config

"""Trains the decoder of an autoencoder: `python -m svg_jax.train_autoencoder --config=configs/… --workdir=DIR`.

First the latent statistics over some images, then the decoder on pixels. The same command goes on where an interrupted
run stopped.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines.batches import TextToImageBatches, TooManyBadRecords, make_loader
from data_pipelines.sources import open_source
from data_pipelines.text import ByteTokenizer
from svg_jax import assemble
from svg_jax import config as doors
from svg_jax.checkpoint import Checkpoints, load_config, load_params
from svg_jax.loop import device_batch, fit
from svg_jax.metrics import MetricWriter
from svg_jax.models.autoencoder import Autoencoder, to_uint8
from svg_jax.nn.functional import Network, Params
from svg_jax.parallel import batch_multiple, batch_sharding, make_mesh, replicated
from svg_jax.state import TrainState
from svg_jax.steps import Moments, autoencoder_step, reconstruct, target_pixels, update_moments

logger = logging.getLogger("svg_jax")

TRAINED = "decoder."  # what the names of trained parameters begin with
PICTURES = 8  # in a grid of input | reconstruction


def main(config: ConfigDict, workdir: str) -> None:
    """Trains to `config.num_train_steps`."""
    with doors.one_sentence():
        assemble.check(config, needs="statistics")
        mesh = make_mesh(config.mesh)
        sizes = assemble.autoencoder_config(config.autoencoder)
        network = Network(lambda rngs: Autoencoder(sizes, rngs=rngs))
        grid = (config.data.resolution // sizes.encoder.patch_size,) * 2
        if config.batch_size % batch_multiple(mesh):
            raise ValueError(
                f"batch_size {config.batch_size} does not divide over {batch_multiple(mesh)} devices: choose a multiple"
            )

        # One grid for all images; captions are not read.
        batches = TextToImageBatches(
            open_source(config.data.path, config.data.root),
            ByteTokenizer(),
            batch_size=config.batch_size,
            resolution=config.data.resolution,
            patch_size=sizes.encoder.patch_size,
            max_text_tokens=1,
            max_ratio=1.0,
            caption_dropout=1.0,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        optimiser = assemble.optimiser(config)

        checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every)
        params_at = assemble.shardings(network, mesh)
        create = functools.partial(new_state, optimiser=optimiser, seed=config.seed)
        state_at, abstract = assemble.placed(jax.eval_shape(create, network.shapes), params_at, mesh)
        restored = checkpoints.restore(abstract)
        if restored is not None:
            assemble.check_resumed(config, load_config(workdir))

    loader = functools.partial(make_loader, batches, num_threads=config.data.num_threads, prefetch=config.data.prefetch)
    with jax.set_mesh(mesh):
        if restored is not None:
            state = restored[0]
            logger.info("resuming after step %d", int(state.step))
        else:
            with doors.one_sentence():
                if config.init_from:
                    params = load_params(config.init_from, network.shapes, params_at)
                else:
                    params = assemble.load_autoencoder(config.autoencoder, network, mesh)
                if not config.init_from:
                    params = measure_latents(config, network, params, loader, mesh)
            state = jax.jit(create, out_shardings=state_at)(params)

        rows = batch_sharding(mesh)
        step = jax.jit(
            autoencoder_step(network, optimiser, ema_decay=config.optim.ema, grid=grid),
            in_shardings=(state_at, rows),
            out_shardings=(state_at, replicated(mesh)),
            donate_argnums=0,
        )
        examples = device_batch(batches[0], mesh)
        side_by_side = jax.jit(
            lambda params, batch: jnp.concatenate(
                [to_uint8(target_pixels(batch["patches"], grid)), reconstruct(network, params, batch, grid)], axis=2
            ),
            out_shardings=replicated(mesh),
        )

        def draw(state: TrainState) -> list[np.ndarray]:
            return list(jax.device_get(side_by_side({**state.frozen, **state.ema}, examples))[:PICTURES])

        with doors.one_sentence():
            writer = MetricWriter(
                workdir,
                total_steps=config.num_train_steps,
                items_per_step=config.batch_size,
                start_step=int(state.step),
                enabled=jax.process_index() == 0,
            )
        reader = loader(start_step=int(state.step))
        with checkpoints, writer, contextlib.closing(reader), doors.one_sentence(TooManyBadRecords):
            fit(step, state, reader, config=config, mesh=mesh, writer=writer, checkpoints=checkpoints, draw=draw)


def new_state(params: Params, *, optimiser: object, seed: int) -> TrainState:
    """The decoder is trained; the encoder and the latent statistics are carried along."""
    trained = {name: value for name, value in params.items() if name.startswith(TRAINED)}
    frozen = {name: value for name, value in params.items() if not name.startswith(TRAINED)}
    return TrainState.create(trained, optimiser, jax.random.key(seed), frozen)


def measure_latents(
    config: ConfigDict, network: Network[Autoencoder], params: Params, loader: Callable[..., Any], mesh: Mesh
) -> Params:
    """Sets mean and standard deviation of the latents from the features of `config.statistics.num_images` images."""
    update = jax.jit(functools.partial(update_moments, network), out_shardings=replicated(mesh), donate_argnums=1)
    moments = jax.device_put(Moments.zero(network.shapes["latents.mean"].shape[0]), replicated(mesh))
    reader = loader()
    for _ in range(-(-config.statistics.num_images // config.batch_size)):
        moments = update(params, moments, device_batch(next(reader), mesh))
    reader.close()
    std = np.asarray(jax.device_get(moments.std()))
    if not (np.isfinite(std).all() and (std > 0).all()):
        raise ValueError(
            f"{np.sum(~(std > 0))} of {len(std)} latent channels do not vary over {int(moments.num_tokens)} features: "
            "are the images readable, and not all of one colour?"
        )
    logger.info("latent statistics over %d features", int(moments.num_tokens))
    return {**params, "latents.mean": moments.mean, "latents.std": moments.std()}


if __name__ == "__main__":
    doors.run(main)

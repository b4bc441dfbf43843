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

from data_pipelines.batches import TextToImageBatches, make_loader
from data_pipelines.sources import open_source
from data_pipelines.text import ByteTokenizer
from svg_jax import assemble, distributed
from svg_jax import config as doors
from svg_jax.checkpoint import Checkpoints, load_config, load_params
from svg_jax.guards import STOPPED
from svg_jax.loop import device_batch, fit
from svg_jax.metrics import MetricWriter
from svg_jax.models.autoencoder import Autoencoder, to_uint8
from svg_jax.nn.functional import Network, Params
from svg_jax.parallel import make_mesh, replicated, shardings_of
from svg_jax.programs import autoencoder_program
from svg_jax.state import TrainState
from svg_jax.steps import Moments, reconstruct, target_pixels, update_moments

logger = logging.getLogger("svg_jax")

PICTURES = 8  # in a grid of input | reconstruction


def main(config: ConfigDict, workdir: str) -> None:
    """Trains to `config.num_train_steps`."""
    with doors.one_sentence():
        assemble.check(config, needs="statistics")
        distributed.initialise(config.cluster)
        mesh = make_mesh(config.mesh)
        program = autoencoder_program(config, mesh)
        network = program.networks
        patch_size = config.autoencoder.encoder.patch_size
        grid = (config.data.resolution // patch_size,) * 2

        # One grid for all images; captions are not read.
        batches = TextToImageBatches(
            open_source(config.data.path, config.data.root),
            ByteTokenizer(),
            batch_size=config.batch_size,
            resolution=config.data.resolution,
            patch_size=patch_size,
            max_text_tokens=1,
            max_ratio=1.0,
            caption_dropout=1.0,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every)
        restored = checkpoints.restore(program.state)
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
                    params = load_params(config.init_from, network.shapes, assemble.shardings(network, mesh))
                else:
                    params = assemble.load_autoencoder(config.autoencoder, network, mesh)
                    params = measure_latents(config, network, params, loader, mesh)
            state = jax.jit(program.create, out_shardings=shardings_of(program.state))(params)

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
                items_per_step=program.images,
                tokens_per_step=program.tokens,
                start_step=int(state.step),
                flops_per_step=program.flops,
                enabled=distributed.is_first(),
            )
        reader = loader(start_step=int(state.step))
        with doors.one_sentence(*STOPPED, OSError), checkpoints, writer, contextlib.closing(reader):
            fit(
                program.jit(),
                state,
                reader,
                config=config,
                mesh=mesh,
                writer=writer,
                checkpoints=checkpoints,
                draw=draw,
                preempted=distributed.preempted,
                records=batches.records,
            )


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

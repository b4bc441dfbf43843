"""Trains an autoencoder: `python -m svg_jax.train_autoencoder --config=configs/… --workdir=DIR`.

First the latent statistics over some images, then decoder, residual branch and discriminator. The same command goes on
where an interrupted run stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines import files
from data_pipelines.grids import GridBatches
from data_pipelines.loader import make_loader
from data_pipelines.sources import open_source
from svg_jax import assemble, distributed, loading
from svg_jax import config as doors
from svg_jax.autoencoder_steps import Moments, reconstruct, update_moments
from svg_jax.checkpoint import Checkpoints, load_config
from svg_jax.guards import STOPPED
from svg_jax.loop import device_batch, fit
from svg_jax.metrics import MetricWriter, side_by_side
from svg_jax.models.autoencoder import Autoencoder
from svg_jax.nn.functional import Network, Params
from svg_jax.parallel import make_mesh, replicated, shardings_of
from svg_jax.programs import autoencoder_program
from svg_jax.state import TrainState, on_device

logger = logging.getLogger("svg_jax")

PICTURES = 8  # in a grid of input | reconstruction | difference


def main(config: ConfigDict, workdir: str) -> None:
    """Trains to `config.num_train_steps`."""
    with doors.one_sentence():
        # Everything that can be wrong is found before anything is compiled.
        assemble.check(config, needs="statistics")
        distributed.initialise(config.cluster)
        assemble.make_paths_absolute(config)
        mesh = make_mesh(config.mesh)
        program = autoencoder_program(config, mesh)
        network = program.networks.autoencoder

        # Data: every batch has one size, the same on all hosts.
        files.set_default(files.Remote(**config.data.remote))
        batches = GridBatches(
            open_source(config.data.path, config.data.root),
            batch_size=config.batch_size,
            resolution=config.data.resolution,
            patch_size=assemble.patch_size(config),
            max_ratio=config.data.max_ratio,
            random_crop=config.data.random_crop,
            max_bad_fraction=config.data.max_bad_fraction,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every)
        restored = checkpoints.restore(program.state)
        fingerprint = batches.fingerprint
        assemble.check_data(fingerprint, restored and restored[1], config.cluster.start_timeout)
        if restored is not None:
            assemble.check_resumed(config, load_config(workdir))

    loader = functools.partial(make_loader, batches, **assemble.reading(config))
    with jax.set_mesh(mesh):
        measure = latent_measurement(config, network, loader, mesh)
        if restored is not None:
            state = restored[0]
            logger.info("resuming after step %d", int(state.step))
        else:
            with doors.one_sentence():
                params = loading.begin_autoencoder(config, program.networks, mesh)
                if not has_statistics(params):
                    params |= measure({name: params[name] for name in network.shapes})
            state = jax.jit(program.create, out_shardings=shardings_of(program.state), donate_argnums=0)(params)
        trained = sum(value.size for value in state.params.values())
        logger.info(
            "%.1fM trained parameters, mesh %s, %d records", trained / 1e6, dict(mesh.shape), len(batches.source)
        )

        examples = device_batch(batches[0], mesh)
        draw_all = jax.jit(
            lambda params, batch: (batch["images"], reconstruct(network, params, batch["images"], batch["valid"])),
            out_shardings=replicated(mesh),
        )

        def model_of(state: TrainState) -> Params:
            everything = {**state.frozen, **on_device(state.ema)}
            return {name: everything[name] for name in network.shapes}

        def draw(state: TrainState) -> list[np.ndarray]:
            before, after = jax.device_get(draw_all(model_of(state), examples))
            return side_by_side(before[:PICTURES, : after.shape[1], : after.shape[2]], after[:PICTURES])

        def with_statistics(state: TrainState) -> TrainState:
            """The latents change as the residual branch does; those of Autoencoder-P stay."""
            if not any(name.startswith("extra_vit.") for name in state.params):
                return state
            try:
                return dataclasses.replace(state, frozen={**state.frozen, **measure(model_of(state))})
            except ValueError as error:
                logger.warning("the statistics of the latents stay as they were: %s", error)
                return state

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
                before_save=with_statistics,
                preempted=distributed.preempted,
                records=batches.records,
                data=restored and restored[1],
                fingerprint=fingerprint,
            )


def has_statistics(params: Params) -> bool:
    """Whether latent statistics came with the weights."""
    mean, std = jax.device_get((params["latents.mean"], params["latents.std"]))
    return bool(np.any(mean != 0.0) or np.any(std != 1.0))


def latent_measurement(
    config: ConfigDict, network: Network[Autoencoder], loader: Callable[[], Any], mesh: Mesh
) -> Callable[[Params], Params]:
    """Measures mean and standard deviation of latents, over the first `config.statistics.num_images` images.

    What it gives raises ValueError where a channel does not vary, or is not finite.
    """
    everywhere = replicated(mesh)
    update = jax.jit(functools.partial(update_moments, network), out_shardings=everywhere, donate_argnums=1)

    def measure(params: Params) -> Params:
        moments = jax.device_put(Moments.zero(network.shapes["latents.mean"].shape[0]), everywhere)
        with contextlib.closing(loader()) as reader:
            for _ in range(-(-config.statistics.num_images // config.batch_size)):
                moments = update(params, moments, device_batch(next(reader), mesh))
        std = np.asarray(jax.device_get(moments.std()))
        if not np.isfinite(std).all():
            raise ValueError(f"{np.sum(~np.isfinite(std))} of {len(std)} latent channels are not finite")
        if not (std > 0).all():
            raise ValueError(
                f"{np.sum(std == 0)} of {len(std)} latent channels do not vary over "
                f"{int(moments.num_tokens)} features: are the images readable, and not all of one colour?"
            )
        logger.info("latent statistics over %d features", int(moments.num_tokens))
        return {"latents.mean": moments.mean, "latents.std": moments.std()}

    return measure


if __name__ == "__main__":
    doors.run(main)

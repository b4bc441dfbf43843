"""Trains the diffusion transformer: `python -m svg_jax.train --config=configs/stage1.py --workdir=DIR`.

The same command goes on where an interrupted run stopped.
"""

from __future__ import annotations

import contextlib
import functools
import logging

import jax
import numpy as np
from ml_collections import ConfigDict

from data_pipelines.batches import TextToImageBatches, TooManyBadRecords, make_loader
from data_pipelines.images import token_budget
from data_pipelines.sources import open_source
from data_pipelines.text import load_tokenizer
from svg_jax import assemble
from svg_jax import config as doors
from svg_jax.checkpoint import Checkpoints, load_config, load_params
from svg_jax.flow.paths import path
from svg_jax.flow.times import resolution_shift
from svg_jax.loop import fit
from svg_jax.metrics import MetricWriter
from svg_jax.models.next_dit import forward_flops
from svg_jax.parallel import batch_multiple, batch_sharding, make_mesh, replicated
from svg_jax.pipeline import SVGPipeline
from svg_jax.state import TrainState
from svg_jax.steps import Batch, FlowObjective, Frozen, Metrics, text_to_image_step

logger = logging.getLogger("svg_jax")


def main(config: ConfigDict, workdir: str) -> None:
    """Trains to `config.num_train_steps`."""
    with doors.one_sentence():
        # Everything that can be wrong is found before anything is compiled.
        assemble.check(config, needs="model")
        assemble.make_paths_absolute(config)
        mesh = make_mesh(config.mesh)
        networks = assemble.networks(config)
        patch_size = config.autoencoder.encoder.patch_size
        image_tokens = token_budget(config.data.resolution, patch_size)
        rows = config.batch_size // config.micro_batches
        if config.batch_size % config.micro_batches or rows % batch_multiple(mesh):
            raise ValueError(
                f"batch_size {config.batch_size} in {config.micro_batches} micro-batches does not divide over "
                f"{batch_multiple(mesh)} devices: choose a multiple of {config.micro_batches * batch_multiple(mesh)}"
            )

        # Data.
        tokenizer = load_tokenizer(config.text.tokenizer)
        assemble.check_tokenizer(config, tokenizer)
        batches = TextToImageBatches(
            open_source(config.data.path, config.data.root),
            tokenizer,
            batch_size=config.batch_size,
            resolution=config.data.resolution,
            patch_size=patch_size,
            max_text_tokens=config.text.max_tokens,
            max_ratio=config.data.max_ratio,
            caption_dropout=config.data.caption_dropout,
            system_prompt=config.text.system_prompt,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

        # What is optimised.
        optimiser = assemble.optimiser(config)
        shift = resolution_shift(image_tokens) if config.flow.shift else 1.0
        objective = FlowObjective(path(config.flow.path), config.flow.times, config.flow.mu, shift)
        step = text_to_image_step(
            networks, objective, optimiser, ema_decay=config.optim.ema, micro_batches=config.micro_batches
        )

        # Shapes, then shardings, then the state: restored, or begun from another run, or fresh.
        checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every)
        params_at = assemble.shardings(networks.dit, mesh)
        init_key, train_key = jax.random.split(jax.random.key(config.seed))
        create = functools.partial(TrainState.create, optimiser=optimiser, key=train_key)
        state_at, abstract = assemble.placed(jax.eval_shape(create, networks.dit.shapes), params_at, mesh)
        restored = checkpoints.restore(abstract)
        if restored is not None:
            assemble.check_resumed(config, load_config(workdir))
            state = restored[0]
            logger.info("resuming after step %d", int(state.step))
        else:
            if config.init_from:
                params = load_params(config.init_from, networks.dit.shapes, params_at)
            else:
                params = assemble.fresh(networks.dit, mesh, init_key)
            state = jax.jit(create, out_shardings=state_at, donate_argnums=0)(params)
        frozen = assemble.frozen(config, networks, mesh)
        pipeline = SVGPipeline(config, networks, state.ema, frozen, mesh, tokenizer)

        start = int(state.step)
        flops = 3 * forward_flops(assemble.dit_config(config.model), image_tokens, config.text.max_tokens)
        writer = MetricWriter(
            workdir,
            total_steps=config.num_train_steps,
            items_per_step=config.batch_size,
            start_step=start,
            flops_per_step=flops * config.batch_size,
            enabled=jax.process_index() == 0,
        )
        loader = make_loader(
            batches, start_step=start, num_threads=config.data.num_threads, prefetch=config.data.prefetch
        )

    count = sum(int(np.prod(shape.shape)) for shape in networks.dit.shapes.values())
    logger.info("%.1fM parameters, mesh %s, %d records", count / 1e6, dict(mesh.shape), len(batches.source))

    # Compile and run.
    frozen_at = {
        "autoencoder": assemble.shardings(networks.autoencoder, mesh),
        "text": assemble.shardings(networks.text, mesh),
    }
    with checkpoints, writer, contextlib.closing(loader), jax.set_mesh(mesh), doors.one_sentence(TooManyBadRecords):
        compilations = 0

        def traced(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
            nonlocal compilations
            compilations += 1  # Python runs this once for each compilation
            return step(state, frozen, batch)

        compiled = jax.jit(
            traced,
            in_shardings=(state_at, frozen_at, batch_sharding(mesh)),
            out_shardings=(state_at, replicated(mesh)),
            donate_argnums=0,
        )

        def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            state, metrics = compiled(state, frozen, batch)
            return state, {**metrics, "compilations": compilations}

        fit(
            update,
            state,
            loader,
            config=config,
            mesh=mesh,
            writer=writer,
            checkpoints=checkpoints,
            draw=lambda state: [np.asarray(image) for image in pipeline.with_params(state.ema)(config.sample.prompts)],
        )
    logger.info("the train step was compiled %d time(s)", compilations)


if __name__ == "__main__":
    doors.run(main)

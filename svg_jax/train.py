"""Trains the diffusion transformer: `python -m svg_jax.train --config=configs/stage1.py --workdir=DIR`.

The same command goes on where an interrupted run stopped.
"""

from __future__ import annotations

import contextlib
import logging

import jax
import numpy as np
from ml_collections import ConfigDict

from data_pipelines import files
from data_pipelines.batches import TextToImageBatches
from data_pipelines.loader import make_loader
from data_pipelines.sources import open_source
from data_pipelines.text import load_tokenizer
from svg_jax import assemble, distributed, loading
from svg_jax import config as doors
from svg_jax.checkpoint import Checkpoints, load_config, load_params
from svg_jax.evaluate.fid.online import online_fid, plan_fid
from svg_jax.guards import STOPPED
from svg_jax.loop import fit
from svg_jax.metrics import MetricWriter
from svg_jax.parallel import make_mesh, shardings_of
from svg_jax.pipeline import SVGPipeline
from svg_jax.programs import train_program
from svg_jax.state import TrainState
from svg_jax.steps import Batch, Frozen, Metrics

logger = logging.getLogger("svg_jax")


def main(config: ConfigDict, workdir: str) -> None:
    """Trains to `config.num_train_steps`."""
    with doors.one_sentence():
        # Everything that can be wrong is found before anything is compiled.
        assemble.check(config, needs="model")
        distributed.initialise(config.cluster)
        assemble.make_paths_absolute(config)
        loading.check_latents(config)
        mesh = make_mesh(config.mesh)
        program = train_program(config, mesh)
        networks = program.networks

        # Data.
        files.set_default(files.Remote(**config.data.remote))
        tokenizer = load_tokenizer(config.text.tokenizer)
        assemble.check_tokenizer(config, tokenizer)
        batches = TextToImageBatches(
            open_source(config.data.path, config.data.root),
            tokenizer,
            batch_size=config.batch_size,
            resolution=config.data.resolution,
            patch_size=assemble.patch_size(config),
            max_text_tokens=config.text.max_tokens,
            max_ratio=config.data.max_ratio,
            caption_dropout=config.data.caption_dropout,
            system_prompt=config.text.system_prompt,
            pack=config.data.pack,
            max_packed_tokens=config.text.max_tokens_packed,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        plan = plan_fid(config, mesh, batches.source) if config.eval.fid_every else None

        # The state: restored, or begun from another run, or fresh; each array is made where it lives.
        checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every)
        restored = checkpoints.restore(program.state)
        fingerprint = batches.fingerprint
        assemble.check_data(fingerprint, restored and restored[1], config.cluster.start_timeout)
        if restored is not None:
            assemble.check_resumed(config, load_config(workdir))
            state = restored[0]
            logger.info("resuming after step %d", int(state.step))
        else:
            if config.init_from:
                params = load_params(config.init_from, networks.dit.shapes, loading.shardings(networks.dit, mesh))
            else:
                params = loading.fresh(networks.dit, mesh, jax.random.split(jax.random.key(config.seed))[0])
            state = jax.jit(program.create, out_shardings=shardings_of(program.state), donate_argnums=0)(params)
        frozen = loading.frozen(config, networks, mesh)
        pipeline = SVGPipeline(config, networks, state.ema, frozen, mesh, tokenizer)
        fid = online_fid(plan, pipeline) if plan else None

        start = int(state.step)
        writer = MetricWriter(
            workdir,
            total_steps=config.num_train_steps,
            items_per_step=program.images,
            tokens_per_step=program.tokens,
            start_step=start,
            flops_per_step=program.flops,
            enabled=distributed.is_first(),
        )
        loader = make_loader(batches, start_step=start, **assemble.reading(config))

    count = sum(int(np.prod(shape.shape)) for shape in networks.dit.shapes.values())
    logger.info("%.1fM parameters, mesh %s, %d records", count / 1e6, dict(mesh.shape), len(batches.source))

    # Compile and run.
    with (
        doors.one_sentence(*STOPPED, OSError, MemoryError),
        checkpoints,
        writer,
        contextlib.closing(loader),
        jax.set_mesh(mesh),
    ):
        compilations = 0

        def traced(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
            nonlocal compilations
            compilations += 1  # Python runs this once for each compilation
            return program.function(state, frozen, batch)

        compiled = program.jit(traced)

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
            evaluate=None if fid is None else lambda state: fid(state.ema),
            preempted=distributed.preempted,
            records=batches.records,
            data=restored and restored[1],
            fingerprint=fingerprint,
        )
    logger.info("the train step was compiled %d time(s)", compilations)


if __name__ == "__main__":
    doors.run(main)

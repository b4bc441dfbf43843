"""Text to image as one object, for notebooks, the sampling door and the pictures drawn during training.

>>> pipeline = Pipeline.from_workdir("out/demo/dit")
>>> images = pipeline(["a red circle at the top left"], seed=1)  # uint8 [H, W, 3] each
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8
from ml_collections import ConfigDict

from data_pipelines.text import Tokenizer, full_prompt, load_tokenizer, pad_tokens
from svg_jax import assemble
from svg_jax.checkpoint import load_config, load_params
from svg_jax.flow.names import lookup
from svg_jax.flow.solvers import TABLEAUS
from svg_jax.nn.functional import Params
from svg_jax.parallel import batch_multiple, batch_sharding, make_mesh, replicated
from svg_jax.steps import Frozen, Networks, Sampling, sample_images

Image = UInt8[np.ndarray, "height width 3"]


class Pipeline:
    """Draws pictures from prompts. Its defaults are the `sample` section of the run's config."""

    def __init__(
        self, config: ConfigDict, networks: Networks, params: Params, frozen: Frozen, mesh: Mesh, tokenizer: Tokenizer
    ) -> None:
        self.config, self.networks, self.mesh, self.tokenizer = config, networks, mesh, tokenizer
        self.params, self.frozen = params, frozen
        self._compiled: dict[Any, Callable[..., Any]] = {}

    @classmethod
    def from_workdir(cls, workdir: str, *, ema: bool = True, mesh: Mesh | None = None) -> Pipeline:
        """From the newest checkpoint of a training run.

        Args:
            workdir: The run.
            ema: Use the averaged weights.
            mesh: Where to run; all devices by default.

        Raises:
            FileNotFoundError: There is no checkpoint, or one that its config names is gone.
            ValueError: A checkpoint is of another architecture.
        """
        config = ConfigDict(load_config(workdir))
        if "model" not in config:
            raise ValueError(f"{workdir} is no run of svg_jax.train: it has no diffusion transformer to draw with")
        mesh = make_mesh({"fsdp": -1}) if mesh is None else mesh
        networks = assemble.networks(config)
        parts = ("ema" if ema else "params", "frozen")
        params = load_params(workdir, networks.dit.shapes, assemble.shardings(networks.dit, mesh), parts=parts)
        tokenizer = load_tokenizer(config.text.tokenizer)
        return cls(config, networks, params, assemble.frozen(config, networks, mesh), mesh, tokenizer)

    def with_params(self, params: Params) -> Pipeline:
        """The same with other weights of the diffusion transformer; compiled programs are shared."""
        other = copy.copy(self)
        other.params = params
        return other

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        negative_prompt: str = "",
        samples_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_steps: int | None = None,
        method: str | None = None,
        guidance_scale: float | None = None,
        renorm: float | None = None,
        truncate: float | None = None,
        shift: float | None = None,
        system_prompt: str | None = None,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> list[Image]:
        """Pictures, `samples_per_prompt` in a row for each prompt.

        A picture is a function of seed, place of its prompt and place among its samples: neither the batch size nor the
        number of hosts changes its noise.

        Args:
            prompts: What to draw; longer ones than the text budget are cut.
            negative_prompt: What guidance leads away from.
            samples_per_prompt: Pictures a prompt.
            height: Pixels; the training resolution by default.
            width: Pixels; the training resolution by default.
            num_steps: Of the solver.
            method: A solver of `flow.solvers`.
            guidance_scale: 1 is none.
            renorm: Limit of the guided norm relative to the conditional one; 0 for none.
            truncate: First time without guidance.
            shift: Of the time grid, toward noise.
            system_prompt: A name in `data_pipelines.text.SYSTEM_PROMPTS`.
            seed: Of the noise.
            batch_size: Pictures at a time.

        Raises:
            ValueError: A size is not a multiple of the patch size, or a number is out of range.
        """
        defaults = self.config.sample
        grid = self._grid(height, width)
        num_steps = defaults.num_steps if num_steps is None else num_steps
        batch_size = defaults.batch_size if batch_size is None else batch_size
        counts = {"samples_per_prompt": samples_per_prompt, "num_steps": num_steps, "batch_size": batch_size}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed is {seed}: it must be from 0 to 2^32 - 1")
        sampling = Sampling(
            guidance_scale=defaults.guidance_scale if guidance_scale is None else guidance_scale,
            renorm=defaults.renorm if renorm is None else renorm,
            truncate=defaults.truncate if truncate is None else truncate,
            shift=defaults.shift if shift is None else shift,
        )
        if not all(map(math.isfinite, sampling)):
            raise ValueError(
                f"guidance_scale, renorm, truncate and shift must be finite numbers, not {tuple(sampling)}"
            )
        if not sampling.shift > 0:
            raise ValueError(f"shift is {sampling.shift:g}: it must be above zero, and 1 is none")
        lookup("ODE solver", method or defaults.method, TABLEAUS)
        multiple = batch_multiple(self.mesh)
        jobs = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(samples_per_prompt)]
        size = min(batch_size, len(jobs))
        size = -(-size // multiple) * multiple
        sample = self._sampler(grid, num_steps, method or defaults.method)

        texts = [full_prompt(prompt, system_prompt or self.config.text.system_prompt or "base") for prompt in prompts]
        key = jax.random.key(seed)
        images: list[Image] = []
        for first in range(0, len(jobs), size):
            batch = jobs[first : first + size]
            full = batch + batch[-1:] * (size - len(batch))  # the last batch is filled up, and cut again below
            tokens, num_tokens = self._tokens([texts[prompt] for prompt, _ in full] + [negative_prompt] * size)
            with jax.set_mesh(self.mesh):
                places = np.array(full, np.int32)
                drawn = sample(self.params, self.frozen, tokens, num_tokens, places, key, sampling)
            images.extend(np.asarray(jax.device_get(drawn))[: len(batch)])
        return images

    def _grid(self, height: int | None, width: int | None) -> tuple[int, int]:
        patch, resolution = self.config.autoencoder.encoder.patch_size, self.config.data.resolution
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and (pixels < patch or pixels % patch):
                nearest = max(pixels // patch, 1) * patch
                raise ValueError(f"{name} {pixels} is not a multiple of the patch size {patch}: choose {nearest}")
        assemble.check_positions(self.config, max(height or resolution, width or resolution))
        return (height or resolution) // patch, (width or resolution) // patch

    def _tokens(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, _ = self.tokenizer.encode(texts, self.config.text.max_tokens)
        return pad_tokens(ids, self.config.text.max_tokens, self.tokenizer.pad_id)

    def _sampler(self, grid: tuple[int, int], num_steps: int, method: str) -> Callable[..., Any]:
        key = (grid, num_steps, method)
        if key not in self._compiled:
            rows = batch_sharding(self.mesh)
            self._compiled[key] = jax.jit(
                functools.partial(sample_images, self.networks, grid=grid, num_steps=num_steps, method=method),
                in_shardings=(None, None, rows, rows, rows, None, None),
                out_shardings=replicated(self.mesh),
            )
        return self._compiled[key]

"""Text to image as one object, for notebooks, the doors, and the pictures drawn during training.

>>> pipe = SVGPipeline.from_checkpoint("out/demo/dit")
>>> images = pipe(["a red circle at the top left"], seed=1)  # one PIL image each
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict
from PIL import Image

from data_pipelines.enhancement import GENERATION, clean_enhancement, enhancement_request
from data_pipelines.images import crop, patchify, to_rgb
from data_pipelines.text import Tokenizer, full_prompt, load_tokenizer, pad_tokens
from svg_jax import assemble, loading
from svg_jax.checkpoint import load_params, newest_step
from svg_jax.flow.solvers import Solver, check_num_steps
from svg_jax.nn.functional import Params
from svg_jax.parallel import batch_multiple, batch_sharding, make_mesh, on_host
from svg_jax.steps import (
    Frozen,
    Networks,
    Sampling,
    decode_latents,
    draw_latents,
    encode_images,
    encode_prompts,
    generate_text,
)

logger = logging.getLogger("svg_jax")

Latents = Float[np.ndarray, "rows cols channels"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything but prompt and place that a picture depends on; `SVGPipeline.settings` fills in the run's defaults.

    Attributes:
        height: Pixels.
        width: Pixels.
        num_steps: Steps of the solver.
        solver: A name in `flow.solvers.SOLVERS`, or a `Solver` with options of its own.
        guidance_scale: How far from the negative prompt; 1 is none, and costs half.
        renorm: Limit of the guided norm relative to the conditional one; 0 for none.
        guidance_interval: Times [from, to) at which guidance acts; 0 is noise, 1 is data.
        shift: Of the time grid, toward noise; 1 is none.
        system_prompt: A name in `data_pipelines.text.SYSTEM_PROMPTS`.
        negative_prompt: What guidance leads away from.
        seed: Of the noise.
        batch_size: Pictures at a time. It changes no noise, and at most the rounding of a pixel; but the steps that
            `dopri5` chooses are those of a whole batch, so that its pictures depend on it up to `rtol`.
        tile: Side, in pixels, of the squares that are decoded one after the other; None decodes all at once.

    Raises:
        ValueError: A number is out of range.
    """

    height: int
    width: int
    num_steps: int = 50
    solver: str | Solver = "dpm++2m"
    guidance_scale: float = 4.0
    renorm: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    shift: float = 10.0
    system_prompt: str = "base"
    negative_prompt: str = ""
    seed: int = 0
    batch_size: int = 4
    tile: int | None = None

    def __post_init__(self) -> None:
        # Numbers of one type each: the compiled programs tell 4 from 4.0.
        self._cast(float, "guidance_scale", "renorm", "shift")
        self._cast(_whole, "height", "width", "num_steps", "seed", "batch_size")
        self._cast(lambda interval: tuple(map(float, _pair(interval))), "guidance_interval")
        if self.tile is not None:
            self._cast(_whole, "tile")
        check_num_steps(self.num_steps)
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: it must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: it must be from 0 to 2^32 - 1")
        numbers = (self.guidance_scale, self.renorm, *self.guidance_interval, self.shift)
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"guidance_scale, renorm, guidance_interval and shift must be finite, not {numbers}")
        if not self.shift > 0:
            raise ValueError(f"shift is {self.shift:g}: it must be above zero, and 1 is none")
        if self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(f"guidance_interval {self.guidance_interval} ends before it begins")
        full_prompt("", self.system_prompt)
        self.as_solver()

    def _cast(self, kind: Callable[[Any], Any], *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, kind(value))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name} is {value!r}: {error}") from error

    def as_solver(self) -> Solver:
        """The solver, with its options.

        Raises:
            ValueError: No solver has that name.
        """
        return self.solver if isinstance(self.solver, Solver) else Solver(self.solver)


@dataclasses.dataclass(frozen=True)
class Job:
    """One picture: its prompt, the place of that prompt in its list, and the place among the prompt's samples."""

    prompt: str
    index: int = 0
    sample: int = 0


def _whole(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():  # web pages and JSON write 4.0
        return int(value)
    return operator.index(value)


def _pair(values: Any) -> tuple[float, float]:
    low, high = values
    return low, high


class Drawn(NamedTuple):
    """One picture, its prompt after enhancement, and what it was decoded from."""

    job: Job
    prompt: str
    image: Image.Image
    latents: Latents


class Computed(NamedTuple):
    """A batch on the devices; rows after those of the jobs only fill it up."""

    jobs: list[Job]
    prompts: list[str]  # after enhancement
    pixels: UInt8[Array, "batch h w 3"]
    latents: Float[Array, "batch tokens channels"]


class SVGPipeline:
    """Draws pictures from prompts. Its defaults are the `sample` section of the run's config."""

    def __init__(
        self, config: ConfigDict, networks: Networks, params: Params, frozen: Frozen, mesh: Mesh, tokenizer: Tokenizer
    ) -> None:
        self.config, self.networks, self.mesh, self.tokenizer = config, networks, mesh, tokenizer
        self.params, self.frozen = params, frozen
        self.origin: dict[str, Any] = {}  # where the weights came from
        self._compiled: dict[Any, Callable[..., Any]] = {}

    @classmethod
    def from_checkpoint(
        cls,
        folder: str,
        *,
        autoencoder: str | None = None,
        text_encoder: str | None = None,
        tokenizer: str | None = None,
        ema: bool = True,
        dtype: str | None = None,
        mesh: Mesh | None = None,
    ) -> SVGPipeline:
        """From released weights that `svg_jax.convert import` has brought over, or from a training run.

        Args:
            folder: What `convert import --to` made (with `dit`, `autoencoder`, `text_encoder` in it), or the workdir of
                a run, whose newest checkpoint is used and whose config names the frozen networks.
            autoencoder: Workdir of another autoencoder.
            text_encoder: Workdir of another text encoder.
            tokenizer: Folder of another tokeniser.
            ema: Use the averaged weights.
            dtype: Compute type, and that of the stored kernels: `float32` or `bfloat16`; by default as configured.
            mesh: Where to run; all devices of this host by default.

        Raises:
            FileNotFoundError: There is no checkpoint, or one that its config names is gone.
            ValueError: A checkpoint is of another architecture.
        """
        workdir, config = assemble.sampling_config(
            folder, autoencoder=autoencoder, text_encoder=text_encoder, tokenizer=tokenizer, dtype=dtype
        )
        mesh = make_mesh({"fsdp": -1}, jax.local_devices()) if mesh is None else mesh
        networks = assemble.networks(config)
        tokens = load_tokenizer(config.text.tokenizer)
        assemble.check_tokenizer(config, tokens)
        with explained_out_of_memory():
            params = load_params(
                workdir,
                loading.in_compute_type(networks.dit, {"": config.model.dtype}),
                loading.shardings(networks.dit, mesh),
                parts=("ema" if ema else "params", "frozen"),
            )
            frozen = loading.frozen(config, networks, mesh)
        pipe = cls(config, networks, params, frozen, mesh, tokens)
        folders = {"checkpoint": workdir, "autoencoder": config.autoencoder.checkpoint}
        folders |= {"text_encoder": config.text.checkpoint, "tokenizer": config.text.tokenizer}
        pipe.origin = {name: path and str(epath.Path(path).absolute()) for name, path in folders.items()}
        pipe.origin |= {"step": newest_step(workdir), "ema": ema, "dtype": config.model.dtype}
        return pipe

    def with_params(self, params: Params) -> SVGPipeline:
        """The same with other weights of the diffusion transformer; compiled programs are shared."""
        other = copy.copy(self)
        other.params = params
        return other

    def settings(self, **options: Any) -> Settings:
        """The run's defaults with these changes; None leaves a default alone.

        Raises:
            TypeError: No such option.
            ValueError: A size is not a multiple of the patch size, or a number is out of range.
        """
        resolution = self.config.data.resolution
        system_prompt = self.config.text.system_prompt or "base"
        defaults: dict[str, Any] = {**self.config.sample.to_dict(), "system_prompt": system_prompt}
        defaults |= {"height": resolution, "width": resolution}
        names = {field.name for field in dataclasses.fields(Settings)}
        values = {name: value for name, value in defaults.items() if name in names}
        values |= {name: value for name, value in options.items() if value is not None}
        settings = Settings(**values)
        self._grid(settings)
        return settings

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        num_images: int = 1,
        return_latents: bool = False,
        **options: Any,
    ) -> Any:
        """Pictures, `num_images` in a row for each prompt.

        A picture is a function of the weights, the settings, the place of its prompt and its place among the samples:
        neither the batch size nor the order nor the number of hosts changes its noise.

        Args:
            prompts: What to draw; an empty one is allowed.
            num_images: Pictures a prompt.
            return_latents: Also give what the pictures were decoded from, each normalised float32 [rows, cols, C].
            **options: Fields of `Settings`, as in `pipe("a red fox", height=512, width=1024, guidance_scale=3.0)`.

        Returns:
            PIL images, or (images, latents).

        Raises:
            TypeError: No such option.
            ValueError: A size is not a multiple of the patch size, or a number is out of range.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}: it must be at least 1")
        jobs = [Job(prompt, i, j) for i, prompt in enumerate(prompts) for j in range(num_images)]
        drawn = [picture for batch in self.stream(jobs, self.settings(**options)) for picture in batch]
        images = [picture.image for picture in drawn]
        return (images, [picture.latents for picture in drawn]) if return_latents else images

    def stream(self, jobs: Sequence[Job], settings: Settings) -> Iterator[list[Drawn]]:
        """The pictures, a batch at a time.

        Raises:
            MemoryError: The devices have too little; the message says which settings need less.
        """
        grid = self._grid(settings)
        for batch in self.on_devices(jobs, settings):
            with explained_out_of_memory():  # which the devices may say as late as here
                images, latents = on_host(batch.pixels), on_host(batch.latents)
            latents = latents.reshape(len(latents), *grid, -1)
            yield [
                Drawn(job, prompt, Image.fromarray(image), latent)
                for job, prompt, image, latent in zip(batch.jobs, batch.prompts, images, latents, strict=False)
            ]

    def on_devices(self, jobs: Sequence[Job], settings: Settings) -> Iterator[Computed]:
        """The same, left where they were computed: rows over the devices, also over those of other processes.

        Raises:
            MemoryError: The devices have too little; the message says which settings need less.
        """
        if not jobs:
            return
        prompts = {job.prompt: job.prompt for job in jobs}
        if settings.system_prompt == "enhance":
            some = [prompt for prompt in prompts if prompt]
            prompts |= zip(some, self.enhance(some, settings.batch_size), strict=True)
        grid, guide = self._grid(settings), settings.guidance_scale != 1
        multiple = batch_multiple(self.mesh)
        size = -(-min(settings.batch_size, len(jobs)) // multiple) * multiple
        sampling = Sampling(*(getattr(settings, name) for name in Sampling._fields))
        negative = full_prompt(settings.negative_prompt, settings.system_prompt)
        key = jax.random.key(settings.seed)
        draw = self._jit(draw_latents, self.networks.dit, grid=grid, solver=settings.as_solver(), guide=guide)
        for first in range(0, len(jobs), size):
            batch = list(jobs[first : first + size])
            full = batch + batch[-1:] * (size - len(batch))  # the last batch is filled up, and cut again below
            texts = [full_prompt(prompts[job.prompt], settings.system_prompt) for job in full]
            places = np.array([(job.index, job.sample) for job in full], np.int32)
            with jax.set_mesh(self.mesh), explained_out_of_memory():
                features, num_tokens = self._encode(texts + [negative] * size if guide else texts)
                z = draw(self.params, features, num_tokens, self._rows(places), key, sampling)
                pixels = self._decode(z, grid, settings.tile)
            yield Computed(batch, [prompts[job.prompt] for job in batch], pixels, z)

    def enhance(self, prompts: Sequence[str], batch_size: int = 4) -> list[str]:
        """Prompts written out by the text encoder, a language model, and shortened as the release does.

        Greedy decoding of the request in `data_pipelines.enhancement`; a prompt of which nothing is left comes back as
        it was.
        """
        limits = {"max_new_tokens": GENERATION["max_new_tokens"], "eos_id": self.tokenizer.eos_id}
        generate = self._jit(generate_text, self.networks.text, **limits)
        enhanced: list[str] = []
        size = -(-min(batch_size, len(prompts)) // batch_multiple(self.mesh)) * batch_multiple(self.mesh)
        for first in range(0, len(prompts), max(size, 1)):
            batch = list(prompts[first : first + size])
            requests = [enhancement_request(prompt) for prompt in batch]
            tokens, num_tokens = self._tokens(requests + requests[-1:] * (size - len(batch)), self._request_budget)
            with jax.set_mesh(self.mesh), explained_out_of_memory():
                ids, counts = generate(self.frozen["text"], self._rows(tokens), self._rows(num_tokens))
                ids, counts = on_host(ids), on_host(counts)
            for prompt, row, count in zip(batch, ids, counts, strict=False):
                enhanced.append(clean_enhancement(prompt, self.tokenizer.decode(row[:count].tolist())))
        return enhanced

    def encode(self, image: Image.Image) -> Latents:
        """Normalised latents of a picture, cropped to the nearest size of whole patches."""
        patch = assemble.patch_size(self.config)
        rows, cols = max(image.height // patch, 1), max(image.width // patch, 1)
        patches, grid = patchify(crop(to_rgb(image), (cols * patch, rows * patch)), patch, rows * cols)
        encode = self._jit(encode_images, self.networks.autoencoder)
        with jax.set_mesh(self.mesh), explained_out_of_memory():
            z = encode(self.frozen["autoencoder"], self._one(patches), self._one(grid))
        return on_host(z)[0].reshape(rows, cols, -1)

    def decode(self, latents: Latents, tile: int | None = None) -> Image.Image:
        """The picture of normalised latents; `tile` as in `Settings`."""
        rows, cols, channels = latents.shape
        with jax.set_mesh(self.mesh), explained_out_of_memory():
            pixels = self._decode(self._one(latents.reshape(rows * cols, channels)), (rows, cols), tile)
        return Image.fromarray(on_host(pixels)[0])

    @property
    def _request_budget(self) -> int:
        """Tokens of a prompt together with the request to enhance it."""
        request, _ = self.tokenizer.encode([enhancement_request("")], 1 << 20)
        return self.config.text.max_tokens + -(-len(request[0]) // 64) * 64

    def _grid(self, settings: Settings) -> tuple[int, int]:
        patch = assemble.patch_size(self.config)
        for name in ("height", "width"):
            pixels = getattr(settings, name)
            if pixels < patch or pixels % patch:
                nearest = max(round(pixels / patch), 1) * patch
                raise ValueError(f"{name} {pixels} is not a multiple of the patch size {patch}: choose {nearest}")
        if settings.tile is not None and settings.tile < 4 * patch:
            raise ValueError(f"tile is {settings.tile}: decode in squares of at least {4 * patch} pixels a side")
        assemble.check_positions(self.config, max(settings.height, settings.width))
        return settings.height // patch, settings.width // patch

    def _tokens(self, texts: list[str], budget: int) -> tuple[np.ndarray, np.ndarray]:
        ids, cut = self.tokenizer.encode(texts, budget)
        for text in {text for text, was_cut in zip(texts, cut, strict=True) if was_cut}:
            logger.warning("a prompt of more than %d tokens is cut: …%s", budget, text[-60:])
        return pad_tokens(ids, budget, self.tokenizer.pad_id)

    def _encode(self, texts: list[str]) -> tuple[Array, Array]:
        tokens, num_tokens = map(self._rows, self._tokens(texts, self.config.text.max_tokens))
        return self._jit(encode_prompts, self.networks.text)(self.frozen["text"], tokens, num_tokens), num_tokens

    def _decode(self, z: Array, grid: tuple[int, int], tile: int | None) -> UInt8[Array, "batch h w 3"]:
        patch = assemble.patch_size(self.config)
        decode = self._jit(
            decode_latents, self.networks.autoencoder, grid=grid, tile=None if tile is None else tile // patch
        )
        return decode(self.frozen["autoencoder"], z)

    def _rows(self, array: np.ndarray) -> Array:
        """Rows over the devices."""
        return jax.device_put(array, batch_sharding(self.mesh))

    def _one(self, array: np.ndarray) -> Array:
        """A batch of this alone: one copy for each device."""
        return self._rows(np.repeat(array[None], batch_multiple(self.mesh), axis=0))

    def _jit(self, function: Callable[..., Any], *leading: Any, **static: Any) -> Callable[..., Any]:
        """`function` with these arguments bound, compiled once for each set of them; what it gives is split by rows."""
        key = (function.__name__, *sorted(static.items()))
        if key not in self._compiled:
            bound = functools.partial(function, *leading, **static)
            self._compiled[key] = jax.jit(bound, out_shardings=batch_sharding(self.mesh))
        return self._compiled[key]


@contextlib.contextmanager
def explained_out_of_memory() -> Iterator[None]:
    """Says which knob to turn."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(
            "out of device memory: lower batch_size, decode in tiles (tile=512), load with dtype=bfloat16, or draw "
            "smaller pictures"
        ) from error

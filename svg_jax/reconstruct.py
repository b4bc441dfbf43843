"""Shows what an autoencoder makes of pictures.

`python -m svg_jax.reconstruct photos/*.jpg --checkpoint=WORKDIR --out=DIR` writes `DIR/reconstructions/NAME.png`, and
`DIR/side_by_side/NAME.png` with input, reconstruction and difference in a row.
"""

from __future__ import annotations

import argparse
import functools
import glob
import io
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float, UInt8
from PIL import Image

from data_pipelines.folders import ImageFolder
from data_pipelines.images import Size, crop, crop_sizes, decode, nearest_size
from data_pipelines.records import BadRecord, Cause
from svg_jax import assemble, distributed
from svg_jax.config import one_sentence
from svg_jax.evaluate.image_metrics import psnr
from svg_jax.loading import find_autoencoder, open_autoencoder
from svg_jax.metrics import side_by_side
from svg_jax.models.autoencoder import Autoencoder, to_uint8
from svg_jax.models.decoder import decode_in_tiles
from svg_jax.nn.functional import Network, Params
from svg_jax.parallel import make_mesh, replicated

logger = logging.getLogger("svg_jax")

FOLDERS = ("reconstructions", "side_by_side")  # of --out
MAX_RATIO = 4.0

Pixels = UInt8[np.ndarray, "height width 3"]


def main(arguments: list[str] | None = None) -> None:
    """Parses, reconstructs one picture after the other, and prints the PSNR of each."""
    options = parser().parse_args(arguments)
    logging.getLogger("svg_jax").setLevel(logging.INFO)
    with one_sentence():
        distributed.initialise()
        inputs = [path for pattern in options.images for path in expanded(pattern)]
        files = find_images(inputs)[jax.process_index() :: jax.process_count()]
        workdir, section = find_autoencoder(options.checkpoint)
        patch = assemble.autoencoder_config(section).patch_size
        sizes, tile = sizes_of(options.resolution, options.max_ratio, patch), tile_of(options.tile, patch)
        check_out(options.out, inputs)
        match = options.match
        if match is None and section.get("residual"):
            match = "per_image"
            logger.info("residual latents are matched per image, each picture alone; --match=batch is as in training")
        mesh = make_mesh({"fsdp": -1}, jax.local_devices()[:1])  # one picture at a time
        loaded = open_autoencoder(workdir, section, mesh, ema=options.ema, dtype=options.dtype, match=match)
        draw = jax.jit(functools.partial(compare, loaded.network, tile=tile))
        values: list[float] = []
        problems: list[BadRecord] = []
        for file, name in files:
            try:
                image = decode(file)
                pixels = fitted(image, patch, sizes, str(file))
                with jax.set_mesh(mesh):
                    batch = jax.device_put(pixels[None], replicated(mesh))
                    output, value, finite = jax.device_get(draw(loaded.params, batch))
                if not finite:
                    raise BadRecord(
                        Cause.DAMAGED,
                        f"the reconstruction of {file} holds values that are not finite: the weights are damaged, or "
                        "too large for the compute type; compare with --dtype float32",
                    )
            except BadRecord as error:
                problems.append(error)
                logger.warning("skipped: %s", error)
                continue
            values.append(float(value[0]))
            said = "" if image.size == pixels.shape[1::-1] else f", from {image.width}x{image.height}"
            save(epath.Path(options.out), name, pixels, output[0])
            print(f"{file}: {pixels.shape[1]}x{pixels.shape[0]}{said}, PSNR {values[-1]:.2f} dB")
        if problems and not values:
            raise problems[0]
    if len(values) > 1:
        print(f"mean of {len(values)} pictures: PSNR {np.mean(values):.2f} dB")
    if problems:
        print(f"{len(problems)} pictures were skipped, see the warnings above")
    print(epath.Path(options.out) / "side_by_side")


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(prog="python -m svg_jax.reconstruct", description=__doc__, allow_abbrev=False)
    add = flags.add_argument
    add("images", nargs="+", metavar="IMAGE", help="files, folders or patterns such as 'photos/*.jpg'")
    add("--checkpoint", required=True, help="workdir of an autoencoder, trained or imported")
    add("--out", default="reconstructions", help="folder for the pictures (default: %(default)s)")
    add("--resolution", type=int, help="crop to the sizes of training at this many pixels; by default sizes are kept")
    add("--max-ratio", type=float, help=f"longest crop of --resolution (default: {MAX_RATIO})")
    add("--match", help="how residual latents are matched: per_image, batch or none (default: per_image)")
    add("--tile", type=int, help="side in pixels of the squares that are decoded one by one; saves memory")
    add("--no-ema", dest="ema", action="store_false", help="the raw weights instead of their average")
    add("--dtype", help=f"compute type, of {', '.join(assemble.DTYPES)}; by default as configured")
    return flags


def check_out(out: str, inputs: Iterable[Path]) -> None:
    """Makes the folders of --out, which must not hold inputs, nor lie among them: the next run would read them.

    Raises:
        ValueError: They do.
        PermissionError: They cannot be made.
    """
    if "://" not in out:
        target = Path(out).resolve()
        for path in inputs:
            among = path.is_dir() and target.is_relative_to(path.resolve())
            if among or any(path.resolve().is_relative_to(target / kind) for kind in FOLDERS):
                raise ValueError(f"--out {out} and the input {path} lie one in the other: choose another --out")
    try:
        for kind in FOLDERS:
            (epath.Path(out) / kind).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(f"cannot write pictures to {out} ({error}): choose another --out") from error


def sizes_of(resolution: int | None, max_ratio: float | None, patch: int) -> list[Size] | None:
    """The crops to choose from; None where pictures keep their sizes.

    Raises:
        ValueError: A number is out of range, or there is a ratio and no resolution.
    """
    if resolution is None:
        if max_ratio is not None:
            raise ValueError(f"--max-ratio {max_ratio:g} is of the crops of --resolution: give that too")
        return None
    if resolution < patch:
        raise ValueError(f"--resolution is {resolution}: it must be at least one patch, {patch} pixels")
    return crop_sizes(resolution, patch, MAX_RATIO if max_ratio is None else max_ratio)


def find_images(inputs: Iterable[Path]) -> list[tuple[Path, str]]:
    """Files, and a name for each that no other has: its path without ending, for those of a folder relative to it.

    Raises:
        ValueError: A folder holds no images.
    """
    found: dict[Path, str] = {}
    for path in inputs:
        if path.is_dir():
            source = ImageFolder(path)
            inside = [Path(source[i].path) for i in range(len(source))]
            found |= {file: str(file.relative_to(path)) for file in inside if file not in found}
        else:
            found.setdefault(path, path.name)
    named: dict[str, Path] = {}
    for file, name in found.items():
        base = unique = str(Path(name).with_suffix(""))
        number = 1
        while unique in named:
            number += 1
            unique = f"{base}_{number}"
        named[unique] = file
    return [(file, name) for name, file in named.items()]


def expanded(pattern: str) -> Iterator[Path]:
    """What a shell would make of a pattern.

    Raises:
        FileNotFoundError: There is no such file.
    """
    path = Path(pattern)
    if path.exists():
        yield path
    elif matches := sorted(glob.glob(pattern, recursive=True)):
        yield from map(Path, matches)
    else:
        raise FileNotFoundError(f"there is no picture {pattern}: name files, folders or patterns")


def tile_of(pixels: int | None, patch: int) -> int | None:
    """Latents a side of what is decoded at a time."""
    if pixels is None:
        return None
    if pixels < 4 * patch:
        raise ValueError(f"--tile {pixels} is too small: it must be at least {4 * patch} pixels, 4 patches")
    return math.ceil(pixels / patch)


def fitted(image: Image.Image, patch: int, sizes: Sequence[Size] | None, name: str) -> Pixels:
    """An image at the size that it is encoded at: the nearest crop, or its own with sides rounded to patches.

    Raises:
        BadRecord: It is smaller than a patch.
    """
    if min(image.size) < patch:
        raise BadRecord(
            Cause.TOO_SMALL,
            f"{name} has {image.width}x{image.height} pixels, less than one patch of {patch}x{patch}: enlarge it first",
        )
    if sizes is not None:
        return np.asarray(crop(image, nearest_size(image.size, sizes)))
    width, height = (round(side / patch) * patch for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def compare(
    network: Network[Autoencoder], params: Params, images: UInt8[Array, "batch h w 3"], *, tile: int | None
) -> tuple[UInt8[Array, "batch h w 3"], Float[Array, " batch"], Bool[Array, ""]]:
    """Reconstructions, their PSNR in dB, and whether all that was decoded is finite, which 8 bits do not show."""
    autoencoder = network(params)
    features = autoencoder.features_of_images(images)
    decoded = autoencoder.decoder(features) if tile is None else decode_in_tiles(autoencoder.decoder, features, tile)
    output = to_uint8(decoded)
    return output, psnr(images, output), jnp.isfinite(decoded).all()


def save(folder: epath.Path, name: str, before: Pixels, after: Pixels) -> None:
    """The reconstruction, and the row of input, reconstruction and difference."""
    (row,) = side_by_side([before], [after])
    for kind, pixels in zip(FOLDERS, (after, row), strict=True):
        file = folder / kind / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, format="PNG")
        file.write_bytes(data.getvalue())


if __name__ == "__main__":
    main()

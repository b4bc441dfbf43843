"""A folder of generated pictures, as the official evaluators read it: ours, or another program's.

    geneval, geneval_long   00000/metadata.jsonl, 00000/samples/0000.png
    dpg                     images/ITEM.png, a grid of all pictures of a prompt
    prompts                 images/00000_0.png

Ours also hold `settings.json`, with everything that the pictures depend on and, as `origin`, where the weights lay, and
`prompts.jsonl`. Files appear whole or not at all, and a picture carries the SHA-256 of those settings without `origin`,
without which it does not count: any number of processes may write into one folder, any of them may be killed, and what
is there is not drawn again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from svg_jax.evaluate.grids import GRIDS, OFFICIAL, Box, Grid, cell, check_padding, grid_of, grid_shape
from svg_jax.evaluate.other_layouts import METADATA, read_geneval, read_grids
from svg_jax.evaluate.prompt_sets import READERS, PromptEntry, PromptSet, warn_of_count
from svg_jax.flow.names import lookup
from svg_jax.output_folder import ORIGIN, output_folder, write_whole

logger = logging.getLogger("svg_jax")

SETTINGS, PROMPTS = "settings.json", "prompts.jsonl"
NUM_THREADS = 8  # that look at files
NAMED = 3  # of several, in a message


@dataclasses.dataclass(frozen=True)
class Generated:
    """Pictures of a set of prompts.

    Attributes:
        folder: Where they lie.
        prompt_set_name: As in `prompt_sets`.
        entries: The prompts.
        num_images: Pictures a prompt that are scored, the first ones.
        settings: Everything that they depend on; empty where another program drew them.
        found: What another program named the files, by id and sample (0 for a grid).
        grid: Columns and rows of the pictures in a file.
    """

    folder: epath.Path
    prompt_set_name: str
    entries: tuple[PromptEntry, ...]
    num_images: int
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    found: Mapping[tuple[str, int], str] = dataclasses.field(default_factory=dict)
    grid: Grid = (1, 1)

    @property
    def is_grid(self) -> bool:
        """Whether all pictures of a prompt lie in one file."""
        return self.prompt_set_name == "dpg"

    @functools.cached_property
    def manifest(self) -> str:
        """SHA-256 of the settings, but for where the weights lay."""
        settings = {name: value for name, value in self.settings.items() if name != ORIGIN}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def path(self, entry: PromptEntry, sample: int) -> epath.Path:
        """The file of a picture."""
        return self.folder / self._name(entry, sample)

    def box(self, entry: PromptEntry, sample: int) -> Box:
        """Where in its file a picture lies, in pixels.

        Raises:
            FileNotFoundError: It is not there.
            ValueError: It cannot be read, or is no grid of so many pictures.
        """
        with opened(self.path(entry, sample)) as image:
            return self._box(image, entry, sample)

    def picture(self, entry: PromptEntry, sample: int) -> Image.Image:
        """A picture in RGB, turned as its EXIF orientation says.

        Raises:
            FileNotFoundError: It is not there.
            ValueError: It cannot be read, or is no grid of so many pictures.
        """
        with opened(self.path(entry, sample)) as image:
            whole = ImageOps.exif_transpose(image).convert("RGB")
        return whole.crop(self._box(whole, entry, sample)) if self.is_grid else whole

    def files(self, entry: PromptEntry) -> list[str]:
        """All files of a prompt, relative to the folder."""
        names = [self._name(entry, sample) for sample in range(1 if self.is_grid else self.num_images)]
        return names + ([f"{entry.id}/{METADATA}"] if self.settings and _is_geneval(self.prompt_set_name) else [])

    def holds(self, entry: PromptEntry) -> bool:
        """Whether all files of a prompt are there, and whole."""
        return all(self._is_whole(entry, name) for name in self.files(entry))

    def missing(self, *, quick: bool = False) -> list[str]:
        """The files that are not there or not whole, in the order of the prompts.

        Args:
            quick: Only the beginning of a file is read, so that one which is cut off counts as whole.
        """
        files = [(entry, name) for entry in self.entries for name in self.files(entry)]
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            there = list(pool.map(lambda file: self._is_whole(*file, quick=quick), files))
        return [name for (_, name), is_there in zip(files, there, strict=True) if not is_there]

    def save(self, entry: PromptEntry, images: Sequence[Image.Image], enhanced: str | None = None) -> None:
        """Writes the pictures of a prompt, each with that prompt and the hash of the settings as PNG texts.

        Args:
            entry: The prompt.
            images: `num_images` of one size.
            enhanced: What was drawn, where the prompt was written out first.
        """
        info = PngInfo()
        info.add_itxt("prompt", entry.prompt)
        if enhanced is not None:
            info.add_itxt("enhanced_prompt", enhanced)
        info.add_text("manifest", self.manifest)
        info.add_text("Software", "svg_jax")
        for sample, image in enumerate([grid_of(images)] if self.is_grid else images):
            data = io.BytesIO()
            image.save(data, format="PNG", pnginfo=info)
            path = self.path(entry, sample)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, data.getvalue())
        if _is_geneval(self.prompt_set_name):
            write_whole(self.folder / entry.id / METADATA, _row(entry))

    def _name(self, entry: PromptEntry, sample: int) -> str:
        number = 0 if self.is_grid else sample
        return self.found.get((entry.id, number)) or _file_name(self.prompt_set_name, entry.id, number)

    def _is_whole(self, entry: PromptEntry, name: str, *, quick: bool = False) -> bool:
        """Whether a file is there with all its bytes; of our pictures also, whether they are of these settings."""
        try:
            if name.endswith(METADATA):
                return (self.folder / name).read_bytes() == _row(entry).encode()
            with (self.folder / name).open("rb") as file, Image.open(file) as image:
                size, manifest = image.size, image.info.get("manifest")
                if not quick and image.format == "PNG":
                    image.verify()  # the checksums; decodes no pixels
                elif not quick:
                    image.load()
        except Exception:  # Pillow's decoders answer broken bytes with errors of many kinds
            return False
        return not self.settings or (size == self._size and manifest == self.manifest)

    @property
    def _size(self) -> tuple[int, int]:
        """Width and height of our files."""
        columns, rows = self.grid
        return columns * self.settings["width"], rows * self.settings["height"]

    def _box(self, image: Image.Image, entry: PromptEntry, sample: int) -> Box:
        if not self.is_grid:
            return (0, 0, *image.size)
        try:
            if not self.settings:
                check_padding(image, self.grid)
            return cell(image.size, sample, self.grid)
        except ValueError as error:
            raise ValueError(f"{self.path(entry, sample)} {error}") from error


def begin(folder: str, prompt_set: PromptSet, num_images: int, settings: Mapping[str, Any]) -> Generated:
    """Makes a folder to draw into, or takes up one of the same settings.

    Args:
        folder: Local or `gs://`.
        prompt_set: What is to be drawn.
        num_images: Pictures a prompt.
        settings: What else the pictures depend on, as JSON can hold it; width and height among it.

    Raises:
        ValueError: The folder holds pictures of other settings, or of another program.
        PermissionError: It cannot be made.
    """
    path = epath.Path(folder)
    pictures = "[0-9]*/samples/*.png" if _is_geneval(prompt_set.name) else "images/*.png"
    if next(iter(path.glob(pictures)), None) is not None and not (path / SETTINGS).exists():
        raise ValueError(
            f"{folder} holds pictures that another program drew, as {SETTINGS} is missing: choose another --out"
        )
    rows = ({"id": entry.id, "prompt": entry.prompt, "metadata": entry.metadata} for entry in prompt_set.entries)
    listing = "".join(json.dumps(row) + "\n" for row in rows).encode()
    what = {"prompt_set": prompt_set.name, "prompts": prompt_set.digest, "num_images": num_images}
    what["prompts_jsonl"] = hashlib.sha256(listing).hexdigest()
    every = json.loads(json.dumps({**what, **settings}))
    path = output_folder(folder, every, inside="" if _is_geneval(prompt_set.name) else "images", results="pictures")
    if not (path / PROMPTS).exists() or (path / PROMPTS).read_bytes() != listing:
        write_whole(path / PROMPTS, listing)
    grid = grid_shape(num_images) if prompt_set.name == "dpg" else (1, 1)
    return Generated(path, prompt_set.name, prompt_set.entries, num_images, every, grid=grid)


def open_generated(
    folder: str,
    prompt_set: PromptSet | None = None,
    *,
    num_images: int | None = None,
    grid: str | None = None,
    complete: bool = True,
) -> Generated:
    """Pictures to be scored.

    Args:
        folder: Ours, or of another program: GenEval's folders, or DPG-Bench's grids right inside it or in `images`.
        prompt_set: What they are to be pictures of; by default what the folder says.
        num_images: How many pictures of each prompt are taken, the first ones; all by default.
        grid: A key of `GRIDS`: how pictures lie in the files of another program; by default as DPG-Bench has them.
        complete: Refuse a folder where some are missing.

    Raises:
        FileNotFoundError: There is no folder, or no picture in it.
        ValueError: Some are missing or damaged, or they are of other prompts; the message says which.
    """
    path = epath.Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder of pictures '{folder}'")
    cells = lookup("grid", grid or OFFICIAL, GRIDS)
    if (path / SETTINGS).exists() or (path / PROMPTS).exists():
        generated = _ours(path)
    elif any(child.name.isdecimal() and child.is_dir() for child in path.iterdir()):
        name, entries, number, files = read_geneval(path)
        generated = Generated(path, name, entries, number, found=files)
    else:
        name, entries, number, files = read_grids(path, math.prod(cells))
        generated = Generated(path, name, entries, number, found=files, grid=cells)
    if grid is not None and cells != generated.grid:
        columns, rows = generated.grid
        raise ValueError(f"--grid is {grid}, and the files in {folder} hold {columns} x {rows} pictures: leave it out")
    if num_images is not None:
        generated = _first(generated, num_images)
    if prompt_set is None:
        warn_of_count(generated.prompt_set_name, len(generated.entries), folder)
    else:
        generated = _of_prompts(generated, prompt_set)
    if complete and (missing := generated.missing(quick=True)):
        raise ValueError(
            f"{folder} is not complete: {listed(missing)} missing or damaged: draw what is missing with the command "
            "that drew the rest"
        )
    return generated


def listed(names: Sequence[str]) -> str:
    """The first few of them, and how many there are: `a, b, c and 5 more are`."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more} {'are' if len(names) > 1 else 'is'}"


def _file_name(prompt_set_name: str, entry_id: str, sample: int) -> str:
    """Where a picture of ours lies in its folder."""
    if _is_geneval(prompt_set_name):
        return f"{entry_id}/samples/{sample:04d}.png"
    return f"images/{entry_id}.png" if prompt_set_name == "dpg" else f"images/{entry_id}_{sample}.png"


def _is_geneval(prompt_set_name: str) -> bool:
    return prompt_set_name in ("geneval", "geneval_long")


def _row(entry: PromptEntry) -> str:
    """What GenEval reads beside the pictures of a prompt."""
    return json.dumps(entry.metadata) + "\n"


@contextlib.contextmanager
def opened(path: epath.Path, data: bytes | None = None) -> Iterator[Image.Image]:
    """An image file; what goes wrong with it inside is told in a sentence.

    Args:
        path: Where it lies.
        data: Its bytes, where they have been read.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It cannot be read.
    """
    try:
        with path.open("rb") if data is None else io.BytesIO(data) as file, Image.open(file) as image:
            yield image
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: draw it with the command that drew the rest") from error
    except Exception as error:  # Pillow's decoders answer broken bytes with errors of many kinds
        raise ValueError(
            f"{path} cannot be read as an image ({type(error).__name__}: {error}): draw it again"
        ) from error


def _ours(path: epath.Path) -> Generated:
    about, listing = path / SETTINGS, path / PROMPTS
    if not about.exists():
        raise ValueError(f"{about} is missing, which says what was drawn: draw the pictures again into another folder")
    try:
        settings = json.loads(about.read_text())
    except ValueError as error:
        raise ValueError(f"{about} is damaged ({error}): draw the pictures again into another folder") from error
    match settings:
        case {
            "prompt_set": str(name),
            "prompts_jsonl": str(digest),
            "num_images": int(num_images),
            "width": int(width),
            "height": int(height),
        } if name in READERS and min(num_images, width, height) > 0:
            pass
        case _:
            raise ValueError(f"{about} does not say what `python -m svg_jax.evaluate generate` drew there")
    rows = listing.read_bytes() if listing.exists() else b""
    if hashlib.sha256(rows).hexdigest() != digest:
        raise ValueError(
            f"{listing} is missing, or not as it was written: the command that drew the pictures writes it again"
        )
    entries = tuple(PromptEntry(index, **json.loads(row)) for index, row in enumerate(rows.splitlines()))
    grid = grid_shape(num_images) if name == "dpg" else (1, 1)
    return Generated(path, name, entries, num_images, settings, grid=grid)


def _first(generated: Generated, num_images: int) -> Generated:
    """The same with the first pictures of each prompt.

    Raises:
        ValueError: There are not so many.
    """
    if not 1 <= num_images <= generated.num_images:
        raise ValueError(
            f"--num-images is {num_images}: {generated.folder} has {generated.num_images} pictures a prompt, of which "
            "at least 1 can be taken"
        )
    return dataclasses.replace(generated, num_images=num_images)


def _of_prompts(generated: Generated, prompt_set: PromptSet) -> Generated:
    """The same with the prompts of a file, of which some may have no picture.

    Raises:
        ValueError: The pictures are of prompts that are not in the file.
    """
    folder, asked = generated.folder, {entry.id: entry for entry in prompt_set.entries}
    same_name = generated.prompt_set_name == prompt_set.name
    if not same_name and (generated.settings or generated.is_grid or prompt_set.name == "dpg"):
        raise ValueError(f"{folder} holds pictures of {generated.prompt_set_name}, and not of {prompt_set.name}")
    if unknown := [entry.id for entry in generated.entries if entry.id not in asked]:
        raise ValueError(
            f"{folder} holds pictures of prompts that the file of prompts does not have ({listed(unknown)} not there): "
            "give the file that they were drawn from"
        )
    texts = {entry.id: entry.prompt.split() for entry in generated.entries if generated.settings}
    differing = [
        entry.id
        for entry in generated.entries
        if entry.metadata != asked[entry.id].metadata
        or texts.get(entry.id) not in (None, asked[entry.id].prompt.split())
    ]
    if differing and not generated.is_grid:
        raise ValueError(
            f"{folder} was drawn from another file of prompts: {listed(differing)} not the same there: give that file"
        )
    if differing:  # the id says which prompt is meant, and its publishers differ in a word or two
        logger.warning("%s was drawn from prompts that are worded otherwise: %s", folder, listed(differing))
    found = dict(generated.found)
    if found:  # the others are missed where these lie
        one = generated.entries[0].id
        names = [found[one, sample] for sample in range(1 if generated.is_grid else generated.num_images)]
        for sample, name in enumerate(names):
            inside, slash, file = name.rpartition("/")
            for entry_id in asked:
                other = f"{inside}{slash}{entry_id}.png" if generated.is_grid else f"{entry_id}/samples/{file}"
                found.setdefault((entry_id, sample), other)
    return dataclasses.replace(generated, prompt_set_name=prompt_set.name, entries=prompt_set.entries, found=found)

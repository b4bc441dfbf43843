"""A folder of drawn pictures: `images/*.png`, `settings.json`, `data.json` and `index.html`.

Each picture carries its prompt and settings. Files appear whole or not at all, so that any number of processes may
write into one folder and any of them may be killed; what lies there when drawing starts again is not drawn again.
"""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

from etils import epath
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from svg_jax.output_folder import output_folder, write_whole

logger = logging.getLogger("svg_jax")

UNREADABLE = (
    UnidentifiedImageError,
    KeyError,
    SyntaxError,
    ValueError,
    OSError,
)  # what a damaged PNG makes Pillow raise
THUMBNAIL = 320  # pixels of the longer side in the gallery


class SampleFolder:
    """Pictures of one set of settings."""

    def __init__(self, folder: str, settings: Mapping[str, Any]) -> None:
        """Makes the folder, or takes up one of the same settings.

        Args:
            folder: Local or `gs://`.
            settings: What all its pictures share, as JSON can hold it.

        Raises:
            ValueError: The folder holds pictures of other settings.
            PermissionError: It cannot be made.
        """
        self.settings = json.loads(json.dumps(settings))
        self.folder = output_folder(folder, self.settings, inside="images", results="pictures")

    def name(self, index: int, sample: int, width: int, height: int) -> str:
        """The file of one picture, relative to the folder."""
        return f"images/{index:05d}_{sample}_{width}x{height}.png"

    def holds(self, name: str, prompt: str) -> bool:
        """Whether this picture is there.

        Raises:
            ValueError: It is, and was drawn for another prompt.
        """
        file = self.folder / name
        if not file.exists():
            return False
        try:
            before = _texts(file)["prompt"]
        except UNREADABLE:
            return False  # not ours, or damaged: it is drawn anew
        if before != prompt:
            raise ValueError(
                f"{file} was drawn for another prompt ('{before[:60]}'): choose another --out, or remove that folder"
            )
        return True

    def save(self, name: str, image: Image.Image, prompt: str, **more: int | str) -> None:
        """Writes a picture with its prompt and settings as PNG texts, where image programs show them.

        `more` are settings of this picture alone; `width`, `height` and `sample` among them.
        """
        info = PngInfo()
        info.add_itxt("prompt", prompt)
        info.add_itxt("settings", json.dumps({**self.settings, **more}))
        info.add_text("Software", "svg_jax")
        data = io.BytesIO()
        image.save(data, format="PNG", pnginfo=info)
        write_whole(self.folder / name, data.getvalue())

    def finish(self) -> None:
        """Lists all pictures in `data.json`, in the release's form with the settings added, and in the gallery.

        Of several processes each calls this at its end; the list is right once the last one has.
        """
        listed: list[str] | None = None
        while (names := self._names()) != listed:  # another process may have added some meanwhile
            listed = names
            entries = [entry for name in names if (entry := self._entry(name)) is not None]
            write_whole(self.folder / "data.json", json.dumps(entries, indent=1))
            write_whole(self.folder / "index.html", self._gallery(entries))

    def _names(self) -> list[str]:
        return sorted(f"images/{file.name}" for file in (self.folder / "images").glob("*.png"))

    def _entry(self, name: str) -> dict[str, Any] | None:
        try:
            texts = _texts(self.folder / name)
            settings = json.loads(texts["settings"])
            prompt = texts["prompt"]
        except UNREADABLE:
            logger.warning("%s is damaged, or not drawn by svg_jax.sample: it is not listed", self.folder / name)
            return None
        return {
            "caption": prompt,
            "image_url": name,
            "resolution": f"{settings['width']}x{settings['height']}",
            "solver": solver if isinstance(solver := settings["solver"], str) else solver["name"],
            "num_sampling_steps": settings["num_steps"],
            "settings": settings,
        }

    def _gallery(self, entries: Iterable[Mapping[str, Any]]) -> str:
        from jinja2 import Template

        prompts: dict[str, list[dict[str, Any]]] = {}
        for entry in entries:
            try:
                address = _thumbnail(self.folder / entry["image_url"])
            except UNREADABLE:  # cut off behind its texts
                logger.warning("%s is damaged: remove it to have it drawn again", self.folder / entry["image_url"])
                continue
            picture = {**entry, "address": address}
            prompts.setdefault(entry["caption"], []).append(picture)
        template = Template(resources.files("svg_jax").joinpath("samples.html.j2").read_text(), autoescape=True)
        return template.render(prompts=prompts, settings=self.settings)


def _texts(file: epath.Path) -> dict[str, str]:
    with file.open("rb") as stream, Image.open(stream) as image:
        return {
            str(key): str(value) for key, value in image.info.items() if isinstance(value, str)
        }  # decodes no pixels


def _thumbnail(file: epath.Path) -> str:
    with file.open("rb") as stream, Image.open(stream) as image:
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    small.save(data, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()

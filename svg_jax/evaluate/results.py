"""A folder of results: `settings.json`, and `parts/NUMBER.npz` with what each batch gave.

Parts appear whole or not at all, so that any number of processes may write into one folder and any of them may be
killed; what is there when evaluation starts again is not computed again, and scores are formed from the parts in their
order: the same, bit for bit, however the work was split.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from svg_jax.output_folder import output_folder, write_whole

Part = Mapping[str, np.ndarray]


class Results:
    """What one set of settings gave."""

    def __init__(self, folder: str, settings: Mapping[str, Any]) -> None:
        """Makes the folder, or takes up one of the same settings.

        Args:
            folder: Local or `gs://`.
            settings: Everything that the results depend on, as JSON can hold it.

        Raises:
            ValueError: The folder holds results of other settings.
            PermissionError: It cannot be made.
        """
        self.settings = json.loads(json.dumps(settings))
        self.folder = output_folder(folder, self.settings, inside="parts", results="results")

    def write(self, name: str, content: str | bytes) -> None:
        """A file of the folder."""
        write_whole(self.folder / name, content)

    def holds(self, number: int) -> bool:
        """Whether a part is there, and whole."""
        try:
            with self._part(number).open("rb") as file, zipfile.ZipFile(file) as archive:
                return archive.testzip() is None
        except (OSError, zipfile.BadZipFile):
            return False

    def save(self, number: int, part: Part) -> None:
        """Writes a part."""
        data = io.BytesIO()
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in part.items()}
        np.savez(data, **arrays)
        self.write(f"parts/{number:06d}.npz", data.getvalue())

    def load(self, number: int) -> dict[str, np.ndarray]:
        """A part.

        Raises:
            FileNotFoundError: It is not there.
        """
        with self._part(number).open("rb") as file, np.load(io.BytesIO(file.read())) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def parts(self, count: int) -> Iterator[dict[str, np.ndarray]]:
        """All of them in their order, one in memory at a time."""
        return (self.load(number) for number in range(count))

    def missing(self, count: int) -> list[int]:
        """Which of the parts are not there."""
        return [number for number in range(count) if not self.holds(number)]

    def _part(self, number: int) -> epath.Path:
        return self.folder / "parts" / f"{number:06d}.npz"

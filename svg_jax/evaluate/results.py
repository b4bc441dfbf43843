"""A folder of results: `settings.json`, and `parts/NUMBER.npz` with what each batch gave.

Parts appear whole or not at all, so that any number of processes may write into one folder and any of them may be
killed; what is there when evaluation starts again is not computed again, and scores are formed from the parts in their
order: the same, bit for bit, however the work was split.
"""

from __future__ import annotations

import io
import json
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

Part = Mapping[str, np.ndarray]


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


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
        self.folder = epath.Path(folder)
        self.settings = json.loads(json.dumps(settings))
        try:
            (self.folder / "parts").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PermissionError(f"cannot write results to {folder} ({error}): choose another --out") from error
        file = self.folder / "settings.json"
        if not file.exists():
            self.write("settings.json", json.dumps(self.settings, indent=2))
            return
        try:
            before, now = flattened(json.loads(file.read_text())), flattened(self.settings)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file} cannot be read ({error}): choose another --out, or remove it") from error
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                raise ValueError(
                    f"{folder} holds results of {key} = {before.get(key)}, and now it is {now.get(key)}: "
                    "choose another --out, or remove that folder"
                )

    def write(self, name: str, content: str | bytes) -> None:
        """A file of the folder, whole or not at all, whoever else writes the same."""
        file = self.folder / name
        part = file.parent / f".{file.name}.{uuid.uuid4().hex[:8]}.part"
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(file)

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

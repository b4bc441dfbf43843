"""Folders of results: what they were made with stands in `settings.json`, and files appear whole or not at all.

So any number of processes may write into one folder, any of them may be killed, and what is there is not made again.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from etils import epath


def output_folder(folder: str, settings: Mapping[str, Any], *, inside: str, results: str) -> epath.Path:
    """Makes a folder, or takes up one of the same settings.

    Args:
        folder: Local or `gs://`.
        settings: Everything that the results depend on, as JSON can hold it.
        inside: The folder in it that is to hold the results.
        results: What they are, for messages.

    Raises:
        ValueError: The folder holds results of other settings.
        PermissionError: It cannot be made.
    """
    path = epath.Path(folder)
    try:
        (path / inside).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(f"cannot write {results} to {folder} ({error}): choose another --out") from error
    file = path / "settings.json"
    text = json.dumps(settings, indent=2)
    if not file.exists():
        write_whole(file, text)
        return path
    try:
        before, now = flattened(json.loads(file.read_text())), flattened(json.loads(text))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): choose another --out, or remove it") from error
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{folder} holds {results} of {key} = {before.get(key)}, and now it is {now.get(key)}: "
                "choose another --out, or remove that folder"
            )
    return path


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def write_whole(file: epath.Path, content: str | bytes) -> None:
    """Whole or not at all, whoever else writes the same file."""
    part = file.parent / f".{file.name}.{uuid.uuid4().hex[:8]}.part"
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    part.replace(file)

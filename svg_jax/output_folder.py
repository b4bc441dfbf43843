"""Folders of results: what they were made with stands in `settings.json`, and files appear whole or not at all.

So any number of processes may write into one folder, any of them may be killed, and what is there is not made again.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

ORIGIN = "origin"
"""The section of settings, at any depth, that says where things lay: it is kept, and may differ in the next run."""


def output_folder(folder: str, settings: Mapping[str, Any], *, inside: str, results: str) -> epath.Path:
    """Makes a folder, or takes up one of the same settings.

    Args:
        folder: Local or `gs://`.
        settings: Everything that the results depend on, as JSON can hold it, and what is known beside that as `ORIGIN`.
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
        write_first(file, text)
    try:  # also what was just written: another process may have been faster
        before = json.loads(file.read_text())
        refuse_others(folder, before, json.loads(text), results)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): choose another --out, or remove it") from error
    return path


def refuse_others(folder: str, before: Mapping[str, Any], now: Mapping[str, Any], results: str) -> None:
    """Whether results of these settings may come beside those that are there; `ORIGIN` is not looked at.

    Raises:
        ValueError: They may not; the message names the first setting that differs.
    """
    there, here = flattened(before), flattened(now)
    for key in sorted({*there, *here}):
        if there.get(key) != here.get(key) and ORIGIN not in key.split("."):
            raise ValueError(
                f"{folder} holds {results} of {key} = {there.get(key)}, and now it is {here.get(key)}: "
                "choose another --out, or remove that folder"
            )


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def write_first(file: epath.Path, content: str) -> None:
    """Whole or not at all, and not where another process has written the file meanwhile."""
    part = file.parent / f".{file.name}.{uuid.uuid4().hex[:8]}.part"
    part.write_text(content)
    try:
        os.link(part, file)  # in one step, unlike a look and a replacement
    except FileExistsError:
        pass
    except OSError:  # no such links, as on gs://: who comes last wins, which those before see when they read it back
        write_whole(file, content)
    finally:
        part.unlink(missing_ok=True)


def write_whole(file: epath.Path, content: str | bytes | Iterable[str]) -> None:
    """Whole or not at all, whoever else writes the same file; pieces of text one after the other, as they come."""
    part = file.parent / f".{file.name}.{uuid.uuid4().hex[:8]}.part"
    pieces = [content] if isinstance(content, str | bytes) else content
    try:
        with part.open("wb") as stream:
            for piece in pieces:
                # Half a surrogate pair, which JSON and file names can hold, is no text.
                stream.write(piece.encode(errors="replace") if isinstance(piece, str) else piece)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    part.replace(file)

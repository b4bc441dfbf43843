"""Prompts to draw, from the files that people keep them in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

KEYS = ("refined_prompt", "prompt", "gpt_4_caption")
"""Where a record may hold its prompt; the first that is there counts, as in the release."""


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file, in order.

    Args:
        path: `.txt`, one a line, empty lines skipped; `.json`, a list; `.jsonl`, one value a line. A value is a string,
            or an object with one of `KEYS`; it may be the empty string.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line or an entry holds no prompt (the message gives its number), or the file none at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of prompts '{path}'")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
    if path.suffix == ".json":
        prompts = _from_json(text, path)
    elif path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), start=1)  # splitlines would also break at characters that JSON may hold
        prompts = [_from_line(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    elif path.suffix == ".txt":
        prompts = [line.strip() for line in text.split("\n") if line.strip()]
    else:
        raise ValueError(f"cannot tell how {path} holds its prompts: name it .txt, .json or .jsonl")
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def _from_json(text: str, path: Path) -> list[str]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(values, list):
        raise ValueError(f"{path}: expected a list of prompts, found {type(values).__name__}")
    return [_prompt(value, f"{path}, entry {number}") for number, value in enumerate(values, start=1)]


def _from_line(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}): {line.strip()[:60]}") from error
    return _prompt(value, where)


def _prompt(value: Any, where: str) -> str:
    found = (
        next((value[key] for key in KEYS if isinstance(value.get(key), str)), None)
        if isinstance(value, dict)
        else value
    )
    if isinstance(found, str):
        return found.encode("utf-8", "replace").decode(
            "utf-8"
        )  # half a surrogate pair, which JSON can hold, is no text
    raise ValueError(f"{where}: expected a string or an object with a text under {', '.join(KEYS)}")

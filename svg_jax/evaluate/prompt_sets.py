"""The prompts of a benchmark, from the files that its authors publish.

`geneval` and `geneval_long` are JSONL, a row a prompt with what its picture must show; `dpg` is the table of
questions, or the prompts alone as text files or as the JSONL of the SVG-T2I release; `prompts` are any others.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipelines.prompts import read_prompts
from svg_jax.config import check_keys
from svg_jax.evaluate.text_files import csv_rows, json_lines, read_text
from svg_jax.flow.names import lookup

logger = logging.getLogger("svg_jax")

# What GenEval asks for, in its order.
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

COUNTS = {"geneval": 553, "geneval_long": 553, "dpg": 1065}  # prompts of the published files
RELATIONS = ("left of", "right of", "above", "below")
LONG = 30  # words; GenEval's own prompts have fewer, those of the long set have 70 to 132
LONG_KEYS = ("refined_prompt", "prompt")  # where a row of geneval_long has its prompt; the first that is there
MOST_BYTES = 200  # of an id; file systems allow 255, and a file that is being written has a longer name
CLAUSES = {"include": ("class", "count", "color", "position"), "exclude": ("class", "count")}


@dataclasses.dataclass(frozen=True)
class PromptEntry:
    """One prompt.

    Attributes:
        index: Its place in the file, from 0; the noise of its pictures depends on it.
        id: What its pictures are named after.
        prompt: What is drawn.
        metadata: GenEval's row as it stands in the file; empty elsewhere.
    """

    index: int
    id: str
    prompt: str
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """All prompts of a file.

    Attributes:
        name: A key of `READERS`.
        digest: SHA-256 of the file's bytes, in hexadecimal digits; of names and bytes where it is a folder.
        entries: In the order of the file.
    """

    name: str
    digest: str
    entries: tuple[PromptEntry, ...]


def read_prompt_set(name: str, path: str | Path) -> PromptSet:
    """Reads a file of prompts; warns where it holds another number of them than the published one.

    Args:
        name: A key of `READERS`.
        path: `geneval`, `geneval_long`: .jsonl with tag, include, exclude and prompt, or refined_prompt in the long
            one. `dpg`: .csv with the columns item_id and text, .jsonl with filename and prompt, or a folder of .txt.
            `prompts`: what `data_pipelines.prompts` reads.

    Raises:
        FileNotFoundError: There is no such file; the message says where to get it.
        ValueError: No such name, or the file is not as described; the message gives the line.
    """
    read = lookup("prompt set", name, READERS)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file of prompts '{path}': {SOURCES[name]}")
    entries = tuple(read(path))
    if not entries:
        raise ValueError(f"{path} holds no prompts: {SOURCES[name]}")
    warn_of_count(name, len(entries), str(path))
    return PromptSet(name, _digest(path), entries)


def warn_of_count(name: str, count: int, where: str) -> str | None:
    """Says so if these cannot be all prompts of a benchmark, and gives the sentence back for a report."""
    if count == COUNTS.get(name, count):
        return None
    sentence = f"{where} has {count:,} prompts and {name} has {COUNTS[name]:,}"
    sentence += ": such scores cannot be compared with published ones"
    logger.warning("%s", sentence)
    return sentence


def check_metadata(row: Any, where: str) -> None:
    """Whether GenEval's rules can be applied to this row.

    Names of classes are not looked at: which there are is the detector's business.

    Args:
        row: What stands in a line of the file, or in `metadata.jsonl` beside pictures.
        where: That file, and the line.

    Raises:
        ValueError: They cannot; the message says where and why.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected an object with tag, include and prompt, found {_shown(row)}")
    if row.get("tag") not in TASKS:
        raise ValueError(f"{where}: tag is {_shown(row.get('tag'))}: expected one of {', '.join(TASKS)}")
    if not isinstance(row.get("prompt"), str):
        raise ValueError(f"{where}: prompt is {_shown(row.get('prompt'))}: expected a text")
    for part, keys in CLAUSES.items():
        clauses = row.get(part, [])
        if not isinstance(clauses, Sequence) or isinstance(clauses, str) or (part == "include" and not clauses):
            raise ValueError(f"{where}: {part} is {_shown(clauses)}: expected a list of clauses")
        for place, clause in enumerate(clauses):
            _check_clause(clause, keys, place, f"{where}, {part}[{place}]")


def _check_clause(clause: Any, keys: Sequence[str], place: int, where: str) -> None:
    """One of `include` or `exclude`, at this place in it."""
    if not isinstance(clause, Mapping):
        raise ValueError(f"{where} is {_shown(clause)}: expected an object with class and count")
    check_keys(clause, keys, where)
    name, count = clause.get("class"), clause.get("count")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where}: class is {_shown(name)}: expected the name of a class")
    if type(count) is not int or count < 1:
        raise ValueError(f"{where}: count is {_shown(count)}: expected a whole number from 1 on")
    if "color" in clause and clause["color"] not in COLORS:
        raise ValueError(f"{where}: color is {_shown(clause['color'])}: expected one of {', '.join(COLORS)}")
    if "position" in clause:
        match clause["position"]:
            case [relation, int(target)] if relation in RELATIONS and 0 <= target < place:
                pass
            case found:
                raise ValueError(
                    f"{where}: position is {_shown(found)}: expected one of {', '.join(RELATIONS)} and the place, from "
                    "0, of an include clause before this one"
                )


def _shown(value: Any) -> str:
    """At most 60 characters of it."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:59] + "…"


def is_long(prompts: Iterable[str]) -> bool:
    """Whether these are of GenEval's long set."""
    return any(len(prompt.split()) > LONG for prompt in prompts)


def _geneval(path: Path, keys: Sequence[str], *, long: bool) -> list[PromptEntry]:
    """Rows of GenEval; the first of the keys that a row has is drawn."""
    entries = []
    for index, (where, row) in enumerate(json_lines(path)):
        check_metadata(row, where)
        prompt = next(row[key] for key in keys if isinstance(row.get(key), str))
        check_text(prompt, where)
        entries.append(PromptEntry(index, f"{index:05d}", prompt, row))
    if entries and is_long(entry.prompt for entry in entries) != long:
        name, other = ("geneval_long", "geneval") if long else ("geneval", "geneval_long")
        raise ValueError(
            f"{path} has {'no ' if long else ''}prompts of more than {LONG} words, unlike {name}: name it --set {other}"
        )
    return entries


def _dpg(path: Path) -> Iterator[PromptEntry]:
    """Prompts of DPG-Bench, whose ids are strings."""
    texts: dict[str, str] = {}
    spelled: dict[str, str] = {}
    for where, item, text in _dpg_rows(path):
        check_text(item + text, where)
        # The official program takes the name of a picture up to its first dot for the id.
        if not re.fullmatch(r"[^./\\\x00-\x1f\x7f]+", item) or len(item.encode()) > MOST_BYTES:
            raise ValueError(
                f"{where}: the id {_shown(item)} cannot name a picture: expected one of at most {MOST_BYTES} bytes "
                "without dots, slashes and control characters"
            )
        if not text:
            raise ValueError(f"{where}: item {item} has no text")
        if texts.setdefault(item, text) != text:
            raise ValueError(f"{where}: item {item} has another text ('{text[:40]}…') than before: keep one of them")
        if (other := spelled.setdefault(item.casefold(), item)) != item:
            raise ValueError(f"{where}: the ids {item} and {other} differ in case alone: rename one of them")
    return (PromptEntry(index, item, text) for index, (item, text) in enumerate(texts.items()))


def _dpg_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """Place, id and text of each row, or of each file in a folder."""
    if path.is_dir():
        for file in sorted(path.glob("*.txt")):
            yield str(file), file.stem, read_text(file).strip()
    elif path.suffix == ".jsonl":
        for where, row in json_lines(path):
            match row:
                case {"filename": str(filename), "prompt": str(text)}:
                    yield where, PurePosixPath(filename).stem, text.strip()
                case _:
                    raise ValueError(f"{where}: expected an object with filename and prompt, found {_shown(row)}")
    else:
        for line, row in csv_rows(path, ("item_id", "text")):
            yield f"{path}, line {line}", row["item_id"].strip(), row["text"].strip()


def check_text(text: str, where: str) -> None:
    """Whether it can be written down.

    Raises:
        ValueError: It holds half a surrogate pair, as JSON can.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half a surrogate pair is no text ({error}): write that character whole") from error


def _prompts(path: Path) -> Iterator[PromptEntry]:
    for index, prompt in enumerate(read_prompts(path)):
        yield PromptEntry(index, f"{index:05d}", prompt)


def _digest(path: Path) -> str:
    if not path.is_dir():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    each = (f"{file.name} {_digest(file)}\n" for file in sorted(path.glob("*.txt")))
    return hashlib.sha256("".join(each).encode()).hexdigest()


READERS: Mapping[str, Callable[[Path], Iterable[PromptEntry]]] = {
    "geneval": functools.partial(_geneval, keys=("prompt",), long=False),
    "geneval_long": functools.partial(_geneval, keys=LONG_KEYS, long=True),
    "dpg": _dpg,
    "prompts": _prompts,
}

SOURCES = {
    "geneval": "take prompts/evaluation_metadata.jsonl of https://github.com/djghosh13/geneval",
    "geneval_long": "take svg_t2i/eval/prompts/geneval_metadata_long.jsonl of https://github.com/KlingTeam/SVG-T2I",
    "dpg": "take dpg_bench/dpg_bench.csv of https://github.com/TencentQQGYLab/ELLA, or the prompts alone: the folder "
    "dpg_bench/prompts there, or svg_t2i/eval/prompts/dpg.jsonl of https://github.com/KlingTeam/SVG-T2I",
    "prompts": "name a .txt, .json or .jsonl with prompts",
}

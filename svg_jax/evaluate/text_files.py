"""Text files that others wrote, row by row; what is wrong in one is told in a sentence that gives the line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

ONE_LINE = ("item_id", "question_natural_language")  # columns of `dpg_bench.csv` that hold no line breaks


def read_text(path: Path | epath.Path) -> str:
    """A file of UTF-8, with or without a byte order mark.

    Raises:
        ValueError: It is something else.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the file in it")
    try:
        return path.read_bytes().decode("utf-8-sig")  # as bytes: universal newlines would change quoted texts
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error


def json_lines(path: Path | epath.Path, otherwise: str = "mend that line") -> Iterator[tuple[str, Any]]:
    """Place and value of each line that is not empty.

    Args:
        path: A JSONL file.
        otherwise: What to do about a line that is something else, for the message.

    Raises:
        ValueError: A line is not JSON.
    """
    # Not `splitlines`, which would also break at characters that JSON may hold.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error}): {otherwise}: {line.strip()[:60]}") from error


def csv_rows(path: Path | epath.Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a table like `dpg_bench.csv`, whose first line names its columns.

    A quote that is never closed would swallow the rows behind it in silence, so that what shows one is refused: text
    behind a closing quote, and line breaks where `ONE_LINE` says that there are none.

    Args:
        path: The table.
        columns: Those that it must have.

    Yields:
        The line that a row begins in, and its values by column, empty where it is too short.

    Raises:
        ValueError: A column is missing, or a row is not as the first line announces.
    """
    rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    line = 1
    try:
        header = next(rows, [])
        if missing := [name for name in columns if name not in header]:
            raise ValueError(
                f"{path} has no column {' and no column '.join(missing)}, but {', '.join(header) or 'nothing'}: take "
                "dpg_bench/dpg_bench.csv of https://github.com/TencentQQGYLab/ELLA"
            )
        line = rows.line_num + 1
        for row in rows:
            if len(row) > len(header):
                raise ValueError(f"{path}, line {line}: {len(row)} values in {len(header)} columns: quote the commas")
            values = dict.fromkeys(header, "") | dict(zip(header, row, strict=False))
            for name in ONE_LINE:
                if "\n" in (value := values.get(name, "").strip()) or "\r" in value:
                    raise ValueError(f"{path}, line {line}: {name} goes over several lines: close its quotes")
            if row:
                yield line, values
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: not CSV ({error}): are all quotes closed?") from error

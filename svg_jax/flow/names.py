"""Tables looked up by a name from a config, with an error that helps."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def unknown(kind: str, name: str, choices: Iterable[str]) -> ValueError:
    """The error for a name that is no choice, with the nearest one whatever the case of its letters."""
    folded = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(name.lower(), folded, n=1)
    hint = f"did you mean '{folded[near[0]]}'? " if near else ""
    return ValueError(f"unknown {kind} '{name}': {hint}choose one of {', '.join(folded.values())}")


def lookup(kind: str, name: str, table: Mapping[str, T]) -> T:
    """`table[name]`.

    Raises:
        ValueError: no such name; says what kind of thing was asked for, the nearest name and all names.
    """
    if name not in table:
        raise unknown(kind, name, table)
    return table[name]

"""Captions of several images side by side in one row of tokens, as the images stand side by side in one sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pack_tokens(
    ids: Sequence[Sequence[int]], pack: int, budget: int, pad_id: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]:
    """Rows of `pack` captions, one after the other without padding between them, then padding up to `budget`.

    Where the captions of a row have more tokens than the budget, the longest are cut, to one common length.

    Args:
      ids: token ids of each caption, start token first; a multiple of `pack` of them.
      pack: captions a row; with 1 this is `text.pad_tokens`, cut at the budget.
      budget: tokens a row, at least `pack`, so that each caption keeps its start token.
      pad_id: fills what is not valid.

    Returns:
      tokens int32 [captions / pack, budget], num_tokens int32 [captions] of each that are in its row, and whether it
      was cut here, bool [captions].

    Raises:
      ValueError: no captions a row, captions that fill no whole number of rows, or a budget without room for their
        start tokens.
    """
    if pack < 1:
        raise ValueError(f"pack={pack} is no number of images in a sequence; it is at least 1")
    if len(ids) % pack:
        raise ValueError(f"{len(ids)} captions do not fill rows of {pack}: choose a batch that is a multiple of {pack}")
    if budget < pack:
        raise ValueError(f"{budget} tokens have no room for the start tokens of {pack} captions: choose {pack} or more")
    lengths = np.array([len(values) for values in ids], np.int32).reshape(-1, pack)
    num_tokens = np.array([np.minimum(row, longest(row, budget)) for row in lengths], np.int32).reshape(-1)
    tokens = np.full((len(lengths), budget), pad_id, np.int32)
    for i, row in enumerate(tokens):
        of_row = range(i * pack, (i + 1) * pack)
        joined = [token for k in of_row for token in ids[k][: num_tokens[k]]]
        row[: len(joined)] = joined
    return tokens, num_tokens, num_tokens < lengths.reshape(-1)


def longest(lengths: NDArray[np.int32], budget: int) -> int:
    """The largest c with Σ min(length, c) <= budget, or the longest of the lengths where all fit."""
    room = budget
    for i, length in enumerate(np.sort(lengths)):
        share = room // (len(lengths) - i)
        if length > share:
            return share
        room -= int(length)
    return int(lengths.max(initial=0))

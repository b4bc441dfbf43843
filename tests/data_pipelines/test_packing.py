"""Captions in one row: nothing lost while they fit, the longest cut first when they do not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from data_pipelines.packing import longest, pack_tokens
from data_pipelines.text import pad_tokens

IDS = [[2, 11, 12], [2], [2, 21, 22, 23, 24, 25, 26], [2, 31, 32, 33]]


def test_captions_stand_one_after_the_other() -> None:
    tokens, num_tokens, cut = pack_tokens(IDS, 2, 12, 0)
    np.testing.assert_array_equal(tokens[0], [2, 11, 12, 2] + 8 * [0])
    np.testing.assert_array_equal(tokens[1], [2, 21, 22, 23, 24, 25, 26, 2, 31, 32, 33, 0])
    assert (num_tokens.tolist(), cut.tolist()) == ([3, 1, 7, 4], [False] * 4)
    assert (tokens.dtype, num_tokens.dtype) == (np.int32, np.int32)


def test_one_caption_a_row_is_plain_padding() -> None:
    tokens, num_tokens, cut = pack_tokens(IDS, 1, 7, 0)
    for found, expected in zip((tokens, num_tokens), pad_tokens(IDS, 7, 0), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert not cut.any()


def test_the_longest_are_cut_to_one_length() -> None:
    tokens, num_tokens, cut = pack_tokens(IDS, 4, 12, 0)
    np.testing.assert_array_equal(tokens, [[2, 11, 12, 2, 2, 21, 22, 23, 2, 31, 32, 33]])
    assert (num_tokens.tolist(), cut.tolist()) == ([3, 1, 4, 4], [False, False, True, False])
    tokens, num_tokens, cut = pack_tokens(IDS, 4, 4, 0)  # of every caption the start token is left
    assert (tokens.tolist(), num_tokens.tolist(), cut.tolist()) == ([[2] * 4], [1] * 4, [True, False, True, True])


def test_the_cut_is_the_mildest_that_fits() -> None:
    for lengths in itertools.product(range(1, 6), repeat=3):
        for budget in range(3, 16):
            found = longest(np.array(lengths, np.int32), budget)
            assert sum(min(length, found) for length in lengths) <= budget
            assert found == max(lengths) or sum(min(length, found + 1) for length in lengths) > budget


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="pack=0 is no number of images in a sequence; it is at least 1"):
        pack_tokens(IDS, 0, 12, 0)
    with pytest.raises(ValueError, match="4 captions do not fill rows of 3: choose a batch that is a multiple of 3"):
        pack_tokens(IDS, 3, 12, 0)
    with pytest.raises(ValueError, match="3 tokens have no room for the start tokens of 4 captions: choose 4 or more"):
        pack_tokens(IDS, 4, 3, 0)

"""Captions of a record: how lists write them, and which of several one draw takes."""

from __future__ import annotations

import itertools
from typing import Any

from data_pipelines.order import CAPTION_KEY, random_word
from data_pipelines.records import BadRecord, Caption, Cause, Record, Source

# Where an object or a row may keep its captions, and the system prompt that goes before; the first that is there
# counts.
CAPTION_KEYS = (
    ("super_high_quality_caption", "align"),
    ("caption", "base"),
    ("captions", "base"),
    ("prompt", "base"),
    ("text", "base"),
    ("TEXT", "base"),
)

_MAX_WEIGHT = 1e6
_PEEKED = 16  # records that tell whether a source has captions


def parse_captions(value: Any, system_prompt: str, where: str) -> tuple[Caption, ...]:
    """The captions under one key of a record.

    Args:
      value: a text; None or a blank text for the empty caption; or a list whose entries are texts, `[text, weight]` or
        `{"text": …, "weight": …}`. An entry of weight 0 is left out, and so is every entry of an empty list.
      system_prompt: what goes before them.
      where: record and key, for messages.

    Raises:
      BadRecord: a value of another type, a weight below zero, or none above.
    """
    if not isinstance(value, list):
        return (Caption(_text(value, where), system_prompt=system_prompt),)
    captions = [_weighted(entry, system_prompt, f"{where}[{number}]") for number, entry in enumerate(value)]
    drawn = tuple(caption for caption in captions if caption.weight > 0)
    if captions and not drawn:
        raise BadRecord(Cause.VALUE, f"{where} holds captions of weight 0 alone; expected one weight above 0")
    return drawn


def captions_under(value: dict[str, Any], where: str) -> tuple[Caption, ...]:
    """The captions of an object or a row, under the first of `CAPTION_KEYS` that it has.

    Raises:
      BadRecord: something else than captions stands there.
    """
    for key, system_prompt in CAPTION_KEYS:
        if key in value:
            return parse_captions(value[key], system_prompt, f"{where} '{key}'")
    return ()


def any_captions(source: Source) -> bool:
    """Whether any of the first records of a source has a caption; True also if none of them can be read."""
    read = 0
    for index in range(min(_PEEKED, len(source))):
        try:
            if source[index].captions:
                return True
            read += 1
        except BadRecord:
            continue
    return read == 0


def read_usable(source: Source, index: int) -> Record:
    """A record that can be trained on, as far as it says itself: its image may still be broken.

    Raises:
      BadRecord: it cannot be read, or has no caption and others of its source have.
    """
    record = source[index]
    if source.has_captions:
        choose(record, seed=0, epoch=0)
    return record


def choose(record: Record, seed: int, epoch: int) -> Caption:
    """The caption that a draw of the record takes: with several, at random by their weights, anew each epoch.

    The choice depends on nothing but (seed, epoch, the record's index).

    Raises:
      BadRecord: the record has no caption.
    """
    captions = record.captions
    if not captions:
        raise BadRecord(Cause.CAPTION, f"{record.where} has no caption; expected one, such as under the key 'prompt'")
    if len(captions) == 1:
        return captions[0]
    ends = list(itertools.accumulate(caption.weight for caption in captions))
    point = random_word(CAPTION_KEY, seed, epoch, record.index) / 2**32 * ends[-1]
    return next((caption for caption, end in zip(captions, ends, strict=True) if point < end), captions[-1])


def _weighted(entry: Any, system_prompt: str, where: str) -> Caption:
    text, weight = entry, 1.0
    if isinstance(entry, dict):
        text, weight = entry.get("text"), entry.get("weight", 1.0)
        unknown = sorted(set(entry) - {"text", "weight"})
        if "text" not in entry or unknown:
            raise BadRecord(Cause.KEYS, f"{where} has the keys {sorted(entry)}; expected 'text' and 'weight'")
    elif isinstance(entry, list):
        if len(entry) != 2:
            raise BadRecord(Cause.VALUE, f"{where} is a list of {len(entry)}; expected [text, weight]")
        text, weight = entry
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= _MAX_WEIGHT:
        raise BadRecord(Cause.VALUE, f"{where} has the weight {weight!r:.60}; expected a number, 0 to {_MAX_WEIGHT:g}")
    return Caption(_text(text, where), float(weight), system_prompt)


def _text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRecord(
            Cause.VALUE, f"{where} is a {type(value).__name__}; expected a text, or a list of texts or [text, weight]"
        )
    # Half of a surrogate pair, which JSON can hold, is no text: it becomes "?", as in a file of prompts.
    return value.encode("utf-8", "replace").decode() if value.strip() else ""

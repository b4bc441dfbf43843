"""What passes between the parts of the pipeline: a record, and the one error that means "skip this record"."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Record:
    """One captioned image.

    Attributes:
      index: position in its source, the record's stable id.
      path: the image file, as it can be opened.
      caption: the caption as written in the data, without system prompt.
      system_prompt: name of the system prompt that goes before the caption (a key of `text.SYSTEM_PROMPTS`).
      where: file and line of the record, for messages.
    """

    index: int
    path: str
    caption: str
    system_prompt: str
    where: str


class BadRecord(ValueError):
    """A record that cannot be used. It is skipped and counted; the run goes on.

    The message is one sentence that names the file or line, what was found and what was expected.
    """

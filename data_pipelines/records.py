"""What passes between the parts of the pipeline: a record, and the one error that means "skip this record"."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Record:
    """One image, with its caption where there is one.

    Attributes:
      index: position in its source, the record's stable id.
      path: the image file, as it can be opened; with `image`, a name for messages.
      caption: the caption as written in the data, without system prompt; None where the data have none.
      system_prompt: name of the system prompt that goes before the caption (a key of `text.SYSTEM_PROMPTS`).
      where: file and line of the record, for messages.
      image: the content of the image file, where it is no file of its own.
      size: (width, height) of the upright image, where the data say it.
    """

    index: int
    path: str
    caption: str | None
    system_prompt: str
    where: str
    image: bytes | None = dataclasses.field(default=None, repr=False)
    size: tuple[int, int] | None = None


class BadRecord(ValueError):
    """A record that cannot be used. It is skipped and counted; the run goes on.

    The message is one sentence that names the file or line, what was found and what was expected.
    """

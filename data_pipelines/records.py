"""What passes between the parts of the pipeline: records, where they come from, and the error that skips one."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, NamedTuple, Protocol


class Caption(NamedTuple):
    """One description of an image.

    Attributes:
      text: as written in the data, without system prompt; empty stands for "no caption".
      weight: how often it is drawn, relative to the others of its record; above zero.
      system_prompt: name of the system prompt that goes before it (a key of `text.SYSTEM_PROMPTS`).
    """

    text: str
    weight: float = 1.0
    system_prompt: str = "base"


@dataclasses.dataclass(frozen=True)
class Record:
    """One image, with its captions where there are any.

    Attributes:
      index: position in its source.
      path: the image file, as it can be opened; with `image`, a name for messages.
      where: the record's stable id, as text, and what messages begin with: file and line, shard and number, or member
        of an archive. It does not depend on the number of processes, nor on the mixture that the record is drawn from.
      captions: one or several to choose from; () where the data have none.
      image: the content of the image file, where it is no file of its own.
      size: (width, height) of the upright image, where the data say it.
    """

    index: int
    path: str
    where: str
    captions: tuple[Caption, ...] = ()
    image: bytes | None = dataclasses.field(default=None, repr=False)
    size: tuple[int, int] | None = None


class Source(Protocol):
    """Random access to records by an index; `Record.where` is the id that stays when other records come before it.

    Attributes:
      name: what the user called it, for messages.
      has_captions: whether records come with captions.
    """

    name: str
    has_captions: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord if this record cannot be used."""
        ...

    @property
    def signature(self) -> str:
        """Changes when other records stand in it, or others of them are drawn."""
        ...


class Cause(enum.StrEnum):
    """Why a record cannot be used.

    Broken records are counted by cause, on devices and in checkpoints, by the position in this list: the order stays,
    and new causes are added at the end.
    """

    MISSING = "missing"  # there is no such file
    PERMISSION = "permission"  # the file may not be read
    NOT_A_FILE = "not_a_file"  # a folder, a pipe, a device, or links that lead in a circle
    EMPTY = "empty"  # zero bytes
    NOT_AN_IMAGE = "not_an_image"  # bytes of no format that is known
    TRUNCATED = "truncated"  # an image that ends early
    DAMAGED = "damaged"  # an image that its decoder gives up on
    TOO_LARGE = "too_large"  # more pixels or bytes than the limit
    MODE = "mode"  # pixel values whose white is not defined
    TOO_SMALL = "too_small"  # a size that cannot be cropped
    NOT_JSON = "not_json"  # text that does not parse
    KEYS = "keys"  # no object, or one without the keys of a record
    VALUE = "value"  # a value of the wrong type, or an empty one
    ENCODING = "encoding"  # bytes that are not UTF-8
    CAPTION = "caption"  # no caption where one is needed
    REMOTE = "remote"  # a store answered with an error
    TIMEOUT = "timeout"  # a store did not answer in time
    STORE = "store"  # a damaged shard, archive or table


class BadRecord(ValueError):
    """A record that cannot be used. It is skipped and counted by its cause; the run goes on.

    Args:
      cause: what it is counted under.
      message: one sentence that names the file or line, what was found and what was expected.
    """

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(cause, message)  # both, so that it can be sent to another process
        self.cause = cause

    def __str__(self) -> str:
        return str(self.args[1])


def size_under(value: dict[str, Any]) -> tuple[int, int] | None:
    """(width, height), where an object or a row says them."""
    width, height = value.get("width"), value.get("height")
    if type(width) is int and type(height) is int and 0 < width < 2**31 and 0 < height < 2**31:
        return width, height
    return None


def first_line(error: Exception) -> str:
    """What an exception says, short enough to stand in a message; its name where it says nothing."""
    return str(error).split("\n")[0][:200] or type(error).__name__

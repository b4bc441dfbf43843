"""What all doors share on their outside: `--config` and `--workdir`, and errors of one sentence."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import logging
import math
import re
import runpy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from svg_jax import distributed


def run(main: Callable[[ConfigDict, str], None]) -> None:
    """Parses `--config=FILE --config.KEY=VALUE … --workdir=DIR` and calls main(config, workdir)."""
    config = config_flags.DEFINE_config_file("config", None, "File with get_config(), for example configs/stage1.py.")
    workdir = flags.DEFINE_string("workdir", None, "Folder or gs:// address for checkpoints, metrics and samples.")
    flags.mark_flags_as_required(["config", "workdir"])
    logging.getLogger("svg_jax").setLevel(logging.INFO)  # Orbax and others speak from WARNING on
    absl_logging.set_verbosity(absl_logging.WARNING)
    app.run(lambda _: main(config.value, str(workdir.value)), flags_parser=parse)


@contextlib.contextmanager
def one_sentence(*kinds: type[Exception]) -> Iterator[None]:
    """Ends the program with the message alone where what the user gave is wrong; other errors keep their traceback.

    Args:
        kinds: Which errors these are; by default those that reading and checking input raise.
    """
    expected = kinds or (ValueError, OSError, ImportError, MemoryError)
    try:
        yield
    except expected as error:
        logging.getLogger("svg_jax").debug("what led to the error below", exc_info=True)
        sentence = str(error) or type(error).__name__  # as a MemoryError has no words
        distributed.failed(sentence)
        raise SystemExit(f"error: {sentence}") from error


def parse_shard(text: str | None) -> tuple[int, int]:
    """(this share, number of shares) of `I/N`; by default this process's among all."""
    if text is None:
        return jax.process_index(), jax.process_count()
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"--shard '{text}' is not I/N with I from 0 to below N, as in 0/4")
    return int(found[1]), int(found[2])


def check_numbers(
    config: ConfigDict, *, positive: Sequence[str], not_negative: Sequence[str], at_most: Mapping[str, float]
) -> None:
    """Every one of these keys, where the config has it, must hold a finite number above, not below, or at most.

    Raises:
        ValueError: One does not; the message names the key and its value.
    """
    values = dict(flatten(config))
    for key in (*positive, *not_negative):
        value = values.get(key)
        if value is None:
            continue
        if not math.isfinite(value) or value < 0 or (value == 0 and key in positive):
            bound = "above zero" if key in positive else "zero or above"
            raise ValueError(f"config.{key} is {value}: it must be {bound}")
        if value > at_most.get(key, math.inf):
            raise ValueError(f"config.{key} is {value}: it must be at most {at_most[key]}")


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every entry."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def from_config(cls: type[Any], values: ConfigDict | dict[str, Any]) -> Any:
    """A frozen dataclass from a section of a config, lists made tuples.

    Raises:
        ValueError: A key is not a field of it; the message shows the nearest.
    """
    given = values.to_dict() if isinstance(values, ConfigDict) else dict(values)
    check_keys(given, cls.__dataclass_fields__, cls.__name__)
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})


def check_keys(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Every key given must be one that is known.

    Raises:
        ValueError: `what` has no such key; the message shows the nearest.
    """
    names = list(known)
    for key in given:
        if key not in names:
            raise ValueError(f"{what} has no '{key}'{_nearest(key, names)}")


def parse(argv: list[str]) -> list[str]:
    """Flags from a command line, as `app.run` wants it; ends the program in one sentence where one is wrong."""
    named = re.search(r"^--?config[=\n](.*)$", "\n".join(argv), re.MULTILINE)
    file, *argument = named[1].split(":", 1) if named else ("",)
    if named and not Path(file).is_file():
        raise SystemExit(f"error: --config: there is no file '{file}'")
    try:
        rest = flags.FLAGS(argv)
        if not isinstance(flags.FLAGS["config"].value, ConfigDict):
            raise SystemExit(f"error: --config: get_config() of '{file}' must return a ConfigDict")
    except (flags.Error, KeyError, AttributeError, ValueError) as error:
        message = _wrong(argv, file, *argument) if named else None
        if message is None and not isinstance(error, flags.Error):
            raise  # a mistake inside the file, which its traceback shows
        raise SystemExit(f"error: {message or error}") from error
    if len(rest) > 1:
        raise SystemExit(f"error: unknown argument '{rest[1]}': values are overridden as --config.KEY=VALUE")
    return rest


def _wrong(argv: list[str], file: str, *argument: str) -> str | None:
    """One sentence on what `file` says of its argument, or on the first override that its config has no place for."""
    module = runpy.run_path(file)
    if "get_config" not in module:
        return f"--config: '{file}' has no get_config()"
    try:
        inspect.signature(module["get_config"]).bind(*argument)
    except TypeError as error:
        return f"--config: get_config() of '{file}' gets what stands after a colon: {error}"
    try:
        config = module["get_config"](*argument)
    except ValueError as error:
        return f"--config: {' '.join(str(error).split())}"
    for arg in argv:
        section, path = config, re.match(r"--?config\.([\w.]+)", arg)
        for key in path[1].split(".") if path else ():
            if not isinstance(section, ConfigDict):
                return f"{arg}: there are no keys below a value"
            if key not in section:
                return f"unknown config key '{key}' in {arg}{_nearest(key, list(section))}"
            section = section[key]
        value = arg.partition("=")[2]
        if path and value and not value.startswith("{") and isinstance(section, ConfigDict):
            return (
                f"{arg}: a section cannot be replaced by a flag: override the keys in it, or choose another --config "
                "that goes without it"
            )
    return None


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f": did you mean '{close[0]}'?" if close else f": it has {', '.join(names)}"

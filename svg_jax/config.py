"""What all doors share on their outside: `--config` and `--workdir`, and errors of one sentence."""

from __future__ import annotations

import contextlib
import difflib
import logging
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags


def run(main: Callable[[ConfigDict, str], None]) -> None:
    """Parses `--config=FILE --config.KEY=VALUE … --workdir=DIR` and calls main(config, workdir)."""
    config = config_flags.DEFINE_config_file("config", None, "File with get_config(), for example configs/stage1.py.")
    workdir = flags.DEFINE_string("workdir", None, "Folder or gs:// address for checkpoints, metrics and samples.")
    flags.mark_flags_as_required(["config", "workdir"])
    logging.getLogger("svg_jax").setLevel(logging.INFO)  # Orbax and others speak from WARNING on
    absl_logging.set_verbosity(absl_logging.WARNING)
    app.run(lambda _: main(config.value, str(workdir.value)), flags_parser=_parse)


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the program with the message alone where what the user gave is wrong; other errors keep their traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        logging.getLogger("svg_jax").debug("what led to the error below", exc_info=True)
        raise SystemExit(f"error: {error}") from error


def from_config(cls: type[Any], values: ConfigDict | dict[str, Any]) -> Any:
    """A frozen dataclass from a section of a config, lists made tuples.

    Raises:
        ValueError: A key is not a field of it; the message shows the nearest.
    """
    fields = list(cls.__dataclass_fields__)
    given = values.to_dict() if isinstance(values, ConfigDict) else dict(values)
    for key in given:
        if key not in fields:
            raise ValueError(f"{cls.__name__} has no '{key}'{_nearest(key, fields)}")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        for name in ("config",):
            value = getattr(flags.FLAGS, name)
            if not isinstance(value, ConfigDict):
                dir(value.keys)  # a file that could not be loaded raises here
    except flags.Error as error:
        raise SystemExit(f"error: {error}") from error
    except (KeyError, AttributeError) as error:
        raise SystemExit(f"error: {_misspelt(str(error), argv)}") from error
    except OSError as error:
        raise SystemExit(f"error: --config: {error.strerror or error}: {error.filename}") from error
    if len(rest) > 1:
        raise SystemExit(f"error: unknown argument '{rest[1]}': values are overridden as --config.KEY=VALUE")
    return rest


def _misspelt(message: str, argv: list[str]) -> str:
    found = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', message)
    key = found[2] if found else message.strip("'\"\\ \n")
    flag = next((arg for arg in argv if f".{key}" in arg), sys.argv[0])
    return f"unknown config key '{key}' in {flag}" + (f": did you mean '{found[1]}'?" if found else "")


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f": did you mean '{close[0]}'?" if close else f": it has {', '.join(names)}"

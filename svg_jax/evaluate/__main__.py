"""Scores of checkpoints: `python -m svg_jax.evaluate reconstruction --checkpoint=WORKDIR --data=FOLDER --out=DIR`."""

from __future__ import annotations

import argparse
import logging

from svg_jax import distributed
from svg_jax.config import one_sentence, parse_shard
from svg_jax.evaluate import reconstruction

COMMANDS = {"reconstruction": reconstruction}


def main(arguments: list[str] | None = None) -> None:
    """Parses, and does what the command says."""
    options = parser().parse_args(arguments)
    logging.getLogger("svg_jax").setLevel(logging.INFO)
    with one_sentence():
        distributed.initialise()
        options.shard = parse_shard(options.shard)
        COMMANDS[options.command].run(options)


def parser() -> argparse.ArgumentParser:
    """The flags of every command."""
    flags = argparse.ArgumentParser(prog="python -m svg_jax.evaluate", description=__doc__, allow_abbrev=False)
    commands = flags.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        summary = (command.__doc__ or "").splitlines()[0]
        command.add_flags(commands.add_parser(name, help=summary, description=summary, allow_abbrev=False))
    return flags


if __name__ == "__main__":
    main()

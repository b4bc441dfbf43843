"""Scores of checkpoints: `python -m svg_jax.evaluate reconstruction --checkpoint=WORKDIR --data=FOLDER --out=DIR`."""

from __future__ import annotations

import argparse
import logging
import re

import jax

from svg_jax import distributed
from svg_jax.config import one_sentence
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


def parse_shard(text: str | None) -> tuple[int, int]:
    """(this share, number of shares) of `I/N`; by default this process's among all."""
    if text is None:
        return jax.process_index(), jax.process_count()
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"--shard '{text}' is not I/N with I from 0 to below N, as in 0/4")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    main()

"""Scores of checkpoints: GenEval, DPG-Bench, FID, and of autoencoders their reconstructions."""

from __future__ import annotations

import argparse
import logging

from svg_jax import distributed
from svg_jax.config import one_sentence, parse_shard
from svg_jax.evaluate import generate, reconstruction
from svg_jax.evaluate.dpg import command as dpg
from svg_jax.evaluate.fid import command as fid
from svg_jax.evaluate.geneval import command as geneval

# What `--help` ends with.
PATH = """
from released weights (imported into WEIGHTS, see README.md) to the two published numbers:

  GenEval, 0.75
    generate --set geneval --prompts evaluation_metadata.jsonl --checkpoint WEIGHTS --out out/geneval
    geneval --images out/geneval --detector WEIGHTS/detector --clip WEIGHTS/clip --out out/geneval_scores

  DPG-Bench, 85.78
    generate --set dpg --prompts dpg_bench.csv --checkpoint WEIGHTS --out out/dpg
    dpg questions --images out/dpg --csv dpg_bench.csv --out out/questions
    python svg_jax/evaluate/dpg/mplug.py --questions out/questions/questions.jsonl --out answers.jsonl    (see there)
    dpg score --questions out/questions --answers answers.jsonl --csv dpg_bench.csv --out out/dpg_scores

Drawing them at 1024 px takes at least 1.0 h and 2.0 h on v5e-8 (the roofline of `python -m svg_jax.aot
--config=configs/stage4.py --topology=v5e:2x4 --step=sample --batch=8`), 1.6 h and 3.1 h on one H100 (FLOPs at its
peak), and about twice that at half of these bounds. GenEval's judges take some 5 hours of a CPU core in all.
"""

COMMANDS = {
    "generate": generate,
    "geneval": geneval,
    "dpg": dpg,
    "fid": fid,
    "reconstruction": reconstruction,
}


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
    flags = argparse.ArgumentParser(
        prog="python -m svg_jax.evaluate",
        description=__doc__,
        epilog=PATH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = flags.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        summary = (command.__doc__ or "").splitlines()[0]
        command.add_flags(commands.add_parser(name, help=summary, description=summary, allow_abbrev=False))
    return flags


if __name__ == "__main__":
    main()

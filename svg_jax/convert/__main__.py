"""Weights of the PyTorch release in and out: `python -m svg_jax.convert import | export | inspect`."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import jax

from svg_jax.config import one_sentence
from svg_jax.convert.exports import SUFFIXES, export_weights
from svg_jax.convert.imports import import_weights
from svg_jax.convert.inspection import inspect

EXAMPLES = """
  python -m svg_jax.convert import consolidated_ema.00-of-01.pth svg_autoencoder.ckpt stats.pt gemma-2-2b --to weights
  python -m svg_jax.convert import vgg16-397923af.pth vgg.pth pt_inception-2015-12-05-6726825d.pth --to weights
  python -m svg_jax.convert export runs/mine --to mine.pth --dtype bfloat16
  python -m svg_jax.convert inspect consolidated_ema.00-of-01.pth
"""


def main(argv: list[str] | None = None) -> None:
    """Does what the command line says; errors in what was given end it with one sentence."""
    args = parser().parse_args(argv)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax speaks of its own affairs
    with one_sentence():
        for line in args.run(args):
            print(line)


def parser() -> argparse.ArgumentParser:
    """The three commands."""
    whole = argparse.ArgumentParser(
        prog="python -m svg_jax.convert",
        description=__doc__,
        epilog=f"examples:{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = whole.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("import", help="the release's files into workdirs of ours", allow_abbrev=False)
    command.add_argument(
        "source",
        nargs="+",
        type=Path,
        help="diffusion transformer, autoencoder, vision model, latent statistics, the two files of LPIPS, the "
        "Inception of FID, GenEval's detector as mmdet has it (.pth, .ckpt, .pt, .safetensors), a checkpoint folder, a "
        "folder of transformers; what each is, its content tells",
    )
    command.add_argument(
        "--to", required=True, metavar="DIR", help="gets a workdir for each: DIR/dit, DIR/autoencoder, ..."
    )
    command.add_argument(
        "--architecture",
        type=Path,
        metavar="FILE.json",
        help="the release's constructor arguments, where weights of no published size do not tell them; "
        'for several sources {"dit": {...}, "autoencoder": {"encoder": {...}, "decoder": {...}, "extra_vit": {...}}}',
    )
    command.add_argument("--overwrite", action="store_true", help="replace workdirs that are there")
    command.set_defaults(run=_import)

    command = commands.add_parser("export", help="a workdir's weights as the release has them", allow_abbrev=False)
    command.add_argument("workdir", help="DIR/dit and so on of an import, or the --workdir of a training run")
    command.add_argument(
        "--to",
        required=True,
        type=Path,
        metavar="TARGET",
        help=f"a file: {', '.join(SUFFIXES)}; or a folder, as the release or transformers has it",
    )
    command.add_argument("--part", choices=["ema", "params"], help="moving average (default) or raw parameters")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="by default as saved")
    command.add_argument("--as", dest="form", choices=["statistics"], help="an autoencoder's latent statistics alone")
    command.add_argument("--overwrite", action="store_true", help="replace TARGET")
    command.set_defaults(run=_export)

    command = commands.add_parser("inspect", help="what a file or folder is", allow_abbrev=False)
    command.add_argument("path", type=Path)
    command.set_defaults(run=lambda args: inspect(args.path))
    return whole


def _import(args: argparse.Namespace) -> list[str]:
    arguments = None
    if args.architecture is not None:
        try:
            arguments = json.loads(args.architecture.read_text())
        except ValueError as error:
            raise ValueError(f"--architecture: {args.architecture} is no readable JSON ({error})") from error
    return import_weights(args.source, args.to, arguments=arguments, overwrite=args.overwrite)


def _export(args: argparse.Namespace) -> list[str]:
    settings = {"part": args.part, "dtype": args.dtype, "overwrite": args.overwrite}
    return export_weights(args.workdir, args.to, statistics=args.form == "statistics", **settings)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # moving numbers needs no accelerator, which another process may hold
    main()

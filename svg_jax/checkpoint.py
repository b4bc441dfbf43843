"""Orbax checkpoints: everything a run needs to go on bit for bit, and parameters alone for those who only draw.

`workdir/checkpoints/STEP/` holds `state` (a TrainState), `data` (where the data order stands) and `config`. A save is
atomic; whatever mesh or number of processes it was made on, it restores onto the shardings of the target.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding

from svg_jax.nn.functional import Params, mismatch
from svg_jax.state import TrainState

logger = logging.getLogger("svg_jax")

FOLDER = "checkpoints"
Result = TypeVar("Result")


class Checkpoints:
    """The checkpoints of one run. Saves run in the background; `close` waits for them."""

    def __init__(self, workdir: str, *, keep: int = 3, keep_every: int | None = None) -> None:
        """Keeps the last `keep`, and for good those whose step is a multiple of `keep_every`.

        Raises:
            PermissionError: The folder cannot be made or written to.
        """
        self.folder = epath.Path(workdir).absolute() / FOLDER
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PermissionError(
                f"cannot write checkpoints to {self.folder} ({error}): choose another --workdir"
            ) from error
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "data", "config"))

    def save(self, state: TrainState, data: Mapping[str, int], config: Mapping[str, Any]) -> None:
        """Writes the state after `state.step` updates; returns once the arrays are copied off the devices."""
        step = int(jax.device_get(state.step))
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(dict(data)),
            config=ocp.args.JsonSave(dict(config)),
        )
        self._manager.save(step, args=args, force=True)

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, int]] | None:
        """The newest state that can be read, placed as `abstract` says, and its data position; None if there is none.

        A damaged checkpoint is reported and the one before is used; the damaged one is set aside as `STEP.damaged`.

        Raises:
            WrongArchitecture: The checkpoint is of another architecture.
            OSError: There are checkpoints and none can be read; nothing is touched.
        """
        damaged: list[int] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder = self.folder / str(step)
            try:
                for part in ("params", "frozen"):
                    _check(getattr(abstract, part), _saved_shapes(folder, part), folder)
                args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
                restored = self._manager.restore(step, args=args)
            except WrongArchitecture:
                raise
            except Exception as error:  # whatever Orbax or the file system says about a damaged file
                logger.error("checkpoint %s cannot be read (%s): trying the one before", folder, error)
                damaged.append(step)
                continue
            for other in damaged:
                self._set_aside(other)
            return restored.state, restored.data
        if damaged:
            raise OSError(
                f"none of the {len(damaged)} checkpoints in {self.folder} can be read (the log says why): "
                "mend what keeps them from it, or start over with another --workdir"
            )
        return None

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            (self.folder / str(step)).rename(self.folder / f"{step}.damaged")
        self._manager.reload()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


class WrongArchitecture(ValueError):
    """The parameters saved are not those of the network they are wanted for."""


def load_config(workdir: str) -> dict[str, Any]:
    """The config of the newest checkpoint of a run.

    Raises:
        FileNotFoundError: There is no checkpoint.
    """

    def read(folder: epath.Path) -> dict[str, Any]:
        return ocp.JsonCheckpointHandler().restore(folder / "config")

    return _from_newest(workdir, read)


def load_params(
    workdir: str,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, NamedSharding],
    *,
    parts: tuple[str, ...] = ("ema", "frozen"),
) -> Params:
    """Parameters from the newest checkpoint of a run that can be read, straight onto their shardings.

    Args:
        workdir: The run.
        shapes: What the network has (`Network.shapes`).
        shardings: Where each parameter goes.
        parts: Fields of the train state that together make up the network; `("params", "frozen")` for the raw ones.

    Raises:
        FileNotFoundError: There is no checkpoint.
        WrongArchitecture: Names or shapes differ; the message says which.
    """

    def read(folder: epath.Path) -> Params:
        handler = ocp.PyTreeCheckpointHandler()
        saved = {part: _saved_shapes(folder, part) for part in parts}
        _check(shapes, {name: shape for part in saved.values() for name, shape in part.items()}, folder)
        target = {
            part: {n: jax.ShapeDtypeStruct(shapes[n].shape, shapes[n].dtype, sharding=shardings[n]) for n in names}
            for part, names in saved.items()
            if names
        }
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
        restored = handler.restore(folder / "state", args=args)
        return {name: value for part in restored.values() for name, value in part.items()}

    return _from_newest(workdir, read)


def _from_newest(workdir: str, read: Callable[[epath.Path], Result]) -> Result:
    """What `read` makes of the newest checkpoint that it can read."""
    folder = epath.Path(workdir).absolute() / FOLDER
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
    for step in sorted(steps, reverse=True):
        try:
            return read(folder / str(step))
        except WrongArchitecture:
            raise
        except Exception as error:  # whatever Orbax or the file system says about a damaged file
            logger.error("checkpoint %s cannot be read (%s): trying the one before", folder / str(step), error)
    raise FileNotFoundError(f"no checkpoint in {folder} can be read: train with this --workdir first, or name another")


def _saved_shapes(folder: epath.Path, part: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Names and shapes of one field of a saved state."""
    tree = ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in (tree.get(part) or {}).items()}


def _check(expected: Mapping[str, Any], found: Mapping[str, Any], where: epath.Path | Path) -> None:
    if problem := mismatch(dict(expected), dict(found)):
        raise WrongArchitecture(f"{where}: {problem}")

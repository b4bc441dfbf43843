"""Orbax checkpoints: everything a run needs to go on bit for bit, and parameters alone for those who only draw.

`workdir/checkpoints/STEP/` holds `state` (a TrainState), `data` (where the data order stands, and broken records so
far) and `config`. A save is atomic; whatever mesh or number of processes it was made on, it restores onto the shardings
of the target.

Several processes read one checkpoint together: what one of them cannot read, none of them uses.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding

from svg_jax.distributed import EXIT_PREEMPTED, end_all, everyone, failed, is_first
from svg_jax.nn.functional import Params, mismatch
from svg_jax.state import TrainState

logger = logging.getLogger("svg_jax")

FOLDER = "checkpoints"
PARTS = ("params", "ema", "frozen", "carried")  # of a checkpoint; `carried` is of the release's files, see `convert`
TOGETHER = 3600.0  # seconds from the first process that has read its share to the last
CHUNK_BYTES = 64 * 2**20  # of a parameter on disk: what a device that wants a piece of it must read at least
OPTIONAL = {
    "extra_vit.": "a residual branch (Autoencoder-R)",
    "mask_token": "masked residual latents (mask_ratio)",
    "loss.discriminator.": "a discriminator",
    "loss.perceptual_loss.": "LPIPS",
}
"""What one autoencoder has and another has not, by how its parameters' names begin."""

ADDED = ("skipped",)  # fields that checkpoints of earlier versions lack, and that begin at zero
Result = TypeVar("Result")


class Checkpoints:
    """The checkpoints of one run. Saves run in the background; `close` waits for them.

    A save that fails is an OSError of the next method called. Where several processes save together it ends all of
    them at once instead, as the others would wait for this one's share.
    """

    def __init__(self, workdir: str, *, keep: int = 3, keep_every: int = 0) -> None:
        """Keeps the last `keep`, and for good those whose step is a multiple of `keep_every`, if that is not zero.

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
            max_to_keep=keep, keep_period=keep_every or None, enable_async_checkpointing=True
        )
        self._manager = _Manager(self.folder, options=options, item_names=("state", "data", "config"))

    def save(self, state: TrainState, data: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Writes the state after `state.step` updates; returns once the arrays are copied off the devices.

        Raises:
            OSError: This save, or the one before, cannot be written.
        """
        step = int(jax.device_get(state.step))
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(dict(data)),
            config=ocp.args.JsonSave(dict(config)),
        )
        self.wait()  # for the one before, which Orbax waits for too
        try:
            self._manager.save(step, args=args, force=True)
        except (OSError, ValueError) as error:  # ValueError is TensorStore's
            raise _unwritable(self.folder, error) from error

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest state that can be read, placed as `abstract` says, and what was saved of its data, or None.

        A damaged checkpoint is reported and the one before is used; the damaged one is set aside as `STEP.damaged`.

        Raises:
            WrongArchitecture: The checkpoint is of another architecture.
            OSError: There are checkpoints and none can be read; nothing is touched.
        """

        def read(folder: epath.Path) -> tuple[TrainState, dict[str, Any]]:
            trained, kept = (_saved_shapes(folder, part) for part in ("params", "frozen"))
            _check({**abstract.params, **abstract.frozen}, {**trained, **kept}, folder)
            _check_trained(abstract.params.keys(), trained.keys(), folder)
            # Not through the manager, where a process that can read waits without end for one that cannot.
            data = ocp.JsonCheckpointHandler().restore(folder / "data")
            args = ocp.args.StandardRestore(_saved_fields(abstract, folder))
            fields = ocp.StandardCheckpointHandler().restore(folder / "state", args=args)
            return _with_new_fields(abstract, fields), data

        steps = _steps(self.folder)
        for i, step in enumerate(steps):
            if (restored := _read_together(read, self.folder / str(step))) is not None:
                for damaged in steps[:i]:
                    self._set_aside(damaged)
                return restored
        if steps:
            raise OSError(
                f"none of the {len(steps)} checkpoints in {self.folder} can be read (the log says why): "
                "mend what keeps them from it, or start over with another --workdir"
            )
        return None

    def _set_aside(self, step: int) -> None:
        if is_first():
            (self.folder / str(step)).rename(self.folder / f"{step}.damaged")
        everyone("set aside", "", TOGETHER)
        self._manager.reload()

    def check(self) -> None:
        """Raises the OSError of a save that has failed meanwhile; costs nothing."""
        if self._manager.failed:
            self.wait()

    def wait(self) -> None:
        """Returns when what was saved is on disk.

        Raises:
            OSError: It cannot be written.
        """
        self._manager.wait_until_finished()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        preempted = isinstance(error, SystemExit) and error.code == EXIT_PREEMPTED
        if error is not None and not preempted and jax.process_count() > 1:
            failed(error)  # and no waiting for a save that the others, who end now, do not finish
        else:
            self.close()

    def close(self) -> None:
        """Waits for saves under way."""
        self.wait()
        self._manager.close()


class _Manager(ocp.CheckpointManager):
    """Tells of a save that fails in the background while it does: Orbax tells once all others have finished theirs."""

    failed = False

    def _wait_for_checkpointers(self) -> None:  # of the thread that finishes a save
        try:
            super()._wait_for_checkpointers()
        except TimeoutError:  # of a barrier: another process is to blame
            raise
        except Exception as error:
            self.failed = True
            problem = _unwritable(self.directory, error)
            end_all(str(problem))
            raise problem from error


def _unwritable(folder: epath.Path, error: Exception) -> OSError:
    number = re.search(r"os_error_code='(\d+)'", str(error))  # how TensorStore puts it, at the end of much else
    reason = os.strerror(int(number[1])) if number else " ".join(str(error).split()) or type(error).__name__
    return OSError(f"a checkpoint cannot be written to {folder} ({reason}): make room there or mend the disk")


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


def newest_step(workdir: str) -> int:
    """Updates of the newest checkpoint of a run.

    Raises:
        FileNotFoundError: There is no checkpoint.
    """
    return _from_newest(workdir, lambda folder: int(folder.name))


def load_params(
    workdir: str,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, NamedSharding],
    *,
    parts: tuple[str, ...] = ("ema", "frozen"),
    select: Callable[[str], bool] | None = None,
) -> Params:
    """Parameters from the newest checkpoint of a run that can be read, straight onto their shardings.

    Args:
        workdir: The run.
        shapes: What the network has (`Network.shapes`).
        shardings: Where each parameter goes.
        parts: Fields of the train state that together make up the network; `("params", "frozen")` for the raw ones.
        select: Which of the saved names count, where the run holds another network too; all by default.

    Raises:
        FileNotFoundError: There is no checkpoint.
        WrongArchitecture: Names or shapes differ; the message says which.
    """
    counts = select or (lambda _: True)

    def read(folder: epath.Path) -> Params:
        handler = ocp.PyTreeCheckpointHandler()
        saved = {part: {n: s for n, s in _saved_shapes(folder, part).items() if counts(n)} for part in parts}
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


def save_params(workdir: str, parts: Mapping[str, Mapping[str, np.ndarray]], config: Mapping[str, Any]) -> None:
    """A checkpoint of parameters alone, as `load_params` and `load_config` read them: that of a run at step 0.

    Each array is asked for once, written and let go, so that parameters that are made on demand never lie in memory
    together.

    Args:
        workdir: A folder without checkpoints.
        parts: Parameters by name, under the field of the train state that they stand for (`ema`, `frozen`). Other parts
            than those are kept too, and read by nobody but `open_params`.
        config: What `load_config` gives back.
    """
    leaves = {part: {name: _OnDemand(arrays, name) for name in arrays} for part, arrays in parts.items() if arrays}
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), leaves)
    registry = ocp.type_handlers.create_type_handler_registry(
        (_OnDemand, _OneByOne()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(type_handler_registry=registry), config=ocp.JsonCheckpointHandler()
    )
    args = ocp.args.Composite(
        state=ocp.args.PyTreeSave(leaves, save_args=chunks), config=ocp.args.JsonSave(dict(config))
    )
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(epath.Path(workdir).absolute() / FOLDER / "0", args=args)


class SavedParams(Mapping[str, np.ndarray]):
    """One part of a checkpoint: each parameter is read when it is asked for, and not kept."""

    def __init__(self, folder: epath.Path, part: str) -> None:
        self._folder, self._part = folder, part
        self.shapes = _saved_shapes(folder, part)

    def __getitem__(self, name: str) -> np.ndarray:
        target = {self._part: {name: self.shapes[name]}}
        restore_args = {self._part: {name: ocp.RestoreArgs(restore_type=np.ndarray)}}
        args = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
        restored = ocp.PyTreeCheckpointHandler().restore(self._folder / "state", args=args)
        return restored[self._part][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def open_params(workdir: str) -> dict[str, SavedParams]:
    """The parts of the newest checkpoint that hold parameters, as saved, on the host; nothing is read yet.

    Raises:
        FileNotFoundError: There is no checkpoint.
    """

    def read(folder: epath.Path) -> dict[str, SavedParams]:
        parts = {part: SavedParams(folder, part) for part in PARTS}
        return {part: params for part, params in parts.items() if params}

    return _from_newest(workdir, read)


class _OnDemand:
    """A leaf that is an entry of a mapping: Orbax passes leaves around before it writes them."""

    def __init__(self, arrays: Mapping[str, np.ndarray], name: str) -> None:
        self._arrays, self._name = arrays, name

    def read(self) -> np.ndarray:
        return self._arrays[self._name]


class _OneByOne(ocp.type_handlers.TypeHandler):
    """Writes such leaves as Orbax writes NumPy arrays, each before the next is read.

    Orbax's own handlers hold a second copy of everything until the last array is written.
    """

    def __init__(self) -> None:
        self._numpy = ocp.type_handlers.NumpyHandler()

    def typestr(self) -> str:
        return str(self._numpy.typestr())

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        for value, info, arg in zip(values, infos, args, strict=True):
            for written in await self._numpy.serialize([value.read()], [info], [arg]):
                await asyncio.to_thread(written.result)
        return []

    async def deserialize(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("checkpoints are read by Orbax's own handlers")

    async def metadata(self, infos: Any) -> Any:
        return await self._numpy.metadata(infos)


def _from_newest(workdir: str, read: Callable[[epath.Path], Result]) -> Result:
    """What `read` makes of the newest checkpoint that every process can read."""
    folder = epath.Path(workdir).absolute() / FOLDER
    for step in _steps(folder):
        if (result := _read_together(read, folder / str(step))) is not None:
            return result
    raise FileNotFoundError(
        f"no checkpoint in {folder} can be read: name the workdir of a training run, or of imported weights"
    )


def _steps(folder: epath.Path) -> list[int]:
    """Of the checkpoints in a folder, the newest first, as process 0 sees them."""
    names = [path.name for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
    first, *_ = everyone(f"steps in {folder}", " ".join(names), TOGETHER)
    return sorted((int(name) for name in first.split()), reverse=True)


def _read_together(read: Callable[[epath.Path], Result], folder: epath.Path) -> Result | None:
    """What `read` makes of a checkpoint; None, and an error in the log, if it fails in any process."""
    try:
        result, problem = read(folder), ""
    except (WrongArchitecture, MemoryError):
        raise
    except Exception as error:  # whatever Orbax or the file system says about a damaged file
        if "RESOURCE_EXHAUSTED" in str(error):
            raise  # by memory too small for it: the checkpoint may be sound
        result, problem = None, str(error) or type(error).__name__
    problems = everyone(f"read {folder}", problem, TOGETHER)
    if not any(problems):
        return result
    where = "" if problem else "in another process: "
    reason = next(text for text in (problem, *problems) if text)
    logger.error("checkpoint %s cannot be read (%s%s): trying the one before", folder, where, reason)
    return None


def _saved_fields(abstract: TrainState, folder: epath.Path) -> dict[str, Any]:
    """The fields of a state that a checkpoint has: one made by an earlier version may lack some."""
    saved = ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree
    fields = {field.name: getattr(abstract, field.name) for field in dataclasses.fields(abstract)}
    return {name: value for name, value in fields.items() if name in saved or name not in ADDED}


def _with_new_fields(abstract: TrainState, fields: Mapping[str, Any]) -> TrainState:
    """A state of restored fields, and zeros for those that the checkpoint lacks."""
    lacking = {name: getattr(abstract, name) for name in ADDED if name not in fields}
    zeros = {
        name: jax.jit(functools.partial(jnp.zeros, s.shape, s.dtype), out_shardings=s.sharding)()
        for name, s in lacking.items()
    }
    return TrainState(**fields, **zeros)


def _saved_shapes(folder: epath.Path, part: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Names and shapes of one field of a saved state."""
    tree = ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in (tree.get(part) or {}).items()}


def _check(expected: Mapping[str, Any], found: Mapping[str, Any], where: epath.Path | Path) -> None:
    if problem := mismatch(dict(expected), dict(found)):
        hint = _only_one_has(expected.keys(), found.keys())
        advice = "give the config the checkpoint's sizes, or name another checkpoint"
        raise WrongArchitecture(f"{where}: {problem}{hint}: {advice}")


def _check_trained(expected: Set[str], found: Set[str], where: epath.Path) -> None:
    for names, now, then in ((expected - found, "trained", "frozen"), (found - expected, "frozen", "trained")):
        if names:
            raise WrongArchitecture(
                f"{where}: {len(names)} parameters, {min(names)} among them, are {now} by the config and {then} in the "
                "checkpoint: set the config back, or begin a new --workdir with --config.init_from"
            )


def _only_one_has(expected: Set[str], found: Set[str]) -> str:
    """In brackets the parts that only the config or only the checkpoint has, where such parts are all that differs."""

    def has(names: Set[str], prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    parts = {prefix: what for prefix, what in OPTIONAL.items() if has(expected, prefix) != has(found, prefix)}
    if not all(name.startswith(tuple(parts)) for name in expected ^ found):
        return ""
    sides = [
        f"only the {'config' if has(expected, prefix) else 'checkpoint'} has {what}" for prefix, what in parts.items()
    ]
    return f" ({', '.join(sides)})" if sides else ""

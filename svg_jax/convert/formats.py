"""Files of weights: safetensors and PyTorch's, read and written one tensor at a time.

Nothing in a file is ever run: pickles go through PyTorch's weights-only reader alone. Safetensors need no PyTorch.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Structs = dict[str, jax.ShapeDtypeStruct]
Write = Callable[[str, np.ndarray], None]

WRAPPERS = ("state_dict", "model", "module")  # keys under which training scripts keep the state dict
MAPPED_BYTES = 512 * 2**20  # how much of a mapped file may lie in memory before it is mapped anew
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"} | {
    f"{letter}{bits}": f"{name}{bits}" for letter, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}
TORCH_STORAGES = {"float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "bool": "Bool"}
TORCH_STORAGES |= {"int64": "Long", "int32": "Int", "int16": "Short", "int8": "Char", "uint8": "Byte"}
ALIGNMENT = 64  # bytes, of tensors in PyTorch's files
MAX_HEADER = 100 * 10**6  # bytes, of safetensors, by its format


class Weights(Mapping[str, np.ndarray]):
    """Named tensors in files: `structs` tells shapes and dtypes, each tensor is read when it is asked for."""

    def __init__(self, structs: Structs, read: Callable[[str], np.ndarray]) -> None:
        self.structs = structs
        self._read = read

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.structs:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.structs)

    def __len__(self) -> int:
        return len(self.structs)

    @classmethod
    def joined(cls, parts: list[Weights]) -> Weights:
        """Of several files as of one."""
        where = {name: part for part in parts for name in part}
        if len(where) != sum(len(part) for part in parts):
            raise ValueError("two of the files hold the same tensor: are they of one model?")
        return cls({name: part.structs[name] for name, part in where.items()}, lambda name: where[name][name])


class Selected(Mapping[str, np.ndarray]):
    """Some entries of a mapping, still read only when they are asked for."""

    def __init__(self, arrays: Mapping[str, np.ndarray], names: list[str]) -> None:
        self._arrays, self._names = arrays, dict.fromkeys(names)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Content(NamedTuple):
    """A file of weights."""

    weights: Weights
    container: str  # "torch" or "safetensors"
    wrapper: str | None = None  # the key under which the state dict stands
    dropped: tuple[str, ...] = ()  # what else stands in the file
    others: tuple[str, ...] = ()  # those of them that are state dicts too
    metadata: dict[str, str] | None = None  # of safetensors


def open_file(path: Path) -> Content:
    """A file of weights, whatever its name.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged or something else, or reading it would run code.
        ImportError: It is PyTorch's, which is not installed.
    """
    return _open_safetensors(path) if _container(path) == "safetensors" else _open_torch(path)


def _container(path: Path) -> str:
    """By what the file begins with."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as file:
        start = file.read(512)
    size = path.stat().st_size
    if not start:
        raise ValueError(f"{path} is empty: download it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
    if re.match(rb"\s*<(!doctype|html|\?xml)", start, re.IGNORECASE):
        raise ValueError(
            f"{path} is a web page, not weights: log in or accept the licence there, and download it again"
        )
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and length <= MAX_HEADER:  # before pickles, for a length may begin as they do
        if 8 + length > size:
            raise ValueError(f"{path} is cut off within its header, after {size} bytes: download it again")
        return "safetensors"
    if start.startswith(b"PK\x03\x04") or start[:1] == b"\x80":
        return "torch"
    raise ValueError(
        f"{path} holds no weights that are known here (it begins with {start[:8]!r}): .pth, .ckpt, safetensors"
    )


def _open_safetensors(path: Path) -> Content:
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        try:
            header: dict[str, Any] = json.loads(file.read(begin - 8))
            metadata = header.pop("__metadata__", None)
            structs, offsets = {}, {}
            foreign = {
                name: entry["dtype"] for name, entry in header.items() if entry["dtype"] not in SAFETENSORS_DTYPES
            }
            for name, entry in ({} if foreign else header).items():
                dtype = jnp.dtype(SAFETENSORS_DTYPES[entry["dtype"]])
                structs[name] = jax.ShapeDtypeStruct(tuple(entry["shape"]), dtype)
                offsets[name], end = entry["data_offsets"]
                if end - offsets[name] != math.prod(entry["shape"]) * dtype.itemsize or offsets[name] < 0:
                    raise ValueError(f"'{name}' has another size than its shape says")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} has no readable safetensors header ({error!r}): download it again") from error
    for name, dtype in foreign.items():
        raise ValueError(
            f"{path}: '{name}' is {dtype}, and quantised weights are not read here: take the file of float32, float16 "
            "or bfloat16"
        )
    expected = begin + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != expected:
        raise ValueError(f"{path} has {size} bytes and should have {expected}: download it again")

    def read(name: str) -> np.ndarray:
        struct = structs[name]
        if not struct.size:
            return np.empty(struct.shape, struct.dtype)
        data = np.memmap(path, np.uint8, "r", begin + offsets[name], (struct.size * struct.dtype.itemsize,))
        return data.view(struct.dtype).reshape(struct.shape)

    return Content(Weights(structs, read), "safetensors", metadata=metadata)


def import_torch() -> Any:
    """PyTorch.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            'PyTorch\'s own files (.pth, .pt, .ckpt) need it installed: pip install "svg_jax[torch]"; '
            "safetensors and transformers folders do without"
        ) from error
    return torch


def load_torch(path: Path) -> Any:
    """What a PyTorch file holds, on the CPU and mapped where its format allows; nothing in it is run.

    Raises:
        ValueError: It is damaged, or something else than weights and plain values.
        ImportError: PyTorch is not installed.
    """
    torch = import_torch()
    mapped = zipfile.is_zipfile(path)  # the format before PyTorch 1.6 is read whole
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"'{named[1]}'" if named else "a pickle of another kind"
        raise ValueError(
            f"{path} holds {what} besides weights, and reading that could run code: refused, nothing of it was run; "
            "if you trust the file, save its state dict alone with PyTorch"
        ) from error
    except Exception as error:  # whatever PyTorch says about a damaged file
        reason = str(error).split("\n")[0][:100]
        raise ValueError(f"{path} is cut off or no file of PyTorch's ({reason}): download it again") from error


def _open_torch(path: Path) -> Content:
    torch = import_torch()
    content = load_torch(path)
    wrapper, state = _state_dict(content, path)
    tensors = {k: value for k, value in state.items() if isinstance(k, str) and isinstance(value, torch.Tensor)}
    dropped = [str(name) for name in state if name not in tensors]
    beside = {str(key): value for key, value in content.items() if wrapper is not None and key != wrapper}
    others = tuple(key for key, value in beside.items() if _holds_tensors(value))
    structs = {name: jax.ShapeDtypeStruct(tuple(t.shape), _dtype(t, name, path)) for name, t in tensors.items()}
    reader = _TorchReader(path, wrapper, tensors)
    return Content(Weights(structs, reader.read), "torch", wrapper, (*dropped, *beside), others)


class _TorchReader:
    """Reads from a mapped file, and maps it anew when much of it lies in memory: a map takes its pages along."""

    def __init__(self, path: Path, wrapper: str | None, tensors: Mapping[str, Any]) -> None:
        self._path, self._wrapper, self._tensors = path, wrapper, tensors
        self._mapped = zipfile.is_zipfile(path)
        self._bytes = 0

    def read(self, name: str) -> np.ndarray:
        if self._mapped and self._bytes > MAPPED_BYTES:
            content = load_torch(self._path)
            self._tensors = content if self._wrapper is None else content[self._wrapper]
            self._bytes = 0
        tensor = self._tensors[name].detach()
        self._bytes += tensor.nbytes
        torch = import_torch()
        if tensor.dtype == torch.bfloat16:  # NumPy has none of its own
            return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
        return tensor.numpy()


def _state_dict(content: Any, path: Path) -> tuple[str | None, Mapping[str, Any]]:
    """The tensors by name, and the key under which they stand."""
    if isinstance(content, Mapping):
        inside = [key for key, value in content.items() if _holds_tensors(value)]
        wrappers = [key for key in WRAPPERS if key in inside]
        if not wrappers and _holds_tensors(content):
            return None, content
        for key in wrappers or (inside if len(inside) == 1 else []):
            return key, content[key]
        raise ValueError(f"{path} holds no state dict: its keys are {', '.join(map(str, content)) or 'none'}")
    raise ValueError(f"{path} holds one {type(content).__name__} and no state dict")


def _holds_tensors(value: Any) -> bool:
    """Whether it is a state dict: tensors by name."""
    torch = import_torch()
    return isinstance(value, Mapping) and any(
        isinstance(key, str) and isinstance(x, torch.Tensor) for key, x in value.items()
    )


def _dtype(tensor: Any, name: str, path: Path) -> Any:
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in TORCH_STORAGES or str(tensor.layout) != "torch.strided" or tensor.device.type == "meta":
        raise ValueError(f"{path}: '{name}' is a tensor of a kind that is not read here ({kind}, {tensor.layout})")
    return jnp.dtype(kind)


def raw(array: np.ndarray) -> memoryview:
    """The bytes of an array in C order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def safetensors_writer(path: Path, structs: Structs, metadata: Mapping[str, str] | None = None) -> Iterator[Write]:
    """Yields `write(name, array)`; every tensor must be written once, in any order.

    The format: eight bytes with the length of a JSON header, the header, the numbers.
    """
    names = {value: key for key, value in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for name, struct in structs.items():
        offsets[name], end = end, end + struct.size * struct.dtype.itemsize
        header[name] = {"dtype": names[struct.dtype.name], "shape": list(struct.shape)}
        header[name]["data_offsets"] = [offsets[name], end]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    left = set(structs)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)

        def write(name: str, array: np.ndarray) -> None:
            _check(name, array, structs)
            left.remove(name)
            file.seek(8 + len(text) + offsets[name])
            file.write(raw(array))

        yield write
    if left:
        raise ValueError(f"{path.name} lacks {sorted(left)[:3]}")


@contextlib.contextmanager
def torch_writer(path: Path, structs: Structs, wrapper: str | None = None) -> Iterator[Write]:
    """As `safetensors_writer`, for a file that `torch.load` reads as {name: tensor}, or {wrapper: {name: tensor}}.

    The format: a zip archive, stored, of a pickle that describes the tensors, and the numbers of each. `torch.save`
    wants them all in memory; this holds one.
    """
    import_torch()
    left = set(structs)
    tensors = {name: _Tensor(str(i), struct) for i, (name, struct) in enumerate(structs.items())}
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _pickled(tensors if wrapper is None else {wrapper: tensors}))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")

        def write(name: str, array: np.ndarray) -> None:
            _check(name, array, structs)
            left.remove(name)
            info = zipfile.ZipInfo(f"archive/data/{tensors[name].key}")
            begin = (
                file.tell() + 30 + len(info.filename) + 20 + 4
            )  # after the fixed fields, sizes, and what follows here
            padding = -begin % ALIGNMENT
            info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            with archive.open(info, "w", force_zip64=True) as entry:
                entry.write(raw(array))

        yield write
    if left:
        raise ValueError(f"{path.name} lacks {sorted(left)[:3]}")


class _Tensor(NamedTuple):
    """A tensor in a pickle: where its numbers are, and how to read them."""

    key: str
    struct: jax.ShapeDtypeStruct


class _Storage(NamedTuple):
    """The numbers of a tensor in a pickle."""

    tensor: _Tensor


def _pickled(tree: Any) -> bytes:
    """`tree` as PyTorch pickles it: for each tensor a recipe that points to the numbers by key."""
    torch = import_torch()

    class Pickler(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            if not isinstance(value, _Tensor):
                return NotImplemented
            shape = value.struct.shape
            strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
            hooks: dict[str, Any] = collections.OrderedDict()
            return torch._utils._rebuild_tensor_v2, (_Storage(value), 0, shape, strides, False, hooks)

        def persistent_id(self, value: Any) -> Any:
            if not isinstance(value, _Storage):
                return None
            key, struct = value.tensor
            return "storage", getattr(torch, f"{TORCH_STORAGES[struct.dtype.name]}Storage"), key, "cpu", struct.size

    with io.BytesIO() as buffer:
        Pickler(buffer, protocol=2).dump(tree)
        return buffer.getvalue()


def _check(name: str, array: np.ndarray, structs: Structs) -> None:
    if (array.shape, array.dtype) != (structs[name].shape, structs[name].dtype):
        raise ValueError(f"'{name}' is {array.dtype}{list(array.shape)}, expected {structs[name]}")

"""What the judges that run in PyTorch share: finding it, the device, the precision, a folder of transformers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtyping import Float


def import_torch() -> Any:
    """PyTorch.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "GenEval's detector and CLIP, and models that answer questions, run in PyTorch: "
            'pip install "svg_jax[eval]"'
        ) from error
    return torch


def torch_device(name: str | None) -> Any:
    """A device of PyTorch, by default the first GPU where there is one.

    Raises:
        ValueError: There is no such device here.
    """
    torch = import_torch()
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used ({str(error).splitlines()[0]}): cpu always can") from error
    return device


@contextlib.contextmanager
def computing(device: Any) -> Iterator[None]:
    """Without gradients, and in float32 where weights are: cuDNN would round that to TF32."""
    torch = import_torch()
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), exact if device.type == "cuda" else contextlib.nullcontext():
        yield


def check_finite(values: Float[Any, "..."], name: str) -> None:
    """Refuses what damaged weights give, before a score is made of it.

    Args:
        values: A tensor of PyTorch.
        name: Of the network: where its weights lie.

    Raises:
        ValueError: There are NaNs or infinities.
    """
    if not values.isfinite().all():
        raise ValueError(f"the network of {name} gives numbers that are not finite: get its weights again")


@contextlib.contextmanager
def one_thread(device: Any) -> Iterator[None]:
    """On a CPU. More threads add in another order, which changes the last digits of a result with their number."""
    torch = import_torch()
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_config(folder: str, model_type: str, source: str) -> dict[str, Any]:
    """The `config.json` of a folder of transformers.

    Args:
        folder: Local.
        model_type: What it must be of, as transformers calls it.
        source: How to get it, for messages.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It is no folder of transformers, or one of another network.
    """
    file = Path(folder) / "config.json"
    if not Path(folder).exists():
        raise FileNotFoundError(f"there is no {folder}: {source}")
    try:
        config = json.loads(file.read_text())
        found = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{folder} is no folder of transformers, whose config.json can be read ({error}): {source}"
        ) from error
    if found != model_type:
        raise ValueError(f"{folder} holds a network of the type {found}, and a {model_type} is needed: {source}")
    return config

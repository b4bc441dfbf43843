"""Networks of transformers, from a local folder or from tensors: whole, or not at all."""

from __future__ import annotations

import re
from typing import Any

from svg_jax.convert.rules import report

# What checkpoints need not have: a norm that the backbone of a detector does not use, and constants.
UNUSED = re.compile(r"(.+\.)?swin\.layernorm\.(weight|bias)|criterion\.empty_weight|(.+\.)?position_ids")


def load_pretrained(name: str, what: str, **source: Any) -> Any:
    """A network of transformers in float32 on the CPU, for inference.

    transformers fills what a checkpoint lacks with random numbers; here that is an error.

    Args:
        name: Its class.
        what: What it is loaded from, for messages.
        source: `pretrained_model_name_or_path`, a local folder; or None there, and `config` and `state_dict`.

    Raises:
        ValueError: Weights are missing, of another shape, not finite or unreadable.
    """
    import transformers

    own = transformers.utils.logging
    verbosity, progress = own.get_verbosity(), own.is_progress_bar_enabled()
    own.set_verbosity_error()
    own.disable_progress_bar()
    try:
        network, told = getattr(transformers, name).from_pretrained(
            **source, dtype="float32", local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # whatever transformers and safetensors say about a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{what} cannot be loaded as {name} ({reason}): download it again") from error
    finally:
        own.set_verbosity(verbosity)
        if progress:
            own.enable_progress_bar()
    missing = [key for key in told["missing_keys"] if not UNUSED.fullmatch(key)]
    differing = [str(key) for key, *_ in told["mismatched_keys"]]
    damaged = [key for key, values in network.state_dict().items() if not values.isfinite().all()]
    problems = {"missing": missing, "of another shape": differing, "not finite": damaged}
    if problem := report(problems, limit=5):
        raise ValueError(f"{what} is not a whole {name}: {problem}; download it again")
    return network.requires_grad_(False).eval()

"""Which weights a judge from elsewhere had, told without loading them."""

from __future__ import annotations

import hashlib
from pathlib import Path

KINDS = ("*.safetensors", "*.bin", "*.pth", "*.pt")  # the first of which a folder has any; as transformers prefers
BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")  # the config, the tokenizer, how images are prepared


def weights_digest(path: str | Path) -> str:
    """16 hexadecimal digits of the SHA-256 of a file of weights, or of all that counts in a folder of transformers.

    The same under another name and in another place.

    Raises:
        FileNotFoundError: There is no such file or folder, or no weights in it.
    """
    path = Path(path)
    if path.is_file():
        return _digest(path)[:16]
    files = next((found for kind in KINDS if (found := sorted(path.glob(kind)))), [])
    if not files:
        raise FileNotFoundError(f"there are no weights at {path}: expected a file, or a folder with {', '.join(KINDS)}")
    files += sorted(file for kind in BESIDE for file in path.glob(kind))
    lines = "".join(f"{_digest(file)} {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from svg_jax.evaluate.weights import weights_digest


def test_a_file_is_known_by_its_sha256(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    file.write_bytes(b"weights")
    assert weights_digest(file) == hashlib.sha256(b"weights").hexdigest()[:16]


def test_a_folder_is_known_by_what_transformers_would_load(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"old")
    old = weights_digest(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    new = weights_digest(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "README.md").write_text("text")
    assert weights_digest(tmp_path) == new != old


def test_config_and_tokenizer_count(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    found = {weights_digest(tmp_path)}
    for name in ("config.json", "tokenizer.json", "merges.txt"):
        for text in ("a", "b"):
            (tmp_path / name).write_text(text)
            found.add(weights_digest(tmp_path))
    assert len(found) == 7
    assert weights_digest(tmp_path.rename(tmp_path.with_name("elsewhere"))) in found


def test_all_parts_count_and_their_order(tmp_path: Path) -> None:
    one, two = tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00002-of-00002.safetensors"
    one.write_bytes(b"a")
    two.write_bytes(b"b")
    before = weights_digest(tmp_path)
    one.write_bytes(b"b")
    two.write_bytes(b"a")
    assert weights_digest(tmp_path) != before


def test_no_weights(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="there are no weights at"):
            weights_digest(path)

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svg_jax.evaluate.fid.moments import Moments, frechet_distance
from svg_jax.evaluate.fid.statistics_file import (
    Statistics,
    check_comparable,
    check_writable,
    members,
    read_statistics,
    write_statistics,
)

MOMENTS = Moments.of(np.random.default_rng(0).standard_normal((20, 4)))
OURS = Statistics.of(MOMENTS, resolution=256, extractor="ab12")


def test_what_is_written_is_read_back_and_pytorch_fid_reads_it(tmp_path: Path) -> None:
    path = str(tmp_path / "new" / "real.npz")
    write_statistics(path, OURS)
    assert members(path) == {"mu", "sigma", "count", "resolution", "extractor"}
    found = read_statistics(path)
    assert (found.count, found.resolution, found.extractor) == (20, 256, "ab12")
    assert frechet_distance(found, MOMENTS) == pytest.approx(0.0, abs=1e-12)
    with np.load(path) as arrays:  # as pytorch-fid does it
        np.testing.assert_array_equal(arrays["mu"][:], MOMENTS.mean)
        np.testing.assert_array_equal(arrays["sigma"][:], MOMENTS.covariance())


def test_statistics_of_pytorch_fid_say_nothing_of_their_network(tmp_path: Path) -> None:
    path = str(tmp_path / "theirs.npz")
    np.savez_compressed(path, mu=MOMENTS.mean, sigma=MOMENTS.covariance())
    found = read_statistics(path)
    assert (found.count, found.resolution, found.extractor) == (None, None, None)
    (warning,) = check_comparable(path, found, channels=4, extractor="ab12", resolutions=(0,))
    assert "does not say by which network" in warning
    assert "pt_inception-2015-12-05" in warning


def test_statistics_that_may_not_be_compared() -> None:
    def check(**changes: Any) -> list[str]:
        return check_comparable("f.npz", OURS, **({"channels": 4, "extractor": "ab12", "resolutions": [256]} | changes))

    assert check() == check(channels=None, extractor=None)
    assert "FID of 20 images is biased" in check()[0]
    assert check(resolutions=[512, 256])
    with pytest.raises(ValueError, match=r"f.npz holds statistics of another extractor: 4 channels instead of 2048"):
        check(channels=2048)
    with pytest.raises(ValueError, match=r"another extractor: they were made with weights ab12, and these are cd34"):
        check(extractor="cd34")
    with pytest.raises(ValueError, match=r"statistics of crops of 256 px, and now whole images are compared"):
        check(resolutions=[0])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros(3)}, "holds no mu and no sigma: it is no file of statistics"),
        ({"mu": np.zeros(3)}, "holds no sigma"),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 2))}, r"mu \(3,\) and sigma \(3, 2\): expected \[channels\]"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "numbers that are not finite"),
        ({"mu": np.array([None, None]), "sigma": np.eye(2)}, "cannot be read as an .npz of statistics"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, r"f\.npz holds mu as <U1 \(2,\): make these"),
        ({"mu": np.zeros(2), "sigma": np.eye(2) * 1j}, r"f\.npz holds sigma as complex128 \(2, 2\): make these"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "count": np.arange(2)}, r"f\.npz holds count as int64 \(2,\)"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "resolution": np.array("a")}, r"holds resolution as <U1 \(\)"),
    ],
)
def test_files_of_something_else(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = str(tmp_path / "f.npz")
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message):
        read_statistics(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = str(tmp_path / "f.npz")
    with pytest.raises(FileNotFoundError, match=r"there is no file of statistics .*f\.npz: make one with"):
        read_statistics(path)
    assert not members(path)
    Path(path).write_bytes(b"no archive")
    assert not members(path)
    with pytest.raises(ValueError, match=r"f\.npz cannot be read as an \.npz of statistics"):
        read_statistics(path)


def test_damaged_archives(tmp_path: Path) -> None:
    """Each byte of a compressed file that is not what it was gives the same statistics, or one sentence."""
    file = tmp_path / "f.npz"
    np.savez_compressed(file, mu=MOMENTS.mean, sigma=MOMENTS.covariance(), count=20)
    whole, refusals = file.read_bytes(), []
    for place in range(0, len(whole), 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :])
        try:
            found = read_statistics(str(file))
        except ValueError as error:
            refusals.append(str(error))
        else:
            np.testing.assert_array_equal(found.mean, MOMENTS.mean)
    assert len(refusals) > 100
    assert all(str(file) in text for text in refusals)


def test_images_beside_statistics_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ADM's reference batches have them, of gigabytes."""
    path = str(tmp_path / "batch.npz")
    np.savez(path, arr_0=np.zeros((20, 64, 64, 3), np.uint8), mu=MOMENTS.mean, sigma=MOMENTS.covariance())
    seen = 0

    class Counted(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal seen
            data = super().read(-1 if size is None else size)
            seen += len(data or b"")
            return data or b""

    monkeypatch.setattr("etils.epath.gpath.PosixGPath.open", lambda self, mode: Counted(str(self), mode))
    read_statistics(path)
    assert 0 < seen < 20_000


def test_where_statistics_cannot_be_written_is_found_before(tmp_path: Path) -> None:
    check_writable(str(tmp_path / "new" / "real.npz"))
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "folder.npz", tmp_path / "file" / "real.npz"):
        with pytest.raises(
            PermissionError, match=r"--save-statistics .*\.npz cannot be written \(.*\): choose another"
        ):
            check_writable(str(path))
    with pytest.raises(ValueError, match=r"real\.txt: the name must end in \.npz"):
        check_writable("real.txt")

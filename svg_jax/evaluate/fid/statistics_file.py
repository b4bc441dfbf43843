"""Mean and covariance of a data set's features in an `.npz`, for FID without the images.

`mu` and `sigma` are as `pytorch-fid` writes and reads them, and as the reference batches of ADM hold them. Ours also
say of how many images they are, at which resolution these were compared, and by which weights.
"""

from __future__ import annotations

import dataclasses
import io
import struct
import uuid
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from numpy.typing import NDArray

from svg_jax.evaluate.fid.moments import Moments, bias
from svg_jax.output_folder import write_whole

SUFFIX = ".npz"
MOMENTS = ("mu", "sigma")
OURS = ("count", "resolution", "extractor")  # beside these, in our files
# What numpy calls numbers, whole numbers and texts.
KINDS = {"mu": "fiu", "sigma": "fiu", "count": "iu", "resolution": "iu", "extractor": "U"}
# What damaged archives end in.
DAMAGED = (OSError, ValueError, EOFError, KeyError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What FID needs to know of a set of images.

    Attributes:
        mean: Of the features, [channels].
        sigma: Their unbiased covariance, [channels, channels].
        count: Of how many images; None where the file does not say.
        resolution: Side in pixels of the centre crops that were compared, 0 for whole images; None where unknown.
        extractor: Digest of the weights that made the features (`svg_jax.loading.digest`); None where unknown.
    """

    mean: NDArray[np.float64]
    sigma: NDArray[np.float64]
    count: int | None = None
    resolution: int | None = None
    extractor: str | None = None

    @classmethod
    def of(cls, moments: Moments, *, resolution: int, extractor: str) -> Statistics:
        """From moments summed here.

        Raises:
            ValueError: They are of fewer than 2 images.
        """
        return cls(moments.mean, moments.covariance(), moments.count, resolution, extractor)

    def covariance(self) -> NDArray[np.float64]:
        return self.sigma


def members(path: str) -> set[str]:
    """What is in an `.npz`: names of arrays, of which those of ADM's reference batches are both images and statistics.

    Empty where this is no such file.
    """
    if not path.endswith(SUFFIX):
        return set()
    try:
        with epath.Path(path).open("rb") as file, zipfile.ZipFile(file) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        return set()


def read_statistics(path: str) -> Statistics:
    """Statistics of this package, of `pytorch-fid`, or of an ADM reference batch.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else, or numbers that are none.
    """
    file = epath.Path(path)
    if not file.exists():
        raise FileNotFoundError(f"there is no file of statistics {path}: make one with --save-statistics {path}")
    try:
        # Members are read one by one, and nothing is unpickled: beside these there may be gigabytes of images.
        with file.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            names = [name for name in KINDS if f"{name}.npy" in archive.namelist()]
            found = {name: np.lib.format.read_array(io.BytesIO(archive.read(f"{name}.npy"))) for name in names}
    except DAMAGED as error:
        raise ValueError(f"{path} cannot be read as an .npz of statistics ({error})") from error
    if missing := [name for name in MOMENTS if name not in found]:
        raise ValueError(f"{path} holds no {' and no '.join(missing)}: it is no file of statistics")
    for name, array in found.items():
        if array.dtype.kind not in KINDS[name] or (name in OURS and array.size != 1):
            raise ValueError(f"{path} holds {name} as {array.dtype} {array.shape}: make these statistics anew")
    mean, sigma = (np.asarray(found[name], np.float64) for name in MOMENTS)
    if mean.ndim != 1 or sigma.shape != (mean.size, mean.size):
        raise ValueError(
            f"{path} has mu {mean.shape} and sigma {sigma.shape}: expected [channels], [channels, channels]"
        )
    if not (np.isfinite(mean).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path} holds numbers that are not finite: make these statistics anew")
    return Statistics(mean, sigma, **{name: found[name].item() for name in OURS if name in found})


def write_statistics(path: str, statistics: Statistics) -> None:
    """Writes an `.npz` that `pytorch-fid` reads too.

    Raises:
        OSError: It cannot be written.
    """
    data = io.BytesIO()
    said = {name: getattr(statistics, name) for name in OURS}
    extra: dict[str, Any] = {name: np.asarray(value) for name, value in said.items() if value is not None}
    np.savez(data, mu=statistics.mean, sigma=statistics.sigma, **extra)
    file = epath.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, data.getvalue())


def check_writable(path: str) -> None:
    """Whether statistics can be written there, before hours go into them.

    Raises:
        ValueError: The name ends otherwise.
        PermissionError: It cannot be written.
    """
    if not path.endswith(SUFFIX):
        raise ValueError(f"--save-statistics {path}: the name must end in {SUFFIX}")
    file = epath.Path(path)
    probe = file.parent / f".{file.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
        if file.is_dir():
            raise IsADirectoryError("it is a folder")
    except OSError as error:
        raise PermissionError(f"--save-statistics {path} cannot be written ({error}): choose another file") from error


def check_comparable(
    path: str, statistics: Statistics, *, channels: int | None, extractor: str | None, resolutions: Sequence[int]
) -> list[str]:
    """Whether features made now may be compared with statistics from a file; what is to be said if they may.

    Args:
        path: The file.
        statistics: What it holds.
        channels: Of a feature made now; None where none is made.
        extractor: Digest of the weights in use; None if nobody knows.
        resolutions: Sides of the centre crops that these may be, the first as they are now; 0 for whole images.

    Raises:
        ValueError: They are of another network, or of images of another resolution.
    """
    anew = "make them anew with --reference IMAGES --save-statistics FILE.npz"
    if channels is not None and statistics.mean.size != channels:
        raise ValueError(
            f"{path} holds statistics of another extractor: {statistics.mean.size} channels instead of {channels}; "
            f"{anew}"
        )
    if None not in (statistics.extractor, extractor) and statistics.extractor != extractor:
        raise ValueError(
            f"{path} holds statistics of another extractor: they were made with weights {statistics.extractor}, and "
            f"these are {extractor}; name those weights, or {anew}"
        )
    if statistics.resolution is not None and statistics.resolution not in resolutions:
        raise ValueError(
            f"{path} holds statistics of {cropped(statistics.resolution)}, and now {cropped(resolutions[0])} are "
            "compared: "
            f"compare at that resolution, or {anew} for this one"
        )
    warnings = []
    if statistics.extractor is None:
        warnings.append(
            f"{path} does not say by which network its statistics were made: FID means something only if it was "
            "pt_inception-2015-12-05, as that of pytorch-fid is"
        )
    if statistics.count is not None and (text := bias(statistics.count)):
        warnings.append(f"{path}: {text}")
    return warnings


def cropped(side: int) -> str:
    """What a resolution says of the images."""
    return f"crops of {side} px" if side else "whole images"

"""Data sets of TensorFlow Datasets as a source, through their ArrayRecord files: TensorFlow itself is not needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from data_pipelines.records import BadRecord, Record

PREFIX = "tfds:"


class PreparedDataset:
    """The images of one split of a prepared data set; a record has no caption.

    Args:
      address: `tfds:NAME/SPLIT`, as in tfds:imagenet2012/train; NAME may hold a config and a version.
      data_dir: where data sets are prepared; TensorFlow Datasets' own default if None.

    Raises:
      ImportError: TensorFlow Datasets is not installed.
      FileNotFoundError: the data set is not prepared there.
      ValueError: no such data set or split, no images in it, or files of another format than ArrayRecord.
    """

    has_captions = False

    def __init__(self, address: str, data_dir: str | Path | None = None) -> None:
        name, _, split = address.removeprefix(PREFIX).rpartition("/")
        if not name or not split:
            raise ValueError(f"{address} names no split; expected tfds:NAME/SPLIT, as in tfds:imagenet2012/train")
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ImportError(
                f'{address} needs TensorFlow Datasets: pip install "svg_jax[tfds]" ({error.name} is missing)'
            ) from error
        self.name, self._split = address, split
        try:
            builder = tfds.builder(name, data_dir=data_dir)
        except Exception as error:  # of a kind that TensorFlow Datasets does not name in its interface
            raise ValueError(f"{address}: there is no data set '{name}' ({_first_line(error)})") from error
        images = [key for key, feature in builder.info.features.items() if isinstance(feature, tfds.features.Image)]
        if not images:
            raise ValueError(f"{address} holds no images; its features are {', '.join(builder.info.features)}")
        self._key = images[0]
        self._version = builder.info.full_name
        self._folder = Path(builder.data_path)
        if not builder.data_path.exists():
            raise FileNotFoundError(
                f"{address} is not prepared in {builder.data_path}: run `tfds build {name} "
                "--file_format=array_record`, or name the folder of prepared data sets as the root"
            )
        try:
            decoders = {self._key: tfds.decode.SkipDecoding()}  # the bytes of the file; pictures are decoded by Pillow
            self._records: Any = builder.as_data_source(split, decoders=decoders)
        except NotImplementedError as error:
            raise ValueError(
                f"{address} is prepared in another format than ArrayRecord ({_first_line(error)}): run "
                f"`tfds build {name} --file_format=array_record`"
            ) from error
        except ValueError as error:
            raise ValueError(f"{address}: there is no split '{split}' ({_first_line(error)})") from error
        if not len(self):
            raise ValueError(f"{address} is empty; expected one record an image")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        where = f"{self.name} record {index}"
        try:
            image = self._records[index][self._key]
        except Exception as error:  # whatever ArrayRecord says about a damaged file
            raise BadRecord(f"{where} cannot be read ({_first_line(error)})") from error
        return Record(index, where, None, "base", where, image=bytes(image))

    @property
    def signature(self) -> str:
        """Changes with the version of the data set and the split."""
        return f"{self._version}/{self._split}"

    def beside(self, name: str) -> Path:
        """Where a file about this split is kept."""
        return self._folder / f".svg_jax.{re.sub(r'[^A-Za-z0-9]', '_', self._split)}.{name}"


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:200] or type(error).__name__

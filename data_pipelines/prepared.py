"""Data sets of TensorFlow Datasets as a source, through their ArrayRecord files: TensorFlow itself is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.captions import CAPTION_KEYS, captions_under
from data_pipelines.records import BadRecord, Cause, Record, first_line

PREFIX = "tfds:"


class PreparedDataset:
    """The images of one split of a prepared data set, with their captions where it has such a feature.

    A caption is a text, a sequence of texts, or a sequence of features with a text among them (as coco_captions has it)
    under one of `captions.CAPTION_KEYS`. Other texts, such as the file names of imagenet2012, are none.

    Args:
      address: `tfds:NAME/SPLIT`, as in tfds:imagenet2012/train; NAME may hold a config and a version.
      data_dir: where data sets are prepared; TensorFlow Datasets' own default if None.

    Raises:
      ImportError: TensorFlow Datasets is not installed.
      FileNotFoundError: the data set is not prepared there.
      ValueError: no such data set or split, no images in it, or files of another format than ArrayRecord.
    """

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
        self.name, self._split, self._data_dir = address, split, data_dir
        try:
            builder = tfds.builder(name, data_dir=data_dir)
        except Exception as error:  # of a kind that TensorFlow Datasets does not name in its interface
            raise ValueError(f"{address}: there is no data set '{name}' ({first_line(error)})") from error
        features = builder.info.features
        images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
        if not images:
            raise ValueError(f"{address} holds no images; its features are {', '.join(features)}")
        self._image = images[0]
        self._captions = {key for key, _ in CAPTION_KEYS if key in features and _holds_text(features[key], tfds)}
        self.has_captions = bool(self._captions)
        self._version = builder.info.full_name
        if not builder.data_path.exists():
            raise FileNotFoundError(
                f"{address} is not prepared in {builder.data_path}: run `tfds build {name} "
                "--file_format=array_record`, or name the folder of prepared data sets as the root"
            )
        try:
            decoders = {
                self._image: tfds.decode.SkipDecoding()
            }  # the bytes of the file; pictures are decoded by Pillow
            self._records: Any = builder.as_data_source(split, decoders=decoders)
        except NotImplementedError as error:
            raise ValueError(
                f"{address} is prepared in another format than ArrayRecord ({first_line(error)}): run "
                f"`tfds build {name} --file_format=array_record`"
            ) from error
        except ValueError as error:
            raise ValueError(f"{address}: there is no split '{split}' ({first_line(error)})") from error
        if not len(self):
            raise ValueError(f"{address} is empty; expected one record an image")

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedDataset, (self.name, self._data_dir)  # opened anew in another process

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        where = f"{self.name} record {index}"
        try:
            value = self._records[index]
        except Exception as error:  # whatever ArrayRecord says about a damaged file
            raise BadRecord(Cause.STORE, f"{where} cannot be read ({first_line(error)})") from error
        captions = captions_under({key: _texts(value[key], where) for key in self._captions}, where)
        return Record(index, where, where, captions, bytes(value[self._image]))

    @property
    def signature(self) -> str:
        """Changes with the version of the data set and the split."""
        return f"{self._version}/{self._split}"


def _holds_text(feature: Any, tfds: Any) -> bool:
    """Whether it is a text, a sequence of texts, or a sequence of features with a text under "text"."""
    if isinstance(feature, tfds.features.Sequence):
        feature = feature.feature
    if isinstance(feature, tfds.features.FeaturesDict):
        feature = dict(feature.items()).get("text")
    return isinstance(feature, tfds.features.Text)


def _texts(value: Any, where: str) -> str | list[str]:
    if isinstance(value, dict):
        value = value["text"]
    try:
        if isinstance(value, bytes | np.bytes_):
            return value.decode()
        return value if isinstance(value, str) else [text if isinstance(text, str) else text.decode() for text in value]
    except UnicodeDecodeError as error:
        raise BadRecord(Cause.ENCODING, f"{where} has a caption that is not UTF-8 text ({error})") from error

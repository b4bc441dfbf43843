"""Captions to token ids: system prompts, tokenisers, padding.

The ids of a caption are one start token, then the tokens of system prompt + caption, cut at the budget; no end token,
padding on the right. That is how the SVG-T2I release feeds Gemma-2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_ALIGN = (
    "You are an assistant designed to generate high-quality images with the highest degree of image-text alignment "
    "based on textual prompts. <Prompt Start> "
)
_BASE = "You are an assistant designed to generate high-quality images based on user prompts. <Prompt Start> "

# As in the release's sampling script. Training uses "base" for plain records and "align" for detailed captions.
SYSTEM_PROMPTS = {
    "align": _ALIGN,
    "base": _BASE,
    "aesthetics": (
        "You are an assistant designed to generate high-quality images with highest degree of aesthetics "
        "based on user prompts. <Prompt Start> "
    ),
    "real": (
        "You are an assistant designed to generate superior images with the superior degree of image-text alignment "
        "based on textual prompts or user prompts. <Prompt Start> "
    ),
    "4grid": (
        "You are an assistant designed to generate four high-quality images with highest degree of aesthetics "
        "arranged in 2x2 grids based on user prompts. <Prompt Start> "
    ),
    "empty": "",
    "enhance": _ALIGN,
}

# The release's evaluation script differs in one of them.
EVALUATION_SYSTEM_PROMPTS = SYSTEM_PROMPTS | {"enhance": _BASE}


def full_prompt(caption: str, system_prompt: str, prompts: dict[str, str] | None = None) -> str:
    """System prompt + caption. An empty caption stays empty: it stands for "no caption" and gets no system prompt.

    Args:
      caption: what the image shows.
      system_prompt: a key of `prompts`.
      prompts: the texts by name, `SYSTEM_PROMPTS` if None.
    """
    prompts = SYSTEM_PROMPTS if prompts is None else prompts
    if system_prompt not in prompts:
        nearest = difflib.get_close_matches(system_prompt, prompts, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown system prompt '{system_prompt}'; did you mean '{nearest}'? Known: {', '.join(prompts)}"
        )
    return prompts[system_prompt] + caption if caption else ""


class Tokenizer(Protocol):
    """What batches and sampling need of a tokeniser.

    Attributes:
      pad_id: fills what is not valid.
      bos_id: the start token, first of every text.
      eos_id: the end token: where a language model stops; no text is encoded with it.
      vocab_size: every id is below it.
    """

    pad_id: int
    bos_id: int
    eos_id: int
    vocab_size: int

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[list[list[int]], list[bool]]:
        """Ids of each text, start token first, at most `max_length`; and which texts were cut."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are left out."""
        ...


class ByteTokenizer:
    """The stand-in where no tokeniser is given: pad 0, end 1 and start 2 as in Gemma, then UTF-8 bytes offset by 3."""

    pad_id, eos_id, bos_id = 0, 1, 2
    vocab_size = 3 + 256

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[list[list[int]], list[bool]]:
        """Ids of each text, start token first, at most `max_length`; and which texts were cut."""
        # Lone surrogates, which JSON can carry, have no UTF-8 form: they become "?".
        return _with_bos(
            [[byte + 3 for byte in text.encode("utf-8", "replace")] for text in texts], self.bos_id, max_length
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are left out, and so are ids beyond the bytes."""
        return bytes(i - 3 for i in ids if 3 <= i < self.vocab_size).decode("utf-8", "replace")


class FolderTokenizer:
    """A transformers tokeniser from a local folder."""

    def __init__(self, folder: Path) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ImportError(
                f"the tokeniser in {folder} needs transformers; run `pip install transformers`"
            ) from error
        # transformers makes an empty tokeniser of a folder that has none.
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            raise ValueError(
                f"tokeniser folder {folder} has neither tokenizer.json nor tokenizer.model; expected one of them"
            )
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # transformers reports a broken folder as OSError, ValueError, KeyError and others.
        except Exception as error:
            raise ValueError(
                f"the tokeniser in {folder} cannot be read by transformers ({type(error).__name__}: {error}); "
                "save it again with save_pretrained"
            ) from error
        for name in ("pad_token", "bos_token", "eos_token"):
            if getattr(self._tokenizer, f"{name}_id") is None:
                raise ValueError(f"the tokeniser in {folder} has no {name}; add one to its tokenizer_config.json")
        self.pad_id: int = self._tokenizer.pad_token_id
        self.bos_id: int = self._tokenizer.bos_token_id
        self.eos_id: int = self._tokenizer.eos_token_id
        self.vocab_size: int = len(self._tokenizer)
        # The first call clears, in place, padding and truncation that the folder may ask for: before threads share it.
        self.encode([""], max_length=1)

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[list[list[int]], list[bool]]:
        """Ids of each text, start token first, at most `max_length`; and which texts were cut."""
        texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        # Cut by us, because setting the tokeniser's own truncation changes it in place too.
        ids = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return _with_bos(ids, self.bos_id, max_length)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


def load_tokenizer(folder: str | Path | None) -> Tokenizer:
    """The tokeniser in a local `transformers` folder, or the byte-level stand-in if None.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: the folder holds no usable tokeniser, or one without start, end or padding token.
    """
    if folder is None:
        return ByteTokenizer()
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"tokeniser folder {folder} does not exist; Gemma-2 is gated: accept its licence at "
            f"https://huggingface.co/google/gemma-2-2b and run `hf download google/gemma-2-2b --local-dir {folder}`, "
            "or give no folder for the byte-level stand-in"
        )
    return FolderTokenizer(folder)


def train_word_tokenizer(captions: Iterable[str], folder: str | Path, vocab_size: int = 2048) -> Tokenizer:
    """Trains a small tokeniser whose words are single tokens, and saves it as a `transformers` folder.

    Byte-level BPE (any text can be encoded) on the captions and the system prompts; with room in the vocabulary,
    merging goes on until each of their words is one token. Ids: pad 0, end 1, start 2, as in Gemma. The same captions
    give the same files.

    Args:
      captions: the texts to learn words from.
      folder: where to save; `load_tokenizer` reads it back.
      vocab_size: upper limit; at least 259 (three special tokens and all bytes).
    """
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(special) + len(alphabet):
        raise ValueError(
            f"vocab_size={vocab_size} is below {len(special) + len(alphabet)}: 3 special tokens and all bytes"
        )
    tokenizer = FastTokenizer(models.BPE())
    # With the prefix space the first word of a text is the same token as anywhere else.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator([*SYSTEM_PROMPTS.values(), *captions], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", padding_side="right"
    ).save_pretrained(folder)
    return load_tokenizer(folder)


def padded_length(ids: Sequence[Sequence[int]], multiple: int = 8) -> int:
    """Length of the longest list, rounded up: what the release pads a batch to when sampling."""
    return -(-max(map(len, ids)) // multiple) * multiple


def pad_tokens(ids: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Pads on the right.

    Returns:
      tokens int32 [texts, length], num_tokens int32 [texts]: position i of a row is valid where i < num_tokens.
    """
    tokens = np.full((len(ids), length), pad_id, np.int32)
    for row, values in zip(tokens, ids, strict=True):
        row[: len(values)] = values
    return tokens, np.array([len(values) for values in ids], np.int32)


def _with_bos(ids: Sequence[list[int]], bos_id: int, max_length: int) -> tuple[list[list[int]], list[bool]]:
    room = max_length - 1
    return [[bos_id, *values[:room]] for values in ids], [len(values) > room for values in ids]

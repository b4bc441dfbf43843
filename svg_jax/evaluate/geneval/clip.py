"""CLIP through `transformers`, with OpenAI's own preprocessing: what GenEval tells colours with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float
from PIL import Image

from svg_jax.convert.pretrained import load_pretrained
from svg_jax.evaluate.torch_networks import check_finite, computing, import_torch, one_thread, read_config, torch_device

Item = TypeVar("Item")

SOURCE = (
    "`hf download openai/clip-vit-large-patch14 config.json model.safetensors tokenizer.json tokenizer_config.json "
    "vocab.json merges.txt special_tokens_map.json --local-dir clip`, and name that folder with --clip"
)
"""How to get it."""

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
AT_ONCE = 64  # texts or images, where they go together

VIT_L_14 = {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14, "image_size": 224}
"""Of its vision tower, as a `config.json` has it."""

_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 32, "image_size": 224}  # of the library


class Clip:
    """CLIP; GenEval's is OpenAI's ViT-L/14. It runs in float32, officially under autocast to float16 on a GPU.

    On a CPU texts and images go through one by one, in one thread, so that nothing depends on what they are given with.
    On others they go together, and agree with that to rounding.
    """

    def __init__(self, network: Any, tokenizer: Any, device: Any, name: str) -> None:
        self._network, self._tokenizer = network.to(device), tokenizer
        self._device, self._name = device, name

    @classmethod
    def load(cls, path: str, *, device: str | None = None) -> Clip:
        """From a folder of transformers that holds the tokenizer too.

        Args:
            path: Local.
            device: Of PyTorch; by default the first GPU where there is one.

        Raises:
            FileNotFoundError: Nothing is there; the message says how to get it.
            ValueError: It is another network, damaged, or of another activation than OpenAI's.
            ImportError: PyTorch is not installed.
        """
        import_torch()
        where = torch_device(device)
        config = read_config(path, "clip", SOURCE)
        for tower in ("text_config", "vision_config"):
            activation = (config.get(tower) or {}).get("hidden_act", "quick_gelu")  # the library's default
            if activation != "quick_gelu":
                raise ValueError(
                    f"{path}: its {tower} says hidden_act {activation}, and OpenAI's CLIP has quick_gelu, which tells "
                    f"other colours: {SOURCE}"
                )
        network = load_pretrained("CLIPModel", path, pretrained_model_name_or_path=path)
        return cls(network, _tokenizer(path, network.config.text_config.vocab_size), where, path)

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]:
        """Projections, float32, not normalised; what is longer than the network's context is cut."""
        length = self._network.config.text_config.max_position_embeddings

        def embed(some: Sequence[str]) -> Any:
            tokens = self._tokenizer(
                list(some), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            )
            # No mask, as in OpenAI's: the network is causal, and reads the result off at the end of the text.
            return self._network.get_text_features(input_ids=tokens.input_ids.to(self._device))

        return self._embed(embed, texts)

    def embed_images(self, images: Sequence[Image.Image]) -> Float[np.ndarray, "images dim"]:
        """Projections, float32, not normalised; images of any sizes."""
        torch = import_torch()
        side = self._network.config.vision_config.image_size

        def embed(some: Sequence[Image.Image]) -> Any:
            pixels = np.stack([preprocess(image, side) for image in some]).transpose(0, 3, 1, 2)
            return self._network.get_image_features(pixel_values=torch.from_numpy(pixels).to(self._device))

        return self._embed(embed, images)

    def _embed(self, embed: Any, items: Sequence[Any]) -> Float[np.ndarray, "items dim"]:
        found = [np.zeros((0, self._network.config.projection_dim), np.float32)]
        with computing(self._device), one_thread(self._device):
            for some in _groups(items, 1 if self._device.type == "cpu" else AT_ONCE):
                vectors = embed(some).pooler_output.float()
                check_finite(vectors, self._name)
                found.append(vectors.cpu().numpy())
        return np.concatenate(found)


def vision_sizes(path: str) -> dict[str, int]:
    """Those of `VIT_L_14` in a folder of transformers; needs no torch.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is another network, or damaged.
    """
    vision = read_config(path, "clip", SOURCE).get("vision_config") or {}
    return {name: vision.get(name, default) for name, default in _DEFAULTS.items()}


def preprocess(image: Image.Image, side: int) -> Float[np.ndarray, "side side 3"]:
    """The shorter side resized to `side` by Pillow's bicubic filter, the centre square, normalised; float32."""
    width, height = image.size
    size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    left, top = (round((length - side) / 2) for length in size)
    square = image.convert("RGB").resize(size, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    pixels = np.asarray(square, np.float32) / 255
    return (pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)


def _tokenizer(path: str, vocab_size: int) -> Any:
    """The tokenizer of a folder; where files are missing, transformers would make one that knows no word."""
    import transformers

    present = {file.name for file in Path(path).iterdir()}
    if "tokenizer.json" not in present and not {"vocab.json", "merges.txt"} <= present:
        raise ValueError(f"{path} has no tokenizer (tokenizer.json, or vocab.json and merges.txt): {SOURCE}")
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # whatever transformers and tokenizers say about damaged files
        raise ValueError(f"{path} has a tokenizer that cannot be read ({type(error).__name__}): {SOURCE}") from error
    if len(tokenizer) != vocab_size:
        raise ValueError(
            f"{path} has a tokenizer of {len(tokenizer)} words, and its network knows {vocab_size}: {SOURCE}"
        )
    return tokenizer


def _groups(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[first : first + size] for first in range(0, len(items), size))

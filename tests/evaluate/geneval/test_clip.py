"""CLIP: OpenAI's preprocessing, its activation, and the whole at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from svg_jax.evaluate.geneval.clip import MEAN, STD, VIT_L_14, Clip, preprocess, vision_sizes
from tests.evaluate.tiny_networks import tiny_clip, tiny_detector

TEXTS = ["a photo of a red bench", "a photo of a blue-colored bench", "a photo of a green object", "word " * 60]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder: str) -> Clip:
    return Clip.load(folder, device="cpu")


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    shapes = ((40, 80, 3), (9, 5, 3), (32, 32, 3), (1, 60, 3))
    return [Image.fromarray(rng.integers(0, 256, shape, np.uint8)) for shape in shapes]


def test_the_shorter_side_is_resized_and_the_centre_kept() -> None:
    image = Image.linear_gradient("L").resize((90, 60)).convert("RGB")
    found = preprocess(image, 30) * STD + MEAN
    resized = image.resize((45, 30), Image.Resampling.BICUBIC)
    # (45 - 30) / 2 = 7.5 columns are cut, rounded to the even neighbour as torchvision's centre crop does.
    expected = np.asarray(resized, np.float32)[:, 8:38] / 255
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert preprocess(image.resize((30, 31)), 30).shape == (30, 30, 3)
    assert preprocess(image.resize((3, 50)), 30).shape == (30, 30, 3)


def test_images_as_transformers_embeds_them(folder: str, clip: Clip) -> None:
    network = CLIPModel.from_pretrained(folder).eval()
    images = pictures()
    pixels = torch.stack([torch.from_numpy(preprocess(image, 32)).permute(2, 0, 1) for image in images])
    with torch.no_grad():
        expected = network.get_image_features(pixel_values=pixels).pooler_output.numpy()
    found = clip.embed_images(images)
    assert found.dtype == np.float32
    assert found.shape == (4, 24)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_texts_as_transformers_embeds_them(folder: str, clip: Clip) -> None:
    network, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    with torch.no_grad():
        expected = [
            network.get_text_features(**tokenizer(text, truncation=True, max_length=77, return_tensors="pt"))
            for text in TEXTS
        ]
    found = clip.embed_texts(TEXTS)
    for one, other in zip(found, expected, strict=True):  # without any padding there, the full length here
        np.testing.assert_allclose(one, other.pooler_output[0].numpy(), rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(found[0] - found[1]) > 1e-2


def test_embeddings_do_not_depend_on_the_batch(clip: Clip) -> None:
    images = pictures()
    np.testing.assert_array_equal(clip.embed_images(images)[2:3], clip.embed_images(images[2:3]))
    np.testing.assert_array_equal(clip.embed_texts(TEXTS)[1:2], clip.embed_texts(TEXTS[1:2]))
    assert clip.embed_images([]).shape == (0, 24)


def test_embeddings_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    folder = tiny_clip(tmp_path / "clip")
    network = CLIPModel.from_pretrained(folder)
    for value in (torch.nan, 3e38):  # damaged, and too large to compute with
        with torch.no_grad():
            network.visual_projection.weight[0] = value
        network.save_pretrained(folder)
        if value != 3e38:
            assert "1 not finite: visual_projection.weight" in refusal(folder)
    damaged = Clip.load(folder, device="cpu")
    assert np.isfinite(damaged.embed_texts(TEXTS)).all()
    with pytest.raises(ValueError, match=f"the network of {folder} gives numbers that are not finite"):
        damaged.embed_images(pictures())


def test_sizes_are_told_without_loading(tmp_path: Path) -> None:
    expected = {"hidden_size": 32, "num_hidden_layers": 2, "patch_size": 8, "image_size": 32}
    assert vision_sizes(tiny_clip(tmp_path / "tiny")) == expected
    CLIPConfig(vision_config={**VIT_L_14, "num_attention_heads": 16}).save_pretrained(tmp_path / "large")
    assert vision_sizes(str(tmp_path / "large")) == VIT_L_14
    CLIPConfig().save_pretrained(tmp_path / "base")
    assert vision_sizes(str(tmp_path / "base"))["patch_size"] == 32


def refusal(path: Path | str, error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as told:
        Clip.load(str(path), device="cpu")
    assert "\n" not in str(told.value)
    return str(told.value)


def test_what_is_not_openais_clip_is_refused(tmp_path: Path) -> None:
    assert "openai/clip-vit-large-patch14" in refusal(tmp_path / "none", FileNotFoundError)
    assert "of the type mask2former, and a clip is needed" in refusal(tiny_detector(tmp_path / "detector"))
    gelu = refusal(tiny_clip(tmp_path / "gelu", activation="gelu"))
    assert "text_config says hidden_act gelu, and OpenAI's CLIP has quick_gelu" in gelu


def test_a_folder_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = Path(tiny_clip(tmp_path / "clip"))
    for file in (*folder.glob("*token*"), *folder.glob("vocab*"), *folder.glob("merges*")):
        file.unlink()
    assert "no tokenizer (tokenizer.json, or vocab.json and merges.txt)" in refusal(folder)
    (folder / "tokenizer.json").write_text("{")
    assert "cannot be read" in refusal(folder)


def test_a_tokenizer_of_another_network_is_refused(tmp_path: Path) -> None:
    folder = Path(tiny_clip(tmp_path / "clip"))
    CLIPTokenizer(vocab={"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}, merges=[]).save_pretrained(
        folder
    )
    assert "a tokenizer of 4 words, and its network knows 514" in refusal(folder)


def test_words_are_read_from_the_older_files_too(tmp_path: Path, folder: str, clip: Clip) -> None:
    older = Path(tiny_clip(tmp_path / "clip"))
    vocabulary = json.loads((older / "tokenizer.json").read_text())["model"]["vocab"]
    (older / "tokenizer.json").unlink()
    (older / "vocab.json").write_text(json.dumps(vocabulary))
    (older / "merges.txt").write_text("#version: 0.2\n")
    np.testing.assert_array_equal(Clip.load(str(older), device="cpu").embed_texts(TEXTS), clip.embed_texts(TEXTS))


def test_an_activation_that_is_not_named_is_the_librarys_own(tmp_path: Path) -> None:
    folder = Path(tiny_clip(tmp_path / "clip"))
    config = json.loads((folder / "config.json").read_text())
    for tower in ("text_config", "vision_config"):
        del config[tower]["hidden_act"]
    (folder / "config.json").write_text(json.dumps(config))
    assert Clip.load(str(folder), device="cpu").embed_texts(["a"]).shape == (1, 24)

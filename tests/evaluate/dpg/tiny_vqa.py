"""Tiny VQA models of random weights, in the folders that `transformers` writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = ["yes", "no", "is", "there", "a", "car", "red", "in", "the", "picture", "big", "user", "assistant"]
WORDS += ["answer", "with", "or", "only", "?", ".", ":", "<image>"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
DECODE = len(VOCABULARY)  # that a BLIP answer begins with, and its tokenizer does not know
SIDE, PATCH = 16, 8
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CHAT = (
    "{% for message in messages %}{{ message['role'] }} : {% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}<image> {% else %}{{ block['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)


def tiny_blip(folder: Path, says: Sequence[str] = WORDS) -> Path:
    """BLIP's question answering, in these words."""
    from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    text = {**SIZES, "vocab_size": DECODE + 2, "max_position_embeddings": 32, "projection_dim": 16}
    ids = {"bos_token_id": DECODE, "sep_token_id": VOCABULARY["[SEP]"], "pad_token_id": 0}
    vision = {**SIZES, "image_size": SIDE, "patch_size": PATCH, "projection_dim": 16}
    model = BlipForQuestionAnswering(BlipConfig(text_config={**text, **ids}, vision_config=vision, projection_dim=16))
    images = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return _saved(model, BlipProcessor(images, BertTokenizer(vocab=VOCABULARY)), folder, says)


def tiny_llava(folder: Path) -> Path:
    """A chat model that sees."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    ids = {"bos_token_id": None, "eos_token_id": VOCABULARY["[SEP]"], "pad_token_id": 0}
    text = LlamaConfig(**SIZES, **ids, vocab_size=len(VOCABULARY), max_position_embeddings=128)
    vision = CLIPVisionConfig(**SIZES, image_size=SIDE, patch_size=PATCH)
    seen = {"image_token_index": VOCABULARY["<image>"], "image_seq_length": (SIDE // PATCH) ** 2}
    config = LlavaConfig(vision_config=vision, text_config=text, **seen)
    words = Tokenizer(WordLevel(VOCABULARY, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = Lowercase(), Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        pad_token="[PAD]",
        eos_token="[SEP]",
        additional_special_tokens=["<image>"],
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    return _saved(LlavaForConditionalGeneration(config), processor, folder)


def _saved(model: Any, processor: Any, folder: Path, says: Sequence[str] = WORDS) -> Path:
    """With weights so large that answers depend on what is asked."""
    import torch

    others = [number for number in range(DECODE + 2) if number not in [VOCABULARY[word] for word in says]]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.normal_(0.0, 1.0, generator=generator)
            if name.endswith("predictions.bias"):  # BLIP would say nothing but special tokens
                value[others] = -100.0
            if name == "lm_head.weight":  # an image in an answer would want pixels
                value[VOCABULARY["<image>"]] = 0.0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder

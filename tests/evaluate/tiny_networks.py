"""GenEval's networks at a tiny size with random weights, in folders as transformers writes them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Mask2FormerConfig, Mask2FormerForUniversalSegmentation

# Patches are four times as large as the real network's, as it sees 800 px a side whatever the image.
SWIN = {
    "patch_size": 16,
    "embed_dim": 16,
    "depths": [2, 1, 2, 1],
    "num_heads": [1, 2, 2, 4],
    "window_size": 4,
    "mlp_ratio": 2.0,
}
DETECTOR = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 48,
    "encoder_layers": 2,
    "decoder_layers": 4,
    "num_attention_heads": 4,
    "dim_feedforward": 40,
    "num_queries": 12,
}


def tiny_detector(folder: Path, *, num_labels: int = 80, seed: int = 0) -> str:
    """A Mask2Former that is sure of its classes, so that some of its detections pass any threshold."""
    torch.manual_seed(seed)
    swin = {"model_type": "swin", "out_features": ["stage1", "stage2", "stage3", "stage4"], **SWIN}
    config = Mask2FormerConfig(backbone_config=swin, num_labels=num_labels, **DETECTOR)
    network = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "relative_position_bias_table" in name:  # would be zeros
                parameter.normal_(std=0.5)
        network.class_predictor.weight.normal_(std=2.0)
        network.model.transformer_module.decoder.mask_predictor.mask_embedder.layers[2].layers[0].weight.normal_(
            std=2.0
        )
    network.save_pretrained(folder)
    return str(folder)


def tiny_clip(folder: Path, *, seed: int = 0, activation: str = "quick_gelu") -> str:
    """A CLIP whose tokenizer knows single letters."""
    torch.manual_seed(seed)
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = {**sizes, **special, "vocab_size": len(words), "max_position_embeddings": 77, "hidden_act": activation}
    vision = {**sizes, "image_size": 32, "patch_size": 8, "hidden_act": activation}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)

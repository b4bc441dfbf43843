"""What scoring GenEval costs, with networks of the real size and random weights: `python -m benchmarks.geneval`.

The two networks alone, then the whole command on images of two numbers: its speed is that of the images that the second
has more, and its memory must not grow with them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from svg_jax.evaluate.geneval.clip import Clip
from svg_jax.evaluate.geneval.command import devices
from svg_jax.evaluate.geneval.detector import Detector

SWIN_S = {"model_type": "swin", "depths": [2, 2, 18, 2], "out_features": ["stage1", "stage2", "stage3", "stage4"]}
WIDTH_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VOCABULARY = 49408
TEXT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


def write_networks(folder: Path) -> tuple[str, str]:
    """Mask2Former with Swin-S, sure of its classes so that there is something to judge, and CLIP ViT-L/14."""
    torch.manual_seed(0)
    detector = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=SWIN_S, num_labels=80))
    with torch.no_grad():
        detector.class_predictor.weight.normal_(std=0.25)
    detector.save_pretrained(folder / "detector")
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [f"word{i}" for i in range(len(words), VOCABULARY - 2)] + ["<|startoftext|>", "<|endoftext|>"]
    special = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 1}
    vision = {**WIDTH_L, "image_size": 224, "patch_size": 14, "hidden_act": "quick_gelu"}
    text = {**TEXT_L, **special, "hidden_act": "quick_gelu"}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)).save_pretrained(folder / "clip")
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder / "clip")
    return str(folder / "detector"), str(folder / "clip")


def picture(seed: int, side: int) -> Image.Image:
    """Random blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST)


def write_images(folder: Path, prompts: int, side: int, name: str) -> str:
    """So many prompts with four images each, in the official layout; every one asks for a colour of `name`."""
    for number in range(prompts):
        samples = folder / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        include = [{"class": name, "count": 1, "color": "red"}]
        metadata = {"tag": "colors", "include": include, "prompt": f"a photo of a red {name}"}
        (samples.parent / "metadata.jsonl").write_text(json.dumps(metadata))
        for sample in range(4):
            picture(4 * number + sample, side).save(samples / f"{sample:04d}.png")
    return str(folder)


def score(images: str, out: Path, networks: tuple[str, str], flags: list[str]) -> tuple[float, int]:
    """Seconds, and peak bytes of the largest process, of the command."""
    flags = ["--images", images, "--out", str(out), "--detector", networks[0], "--clip", networks[1], *flags]
    start = time.perf_counter()
    command = [sys.executable, "-m", "svg_jax.evaluate", "geneval", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("the command failed: its error stands above")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def seconds(work: Callable[[], object], runs: int) -> float:
    """Of one run, in the median."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--prompts", type=int, default=2, help="of the smaller run, or one a worker; four images each, then three times"
    )
    parser.add_argument("--side", type=int, default=1024, help="pixels of an image")
    parser.add_argument("--num-workers", type=int, help="of the command; by default its own choice")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each network")
    parser.add_argument("--device", help="by default a GPU where there is one")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        networks = write_networks(folder)
        detect, clip = Detector.load(networks[0], device=args.device), Clip.load(networks[1], device=args.device)
        image = picture(0, args.side)
        found = detect([image], min_score=0.3)[0]
        best = max(found, key=lambda name: found[name][0].score)
        crop = image.crop((0, 0, args.side // 2, args.side // 3))
        alone = {
            "Mask2Former, an image": seconds(lambda: detect([image], min_score=0.3), args.runs),
            "Mask2Former, an image, all 100 masks": seconds(lambda: detect([image], min_score=0.0), 1),
            "CLIP, an object": seconds(lambda: clip.embed_images([crop]), args.runs),
            "CLIP, a text": seconds(lambda: clip.embed_texts(["a photo of a red bench"]), args.runs),
        }
        del detect, clip
        print("| | seconds |\n|---|---|")
        for what, value in alone.items():
            print(f"| {what} | {value:.3f} |")

        # The same workers in both runs, all of them busy: the command starts no more than it has prompts.
        workers = len(devices(args.device, args.num_workers))
        flags = ["--num-workers", str(workers), *(["--device", args.device] if args.device else [])]
        fewest = max(args.prompts, workers)
        counts = (fewest, 3 * fewest)
        print("\n| command | seconds | peak memory |\n|---|---|---|")
        taken: list[tuple[float, int]] = []
        for count in counts:
            images = write_images(folder / f"images{count}", count, args.side, best)
            taken.append(score(images, folder / f"out{count}", networks, flags))
            print(f"| {4 * count} images | {taken[-1][0]:.1f} | {taken[-1][1] / 2**30:.2f} GiB |")
        more = 4 * (counts[1] - counts[0]) / (taken[1][0] - taken[0][0])
        print(f"\n{more:.2f} images/s once it runs: {workers} workers, {os.cpu_count()} CPU cores, {args.side} px.")
    if load > 0.5:
        print(f"The machine was busy before the start (load {load:.1f}): do not quote these numbers.")


if __name__ == "__main__":
    main()

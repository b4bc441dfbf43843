"""Answers to questions about pictures by a model of `transformers` (extra `eval`), as a judge of DPG-Bench.

Two kinds of models: BLIP's question answering (arXiv 2201.12086, the nearest to the official mPLUG), which is asked the
question as it stands, and chat models that see, which are told to answer by yes or no. Tokens are chosen greedily.

All pictures are asked one question at a time: prompts of one length need no padding, which would change what models
answer. BLIP attends to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from svg_jax.evaluate.torch_networks import computing, torch_device

BLIP = "BlipForQuestionAnswering"  # the one architecture without a chat
INSTRUCTION = "{question} Answer with yes or no only."
MAX_NEW_TOKENS = 8
SOURCE = (
    "get one with `hf download Salesforce/blip-vqa-capfilt-large --local-dir blip-vqa`, or a chat model such as "
    "llava-hf/llava-1.5-7b-hf, and give that folder as --vqa"
)


class VQA:
    """A model and its processor."""

    def __init__(self, model: Any, processor: Any, *, chats: bool) -> None:
        """Of `transformers`, on a device.

        Args:
            model: What generates.
            processor: What makes its inputs.
            chats: Whether questions are put into its chat template.
        """
        self.model = model
        self.processor = processor
        self.chats = chats

    @classmethod
    def load(cls, folder: str, *, device: str | None = None) -> VQA:
        """From a folder of `transformers`, in the type that its weights are saved in.

        Args:
            folder: With model, tokenizer and processor.
            device: As torch names it; by default a GPU where there is one.

        Raises:
            ImportError: torch is not installed.
            FileNotFoundError: There is no such folder.
            ValueError: It holds something else, or not all weights; or there is no such device.
        """
        check_folder(folder)
        place = torch_device(device)
        import transformers
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        try:
            config = AutoConfig.from_pretrained(folder)
            processor = AutoProcessor.from_pretrained(folder)
            architecture = (config.architectures or ["nothing"])[0]
            kind: Any
            if not (chats := architecture != BLIP):
                kind = transformers.BlipForQuestionAnswering
            elif getattr(processor, "chat_template", None):
                kind = AutoModelForImageTextToText
            else:
                raise ValueError(f"it is {architecture} without a chat template, and not {BLIP}")
            model, info = kind.from_pretrained(folder, dtype="auto", output_loading_info=True)
        except ImportError as error:  # some models' processors need torchvision, or more
            raise ImportError(f"{folder} needs what is not installed: {str(error).strip().splitlines()[0]}") from error
        except Exception as error:  # of safetensors, pickle, torch and transformers, each with kinds of its own
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{folder} cannot be loaded as a VQA model ({first}): {SOURCE}") from error
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{folder} lacks {len(missing)} weights of {architecture}, the first: {missing[0]}: download it again"
            )
        return cls(model.to(place).eval(), processor, chats=chats)

    def __call__(self, pictures: Sequence[Image.Image], question: str) -> list[str]:
        """The answer to one question for each of some RGB pictures of one size, as the model words it."""
        inputs = self._inputs(pictures, question).to(self.model.device, self.model.dtype)
        with computing(self.model.device):  # or what the weights are saved in
            tokens = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, num_beams=1)
        if self.chats:  # which repeat the prompt before their answer
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]

    def _inputs(self, pictures: Sequence[Image.Image], question: str) -> Any:
        if not self.chats:
            return self.processor(images=list(pictures), text=[question] * len(pictures), return_tensors="pt")
        text = {"type": "text", "text": INSTRUCTION.format(question=question)}
        turns = [[{"role": "user", "content": [{"type": "image", "image": image}, text]}] for image in pictures]
        return self.processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )


def check_folder(folder: str) -> None:
    """Whether there is one at all.

    Raises:
        FileNotFoundError: There is not.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no folder of a VQA model (there is no config.json in it): {SOURCE}")

"""Answers of tiny models against a loop of single forward passes, written out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from svg_jax.evaluate.__main__ import main
from svg_jax.evaluate.dpg.files import read_asked, read_pictures
from svg_jax.evaluate.dpg.rules import normalised
from svg_jax.evaluate.dpg.vqa import INSTRUCTION, MAX_NEW_TOKENS, VQA
from svg_jax.evaluate.grids import grid_of
from tests.evaluate.dpg.tiny_vqa import DECODE, VOCABULARY, tiny_blip, tiny_llava

torch = pytest.importorskip("torch")

QUESTIONS = ("Is there a car in the picture?", "Is the car red?", "Is there no car?", "Is the picture big?")
COLORS = ("red", "blue", "white", "#123456")
TABLE = "item_id,text,proposition_id,dependency,tuple,question_natural_language\n" + "".join(
    f"{item_id},A car,{number},0,entity - whole (car),{question}\n"
    for item_id in ("car1", "car2")
    for number, question in enumerate(QUESTIONS, start=1)
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """More only wait for one another in networks this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vqa")
    tiny_blip(folder / "blip")
    tiny_llava(folder / "llava")
    return folder


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    gradient = Image.linear_gradient("L").resize((24, 24))
    return [
        Image.composite(Image.new("RGB", (24, 24), color), Image.new("RGB", (24, 24)), gradient) for color in COLORS
    ]


def blip_tokens(vqa: VQA, picture: Image.Image, question: str) -> list[int]:
    """The question is read together with the picture, and the decoder attends to what was read."""
    model, inputs = vqa.model, vqa.processor(images=picture, text=question, return_tensors="pt")
    seen = model.vision_model(pixel_values=inputs["pixel_values"])[0]
    read = model.text_encoder(input_ids=inputs["input_ids"], encoder_hidden_states=seen)[0]
    tokens = [DECODE]
    for _ in range(MAX_NEW_TOKENS):
        logits = model.text_decoder(input_ids=torch.tensor([tokens]), encoder_hidden_states=read).logits
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == VOCABULARY["[SEP]"]:
            break
    return tokens


def llava_tokens(vqa: VQA, picture: Image.Image, question: str) -> list[int]:
    """The prompt goes on, a token at a time."""
    prompt = f"user : <image> {INSTRUCTION.format(question=question)} assistant :"
    inputs = vqa.processor(images=picture, text=prompt, return_tensors="pt")
    tokens = inputs["input_ids"]
    start = tokens.shape[1]
    for _ in range(MAX_NEW_TOKENS):
        logits = vqa.model(input_ids=tokens, pixel_values=inputs["pixel_values"]).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        if tokens[0, -1] == VOCABULARY["[SEP]"]:
            break
    return tokens[0, start:].tolist()


@pytest.mark.parametrize(("kind", "expected"), [("blip", blip_tokens), ("llava", llava_tokens)])
def test_answers(folder: Path, pictures: list[Image.Image], kind: str, expected: Callable[..., list[int]]) -> None:
    vqa = VQA.load(str(folder / kind), device="cpu")
    found = {question: vqa(pictures, question) for question in QUESTIONS}
    with torch.inference_mode():
        for question, answers in found.items():
            for picture, answer in zip(pictures, answers, strict=True):
                tokens = expected(vqa, picture, question)
                assert answer == vqa.processor.decode(tokens, skip_special_tokens=True).strip()
                assert vqa([picture], question) == [answer]  # whatever is asked together
    assert any(len(set(answers)) > 1 for answers in found.values())  # pictures are looked at
    assert len({tuple(answers) for answers in found.values()}) > 1  # and questions read


@pytest.fixture(scope="module")
def questions(pictures: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About two grids of four pictures each."""
    folder = tmp_path_factory.mktemp("questions")
    (folder / "grids").mkdir()
    for item_id, some in (("car1", pictures), ("car2", pictures[::-1])):
        grid_of(some).save(folder / "grids" / f"{item_id}.png")
    (folder / "table.csv").write_text(TABLE)
    main(["dpg", "questions", f"--images={folder / 'grids'}", f"--csv={folder / 'table.csv'}", f"--out={folder}"])
    return folder / "questions.jsonl"


@pytest.fixture(scope="module")
def answers(folder: Path, questions: Path) -> bytes:
    """Of one process."""
    main(["dpg", "answer", f"--questions={questions}", f"--vqa={folder / 'blip'}", f"--out={folder / 'answers'}"])
    return (folder / "answers" / "answers.jsonl").read_bytes()


def test_the_command_writes_down_what_the_model_says(folder: Path, questions: Path, answers: bytes) -> None:
    vqa = VQA.load(str(folder / "blip"), device="cpu")
    for asked, line in zip(read_asked(questions), answers.splitlines(), strict=True):
        row = json.loads(line)
        (answer,) = vqa([read_pictures([asked])[asked.sample]], asked.question)
        assert row["key"] == asked.key
        assert row["answer"] in (answer, normalised(answer))


def test_folders_that_hold_something_else(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(FileNotFoundError, match=r"is no folder of a VQA model .*: get one with `hf download"):
        VQA.load(str(tmp_path))
    silent = tiny_llava(tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"it is LlavaForConditionalGeneration without a chat template, and not Blip"):
        VQA.load(str(silent))
    broken = tiny_blip(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights.pop("vision_model.post_layernorm.weight")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of Blip.*, the first: vision_model\.post_layernorm\.weight"):
        VQA.load(str(broken))
    save_file({name: value[..., :1].contiguous() for name, value in weights.items()}, broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"cannot be loaded as a VQA model \(.*\): get one with `hf download"):
        VQA.load(str(broken))
    (broken / "model.safetensors").write_bytes((folder / "blip" / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot be loaded as a VQA model \(.*\): get one with `hf download"):
        VQA.load(str(broken))
    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"cannot be loaded as a VQA model \(.*\): get one with `hf download"):
        VQA.load(str(broken))
    (broken / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"broken cannot be loaded as a VQA model"):
        VQA.load(str(broken))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r'pip install "svg_jax\[eval\]"'):
        VQA.load(str(folder / "blip"))

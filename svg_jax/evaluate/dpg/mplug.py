"""Answers the questions of DPG-Bench with mPLUG large, the official model, in the old environment that it needs.

    python mplug.py --questions questions.jsonl --out answers.jsonl

The file stands alone, so that it can be copied to where that environment is: Python 3.8 or newer, `modelscope` as
https://github.com/TencentQQGYLab/ELLA asks for it, and Pillow; nothing of svg_jax. Questions are asked one by one, as
there. Each answer is appended as it comes, and a run that is started again asks what is not answered yet. With several
GPUs, run `--shard 0/4 --out answers_0.jsonl`, `--shard 1/4 …` side by side: scoring takes any number of files.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import sys
from typing import Any, TextIO

MODEL = "damo/mplug_visual-question-answering_coco_large_en"
WEIGHTS = (".bin", ".pth", ".pt", ".ckpt", ".safetensors")  # endings of files that hold them
START = b'{"model": "'  # of every row that is written here


def main() -> None:
    """Answers what is not answered yet."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    flags.add_argument("--questions", required=True, help="as `python -m svg_jax.evaluate dpg questions` writes them")
    flags.add_argument("--out", required=True, help="file for the answers, which is continued where there is one")
    flags.add_argument("--model", default=MODEL, help="name at modelscope, or a folder (default: %(default)s)")
    flags.add_argument("--device", default="gpu", help="gpu, gpu:1, cpu (default: %(default)s)")
    flags.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th question from the I-th only")
    options = flags.parse_args()
    try:
        run(options)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def run(options: argparse.Namespace) -> None:
    """Answers what is not answered yet.

    Raises:
        ValueError: The files are not what they should be, a picture has changed since it was asked about, or the
            answers that are there are another model's.
        OSError: A file cannot be read or written.
        ImportError: There is no modelscope or no Pillow.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", options.shard)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"--shard '{options.shard}' is not I/N with I from 0 to below N, as in 0/4")
    with open(options.questions, "rb") as file:
        rows = read_rows(options.questions, file.read(), ("key", "image", "box", "question"))
    questions = rows[int(found[1]) :: int(found[2])]
    before, whole = answered(options.out)
    # A script's own folder stands first on the path, and modelscope imports modules of names that ours have too.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    ask, weights = load(options.model, options.device)
    origin = {"model": options.model.rstrip("/").split("/")[-1], "weights": weights}
    for answer in before:
        if answer["model"] != origin["model"] or answer["weights"] != weights:
            raise ValueError(
                "{} holds answers of {} ({}), and now it is {} ({}): choose another --out".format(
                    options.out, answer["model"], answer["weights"], origin["model"], weights
                )
            )
    done = {answer["key"] for answer in before}
    todo = [question for question in questions if question["key"] not in done]
    with open(options.out, "a", encoding="utf-8") as out:
        out.truncate(whole)
        num_failed = answer_all(todo, ask, origin, out)
    if num_failed:
        raise ValueError(f"{num_failed} questions could not be answered: run the same again to ask them once more")
    print(f"all {len(questions)} questions are answered in {options.out}")


def answer_all(todo: list[dict[str, Any]], ask: Any, origin: dict[str, str], out: TextIO) -> int:
    """Appends an answer a line; returns how many questions failed.

    Raises:
        ValueError: A picture has changed since it was asked about.
    """
    num_failed = 0
    opened: dict[str, Any] = {}  # the picture file that was read last
    for number, question in enumerate(todo, 1):
        path, box, text = question["image"], question["box"], question["question"]
        try:
            if path not in opened:
                opened = {path: read_picture(path)}
            content, picture = opened[path]
            changed = key(content, box, text) != question["key"]
            answer = "" if changed else ask(picture.crop(box), text)
        except Exception as error:  # a question that fails is not to end a run of hours
            num_failed += 1
            print(f"{path}: {text}: {error}", file=sys.stderr)
            continue
        if changed:
            raise ValueError(f"{path} has changed since `dpg questions` wrote about it: run that again")
        out.write(json.dumps(dict(origin, key=question["key"], answer=answer), ensure_ascii=False) + "\n")
        out.flush()
        if number % 100 == 0 or number == len(todo):
            print(f"{number} of {len(todo)} questions", flush=True)
    return num_failed


def read_picture(path: str) -> tuple[str, Any]:
    """SHA-256 of a file, and its picture."""
    from PIL import Image

    with open(path, "rb") as file:
        content = file.read()
    with Image.open(io.BytesIO(content)) as image:
        return hashlib.sha256(content).hexdigest(), image.convert("RGB")


def key(image: str, box: list[int], question: str) -> str:
    """What stands for a question about a part of the image file with this SHA-256 in `questions.jsonl`."""
    return hashlib.sha256(f"{image} {box} {question}".encode()).hexdigest()[:16]


def load(model: str, device: str) -> tuple[Any, str]:
    """The function (picture, question) -> answer, and 16 hexadecimal digits of the SHA-256 of the model's weights."""
    try:
        from modelscope.hub.snapshot_download import snapshot_download
        from modelscope.pipelines import pipeline
        from modelscope.utils.constant import Tasks
    except ImportError as error:
        raise ImportError(
            f"mPLUG needs modelscope ({error}): run this file in an environment with what the requirements of "
            "https://github.com/TencentQQGYLab/ELLA list"
        ) from error
    folder = model if os.path.isdir(model) else snapshot_download(model)
    answer = pipeline(Tasks.visual_question_answering, model=folder, device=device)
    return lambda picture, question: answer({"image": picture, "question": question})["text"], digest(folder)


def digest(folder: str) -> str:
    """Of the weights in a folder, in the order of their names."""
    total = hashlib.sha256()
    names = sorted(name for name in os.listdir(folder) if name.endswith(WEIGHTS))
    if not names:
        raise ValueError(f"{folder} holds no weights: give the folder of a model, or its name at modelscope")
    for name in names:
        with open(os.path.join(folder, name), "rb") as file:
            for block in iter(lambda: file.read(1 << 24), b""):
                total.update(block)
    return total.hexdigest()[:16]


def answered(path: str) -> tuple[list[dict[str, Any]], int]:
    """The answers of a run before, and how many bytes they take: a last line may have been cut off."""
    if not os.path.exists(path):
        return [], 0
    with open(path, "rb") as file:
        content = file.read()
    whole = content.rfind(b"\n") + 1
    cut_off = content[whole:]
    if cut_off[: len(START)] != START[: len(cut_off)]:
        raise ValueError(f"{path} ends with what is no answer: choose another --out")
    return read_rows(path, content[:whole], ("key", "answer", "model", "weights")), whole


def read_rows(path: str, content: bytes, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of a JSONL file, each with these keys."""
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line)
            missing = [name for name in names if name not in row]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} line {number} is not a JSON object ({error})") from error
        if missing:
            raise ValueError("{} line {} has no {}".format(path, number, ", ".join(missing)))
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()

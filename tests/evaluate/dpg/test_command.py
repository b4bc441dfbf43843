"""The three steps on grids of plain colours, whose questions a few lines can answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from svg_jax.evaluate.__main__ import main
from svg_jax.evaluate.dpg import vqa
from svg_jax.evaluate.generated import begin
from svg_jax.evaluate.prompt_sets import read_prompt_set

SIDE = 32  # pixels of a picture, four of which are a grid
COLORS = {"tree1": "red red blue red", "car2": "blue red blue red", "sky3": "red red red red"}  # of the pictures
SCORES = {"tree1": [1, 1, 0, 1], "car2": [1 / 3, 1, 1 / 3, 1], "sky3": [0.5, 0.5, 0.5, 0.5]}
HEAD = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)
TABLE = f"""{HEAD}
tree1,"A red tree, tall",,1,0,,,entity - whole (tree),Is it red?
tree1,"A red tree, tall",,2,1,,,"attribute - size (tree, tall)",Is there anything?
car2,A red car,,1,0,,,entity - whole (car),Is there anything?
car2,A red car,,2,1,,,"attribute - color (car, red)",Is it red?
car2,A red car,,3,"1, 2",,,"relation - spatial (car, in, street)",Is the one on the left there?
sky3,A blue sky,,1,0,,,global - (sky),Is there anything?
sky3,A blue sky,,2,0,,,"attribute - color (sky, blue)",Is it blue?
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`grids` as another program draws them, and `table.csv`."""
    (tmp_path / "grids").mkdir()
    for item_id in COLORS:
        grid(item_id).save(tmp_path / "grids" / f"{item_id}.png")
    (tmp_path / "table.csv").write_text(TABLE)
    return tmp_path


def pictures(item_id: str) -> list[Image.Image]:
    return [Image.new("RGB", (SIDE, SIDE), color) for color in COLORS[item_id].split()]


def grid(item_id: str) -> Image.Image:
    whole = Image.new("RGB", (2 * SIDE, 2 * SIDE))
    for number, picture in enumerate(pictures(item_id)):
        whole.paste(picture, (number % 2 * SIDE, number // 2 * SIDE))
    return whole


def truth(picture: Image.Image, question: str) -> str:
    """Of a picture of one colour; a cut at the wrong place holds two and has no answer."""
    ((_, color),) = picture.getcolors()  # type: ignore[misc]
    return "no" if ("red" in question and color != (255, 0, 0)) or "blue" in question else "yes"


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def ask(folder: Path, images: str = "grids", *more: str) -> Path:
    out = folder / "questions"
    images = str(folder / images)
    main(["dpg", "questions", f"--images={images}", f"--csv={folder / 'table.csv'}", f"--out={out}", *more])
    return out


def answer(questions: Path, file: Path, model: str = "eyes", **other: str) -> Path:
    """By the protocol alone, as a program that knows nothing of svg_jax would."""
    with file.open("w") as out:
        for row in rows_of(questions / "questions.jsonl"):
            text = truth(Image.open(row["image"]).crop(row["box"]), row["question"])
            answer = {"key": row["key"], "answer": other.get(text, text), "model": model, "weights": "of 1980"}
            out.write(json.dumps(answer) + "\n")
    return file


def score(folder: Path, answers: Sequence[Path], *more: str, out: str = "scores") -> dict[str, Any]:
    arguments = ["dpg", "score", f"--questions={folder / 'questions'}", f"--csv={folder / 'table.csv'}"]
    main([*arguments, "--answers", *map(str, answers), f"--out={folder / out}", *more])
    return json.loads((folder / out / "results.json").read_text())


def test_scores_of_both_modes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)  # neither step needs it
    answers = answer(ask(folder), folder / "answers.jsonl")
    assert "mplug.py --questions" in capsys.readouterr().out
    found = score(folder, [answers])
    corrected, official = found["scores"]["corrected"], found["scores"]["official"]
    means = {item_id: sum(values) / 4 for item_id, values in SCORES.items()}
    assert corrected["overall"] == pytest.approx(sum(means.values()) / 3)
    assert corrected["entity"] == pytest.approx((3 + 4) / 8)
    assert corrected["attribute"] == pytest.approx((3 + 2 + 0) / 12)
    assert corrected["relation"] == pytest.approx(2 / 4)
    assert corrected["global"] == 1
    # tree1 depends on the first row of the table, which is never asked; categories are of the last picture alone.
    assert official["overall"] == pytest.approx((means["car2"] + means["sky3"]) / 2)
    assert official["entity"] == 1
    assert official["attribute"] == pytest.approx(1 / 2)
    assert found["left_out"]["official"]["questions they depend on"] == ["tree1"]
    assert found["settings"]["judge"] == {"model": "eyes", "weights": "of 1980"}
    assert found["counts"]["corrected"]["overall"] == 3
    assert any("official: tree1 is left out for want of questions they depend on" in text for text in found["warnings"])
    assert any("3 prompts and dpg has 1,065" in text for text in found["warnings"])
    assert any("eyes answered" in text for text in found["warnings"])

    rows = {row["name"]: row for row in rows_of(folder / "scores" / "images.jsonl")}
    for item_id, values in SCORES.items():
        assert [rows[f"{item_id}/{sample}"]["corrected"] for sample in range(4)] == pytest.approx(values)
    assert "official" not in rows["tree1/0"]
    assert rows["car2/0"]["answers"] == {"1": "yes", "2": "no", "3": "yes"}
    text = (folder / "scores" / "results.md").read_text()
    assert "SVG-T2I" in text
    assert "85.78" in text
    assert "attribute - color" in text
    assert score(folder, [answers], "--mode=official")["scores"].keys() == {"official"}


def test_our_own_pictures_and_those_that_are_missing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = read_prompt_set("dpg", folder / "table.csv")
    ours = begin(str(folder / "ours"), prompts, 4, {"width": SIDE, "height": SIDE, "seed": 3})
    for entry in prompts.entries[:2]:
        ours.save(entry, pictures(entry.id))
    answers = answer(ask(folder, "ours"), folder / "answers.jsonl")
    assert "sky3 is missing or damaged" in caplog.text
    with pytest.raises(SystemExit, match=r"sky3 is incomplete, with pictures missing: draw them"):
        score(folder, [answers])
    found = score(folder, [answers], "--mode=official")
    assert found["left_out"]["official"]["pictures"] == ["sky3"]
    assert found["settings"]["pictures"]["seed"] == 3

    # Once the rest is drawn, answers to the others still hold.
    ours.save(prompts.entries[2], pictures("sky3"))
    before = rows_of(answers)
    answers = answer(ask(folder, "ours"), folder / "answers.jsonl")
    assert rows_of(answers)[: len(before)] == before
    assert score(folder, [answers])["counts"]["corrected"]["overall"] == 3


def test_files_of_several_shards(folder: Path) -> None:
    answers = answer(ask(folder), folder / "answers.jsonl")
    whole = score(folder, [answers], out="whole")
    lines = answers.read_text().splitlines(keepends=True)
    for shard in range(2):
        (folder / f"{shard}.jsonl").write_text("".join(lines[shard::2]))
    assert score(folder, [folder / "1.jsonl", folder / "0.jsonl"], out="parts") == whole


def test_pictures_that_are_elsewhere_by_now(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    answers = answer(ask(folder), folder / "answers.jsonl")
    whole = score(folder, [answers], out="with")
    (folder / "grids").rename(folder / "moved")
    assert score(folder, [answers], out="without") == whole
    assert "the page goes without some pictures" in caplog.text


def test_answers_in_other_words(folder: Path) -> None:
    questions = ask(folder)
    found = score(folder, [answer(questions, folder / "answers.jsonl", yes=" Yes.", no="NO")])
    assert found["scores"]["corrected"]["overall"] == pytest.approx(sum(map(sum, SCORES.values())) / 12)
    assert found["scores"]["official"]["overall"] == 0
    assert any("say yes in other letters (' Yes.')" in text for text in found["warnings"])
    # A few that are neither count as no and are reported; with many, the judge has not understood.
    lines = rows_of(answer(questions, folder / "answers.jsonl"))
    lines[8]["answer"] = "2"
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    found = score(folder, [folder / "few.jsonl"])
    assert "corrected: 1 of 28 answers are neither yes nor no ('2') and taken for no" in found["warnings"]
    assert "official: 1 of 20 answers are neither yes nor no ('2') and taken for no" in found["warnings"]
    assert found["scores"]["corrected"]["entity"] == pytest.approx((3 + 3) / 8)
    with pytest.raises(SystemExit, match=r"answers are neither yes nor no \('a red'\): have the model answer by"):
        score(folder, [answer(questions, folder / "odd.jsonl", no="a red")])


def test_answers_that_do_not_fit(folder: Path) -> None:
    answers = answer(ask(folder), folder / "answers.jsonl")
    rows = rows_of(answers)

    def refused(message: str, rows: Sequence[dict[str, Any]], *more: str) -> None:
        (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(SystemExit, match=message):
            score(folder, [folder / "bad.jsonl"], *more)

    refused(r"sky3 is incomplete, with answers missing: have the rest answered", rows[:-1])
    refused(r"answers of 2 models are mixed, eyes with weights .* and ears", [*rows[1:], {**rows[0], "model": "ears"}])
    refused(r"answers of 2 models are mixed", [*rows[1:], {**rows[0], "weights": "of 1990"}])
    refused(
        r"line 29 answers question \w+ by 'perhaps', and before it was 'yes'", [*rows, {**rows[0], "answer": "perhaps"}]
    )
    refused(r"line 1 is no answer: expected the texts key, answer, model and weights", [{"key": 1}])
    refused(r"none of the answers is to one of these questions", [{**rows[0], "key": "other"}])
    refused(r"holds no answers", [])
    (folder / "cut.jsonl").write_text(answers.read_text()[:-20])
    with pytest.raises(SystemExit, match=r"line 28: not JSON .*: remove that line, or answer the questions"):
        score(folder, [folder / "cut.jsonl"])
    with pytest.raises(SystemExit, match=r"there is no .*none\.jsonl: answer the questions"):
        score(folder, [folder / "none.jsonl"])
    (folder / "more.jsonl").write_text(answers.read_text() + json.dumps({**rows[0], "key": "old"}) + "\n")
    assert any(
        "1 answers are to other questions" in text for text in score(folder, [folder / "more.jsonl"])["warnings"]
    )


def test_files_that_do_not_belong_together(folder: Path) -> None:
    answers = answer(ask(folder), folder / "answers.jsonl")
    score(folder, [answers])
    with pytest.raises(SystemExit, match=r"scores of judge\.model = eyes, and now it is ears: choose another --out"):
        score(folder, [answer(folder / "questions", folder / "other.jsonl", "ears")])
    (folder / "table.csv").write_text(TABLE.replace("Is it blue?", "Is the sky blue?"))
    with pytest.raises(SystemExit, match=r"is not the table that the questions in .* were taken from"):
        score(folder, [answers])
    (folder / "table.csv").write_text(TABLE.replace("sky3", "sea3"))
    with pytest.raises(SystemExit, match=r"sky3"):
        ask(folder)
    with pytest.raises(SystemExit, match=r"there is no .*settings\.json: --questions is the folder"):
        main(["dpg", "score", f"--questions={folder}", f"--csv={folder / 'table.csv'}", "--answers=a", "--out=b"])


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"csv": "9c"}', '{"csv": "9c", "num_images": 0}'])
def test_damaged_settings_of_questions(folder: Path, content: str) -> None:
    ask(folder)
    (folder / "questions" / "settings.json").write_text(content)
    with pytest.raises(SystemExit, match=r"settings\.json (is not JSON|does not say which table) .*: write it with"):
        score(folder, [folder / "answers.jsonl"])


def test_a_picture_that_cannot_be_read(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = folder / "grids" / "car2.png"
    file.write_bytes(file.read_bytes()[:60])
    answers = answer(ask(folder), folder / "answers.jsonl")
    assert "car2 is missing or damaged" in caplog.text
    assert score(folder, [answers], "--mode=official")["left_out"]["official"]["pictures"] == ["car2"]
    with pytest.raises(SystemExit, match="car2"):
        score(folder, [answers])


def test_single_pictures(folder: Path) -> None:
    for item_id in COLORS:
        pictures(item_id)[0].save(folder / "grids" / f"{item_id}.png")
    found = score(folder, [answer(ask(folder, "grids", "--grid=1x1"), folder / "answers.jsonl")])
    assert found["scores"]["corrected"]["overall"] == pytest.approx((1 + 1 / 3 + 0.5) / 3)


def test_the_first_pictures_of_a_grid(folder: Path) -> None:
    """Cut as from a grid of four, of which fewer are judged."""
    found = score(folder, [answer(ask(folder, "grids", "--num-images=2"), folder / "answers.jsonl")])
    expected = sum(sum(values[:2]) / 2 for values in SCORES.values()) / 3
    assert found["scores"]["corrected"]["overall"] == pytest.approx(expected)
    assert found["settings"]["num_images"] == 2
    for number in (0, 5):
        with pytest.raises(SystemExit, match=f"--num-images is {number}: "):
            ask(folder, "grids", f"--num-images={number}")


def test_a_picture_that_changes_between_the_steps(
    folder: Path, answer_with: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    answers = answer(ask(folder), folder / "answers.jsonl")
    grid("tree1").save(folder / "grids" / "sky3.png")
    with pytest.raises(SystemExit, match=r"sky3\.png has changed since `dpg questions` wrote about it: run that again"):
        answer_with(judge([]), "answers")
    score(folder, [answers])  # of the pictures as they were, of which the page does not show others
    assert "the page goes without some pictures" in caplog.text


def test_only_the_official_model_is_taken_for_it(folder: Path) -> None:
    questions = ask(folder)
    official = "mplug_visual-question-answering_coco_large_en"
    for number, (model, warned) in enumerate({official: 0, f"damo/{official}": 0, "mplug-owl3": 1}.items()):
        file = answer(questions, folder / f"{number}.jsonl", model)
        warnings = score(folder, [file], out=f"scores{number}")["warnings"]
        assert sum("published scores are those of mPLUG large" in text for text in warnings) == warned


Model = Callable[[Sequence[Image.Image], str], list[str]]


class Killed(BaseException):
    """Stands for a signal."""


def judge(asked: list[str], *, stops_after: int = 1000) -> Model:
    """Answers as a chat model would, writes down what it is asked, and is killed after so many questions."""

    def model(images: Sequence[Image.Image], question: str) -> list[str]:
        if len(asked) == stops_after:
            raise Killed
        asked.append(f"{len(images)}: {question}")
        return [truth(image, question).capitalize() + "." for image in images]

    return model


@pytest.fixture
def answer_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    (folder / "blip").mkdir()
    (folder / "blip" / "config.json").write_text("{}")
    (folder / "blip" / "model.safetensors").write_bytes(b"weights")

    def run(model: Model, out: str, *more: str) -> Path:
        monkeypatch.setattr(vqa.VQA, "load", lambda folder, device: model)
        questions = folder / "questions" / "questions.jsonl"
        arguments = [f"--questions={questions}", f"--vqa={folder / 'blip'}", f"--out={folder / out}"]
        main(["dpg", "answer", *arguments, *more])
        return folder / out / "answers.jsonl"

    return run


def test_a_model_answers_each_question_of_a_prompt_once(folder: Path, answer_with: Callable[..., Path]) -> None:
    questions = ask(folder)
    asked: list[str] = []
    answers = answer_with(judge(asked), "answers")
    assert asked == [f"4: {line.rsplit(',', 1)[1]}" for line in TABLE.splitlines()[1:]]  # of four pictures together
    rows = rows_of(answers)
    assert [row["key"] for row in rows] == [row["key"] for row in rows_of(questions / "questions.jsonl")]
    assert {row["answer"] for row in rows} == {"yes", "no"}  # as the official mode wants it
    assert {row["model"] for row in rows} == {"blip"}
    expected = score(folder, [answer(questions, folder / "expected.jsonl")], out="expected")
    assert score(folder, [answers])["scores"] == expected["scores"]


def test_answers_are_the_same_however_the_work_was_split(
    folder: Path, answer_with: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ask(folder)
    whole = answer_with(judge([]), "whole").read_bytes()
    answer_with(judge([]), "shards", "--shard=1/2")
    assert "1 of 3 prompts are answered: the last shard writes answers.jsonl" in capsys.readouterr().out
    assert answer_with(judge([]), "shards", "--shard=0/2").read_bytes() == whole

    first: list[str] = []
    with pytest.raises(Killed):
        answer_with(judge(first, stops_after=3), "killed")
    assert not (folder / "killed" / "answers.jsonl").exists()
    rest: list[str] = []
    assert answer_with(judge(rest), "killed").read_bytes() == whole
    assert len(rest) == 5  # the first prompt is not asked again
    (folder / "killed" / "answers" / "sky3.jsonl").write_text('{"key": "cut o')
    assert answer_with(judge(rest), "killed").read_bytes() == whole
    assert len(rest) == 7


def test_only_a_picture_that_was_drawn_anew_is_asked_about_again(
    folder: Path, answer_with: Callable[..., Path]
) -> None:
    ask(folder)
    answer_with(judge([]), "answers")
    grid("tree1").save(folder / "grids" / "car2.png")
    ask(folder)
    again: list[str] = []
    answers = answer_with(judge(again), "answers")
    assert len(again) == 3
    assert score(folder, [answers])["scores"]["corrected"]["relation"] == pytest.approx(3 / 4)


def test_answers_of_other_weights_in_one_folder(folder: Path, answer_with: Callable[..., Path]) -> None:
    ask(folder)
    answer_with(judge([]), "answers")
    (folder / "blip" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(SystemExit, match=r"holds answers of weights = \w+, and now it is \w+: choose another --out"):
        answer_with(judge([]), "answers")
    (folder / "blip" / "config.json").unlink()
    with pytest.raises(SystemExit, match=r"blip is no folder of a VQA model .*: get one with `hf download"):
        answer_with(judge([]), "others")
    with pytest.raises(SystemExit, match=r"there is no .*questions\.jsonl: write it with"):
        main(["dpg", "answer", f"--questions={folder / 'questions.jsonl'}", "--vqa=blip", "--out=out"])


def test_the_page_shows_each_picture_with_its_questions(folder: Path) -> None:
    score(folder, [answer(ask(folder), folder / "answers.jsonl")])
    page = (folder / "scores" / "index.html").read_text()
    shown = ("Pictures as corrected judges them", "Is the one on the left there?", "relation - spatial")
    for text in (*shown, "car2/3", "1 of 3 questions count", '"answer": "yes", "accepted": true, "counted": false'):
        assert text in page

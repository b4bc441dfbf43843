from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from svg_jax.evaluate.prompt_sets import PromptSet, read_prompt_set

ONE = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
TWO = {
    "tag": "position",
    "include": [
        {"class": "bowl", "count": 1},
        {"class": "couch", "count": 1, "color": "red", "position": ["left of", 0]},
    ],
    "prompt": "a photo of a red couch left of a bowl",
}
THREE = {
    "tag": "counting",
    "include": [{"class": "cup", "count": 3}],
    "exclude": [{"class": "cup", "count": 4}],
    "prompt": "a photo of three cups",
}


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_table(path: Path, *rows: tuple[str, str]) -> Path:
    """As `dpg_bench.csv` is: a row a question, quotes where needed."""
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["item_id", "text", "proposition_id"])
        writer.writerows((*row, number) for number, row in enumerate(rows))
    return path


def texts(prompt_set: PromptSet) -> dict[str, str]:
    return {entry.id: entry.prompt for entry in prompt_set.entries}


def test_rows_of_geneval(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_rows(tmp_path / "metadata.jsonl", ONE, TWO, THREE)
    found = read_prompt_set("geneval", file)
    assert found.name == "geneval"
    assert found.digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert [(entry.index, entry.id) for entry in found.entries] == [(0, "00000"), (1, "00001"), (2, "00002")]
    assert [entry.prompt for entry in found.entries] == [row["prompt"] for row in (ONE, TWO, THREE)]
    assert [entry.metadata for entry in found.entries] == [ONE, TWO, THREE]
    assert "has 3 prompts and geneval has 553: such scores cannot be compared" in caplog.text


def test_the_published_number_of_prompts_is_not_worth_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(read_prompt_set("geneval", write_rows(tmp_path / "m.jsonl", *[ONE] * 553)).entries) == 553
    rows = [(f"item{i // 2}", f"text {i // 2}") for i in range(2 * 1065)]
    assert len(read_prompt_set("dpg", write_table(tmp_path / "dpg.csv", *rows)).entries) == 1065
    assert not caplog.records


def test_the_long_set_draws_the_refined_prompt_where_there_is_one(tmp_path: Path) -> None:
    at_length = "a bench" + " that is long" * 10
    rows = [ONE | {"refined_prompt": at_length}, TWO]
    file = write_rows(tmp_path / "long.jsonl", *rows)
    assert [e.prompt for e in read_prompt_set("geneval_long", file).entries] == [at_length, TWO["prompt"]]
    assert [e.prompt for e in read_prompt_set("geneval", file).entries] == [ONE["prompt"], TWO["prompt"]]


def test_short_and_long_prompts_are_not_taken_for_each_other(tmp_path: Path) -> None:
    short = write_rows(tmp_path / "short.jsonl", ONE, TWO)
    long = write_rows(tmp_path / "long.jsonl", ONE, TWO | {"prompt": "a red couch " * 11})
    with pytest.raises(
        ValueError, match=r"short\.jsonl has no prompts of more than 30 words, .*name it --set geneval$"
    ):
        read_prompt_set("geneval_long", short)
    with pytest.raises(
        ValueError, match=r"long\.jsonl has prompts of more than 30 words, .*name it --set geneval_long$"
    ):
        read_prompt_set("geneval", long)
    read_prompt_set("geneval", short)
    read_prompt_set("geneval_long", long)


def changed(row: dict[str, Any], part: str, **changes: Any) -> dict[str, Any]:
    """With the last clause of a part changed."""
    *before, last = row[part]
    return row | {part: [*before, last | changes]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["a"], r"line 2: expected an object with tag, include and prompt, found \[\"a\"\]"),
        (ONE | {"tag": "color"}, r'line 2: tag is "color": expected one of single_object, .*color_attr'),
        (ONE | {"prompt": None}, r"line 2: prompt is null: expected a text"),
        (ONE | {"prompt": "a \ud800"}, r"line 2: half a surrogate pair is no text"),
        (ONE | {"include": []}, r"line 2: include is \[\]: expected a list of clauses"),
        (ONE | {"include": "bench"}, r'line 2: include is "bench": expected a list'),
        (ONE | {"include": ["bench"]}, r"line 2, include\[0\] is \"bench\": expected an object with class and count"),
        (changed(ONE, "include", **{"class": ""}), r'include\[0\]: class is "": expected the name'),
        (changed(ONE, "include", count=0), r"include\[0\]: count is 0: expected a whole number from 1 on"),
        (changed(ONE, "include", count=True), r"count is true"),
        (changed(ONE, "include", colour="red"), r"include\[0\] has no 'colour': did you mean 'color'"),
        (changed(TWO, "include", color="mauve"), r'include\[1\]: color is "mauve": expected one of red, orange'),
        (changed(TWO, "include", position=["beside", 0]), r'position is \["beside", 0\]: expected one of left of'),
        (changed(TWO, "include", position=["above", 1]), r"of an include clause before this one"),
        (changed(TWO, "include", position="above"), r'position is "above"'),
        (changed(THREE, "exclude", count=1.5), r"exclude\[0\]: count is 1.5"),
        (changed(THREE, "exclude", color="red"), r"exclude\[0\] has no 'color'"),
    ],
)
def test_a_row_that_cannot_be_judged_is_told_by_its_line(tmp_path: Path, row: Any, message: str) -> None:
    file = write_rows(tmp_path / "metadata.jsonl", ONE, row)
    with pytest.raises(ValueError, match=message) as error:
        read_prompt_set("geneval", file)
    assert str(error.value).startswith(f"{file}, line 2")
    assert "\n" not in str(error.value)


def test_items_of_the_table_of_dpg_bench(tmp_path: Path) -> None:
    rows = [
        ("b7", 'a "red"\nfox, é'),
        ("b7", 'a "red"\nfox, é'),
        ("007", "two owls\u2028 there"),
        ("b7", 'a "red"\nfox, é'),
    ]
    found = read_prompt_set("dpg", write_table(tmp_path / "dpg.csv", *rows))
    assert texts(found) == {"b7": 'a "red"\nfox, é', "007": "two owls\u2028 there"}
    assert [entry.index for entry in found.entries] == [0, 1]
    assert [entry.metadata for entry in found.entries] == [{}, {}]


def test_prompts_of_dpg_bench_alone(tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, text in (("partiprompts7", "an owl\n"), ("10", " a fox"), ("9", "a hen")):
        (folder / f"{name}.txt").write_text(text)
    expected = {"10": "a fox", "9": "a hen", "partiprompts7": "an owl"}
    found = read_prompt_set("dpg", folder)
    assert texts(found) == expected
    assert list(texts(found)) == sorted(expected)

    rows = [{"filename": f"{name}.txt", "prompt": text} for name, text in expected.items()]
    assert texts(read_prompt_set("dpg", write_rows(tmp_path / "dpg.jsonl", *rows))) == expected

    (folder / "9.txt").write_text("a hen!")
    assert read_prompt_set("dpg", folder).digest != found.digest


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("dpg.csv", "id,text\n1,a\n", r"dpg\.csv has no column item_id, but id, text: take dpg_bench/dpg_bench\.csv"),
        ("dpg.csv", "", r"has no column item_id and no column text"),
        ("dpg.csv", "item_id,text\n1,a fox\n1,a hen\n", r"line 3: item 1 has another text \('a hen…'\) than before"),
        ("dpg.csv", "item_id,text\n1\n", r"line 2: item 1 has no text"),
        ("dpg.csv", "item_id,text\n../1,a\n", r'line 2: the id "\.\./1" cannot name a picture'),
        ("dpg.csv", "item_id,text\n1,a\na\x01,b\n", r"line 3: the id .* cannot name a picture.*control characters"),
        ("dpg.csv", f"item_id,text\n{'é' * 101},a\n", r"line 2: the id .* cannot name .* at most 200 bytes"),
        ("dpg.csv", "item_id,text\nA,a fox\na,a hen\n", r"line 3: the ids a and A differ in case alone"),
        ("dpg.csv", 'item_id,text\n"a\nb",a\n', r"line 2: item_id goes over several lines: close its quotes"),
        ("dpg.csv", "item_id,text\n1,a fox, red\n", r"line 2: 3 values in 2 columns: quote the commas"),
        ("dpg.csv", 'item_id,text\n1,"a\nb"\n2,"a fox\n3,b\n', r"line 4: not CSV .*: are all quotes closed\?"),
        ("dpg.csv", 'item_id,text\n1,"a fox\n2,"b"\n', r"line 2: not CSV .*: are all quotes closed\?"),
        (
            "dpg.csv",
            'item_id,text,question_natural_language\n1,a,"Is it?\n2,b,Is it?\n3,c,Is it?"\n',
            r"line 2: question_natural_language goes over several lines: close its quotes",
        ),
        ("dpg.csv", "item_id,text\n", r"dpg\.csv holds no prompts: take"),
        ("dpg.csv", 'item_id,text\n1,"a' + "a" * 200_000, r"line \d: not CSV \(field larger"),
        ("dpg.jsonl", '{"filename": "1.txt"}\n', r"line 1: expected an object with filename and prompt"),
        ("dpg.jsonl", '{"filename": \n', r"line 1: not JSON"),
        ("dpg.jsonl", '{"filename": "1.txt", "prompt": "a \\ud800"}\n', r"line 1: half a surrogate pair is no text"),
    ],
)
def test_bad_tables_are_named_with_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_prompt_set("dpg", tmp_path / name)
    assert "\n" not in str(error.value)


def test_any_prompts(tmp_path: Path) -> None:
    found = read_prompt_set("prompts", write_rows(tmp_path / "p.jsonl", "a fox", {"prompt": ""}, "a fox"))
    assert [(entry.id, entry.prompt) for entry in found.entries] == [
        ("00000", "a fox"),
        ("00001", ""),
        ("00002", "a fox"),
    ]


def test_files_that_are_not_there_or_no_prompts(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no file of prompts 'none': take prompts/evaluation_metadata.jsonl of"
    ):
        read_prompt_set("geneval", "none")
    with pytest.raises(ValueError, match=r"unknown prompt set 'geneval-long': did you mean 'geneval_long'"):
        read_prompt_set("geneval-long", tmp_path)
    with pytest.raises(ValueError, match=r"is a folder: name the file in it"):
        read_prompt_set("geneval", tmp_path)
    with pytest.raises(ValueError, match=r"holds no prompts: take dpg_bench"):
        read_prompt_set("dpg", tmp_path)
    (tmp_path / "m.jsonl").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"is not UTF-8 text .*: save it as UTF-8"):
        read_prompt_set("geneval", tmp_path / "m.jsonl")

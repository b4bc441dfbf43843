from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipelines.prompts import read_prompts


def test_text_files_hold_one_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red fox\n\n  zwei blaue Bälle \n", encoding="utf-8")
    assert read_prompts(file) == ["a red fox", "zwei blaue Bälle"]


@pytest.mark.parametrize(
    ("value", "prompt"),
    [
        ("a fox", "a fox"),
        ("", ""),
        ({"prompt": ""}, ""),
        ({"prompt": "a fox", "refined_prompt": "a red fox"}, "a red fox"),
        ({"gpt_4_caption": "a hen", "path": "1.jpg"}, "a hen"),
        ("half a \ud83e pair", "half a ? pair"),
        ({"prompt": "a line\u2028break"}, "a line\u2028break"),
    ],
)
def test_records_in_the_release_form(tmp_path: Path, value: object, prompt: str) -> None:
    lines, whole = tmp_path / "prompts.jsonl", tmp_path / "prompts.json"
    lines.write_text(
        "\ufeff" + json.dumps(value, ensure_ascii="\ud83e" in str(value)) + "\n\n" + json.dumps("last"),
        encoding="utf-8",
    )
    whole.write_text(json.dumps([value, "last"]))
    assert read_prompts(lines) == read_prompts(whole) == [prompt, "last"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '"a"\n{"prompt": ', r"p\.jsonl, line 2: not JSON"),
        ("p.jsonl", '"a"\n\n{"text": "b"}', r"p\.jsonl, line 3: expected a string or .* refined_prompt, prompt"),
        ("p.json", '["a", 3]', r"p\.json, entry 2: expected a string"),
        ("p.json", '["a",\n', r"p\.json, line 2: not JSON"),
        ("p.json", '{"prompt": "a"}', r"expected a list of prompts, found dict"),
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.csv", "a", r"name it \.txt, \.json or \.jsonl"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_other_encodings_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("Bälle".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(FileNotFoundError, match="there is no file of prompts"):
        read_prompts(tmp_path / "none.txt")

"""System prompts, tokenisers and padding: against the release's facts, and on text of every kind."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import base
from data_pipelines import enhancement, text
from data_pipelines.sources import open_source
from tests.vectors import FOLDER

CAPTIONS = [
    f"{n} {colour} {shape} in the corner"
    for n in ("two", "three")
    for colour in ("red", "blue")
    for shape in ("circles", "squares")
]


def facts() -> dict[str, Any]:
    return json.loads((FOLDER / "text" / "facts.json").read_text())


@pytest.mark.golden
def test_system_prompts_are_the_releases() -> None:
    assert facts()["system_prompts_sampling_script"] == text.SYSTEM_PROMPTS
    assert facts()["system_prompts_eval_script"] == text.EVALUATION_SYSTEM_PROMPTS


@pytest.mark.golden
@pytest.mark.parametrize(
    ("record", "fact"),
    [
        ({"path": "a.jpg", "prompt": "a cat"}, "records_with_key_path"),
        ({"image_path": "a.jpg", "super_high_quality_caption": "a cat"}, "records_with_key_super_high_quality_caption"),
    ],
)
def test_the_key_of_a_record_decides_its_system_prompt(tmp_path: Path, record: dict[str, str], fact: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    (caption,) = open_source(tmp_path / "a.jsonl")[0].captions
    expected = facts()["facts"]["training_system_prompt"][fact] + "a cat"
    assert text.full_prompt(caption.text, caption.system_prompt) == expected


@pytest.mark.golden
def test_padding_is_the_releases(tmp_path: Path) -> None:
    """The release's toy tokeniser, as a transformers folder, through our encoding and padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(facts()["toy_vocab"], unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    tokenizer = text.load_tokenizer(tmp_path)
    for job in facts()["padding_jobs"]:
        ids, truncated = tokenizer.encode(job["captions"], job["max_length"])
        length = text.padded_length(ids, job["pad_to_multiple_of"])
        tokens, num_tokens = text.pad_tokens(ids, length, tokenizer.pad_id)
        np.testing.assert_array_equal(tokens, job["input_ids"])
        np.testing.assert_array_equal(np.arange(length) < num_tokens[:, None], np.array(job["attention_mask"], bool))
        assert truncated == [len(caption.split()) + 1 > job["max_length"] for caption in job["captions"]]


@pytest.mark.golden
def test_budget_and_dropout_are_the_releases() -> None:
    known, config = facts()["facts"], base.get_config()
    assert config.text.max_tokens == known["sampling_max_length"] == known["training_scripts_max_length"]
    assert config.data.caption_dropout == known["caption_dropout_default"]


@pytest.mark.golden
@pytest.mark.parametrize("example", facts()["enhance"], ids=lambda example: example["prompt"])
def test_enhanced_prompts_are_cleaned_as_in_the_release(example: dict[str, str]) -> None:
    cleaned = enhancement.clean_enhancement(example["prompt"], example["decoded_new_text"])
    assert cleaned == example["result"]


@pytest.mark.golden
def test_enhancement_is_asked_for_as_in_the_release() -> None:
    expected = facts()["enhance_instruction_with_prompt_PROMPTHERE"]
    assert enhancement.enhancement_request("PROMPTHERE") == expected
    end = facts()["toy_vocab"]["<eos>"]
    assert facts()["enhance_generate_options"] == enhancement.GENERATION | {"eos_token_id": end, "pad_token_id": end}


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (" \n\t\n  a red fox  \nand more", "a red fox"),
        ("PROMPT: a fox: at rest", "a fox: at rest"),
        ("Enhanced description:", "a fox"),
        ("A, b,, a ,B, c, d, e", "A, b, c, d"),
        (" , ,", ", ,"),
        ("a" * 200 + " " + "b" * 54 + " cc", "a" * 200 + " " + "b" * 54),
        ("a" * 200 + " " + "b" * 56, "a" * 200),
    ],
)
def test_enhancement_keeps_what_describes_the_image(written: str, expected: str) -> None:
    assert enhancement.clean_enhancement("a fox", written) == expected


def test_an_empty_caption_gets_no_system_prompt() -> None:
    assert text.full_prompt("", "align") == ""
    assert text.full_prompt("a cat", "empty") == "a cat"


def test_an_unknown_system_prompt_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown system prompt 'asthetics'; did you mean 'aesthetics'"):
        text.full_prompt("a cat", "asthetics")


def test_bytes_are_the_stand_in_where_no_folder_is_given() -> None:
    tokenizer = text.load_tokenizer(None)
    ids, truncated = tokenizer.encode(["", "aé", "aé"], 4)
    assert ids == [[2], [2, 3 + 0x61, 3 + 0xC3, 3 + 0xA9], [2, 3 + 0x61, 3 + 0xC3, 3 + 0xA9]]
    assert truncated == [False, False, False]
    assert tokenizer.encode(["aé"], 3) == ([[2, 3 + 0x61, 3 + 0xC3]], [True])
    assert max(max(row) for row in tokenizer.encode(["\U0010ffff\ud800"], 9)[0]) < tokenizer.vocab_size


def test_bytes_decode_to_the_text_without_special_tokens() -> None:
    tokenizer = text.load_tokenizer(None)
    (ids,), _ = tokenizer.encode(["a caf\u00e9, \u6f22"], 99)
    assert tokenizer.decode([*ids, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size]) == "a caf\u00e9, \u6f22"
    assert tokenizer.decode(ids[:7]) == "a caf\ufffd"  # cut inside a letter
    assert tokenizer.decode([]) == ""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "words"
    text.train_word_tokenizer(CAPTIONS, folder)
    return folder


def test_trained_words_are_single_tokens(trained: Path) -> None:
    tokenizer = text.load_tokenizer(trained)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    ids, _ = tokenizer.encode(CAPTIONS, 16)
    assert {len(row) for row in ids} == {1 + 6}
    assert len({tuple(row) for row in ids}) == len(CAPTIONS)
    assert max(max(row) for row in ids) < tokenizer.vocab_size
    # The system prompt costs one token a word or mark, and the caption after it keeps its tokens.
    full, _ = tokenizer.encode([text.full_prompt(caption, "base") for caption in CAPTIONS], 64)
    assert [row[-6:] for row in full] == [row[1:] for row in ids]
    assert len(full[0]) < 30


def test_any_text_can_be_encoded_by_a_trained_tokenizer(trained: Path) -> None:
    ids, truncated = text.load_tokenizer(trained).encode(["", "zebra 漢字 \U0001f600", "\ud800"], 64)
    assert ids[0] == [2]
    assert len(ids[1]) > 1
    assert truncated == [False, False, False]


def test_a_trained_tokenizer_decodes_without_special_tokens(trained: Path) -> None:
    tokenizer = text.load_tokenizer(trained)
    ids, _ = tokenizer.encode(CAPTIONS, 64)
    for row, caption in zip(ids, CAPTIONS, strict=True):
        assert tokenizer.decode([*row, tokenizer.eos_id, tokenizer.pad_id]).strip() == caption


def test_training_the_same_words_gives_the_same_tokenizer(trained: Path, tmp_path: Path) -> None:
    text.train_word_tokenizer(CAPTIONS, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


def test_a_tokenizer_serves_many_threads(trained: Path) -> None:
    tokenizer = text.load_tokenizer(trained)
    expected = [tokenizer.encode(CAPTIONS, 4 + i) for i in range(4)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: tokenizer.encode(CAPTIONS, 4 + i % 4), range(200)))
    assert all(result == expected[i % 4] for i, result in enumerate(results))


def test_a_vocabulary_below_the_bytes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size=100 is below 259"):
        text.train_word_tokenizer(CAPTIONS, tmp_path, vocab_size=100)


def test_a_missing_tokenizer_folder_says_how_to_get_gemma(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; Gemma-2 is gated"):
        text.load_tokenizer(tmp_path / "gemma-2-2b")


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    with pytest.raises(ValueError, match=r"has neither tokenizer\.json nor tokenizer\.model"):
        text.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read by transformers"):
        text.load_tokenizer(tmp_path)


@pytest.mark.parametrize("missing", ["pad_token", "bos_token", "eos_token"])
def test_a_tokenizer_without_a_special_token_is_an_error(missing: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    vocab = {token: i for i, token in enumerate(special.values())}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    del special[missing]
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"has no {missing}"):
        text.load_tokenizer(tmp_path)


def test_the_byte_tokenizer_needs_no_transformers() -> None:
    script = (
        "import sys; from data_pipelines import batches, text; text.load_tokenizer(None); "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])

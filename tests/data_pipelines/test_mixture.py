"""Mixtures: the release's YAML, the records that are used, exact shares of the draws, and what each message names."""

from __future__ import annotations

import collections
import json
import pickle
from pathlib import Path

import pytest

from data_pipelines.mixture import Mixture, apportion, draw
from data_pipelines.order import shuffled_index
from data_pipelines.sources import open_source


def write_list(path: Path, prompts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps({"path": f"{prompt}.jpg", "prompt": prompt}) for prompt in prompts))


def write_mixture(folder: Path, *entries: str, counts: tuple[int, ...] = (40, 10)) -> Path:
    """`folder/mix.yaml` of the lists a, b, ... with so many records each; an entry says what stands beside the path."""
    names = "abcdef"[: len(counts)]
    for name, count in zip(names, counts, strict=True):
        write_list(folder / f"{name}.jsonl", [f"{name}{i}" for i in range(count)])
    lines = [f"- {{path: {name}.jsonl, {entry}}}" for name, entry in zip(names, entries, strict=True)]
    path = folder / "mix.yaml"
    path.write_text("META:\n" + "\n".join(lines))
    return path


def prompts(source: object, indices: range) -> list[str]:
    return [source[i].captions[0].text for i in indices]  # type: ignore[index]


def test_the_releases_file_is_read_from_where_the_release_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As published: the path is relative to the folder above the one that the file is in.
    file = tmp_path / "configs" / "data.yaml"
    write_list(tmp_path / "configs" / "example.jsonl", ["A man", "A woman"])
    file.write_text("META:\n  -\n    path: './configs/example.jsonl'\n    type: 'image_text'\n")
    monkeypatch.chdir(tmp_path)
    source = open_source(file)
    assert source.has_captions
    assert prompts(source, range(len(source))) == ["A man", "A woman"]


def test_records_stand_one_list_after_another_and_keep_their_ids(tmp_path: Path) -> None:
    source = open_source(write_mixture(tmp_path, "type: image_text", "root: gs://bucket/images"))
    alone = open_source(tmp_path / "b.jsonl")
    assert len(source) == 50
    assert prompts(source, range(50)) == [*(f"a{i}" for i in range(40)), *(f"b{i}" for i in range(10))]
    assert [source[i].index for i in (0, 45)] == [0, 45]
    assert source[45].where == alone[5].where == f"{tmp_path}/b.jsonl:6"
    assert source[0].path == f"{tmp_path}/a0.jpg"
    assert source[45].path == "gs://bucket/images/b5.jpg"
    with pytest.raises(IndexError):
        source[50]
    assert pickle.loads(pickle.dumps(source))[45] == source[45]


def test_a_root_for_all_lists_counts_where_a_list_has_none(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    source = open_source(write_mixture(tmp_path, "type: x", "root: pictures"), root="/elsewhere")
    assert (source[0].path, source[40].path) == ("/elsewhere/a0.jpg", f"{tmp_path}/pictures/b0.jpg")


def test_a_ratio_uses_a_fixed_share_of_a_list(tmp_path: Path) -> None:
    source = open_source(write_mixture(tmp_path, "ratio: 0.3", "ratio: 1.0"))
    assert len(source) == 12 + 10
    used = prompts(source, range(12))
    assert len(set(used)) == 12
    assert set(used) < {f"a{i}" for i in range(40)}
    assert used[:12] != [f"a{i}" for i in range(12)]  # from all over the list
    assert prompts(source, range(12, 22)) == [f"b{i}" for i in range(10)]
    # The same records again, also where the list stands elsewhere in the mixture.
    again = open_source(write_mixture(tmp_path / "again", "ratio: 1.0", "ratio: 0.3", counts=(7, 40)))
    assert [text[1:] for text in prompts(again, range(7, 19))] == [text[1:] for text in used]


def test_the_signature_changes_with_the_records_that_are_used(tmp_path: Path) -> None:
    path = write_mixture(tmp_path, "ratio: 0.3", "ratio: 1.0")
    before = open_source(path).signature
    assert open_source(path).signature == before
    path.write_text(path.read_text().replace("0.3", "0.4"))
    after = open_source(path).signature
    assert after != before
    write_list(tmp_path / "b.jsonl", ["another"])
    assert open_source(path).signature not in (before, after)


def test_the_signature_changes_with_the_shares(tmp_path: Path) -> None:
    path, signatures = write_mixture(tmp_path, "weight: 1", "weight: 1"), set()
    for before, now in (("", ""), ("weight: 1", "weight: 2"), (", weight: 2", "")):  # 25 and 25; the same; none
        path.write_text(path.read_text().replace(before, now))
        signatures.add(open_source(path).signature)
    path.write_text(path.read_text().replace("a.jsonl", "a.jsonl, weight: 1").replace("b.jsonl", "b.jsonl, weight: 3"))
    assert len(signatures) == 2
    assert open_source(path).signature not in signatures


def test_any_source_can_stand_in_a_mixture(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "c.png")
    write_list(tmp_path / "a.jsonl", ["a0"])
    (tmp_path / "mix.yml").write_text("META: [{path: a.jsonl}, {path: pictures}]")
    source = open_source(tmp_path / "mix.yml")
    assert [record.path for record in (source[0], source[1])] == [
        f"{tmp_path}/a0.jpg", f"{tmp_path}/pictures/c.png",
    ]  # fmt: skip
    assert not source.has_captions


def test_without_weights_every_record_comes_once_an_epoch() -> None:
    source = range(23)
    for shuffle in (True, False):
        for epoch in range(3):
            drawn = [draw(source, epoch * 23 + place, 5, shuffle) for place in range(23)]  # type: ignore[arg-type]
            assert {found for found, _ in drawn} == {epoch}
            assert sorted(index for _, index in drawn) == list(range(23))
    assert draw(source, 23 + 4, 5, True) == (1, shuffled_index(4, 23, 5, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("shuffle", [True, False])
def test_weights_give_exact_shares_of_each_epoch_and_go_through_each_list(tmp_path: Path, shuffle: bool) -> None:
    source = open_source(write_mixture(tmp_path, "weight: 1", "weight: 2", "weight: 0.2", counts=(40, 10, 13)))
    assert isinstance(source, Mixture)
    # 63 draws: 19.69, 39.375 and 3.94 of them.
    assert source.shares == [20, 39, 4]
    seen: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
    for epoch in range(7):
        drawn = [draw(source, epoch * 63 + place, 11, shuffle) for place in range(63)]
        lists = collections.Counter(source[index].captions[0].text[0] for _, index in drawn)
        assert lists == {"a": 20, "b": 39, "c": 4}
        for passes, index in drawn:
            seen[source[index].captions[0].text[0]].append((passes, index))
    # No record comes twice in a pass over its list, and none is left out of one that is over.
    for name, count in (("a", 40), ("b", 10), ("c", 13)):
        assert len(set(seen[name])) == len(seen[name])
        by_pass = collections.Counter(passes for passes, _ in seen[name])
        whole = len(seen[name]) // count
        assert [by_pass[i] for i in range(whole)] == [count] * whole


def test_the_order_of_a_weighted_mixture_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = write_mixture(tmp_path, "weight: 3", "weight: 1")
    sources = [open_source(path), open_source(path)]
    orders = [[draw(source, k, seed, True) for k in range(200)] for source, seed in zip(sources, (1, 1), strict=True)]
    assert orders[0] == orders[1]
    assert orders[0] != [draw(sources[0], k, 2, True) for k in range(200)]
    assert orders[0][:50] != orders[0][50:100]
    # A new order for each pass over a list: b has 12 or 13 of the 50 draws, and 10 records.
    passes = [[index for found, index in orders[0] if index >= 40 and found == i] for i in range(4)]
    assert len({tuple(order) for order in passes}) == 4


@pytest.mark.parametrize(
    ("total", "weights", "shares"),
    [
        (10, [1, 1, 1], [4, 3, 3]),
        (10, [0.5, 0.3, 0.2], [5, 3, 2]),
        (100, [1, 2, 97], [1, 2, 97]),
        (3, [1, 1000], [0, 3]),
        (60_000_000, [0.1, 0.2, 0.7], [6_000_000, 12_000_000, 42_000_000]),
        (7, [1e-300, 1e9], [0, 7]),
    ],
)
def test_largest_remainders(total: int, weights: list[float], shares: list[int]) -> None:
    assert apportion(total, weights) == shares


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("META: [", r"mix\.yaml is not YAML"),
        ("\xff\x00", r"mix\.yaml is not YAML"),
        ("!!python/object/apply:os.getcwd []", r"mix\.yaml is not YAML"),
        ("", "has no list under META"),
        ("META: {path: a.jsonl}", "has no list under META"),
        ("META: []", "has no list under META"),
        ("META: []\nMETA: [{path: a.jsonl}]", r"mix\.yaml is not YAML \(the key 'META' stands twice .*line 1"),
        ("META: [{path: a.jsonl, weight: 1, weight: 3}]", r"the key 'weight' stands twice"),
        ("META: [a.jsonl]", r"mix\.yaml entry 1 is a str; expected '- path: a\.jsonl'"),
        ("META: [{path: a.jsonl}, {type: x}]", "entry 2 names no path"),
        ("META: [{path: 3}]", "entry 1 has 3 under 'path'; expected a text"),
        ("META: [{path: a.jsonl, weigth: 3}]", "has the key 'weigth'; did you mean 'weight'?"),
        ("META: [{path: a.jsonl, ratio: 1.5}]", "has the ratio 1.5; expected a number above 0 and at most 1"),
        ("META: [{path: a.jsonl, ratio: 0}]", "has the ratio 0;"),
        ("META: [{path: a.jsonl, ratio: .nan}]", "has the ratio nan;"),
        ("META: [{path: a.jsonl, weight: '3'}]", "has the weight '3';"),
        ("META: [{path: a.jsonl, weight: -1}]", "has the weight -1;"),
        (
            "META: [{path: a.jsonl, weight: 1}, {path: a.jsonl}]",
            r"gives no weight to the entries \[2\]; give one to all",
        ),
        ("META: [{path: a.jsonl, ratio: 0.01}]", r"the ratio 0\.01 leaves none of the 10 records of .*a\.jsonl"),
        (
            "META: [{path: a.jsonl, weight: 1}, {path: a.jsonl, weight: 900}]",
            "the weight 1 of .* too small for one draw",
        ),
        ("META: [{path: mix.yaml}]", r"entry 1 is a mixture itself, .*mix\.yaml; name its lists"),
        ("META: [{path: none.jsonl}]", r"data .*none\.jsonl does not exist"),
    ],
)
def test_a_mixture_that_cannot_be_is_fatal(tmp_path: Path, content: str, reason: str) -> None:
    write_list(tmp_path / "a.jsonl", [f"a{i}" for i in range(10)])
    (tmp_path / "mix.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as caught:
        open_source(tmp_path / "mix.yaml")
    assert "\n" not in str(caught.value)

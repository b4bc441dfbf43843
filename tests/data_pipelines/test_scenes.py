"""The rendered scenes and the judge that reads them back."""

import collections
import json
import time

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_pipelines.scenes import (
    ASPECTS,
    COLOURS,
    HELD_OUT,
    KINDS,
    PAIRS,
    PLACES,
    SHAPES,
    Thing,
    agreement,
    chance_levels,
    compare,
    detect,
    find_things,
    geneval_rows,
    render,
    sample_scene,
    scene_from_record,
    score,
    write_scenes,
)

NUM = 300


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(0, index) for index in range(NUM)]


def test_a_scene_is_a_function_of_seed_and_index(scenes):
    assert sample_scene(0, 17) == scenes[17]
    assert np.array_equal(render(scenes[17]), render(sample_scene(0, 17)))
    assert sample_scene(1, 17) != scenes[17]


def test_every_colour_shape_place_and_kind_occurs(scenes):
    things = [thing for scene in scenes for thing in scene.things]
    assert {thing.colour for thing in things} == set(COLOURS)
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.place for thing in things} == set(PLACES)
    assert {scene.kind for scene in scenes} == set(KINDS)
    assert {len(scene.things) for scene in scenes} == {1, 2, 3}


def test_held_out_pairs_never_occur_in_training_and_always_in_held_out_scenes(scenes):
    trained = {(thing.colour, thing.shape) for scene in scenes for thing in scene.things}
    assert trained == set(PAIRS) - HELD_OUT
    asked = {(t.colour, t.shape) for index in range(100) for t in sample_scene(0, index, held_out=True).things}
    assert asked == HELD_OUT
    # Each colour and each shape of a held-out pair is seen in training beside other shapes and colours.
    assert {colour for colour, _ in trained} == set(COLOURS)
    assert {shape for _, shape in trained} == set(SHAPES)


def test_the_caption_fixes_the_things(scenes):
    described = collections.defaultdict(set)
    for scene in scenes:
        described[scene.prompt].add(tuple(sorted(scene.things)))
        assert all(thing.colour in scene.prompt and thing.shape in scene.prompt for thing in scene.things)
        assert len(scene.prompt.split()) <= 18
        assert "a orange" not in scene.prompt
    assert all(len(things) == 1 for things in described.values())


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown kind 'four'"):
        sample_scene(0, 0, kind="four")


@pytest.mark.parametrize("blur", [0.0, 0.8, 1.6])
def test_the_judge_reads_renderings_back(scenes, blur):
    pictures = [Image.fromarray(render(scene)).filter(ImageFilter.GaussianBlur(blur)) for scene in scenes]
    found = [find_things(np.asarray(picture)) for picture in pictures]
    assert min(agreement(found, scenes).values()) >= 0.99


def test_the_judge_withstands_noise(scenes):
    noise = np.random.default_rng(0).normal(0, 12, (NUM, 64, 64, 3))
    pictures = [np.clip(render(scene) + noise[i], 0, 255).astype(np.uint8) for i, scene in enumerate(scenes)]
    assert min(agreement([find_things(picture) for picture in pictures], scenes).values()) >= 0.99


def test_the_judge_finds_nothing_where_nothing_is():
    assert find_things(np.full((64, 64, 3), 240, np.uint8)) == []
    speck = np.full((64, 64, 3), 240, np.uint8)
    speck[10:14, 10:14] = 0
    assert find_things(speck) == []


def test_a_shape_that_is_none_of_ours_is_unknown():
    image = np.full((64, 64, 3), 240, np.uint8)
    image[8:24, 8:12] = image[20:24, 8:24] = COLOURS["red"]  # an L
    assert find_things(image) == [Thing("red", "unknown", "top left")]


def test_a_component_may_wind():
    image = np.full((64, 64, 3), 240, np.uint8)
    image[4:60, 4:60] = 0
    for row in range(8, 56, 16):  # a serpentine: slits open on the right, then on the left
        image[row : row + 4, 8:] = 240
        image[row + 8 : row + 12, :56] = 240
    assert len(find_things(image)) == 1


def test_boxes_are_those_the_shapes_were_drawn_into(scenes):
    for scene in scenes[:60]:
        found = {(one.thing, one.x1, one.y1, one.x2, one.y2) for one in detect(render(scene))}
        assert len(found) == len(scene.things)
        for thing, (top, left, size) in zip(scene.things, scene.boxes, strict=True):
            (box,) = (box for other, *box in found if other == thing)
            # The outermost pixels of a shape are covered in part, and count where they differ enough from the ground.
            assert np.abs(np.array(box) - [left, top, left + size, top + size]).max() <= 2
            assert left <= box[0] < box[2] <= left + size
            assert top <= box[1] < box[3] <= top + size


def test_scenes_as_geneval_asks_for_them(scenes):
    rows = {kind: [(scene, geneval_rows(scene)) for scene in scenes if scene.kind == kind] for kind in KINDS}
    for scene, (single, colors) in rows["one"]:
        ((colour, shape, _),) = scene.things
        assert single == {"tag": "single_object", "include": [{"class": shape, "count": 1}], "prompt": scene.prompt}
        assert colors["include"] == [{"class": shape, "count": 1, "color": colour}]
    for scene, (counting,) in rows["pair"] + rows["trio"]:
        number = len(scene.things)
        assert counting["include"] == [{"class": scene.things[0].shape, "count": number}]
        assert counting["exclude"] == [{"class": scene.things[0].shape, "count": number + 1}]
    tags = collections.Counter(tuple(row["tag"] for row in found) for _, found in rows["two"])
    assert set(tags) == {(), ("two_object", "color_attr"), ("two_object", "color_attr", "position")}
    for scene, found in rows["two"]:
        assert bool(found) == (scene.things[0].shape != scene.things[1].shape)
        if len(found) == 3:
            first, second = (thing.place for thing in scene.things)
            ((relation, target),) = (clause["position"] for clause in found[2]["include"] if "position" in clause)
            word = {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}[relation]
            assert target == 0
            assert word in second
            assert word not in first


def test_compare_tells_the_aspects_apart():
    red_circle, blue_square = Thing("red", "circle", "top left"), Thing("blue", "square", "top right")
    swapped = [Thing("blue", "circle", "top left"), Thing("red", "square", "top right")]
    assert compare([blue_square, red_circle], [red_circle, blue_square]) == dict.fromkeys(ASPECTS, True)
    assert compare(swapped, [red_circle, blue_square]) == dict.fromkeys(ASPECTS, True) | {"all": False}
    assert compare([red_circle], [red_circle, blue_square]) == dict.fromkeys(ASPECTS, False)
    assert compare([], [red_circle]) == dict.fromkeys(ASPECTS, False)


def test_score_is_the_judge_and_the_comparison(scenes):
    assert score(render(scenes[0]), scenes[0]) == dict.fromkeys(ASPECTS, True)
    empty = np.full((64, 64, 3), 240, np.uint8)
    assert score(empty, scenes[0]) == dict.fromkeys(ASPECTS, False)


def test_chance_is_far_below_one_and_counts_what_shuffled_captions_share(scenes):
    singles = [sample_scene(3, index, kind="one") for index in range(200)]
    levels = chance_levels(singles)
    assert levels["count"] == 1
    assert 0.05 < levels["colour"] < 0.25
    assert 0.2 < levels["shape"] < 0.32
    assert 0.15 < levels["position"] < 0.25
    assert chance_levels(scenes[:100])["all"] < 0.02


def test_write_scenes_writes_what_the_trainer_reads_and_the_judge_needs(tmp_path):
    start = time.perf_counter()
    records = write_scenes(tmp_path, 500, seed=4)
    assert time.perf_counter() - start < 10
    lines = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 500
    for index in (0, 499):
        scene = scene_from_record(lines[index])
        assert scene == sample_scene(4, index)
        assert np.array_equal(np.asarray(Image.open(tmp_path / lines[index]["path"])), render(scene))

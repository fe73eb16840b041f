"""Mosaic and mixup: pictures, boxes, and how many of them come back."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vision.pictures import KINDS, bounds, picture, with_a_rectangle
from torch_frame.vision import crop, flip, mixup, mixup_boxes, mosaic

some = settings(max_examples=50)


@st.composite
def scenes(draw, kind: str, count: int):
    """Pairs (picture of a kind, (n, 5) rows class, x1, y1, x2, y2 inside it)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pairs = []
    for _ in range(count):
        height, width, boxes = draw(st.integers(1, 50)), draw(st.integers(1, 50)), draw(st.integers(0, 4))
        corners = np.sort(rng.uniform(0, 1, (boxes, 2, 2)), axis=1).reshape(boxes, 4) * [width, height, width, height]
        pairs.append((picture(kind, height, width, rng), np.c_[rng.integers(0, 90, boxes), corners]))
    return pairs


@some
@given(st.data(), st.sampled_from(KINDS), st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6))
def test_mosaic_keeps_classes_and_count_and_cuts_boxes_to_their_picture(data, kind, height, width, seed):
    pairs = data.draw(scenes(kind, 4))
    before = [(image.copy(), boxes.copy()) for image, boxes in pairs]
    image, boxes = mosaic(pairs, (height, width), rng=random.Random(seed))
    for (image_before, boxes_before), (image_now, boxes_now) in zip(before, pairs, strict=True):
        assert (image_before == image_now).all()
        assert (boxes_before == boxes_now).all()
    assert image.shape == (2 * height, 2 * width, *pairs[0][0].shape[2:])
    assert image.dtype == pairs[0][0].dtype
    assert boxes[:, 0].tolist() == [row[0] for _, rows in pairs for row in rows]
    assert (boxes[:, 1:] >= 0).all()
    assert (boxes[:, [1, 3]] <= 2 * width).all()
    assert (boxes[:, [2, 4]] <= 2 * height).all()
    assert (boxes[:, 1:3] <= boxes[:, 3:5]).all()
    kept = mosaic(pairs, (height, width), wh_thr=0, rng=random.Random(seed))[1]
    assert kept.tolist() == [row for row in boxes.tolist() if row[3] > row[1] and row[4] > row[2]]


@pytest.mark.parametrize("seed", range(20))
def test_a_box_of_a_mosaic_lies_where_its_pixels_are(seed):
    rng = np.random.default_rng(seed)
    image, box = with_a_rectangle(rng)
    black = np.zeros((30, 50), np.uint8)
    for place in range(4):
        data = [(black, np.zeros((0, 5)))] * 4
        data[place] = (image, np.array([[3.0, *box]]))
        result, rows = mosaic(data, (45, 64), fill_value=0, rng=random.Random(seed))
        if (result > 127).sum() > 4:
            np.testing.assert_allclose(bounds(result), rows[0, 1:], atol=1.5)


def test_mosaic_puts_each_picture_against_the_centre():
    data = [(np.full((20, 10), level, np.uint8), [[level, 0, 0, 10, 20]]) for level in (1, 2, 3, 4)]
    image, boxes = mosaic(data, (40, 40), rng=random.Random(0))
    draw = random.Random(0)
    centre_y, centre_x = int(draw.uniform(20, 60)), int(draw.uniform(20, 60))
    assert image[centre_y - 1, centre_x - 1] == 1
    assert image[centre_y - 1, centre_x] == 2
    assert image[centre_y, centre_x - 1] == 3
    assert image[centre_y, centre_x] == 4
    assert (image == 114).any()
    assert boxes[3].tolist() == [4, centre_x, centre_y, centre_x + 20, min(centre_y + 40, 80)]


@some
@given(st.data(), st.sampled_from(KINDS), st.integers(0, 10**6))
def test_mixup_is_the_weighted_sum_and_keeps_every_box_with_an_area(data, kind, seed):
    (first, boxes1), (second, boxes2) = data.draw(scenes(kind, 2))
    before = first.copy(), boxes1.copy()
    image, boxes = mixup_boxes(first, boxes1, second, boxes2, rng=random.Random(seed), ar_thr=np.inf)
    assert (first == before[0]).all()
    assert (boxes1 == before[1]).all()
    draw = random.Random(seed)
    alpha = draw.uniform(0.4, 0.6)
    height, width = max(first.shape[0], second.shape[0]), max(first.shape[1], second.shape[1])
    expected, rows = np.zeros((height, width, *first.shape[2:])), []
    for part, weight, given_rows in ((first, alpha, boxes1), (second, 1 - alpha, boxes2)):
        y, x = draw.randint(0, height - part.shape[0]), draw.randint(0, width - part.shape[1])
        expected[y : y + part.shape[0], x : x + part.shape[1]] += part.astype(np.float64) * weight
        rows += [row + np.array([0, x, y, x, y]) for row in given_rows if row[3] > row[1] and row[4] > row[2]]
    assert image.dtype == first.dtype
    np.testing.assert_array_equal(image, expected.astype(first.dtype))
    np.testing.assert_allclose(boxes, np.reshape(rows, (-1, 5)), atol=1e-9)


def test_mixup_does_not_measure_a_box_by_its_class():
    image, box = np.zeros((50, 50, 3), np.uint8), np.array([[70.0, 5, 5, 20, 20]])  # 1.7: y1 - class was the height
    assert mixup_boxes(image, box, image, [])[1].tolist() == box.tolist()
    assert len(mixup_boxes(image, box, image, box, wh_thr=15)[1]) == 0
    assert len(mixup_boxes(image, box, image, box, wh_thr=14)[1]) == 2
    assert mixup(image + 100, image).dtype == np.uint8
    assert mixup(image + 100, image, 0.0).max() == 50


def test_grey_pictures_among_colour_ones_get_their_channels():
    rng = np.random.default_rng(0)
    grey, flat, colour = picture("uint8 grey", 9, 9, rng), picture("uint8 1", 9, 9, rng), picture("uint8 3", 9, 9, rng)
    data = [(grey, []), (colour, []), (flat, []), (colour, [])]
    assert mosaic(data, (8, 8))[0].shape == (16, 16, 3)
    assert mixup(grey, colour).shape == (9, 9, 3)
    assert mixup(grey, flat).shape in ((9, 9), (9, 9, 1))
    with pytest.raises(ValueError, match=r"\[3, 4\] channels"):
        mixup(colour, picture("uint8 4", 9, 9, rng))
    with pytest.raises(ValueError, match="of one dtype"):
        mixup(colour, (colour / 255).astype(np.float32))


@pytest.mark.parametrize(
    "empty", [[], (), np.zeros((0, 5)), np.zeros((0, 5), np.int64), np.zeros(0), torch.zeros(0, 5)]
)
def test_no_boxes_of_any_kind(empty):
    image, box = np.zeros((12, 12, 3), np.uint8), np.array([[1, 2, 2, 9, 9]], dtype=np.float32)
    assert mosaic([(image, empty)] * 4, (12, 12))[1].shape == (0, 5)
    assert mixup_boxes(image, empty, image, empty)[1].shape == (0, 5)
    rows = mixup_boxes(image, empty, image, box)[1]
    assert rows.tolist() == box.tolist()
    assert rows.dtype == np.float32  # what is empty does not decide
    assert mosaic([(image, empty)] * 3 + [(image, box)], (12, 12))[1].dtype == np.float32


def test_boxes_beside_their_picture_do_not_reach_into_another():
    image = np.zeros((20, 20), np.uint8)
    rows = mosaic([(image, [[0, -50, -50, 500, 500]])] * 4, (20, 20), rng=random.Random(1))[1]
    draw = random.Random(1)
    y, x = int(draw.uniform(10, 30)), int(draw.uniform(10, 30))
    expected = [[x - 20, y - 20, x, y], [x, y - 20, x + 20, y], [x - 20, y, x, y + 20], [x, y, x + 20, y + 20]]
    assert rows[:, 1:].tolist() == np.clip(expected, 0, 40).tolist()


def test_whole_numbers_stay_whole_and_further_columns_come_along():
    image = np.zeros((30, 20, 3), np.uint8)
    rows = np.array([[1, 2, 3, 9, 9, 55]])
    for result in (mosaic([(image, rows)] * 4, (25, 25))[1], mixup_boxes(image, rows, image, rows)[1]):
        assert result.dtype == rows.dtype
        assert result[:, 5].tolist() == [55] * len(result)
    last = mosaic([(image, [[2.0, 3, 9, 9, 1]])] * 4, (25, 25), class_first=False, rng=random.Random(1))[1]
    first = mosaic([(image, [[1, 2.0, 3, 9, 9]])] * 4, (25, 25), rng=random.Random(1))[1]
    assert (first[:, [1, 2, 3, 4, 0]] == last).all()
    with pytest.raises(ValueError, match="columns"):
        mixup_boxes(image, rows, image, rows[:, :5])


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16])
def test_boxes_of_small_integers_do_not_wrap_around_on_a_large_canvas(dtype):
    small, large = np.zeros((120, 120), np.uint8), np.zeros((900, 900), np.uint8)
    rows = np.array([[3, 10, 20, 110, 120]], dtype=dtype)
    wide = rows.astype(np.int64)
    for make in (
        lambda rows: mosaic([(small, rows)] * 4, (900, 900), rng=random.Random(1))[1],
        lambda rows: mixup_boxes(small, rows, large, rows, rng=random.Random(3))[1],
        lambda rows: flip(large, rows, class_first=True)[1],
        lambda rows: crop(large, rows, (5, 5, 700, 800), class_first=True)[1],
    ):
        assert make(wide)[:, 1:].max() > 100
        assert make(rows).tolist() == make(wide).tolist()


def test_a_share_that_no_box_can_be_above_is_told():
    image, rows = np.zeros((20, 20), np.uint8), [[0, 2, 2, 9, 9]]
    for make in (
        lambda share: crop(image, rows, (0, 0, 12, 12), area_thr=share, class_first=True)[1],
        lambda share: mixup_boxes(image, rows, image, [], area_thr=share)[1],
    ):
        assert len(make(0.999)) == 1
        with pytest.raises(ValueError, match=r"area_thr is 1.0; .* Take 0.999"):
            make(1.0)


def test_long_thin_pictures_are_at_least_a_pixel_wide():
    for shape in ((1, 4000), (4000, 1), (1, 1)):
        image, boxes = mosaic([(np.full(shape, 9, np.uint8), [[0, 0, 0, *shape[::-1]]])] * 4, (16, 16))
        assert image.shape == (32, 32)
        assert boxes.shape == (4, 5)


def test_wrong_arguments_are_told():
    image = np.zeros((4, 4), np.uint8)
    with pytest.raises(ValueError, match="these are 3"):
        mosaic([(image, [])] * 3, (4, 4))
    with pytest.raises(ValueError, match="ouput_dim is"):
        mosaic([(image, [])] * 4, (4, 4, 3))
    with pytest.raises(ValueError, match="ouput_dim is 4"):
        mosaic([(image, [])] * 4, 4)
    with pytest.raises(ValueError, match="rows of numbers class"):
        mosaic([(image, [[0, 0, 1, 1]])] * 4, (4, 4))
    with pytest.raises(ValueError, match=r"mixup_scale is 0.6"):
        mixup(image, image, 0.6)
    with pytest.raises(TypeError, match="this is a str"):
        mosaic([("a.jpg", [])] * 4, (4, 4))


def test_the_generator_that_is_passed_decides_alone():
    rng = np.random.default_rng(0)
    data = [(picture("uint8 3", 20, 30, rng), [])] * 4
    state = random.getstate()
    for make in (random.Random, np.random.default_rng, lambda seed: torch.Generator().manual_seed(seed)):
        assert (mosaic(data, (20, 20), rng=make(3))[0] == mosaic(data, (20, 20), rng=make(3))[0]).all()
        assert (mixup(data[0][0], data[1][0], rng=make(3)) == mixup(data[0][0], data[1][0], rng=make(3))).all()
    assert random.getstate() == state

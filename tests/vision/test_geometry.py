"""Letterbox, flips, crops, perspective: boxes go where the picture goes, whatever the picture."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vision.pictures import KINDS, bounds, picture, with_a_rectangle, without_opencv
from torch_frame.vision import (
    crop,
    flip,
    letterbox,
    random_crop,
    random_flip,
    random_perspective,
    unletterbox,
)
from torch_frame.vision.geometry import _random_matrix, _warped_boxes

sides = st.integers(1, 70)
some = settings(max_examples=50)


@st.composite
def scenes(draw):
    """A picture of any kind and (n, 5) rows x1, y1, x2, y2, class inside it, across its edge, outside."""
    height, width, count = draw(sides), draw(sides), draw(st.integers(0, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    image = picture(draw(st.sampled_from(KINDS)), height, width, rng)
    corner = rng.uniform(-0.5, 1.2, (count, 2)) * [width, height]
    boxes = np.c_[corner, corner + rng.uniform(0, 0.8, (count, 2)) * [width, height], rng.integers(0, 9, count)]
    return image, boxes


def assert_fits(image, boxes, like):
    assert image.dtype == like.dtype
    assert image.shape[2:] == like.shape[2:]
    assert image.ndim == like.ndim
    assert image.flags.c_contiguous
    torch.from_numpy(image)  # no negative strides
    assert not np.shares_memory(image, like)
    assert (boxes[:, :4] >= 0).all()
    assert (boxes[:, [0, 2]] <= image.shape[1]).all()
    assert (boxes[:, [1, 3]] <= image.shape[0]).all()
    assert (boxes[:, :2] <= boxes[:, 2:4]).all()


@some
@given(scenes(), sides, sides, st.booleans(), st.booleans())
def test_letterbox_shows_all_of_the_picture_and_every_box_finds_its_way_back(scene, height, width, centre, enlarge):
    image, boxes = scene
    before = image.copy(), boxes.copy()
    result = letterbox(image, (height, width), boxes, centre=centre, enlarge=enlarge)
    assert result.image.shape[:2] == (height, width)
    assert_fits(result.image, result.boxes, image)
    assert (image == before[0]).all()
    assert (boxes == before[1]).all()
    assert (result.boxes[:, 4] == boxes[:, 4]).all()  # all of them, in order
    back = unletterbox(result.boxes, *result[2:])
    inside = boxes[:, :4].clip(0, [image.shape[1], image.shape[0]] * 2)
    np.testing.assert_allclose(
        back[:, :4], inside, atol=1e-9 * max(image.shape[:2]) / min(result.scale_x, result.scale_y)
    )
    if not enlarge:
        assert max(result.scale_x, result.scale_y) <= 1


def test_letterbox_rounds_each_side_and_reports_the_padding_that_is_there():
    flat = letterbox(np.zeros((1571, 3775), np.uint8), (1280, 1280), [[0, 0, 3775, 1571]])
    assert flat.boxes.tolist() == [[0, 373, 1280, 906]]  # 1571 * 1280 / 3775 is 532.7: 533 rows, 373 above
    assert (flat.image[[372, 373, 905, 906], 0] == [114, 0, 0, 114]).all()
    tall = letterbox(np.zeros((3775, 1571), np.uint8), (1280, 1280), [[0, 0, 1571, 3775]])
    assert tall.boxes.tolist() == [[373, 0, 906, 1280]]


@pytest.mark.parametrize("opencv", [True, False])
def test_letterbox_is_opencvs_resize_with_a_border(opencv, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    if not opencv:
        without_opencv(monkeypatch)
    for seed, kind in enumerate(KINDS * 3):
        rng = np.random.default_rng(seed)
        image = picture(kind, *rng.integers(3, 60, 2), rng)
        size = tuple(rng.integers(10, 60, 2).tolist())
        result = letterbox(image, size)
        height, width = (
            round(side * scale) for side, scale in zip(image.shape, (result.scale_y, result.scale_x), strict=False)
        )
        middle = cv2.resize(image.astype(np.float64), (width, height), interpolation=cv2.INTER_LINEAR)
        right, bottom = size[1] - result.left - width, size[0] - result.top - height
        level = 114 if image.dtype == np.uint8 else 114 / 255
        edges = (result.top, bottom, result.left, right)
        expected = cv2.copyMakeBorder(middle, *edges, cv2.BORDER_CONSTANT, value=[level] * 4).reshape(
            result.image.shape
        )
        tolerance = {"uint8": 1, "float16": 1e-3}.get(str(image.dtype), 1e-5)
        np.testing.assert_allclose(result.image.astype(np.float64), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("opencv", [True, False])
def test_a_box_lies_where_its_pixels_are(opencv, monkeypatch):
    if opencv:
        pytest.importorskip("cv2")
    else:
        without_opencv(monkeypatch)
    for seed in range(40):
        image, box = with_a_rectangle(np.random.default_rng(seed))
        boxed = letterbox(image, (90, 130), [box])
        np.testing.assert_allclose(bounds(boxed.image), boxed.boxes[0], atol=1)
        flipped, rows = flip(image, [box], horizontal=seed % 2 == 0, vertical=seed % 3 == 0)
        assert bounds(flipped) == rows[0].tolist()
        cropped, rows = random_crop(image, [box], rng=random.Random(seed))
        if len(rows):
            assert bounds(cropped) == rows[0].tolist()
        matrix, _ = _random_matrix(random.Random(seed), *image.shape, 0, 0.1, (0.7, 1.5), 0, 0.0)
        moved, rows = random_perspective(
            image, [box], 0, 0.1, (0.7, 1.5), 0, fill_value=0, wh_thr=0, area_thr=0, rng=random.Random(seed)
        )
        if len(rows):  # scaled and shifted only: the box is as tight as before
            np.testing.assert_allclose(bounds(moved), rows[0], atol=1.01)
            np.testing.assert_allclose(
                rows, _warped_boxes(np.array([box], float), matrix).clip(0, image.shape[::-1] * 2)
            )
        kwargs = {"perspective": 0.3} if seed % 2 else {}
        moved, rows = random_perspective(
            image, [box], 30, 0.1, fill_value=0, wh_thr=0, area_thr=0, rng=random.Random(seed), **kwargs
        )
        if (moved > 127).any():  # turned: the box is around its corners
            x1, y1, x2, y2 = bounds(moved)
            assert rows[0, 0] - 1 <= x1 <= x2 <= rows[0, 2] + 1
            assert rows[0, 1] - 1 <= y1 <= y2 <= rows[0, 3] + 1


@some
@given(scenes(), st.booleans(), st.booleans())
def test_flips_are_their_own_inverse_and_keep_every_box(scene, horizontal, vertical):
    image, boxes = scene
    once = flip(image, boxes, horizontal=horizontal, vertical=vertical)
    assert_fits(*once, image)
    twice = flip(*once, horizontal=horizontal, vertical=vertical)
    assert (twice[0] == image).all()
    np.testing.assert_allclose(twice[1][:, :4], boxes[:, :4].clip(0, [image.shape[1], image.shape[0]] * 2), atol=1e-9)
    assert (twice[1][:, 4] == boxes[:, 4]).all()
    expected = np.flip(image, [axis for axis, asked in ((1, horizontal), (0, vertical)) if asked])
    assert (once[0] == expected).all()


@some
@given(scenes(), st.data())
def test_a_crop_is_the_slice_and_leaves_out_only_boxes_of_which_nothing_is_seen(scene, data):
    image, boxes = scene
    height, width = image.shape[:2]
    x1, y1 = data.draw(st.integers(-5, width - 1)), data.draw(st.integers(-5, height - 1))
    x2, y2 = data.draw(st.integers(max(x1, 0) + 1, width + 5)), data.draw(st.integers(max(y1, 0) + 1, height + 5))
    before = boxes.copy()
    cropped, rows = crop(image, boxes, (x1, y1, x2, y2))
    assert (boxes == before).all()
    assert_fits(cropped, rows, image)
    assert (cropped == image[max(y1, 0) : y2, max(x1, 0) : x2]).all()
    window = np.array([max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)])
    seen = [
        np.r_[max(b[0], window[0]), max(b[1], window[1]), min(b[2], window[2]), min(b[3], window[3])] for b in boxes
    ]
    expected = [
        b - window[[0, 1, 0, 1]] for b in seen if (b[2:] - b[:2] > 0).all() and (b[2] - b[0]) * (b[3] - b[1]) > 0
    ]
    np.testing.assert_allclose(rows[:, :4], np.reshape(expected, (-1, 4)), atol=1e-9)


def test_boxes_without_end_are_cut_to_the_picture():
    image, endless = np.zeros((30, 40), np.uint8), [[-np.inf, -np.inf, np.inf, np.inf]]
    assert crop(image, endless, (5, 5, 20, 20))[1].tolist() == [[0, 0, 15, 15]]
    assert flip(image, endless)[1].tolist() == [[0, 0, 40, 30]]
    assert letterbox(image, (60, 80), endless).boxes.tolist() == [[0, 0, 80, 60]]
    assert random_perspective(image, endless, area_thr=0)[1].tolist() == [[0, 0, 40, 30]]
    for dtype in (np.float16, np.float32):
        rows = flip(image, np.array(endless, dtype))[1]
        assert rows.tolist() == [[0, 0, 40, 30]]
        assert rows.dtype == np.float32


def test_crop_thresholds_and_windows_beside_the_picture():
    image = np.zeros((100, 100), np.uint8)
    boxes = [[0, 0, 50, 10], [45, 0, 95, 10]]
    assert len(crop(image, boxes, (40, 0, 100, 100))[1]) == 2
    assert crop(image, boxes, (40, 0, 100, 100), area_thr=0.5)[1].tolist() == [[5, 0, 55, 10]]
    with pytest.raises(ValueError, match="no pixel of the picture 100 x 100"):
        crop(image, boxes, (100, 0, 120, 50))
    with pytest.raises(ValueError, match="scale is"):
        random_crop(image, scale=(0, 1))


@some
@given(scenes(), st.integers(0, 10**6), st.sampled_from([(0, 0), (3, 5), (-1, 0)]), st.booleans())
def test_random_perspective_takes_everything_and_keeps_boxes_inside(scene, seed, border, tilted):
    image, boxes = scene
    if image.shape[0] + 2 * border[0] < 1:
        border = (0, 0)
    before = image.copy(), boxes.copy()
    moved, rows = random_perspective(
        image, boxes, border=border, fill_value=7, perspective=0.2 if tilted else 0.0, rng=random.Random(seed)
    )
    assert (image == before[0]).all()
    assert (boxes == before[1]).all()
    assert moved.shape[:2] == (image.shape[0] + 2 * border[0], image.shape[1] + 2 * border[1])
    assert_fits(moved, rows, image)
    assert (rows[:, 2:4] - rows[:, :2] > 2).all()  # the default thresholds
    every = random_perspective(
        image,
        boxes,
        border=border,
        perspective=0.2 if tilted else 0.0,
        wh_thr=-1,
        ar_thr=math.inf,
        area_thr=-1,
        rng=random.Random(seed),
    )[1]
    kept = {tuple(row) for row in rows.tolist()}
    assert kept <= {tuple(row) for row in every.tolist()}
    assert len(every) == len(boxes)


def test_random_perspective_of_nothing_is_the_identity_with_the_border():
    image = np.arange(60, dtype=np.uint8).reshape(6, 10)
    still = {"angle": 0, "translate": 0, "scale": (1, 1), "shear": 0}
    assert (random_perspective(image, [], **still)[0] == image).all()
    padded, rows = random_perspective(image, [[1, 2, 6, 6]], border=(2, 1), fill_value=9, **still)
    assert (padded == np.pad(image, ((2, 2), (1, 1)), constant_values=9)).all()
    assert rows.tolist() == [[2, 4, 7, 8]]
    middle, rows = random_perspective(image, [[1, 1, 6, 6]], border=(-1, -2), **still)  # out of a mosaic
    assert (middle == image[1:-1, 2:-2]).all()
    assert rows.tolist() == [[0, 0, 4, 4]]
    with pytest.raises(ValueError, match="nothing is left"):
        random_perspective(image, [], border=(-3, 0))
    with pytest.raises(ValueError, match="perspective is"):
        random_perspective(image, [], perspective=0.6)


def test_what_is_left_of_a_box_is_measured_against_the_scaled_box():
    image, box = np.zeros((100, 100), np.uint8), [[20, 20, 40, 40]]
    twice = {"angle": 0, "translate": 0, "scale": (2, 2), "shear": 0}  # -10.5..29.5, of which 54 % are seen
    assert random_perspective(image, box, **twice, area_thr=0.5)[1].round(9).tolist() == [[0, 0, 29.5, 29.5]]
    assert len(random_perspective(image, box, **twice, area_thr=0.6)[1]) == 0


def test_a_warp_without_opencv_is_opencvs(monkeypatch):
    pytest.importorskip("cv2")
    arguments = [(kind, seed) for seed in range(12) for kind in KINDS]

    def warp_all():
        results = []
        for kind, seed in arguments:
            image = picture(kind, 40, 50, np.random.default_rng(seed))
            tilt = {"perspective": 0.2} if seed % 2 else {}
            results.append(random_perspective(image, [], rng=random.Random(seed), **tilt)[0].astype(np.float64))
        return results

    theirs = warp_all()
    without_opencv(monkeypatch)
    for (kind, seed), ours, expected in zip(arguments, warp_all(), theirs, strict=True):
        tolerance = {"uint8": 1, "float16": 2e-3}.get(kind.split()[0], 1e-4)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance, err_msg=f"{kind} {seed}")


@pytest.mark.parametrize("boxes", [[], (), np.zeros((0, 5)), np.zeros(0), torch.zeros(0, 5)])
def test_no_boxes_of_any_kind(boxes):
    image = np.zeros((8, 9, 3), np.uint8)
    for rows in (
        letterbox(image, (5, 5), boxes).boxes,
        flip(image, boxes)[1],
        random_crop(image, boxes)[1],
        random_perspective(image, boxes)[1],
    ):
        assert rows.ndim == 2
        assert len(rows) == 0
        assert rows.shape[1] in (4, 5)


@pytest.mark.parametrize("as_kind", [tuple, list, np.asarray, torch.as_tensor])
def test_boxes_of_any_kind_with_the_class_first_or_last(as_kind):
    image = np.zeros((40, 40), np.uint8)
    last = as_kind([[4, 6, 20, 30, 7]])
    first = as_kind([[7, 4, 6, 20, 30]])
    for move in (
        lambda rows, **order: letterbox(image, (80, 100), rows, **order).boxes,
        lambda rows, **order: flip(image, rows, **order)[1],
        lambda rows, **order: random_flip(image, rows, rng=random.Random(1), **order)[1],
        lambda rows, **order: crop(image, rows, (2, 2, 30, 28), **order)[1],
        lambda rows, **order: random_crop(image, rows, rng=random.Random(1), **order)[1],
        lambda rows, **order: random_perspective(image, rows, rng=random.Random(1), **order)[1],
        lambda rows, **order: unletterbox(rows, 2.0, 2.0, 1, 0, **order),
    ):
        by_last, by_first = move(last), move(first, class_first=True)
        assert by_last.shape == (1, 5)
        assert (by_first == by_last[:, [4, 0, 1, 2, 3]]).all()
        assert by_last[0, 4] == 7
    assert (
        flip(image, last)[1].dtype == crop(image, last, (0, 0, 9, 9))[1].dtype == np.int64
    )  # exact, so whole numbers stay


def _seeded_twice():
    """python's `random` as the default, and as a module that is passed."""
    random.seed(8)
    yield None
    random.seed(8)
    yield random


def test_the_generator_that_is_passed_decides_alone():
    image, boxes = np.arange(900, dtype=np.uint8).reshape(30, 30), [[3, 3, 20, 20]]
    assert np.array_equal(*(random_crop(image, boxes, rng=rng)[0].shape for rng in _seeded_twice()))
    makers = [random.Random, np.random.default_rng, lambda seed: torch.Generator().manual_seed(seed)]
    for augment in (random_flip, random_crop, random_perspective):
        for maker in makers:
            state = random.getstate()
            first, again, other = (augment(image, boxes, rng=maker(seed)) for seed in (3, 3, 12))
            assert random.getstate() == state
            assert np.array_equal(first[0], again[0])
            assert np.array_equal(first[1], again[1])
            assert augment is random_flip or not np.array_equal(first[0], other[0])
        random.seed(5)
        first = augment(image, boxes)
        assert np.array_equal(first[0], augment(image, boxes, rng=random.Random(5))[0])
    with pytest.raises(TypeError, match="rng is a int"):
        random_flip(image, rng=3)


def test_random_flip_and_crop_happen_as_often_as_asked():
    image = np.arange(16, dtype=np.uint8).reshape(4, 4)
    rng = random.Random(0)
    flips = sum((random_flip(image, p=0.3, rng=rng)[0] != image).any() for _ in range(2000))
    crops = sum(random_crop(image, scale=(0.3, 0.5), p=0.3, rng=rng)[0].shape != (4, 4) for _ in range(2000))
    assert flips == pytest.approx(600, abs=85)  # four standard deviations
    assert crops == pytest.approx(600, abs=85)
    assert (random_flip(image, p=0)[0] == image).all()
    assert (random_flip(image, p=0, vertical_p=1)[0] == image[::-1]).all()


def test_odd_pictures_work_and_no_pictures_are_told():
    for shape in ((1, 1), (1, 1, 1), (1, 1, 3), (1, 300), (300, 1, 3), (7, 9, 4), (7, 9, 11)):
        for image in (np.zeros(shape, np.uint8), np.zeros(shape, np.float32)[::-1], np.zeros(shape, np.float16)):
            image.flags.writeable = False
            letterbox(image, (16, 16), [[0, 0, 1, 1]])
            random_crop(image, [[0, 0, 1, 1]])
            random_perspective(image, [[0, 0, 1, 1]], fill_value=5)
            flip(image, [[0, 0, 1, 1]])
    with pytest.raises(TypeError, match="this is a list"):
        flip([[1]])
    with pytest.raises(TypeError, match="this is a Tensor"):
        letterbox(torch.zeros(3, 4, 4), (5, 5))
    with pytest.raises(TypeError, match="this one is of int64"):
        random_perspective(np.zeros((4, 4), int), [])
    with pytest.raises(ValueError, match=r"this one is \(0, 4\)"):
        crop(np.zeros((0, 4), np.uint8), [], (0, 0, 1, 1))
    with pytest.raises(ValueError, match=r"size is 640; it is \(height, width\)"):
        letterbox(np.zeros((4, 4), np.uint8), 640)
    with pytest.raises(ValueError, match="size is"):
        letterbox(np.zeros((4, 4), np.uint8), (0, 5))
    with pytest.raises(ValueError, match="Boxes have NaN, first in row 1"):
        random_perspective(np.zeros((4, 4), np.uint8), [[0, 0, 1, 1], [0, np.nan, 1, 1]])
    with pytest.raises(ValueError, match="rows of numbers x1"):
        flip(np.zeros((4, 4), np.uint8), [[1, 2, 3]])
    with pytest.raises(ValueError, match="rows of numbers class"):
        flip(np.zeros((4, 4), np.uint8), [[1, 2, 3, 4]], class_first=True)
    for fill in ((1, 2), 256, -1, np.nan, None):
        with pytest.raises(ValueError, match="fill_value"):
            letterbox(np.zeros((4, 4, 3), np.uint8), (9, 5), fill_value=fill)
    for wrong in ({"scale": (0, 1)}, {"shear": 45}, {"shear": np.nan}):
        with pytest.raises(ValueError, match="scales are above 0"):
            random_perspective(np.zeros((4, 4), np.uint8), [], **wrong)
    with pytest.raises(ValueError, match="vertical_p is -1"):
        random_flip(np.zeros((4, 4), np.uint8), vertical_p=-1)


def test_fill_is_in_levels_of_255_whatever_the_dtype():
    for dtype, level in ((np.uint8, 51), (np.float32, 0.2), (np.float64, 0.2)):
        result = letterbox(np.zeros((2, 4, 3), dtype), (4, 4), fill_value=(51, 0, 51)).image
        assert result[0, 0].tolist() == pytest.approx([level, 0, level])
        assert letterbox(np.zeros((2, 4), dtype), (4, 4), fill_value=(51, 51, 51)).image[0, 0] == pytest.approx(level)

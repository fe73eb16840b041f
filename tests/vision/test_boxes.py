"""Formats, overlap and filters of boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from torch_frame.vision import (
    bboxes_iou,
    box_candidates,
    box_iou,
    clip_boxes,
    convert_boxes,
    filter_box,
    xyxy2cxcywh,
)
from torch_frame.vision.boxes import FORMATS, MODES

quick = settings(max_examples=60, deadline=None)


@st.composite
def boxes_xyxy(draw, *, dtype=np.float64, max_size=8):
    """(n, 4), of any size within 0..1000, some without area."""
    count = draw(st.integers(0, max_size))
    whole = hnp.arrays(np.int64, (count, 4), elements=st.integers(0, 1000))
    values = draw(
        whole if np.issubdtype(dtype, np.integer) else hnp.arrays(np.float64, (count, 4), elements=st.floats(0, 1000))
    )
    return np.sort(values.reshape(count, 2, 2), axis=1).reshape(count, 4).astype(dtype)


def as_kind(boxes: np.ndarray, kind: str):
    return torch.from_numpy(boxes) if kind == "tensor" else boxes


@quick
@given(boxes_xyxy(), st.sampled_from(FORMATS), st.sampled_from(FORMATS), st.sampled_from(["array", "tensor"]))
def test_a_box_comes_back_from_every_format(boxes, first, second, kind):
    there = convert_boxes(as_kind(boxes, kind), "xyxy", first)
    further = convert_boxes(there, first, second)
    back = convert_boxes(further, second, "xyxy")
    assert type(back) is type(as_kind(boxes, kind))
    np.testing.assert_allclose(np.asarray(back), boxes, rtol=0, atol=1e-9)


@quick
@given(boxes_xyxy(dtype=np.int64), st.sampled_from(["array", "tensor"]))
def test_whole_numbers_are_exact_in_every_format(boxes, kind):
    sides = convert_boxes(as_kind(boxes, kind), "xyxy", "xywh")
    assert "int64" in str(sides.dtype)
    assert (convert_boxes(sides, "xywh", "xyxy") == as_kind(boxes, kind)).all()
    centres = convert_boxes(as_kind(boxes, kind), "xyxy", "cxcywh")
    assert (convert_boxes(centres, "cxcywh", "xyxy") == as_kind(boxes, kind)).all()


def test_formats_say_what_they_say_and_leave_their_argument_and_further_columns():
    boxes = np.array([[10.0, 20.0, 40.0, 60.0, 0.5]])
    before = boxes.copy()
    assert convert_boxes(boxes, "xyxy", "xywh").tolist() == [[10, 20, 30, 40, 0.5]]
    assert convert_boxes(boxes, "xyxy", "cxcywh").tolist() == [[25, 40, 30, 40, 0.5]]
    same = convert_boxes(boxes, "xyxy", "xyxy")
    assert same is not boxes
    assert not np.shares_memory(same, boxes)
    assert (boxes == before).all()


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_xyxy2cxcywh_changes_its_argument_and_returns_it(kind):
    boxes = as_kind(np.array([[10.0, 20.0, 40.0, 60.0, 7.0]]), kind)
    assert xyxy2cxcywh(boxes) is boxes
    assert boxes.tolist() == [[25, 40, 30, 40, 7]]
    rows = np.array([[3.0, 10.0, 20.0, 40.0, 60.0]])
    rows[:, 1:] = xyxy2cxcywh(rows[:, 1:])  # as YOLOX code writes it
    assert rows.tolist() == [[3, 25, 40, 30, 40]]
    assert xyxy2cxcywh(boxes[:0]).shape == (0, 5)


@quick
@given(boxes_xyxy(), boxes_xyxy())
def test_iou_is_pycocotools(a, b):
    if len(a) and len(b):
        wide = [np.ascontiguousarray(convert_boxes(boxes, "xyxy", "xywh")) for boxes in (a, b)]
        expected = np.nan_to_num(np.array(coco.iou(*wide, [0] * len(b))))
        np.testing.assert_allclose(box_iou(a, b), expected, rtol=1e-9, atol=1e-12)


@quick
@given(boxes_xyxy(), boxes_xyxy(), st.sampled_from(MODES), st.sampled_from(["array", "tensor"]))
def test_overlap_is_symmetric_and_within_its_bounds(a, b, mode, kind):
    forth, back = (np.asarray(box_iou(as_kind(x, kind), as_kind(y, kind), mode=mode)) for x, y in ((a, b), (b, a)))
    assert forth.shape == (len(a), len(b))
    np.testing.assert_allclose(forth, back.T, rtol=0, atol=1e-12)
    lowest = {"iou": 0, "iof": 0, "giou": -1, "ciou": -2}[mode]
    assert (forth >= lowest - 1e-12).all()
    assert (forth <= 1 + 1e-12).all()
    if mode in ("giou", "ciou"):
        assert (forth <= np.asarray(box_iou(a, b)) + 1e-12).all()


@quick
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(MODES),
    st.sampled_from(["xywh", "cxcywh"]),
    st.sampled_from([np.float32, np.float64]),
)
def test_tiny_boxes_far_from_0_stay_within_the_bounds_in_every_format(seed, mode, box_format, dtype):
    rng = np.random.default_rng(seed)
    sides = 10 ** rng.uniform(-9, 2, (6, 2))
    rows = np.c_[rng.uniform(0, 1000, (6, 2)).round(1), sides].astype(dtype)
    near = np.r_[rows, rows + np.array([0, 0, 1e-8, 1e-7])].astype(dtype)
    overlap = box_iou(rows, near, mode=mode, box_format=box_format)
    assert (overlap <= 1).all()
    assert (overlap >= {"iou": 0, "iof": 0, "giou": -1, "ciou": -2}[mode] - 1e-6).all()


@quick
@given(boxes_xyxy(), st.sampled_from(MODES), st.sampled_from(FORMATS))
def test_a_box_with_an_area_overlaps_itself_wholly_in_every_format(boxes, mode, box_format):
    boxes = boxes[(boxes[:, 2:] - boxes[:, :2] > 1e-3).all(axis=1)]
    given_boxes = convert_boxes(boxes, "xyxy", box_format)
    own = box_iou(given_boxes, given_boxes.copy(), mode=mode, box_format=box_format, paired=True)
    np.testing.assert_allclose(own, 1, rtol=0, atol=1e-6)
    all_pairs = box_iou(given_boxes, given_boxes, mode=mode, box_format=box_format)
    np.testing.assert_array_equal(np.diagonal(all_pairs), own)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint32, np.int64])
def test_whole_numbers_neither_wrap_around_nor_lose_digits(dtype):
    boxes = np.array([[0, 0, 200, 200], [100, 100, 250, 250]], dtype=dtype)
    assert box_iou(boxes, boxes)[0, 1] == 100 * 100 / (200 * 200 + 150 * 150 - 100 * 100)
    large = np.array([[0, 0, 100_000, 100_000], [0, 0, 100_000, 50_000]], dtype=np.int32)  # areas beyond 32 bits
    assert box_iou(large, large)[0, 1] == 0.5
    assert box_iou(torch.from_numpy(large), torch.from_numpy(large))[0, 1] == 0.5
    assert box_candidates(large, large).tolist() == [True, True]
    assert len(filter_box(large, 1)) == 2
    square = np.array([[0, 0, 65536, 65536]], dtype=np.int32)  # an area of 2 ** 32
    for boxes in (square, torch.from_numpy(square)):
        assert len(filter_box(boxes)) == 1
        assert box_candidates(boxes, boxes).tolist() == [True]


@pytest.mark.parametrize("kind", ["array", "tensor"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.uint32])
def test_sums_and_differences_of_small_and_unsigned_integers_do_not_wrap_around(dtype, kind):
    top = int(np.iinfo(dtype).max)
    numbers = np.array([[top - 1, 1, top, 3], [5, 9, 2, 14]], dtype=dtype)
    boxes, exact = as_kind(numbers, kind), as_kind(numbers.astype(np.int64), kind)
    for source, target in (("xywh", "xyxy"), ("xyxy", "xywh"), ("xywh", "cxcywh"), ("xyxy", "cxcywh")):
        assert convert_boxes(boxes, source, target).tolist() == convert_boxes(exact, source, target).tolist()
    assert clip_boxes(boxes, 2 * top, 3 * top).tolist() == exact.tolist()
    assert filter_box(boxes, 1.0).tolist() == filter_box(exact, 1.0).tolist() == exact[:1].tolist()


def test_clip_boxes_lets_gradients_flow_where_nothing_is_cut():
    boxes = torch.tensor([[-5.0, 2, 50, 19]], requires_grad=True)
    clip_boxes(boxes, 20, 10).sum().backward()
    assert boxes.grad.tolist() == [[0, 1, 0, 1]]


def test_half_is_computed_in_float32_and_stays_half():
    boxes = torch.tensor([[0.0, 0, 640, 640], [0, 0, 640, 320]])
    for dtype in (torch.float16, torch.bfloat16):
        overlap = bboxes_iou(boxes.to(dtype), boxes.to(dtype))  # an area of 409,600 is beyond float16
        assert overlap.dtype == dtype
        assert overlap[0].tolist() == [1.0, 0.5]
    assert box_iou(boxes.numpy().astype(np.float16), boxes.numpy().astype(np.float16)).dtype == np.float16


def test_zero_area_inverted_and_empty_boxes():
    odd = np.array([[5.0, 5, 5, 5], [8, 8, 2, 2], [8, 2, 2, 8], [np.inf, 0, np.inf, 1]])
    plain = np.array([[0.0, 0, 10, 10]])
    for mode in ("iou", "iof"):
        assert bboxes_iou(odd[:3], plain, mode=mode).tolist() == [[0], [0], [0]]
        assert box_iou(odd[:3], odd[:3], mode=mode).tolist() == np.zeros((3, 3)).tolist()
    for mode in MODES:
        assert np.isfinite(box_iou(odd[:3], odd[:3], mode=mode)).all()
        for kind in ("array", "tensor"):
            assert box_iou(as_kind(plain[:0], kind), as_kind(odd, kind), mode=mode).shape == (0, 4)
    assert box_iou(odd, plain).shape == (4, 1)  # infinite: NaN, no warning


@pytest.mark.parametrize("mode", MODES)
def test_gradients_flow_and_are_finite_for_odd_boxes_too(mode):
    rows = [[0.0, 0, 10, 10], [5, 5, 5, 5], [20, 20, 30, 40], [0, 0, 10, 10]]
    boxes = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[2.0, 3, 12, 14], [5, 5, 5, 5], [0, 0, 1, 1], [0, 0, 10, 10]], dtype=torch.float64)
    box_iou(boxes, other, mode=mode, paired=True).sum().backward()
    assert torch.isfinite(boxes.grad).all()
    assert boxes.grad[0].abs().sum() > 0
    if mode != "ciou":  # whose weight is a constant to the gradient
        first = boxes.detach()[:1].requires_grad_()
        assert torch.autograd.gradcheck(lambda x: box_iou(x, other[:1], mode=mode, paired=True), first)


def test_generalised_and_complete_iou_of_the_papers_formulas():
    a, b = np.array([[0.0, 0, 10, 10]]), np.array([[20.0, 0, 30, 20]])
    assert box_iou(a, b, mode="giou")[0, 0] == pytest.approx(-(600 - 300) / 600)
    angle = 4 / np.pi**2 * (np.arctan(0.5) - np.arctan(1)) ** 2
    expected = 0 - (20**2 + 5**2) / (30**2 + 20**2) - angle / (1 + angle) * angle
    assert box_iou(a, b, mode="ciou")[0, 0] == pytest.approx(expected)


def test_the_weight_of_ciou_is_a_constant_to_the_gradient():
    boxes = torch.tensor([[0.0, 0, 10, 10]], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[3.0, 1, 20, 9]], dtype=torch.float64)
    (found,) = torch.autograd.grad(box_iou(boxes, other, mode="ciou").sum(), boxes)
    sides, other_sides = boxes[0, 2:] - boxes[0, :2], other[0, 2:] - other[0, :2]
    shape = 4 / torch.pi**2 * (torch.atan(other_sides[0] / other_sides[1]) - torch.atan(sides[0] / sides[1])) ** 2
    centres = ((boxes[0, :2] + boxes[0, 2:] - other[0, :2] - other[0, 2:]) ** 2).sum() / 4
    hull = (torch.maximum(boxes[0, 2:], other[0, 2:]) - torch.minimum(boxes[0, :2], other[0, :2])) ** 2
    iou = box_iou(boxes, other).sum()
    weight = (shape / (1 - iou + shape)).item()
    (expected,) = torch.autograd.grad(iou - centres / hull.sum() - weight * shape, boxes)
    torch.testing.assert_close(found, expected)


def test_iof_is_over_the_smaller_area_and_eps_is_the_least_denominator():
    small, large = np.array([[0.0, 0, 2, 2]]), np.array([[0.0, 0, 10, 10]])
    assert bboxes_iou(small, large, mode="iof").item() == bboxes_iou(large, small, mode="iof").item() == 1
    tiny = np.array([[0.0, 0, 1e-4, 1e-4]])
    assert bboxes_iou(tiny, tiny).item() == pytest.approx(1e-2)  # 1.7's eps of 1e-6
    assert box_iou(tiny, tiny).item() == pytest.approx(1)


def test_wrong_arguments_are_told():
    boxes = np.zeros((2, 4))
    with pytest.raises(TypeError, match="ndarray and Tensor"):
        bboxes_iou(boxes, torch.zeros(2, 4))
    with pytest.raises(TypeError, match="list and ndarray"):
        box_iou([[0, 0, 1, 1]], boxes)
    with pytest.raises(IndexError, match=r"\(2, 5\)"):
        bboxes_iou(boxes, np.zeros((2, 5)))
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        box_iou(boxes, np.zeros((2, 5)))
    with pytest.raises(ValueError, match="mode is 'gio'"):
        bboxes_iou(boxes, boxes, mode="gio")
    with pytest.raises(ValueError, match="box format is 'yolo'"):
        box_iou(boxes, boxes, box_format="yolo")
    with pytest.raises(ValueError, match="2 and 1"):
        box_iou(boxes, boxes[:1], paired=True)
    with pytest.raises(ValueError, match="box format"):
        convert_boxes(boxes, "xyxy", "yxyx")
    with pytest.raises(ValueError, match="at least 4 columns"):
        convert_boxes(boxes[:, :3], "xyxy", "xywh")


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_filter_box_keeps_areas_between_the_two_squares(kind):
    boxes = as_kind(np.array([[0.0, 0, 5, 5, 1], [0, 0, 6, 6, 2], [0, 0, 10, 10, 3], [3, 3, 3, 9, 4]]), kind)
    assert filter_box(boxes, 5, 10)[:, 4].tolist() == [2]
    assert filter_box(boxes)[:, 4].tolist() == [1, 2, 3]
    assert filter_box(boxes, max_scale=10)[:, 4].tolist() == [1, 2]
    assert filter_box(boxes[:0], 5).shape == (0, 5)


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_box_candidates_thresholds_are_strict(kind):
    before = as_kind(np.tile([0.0, 0, 10, 10], (5, 1)), kind)
    after = as_kind(np.array([[0.0, 0, 10, 10], [0, 0, 2, 10], [0, 0, 2.5, 50], [0, 0, 4, 5], [0, 0, 4, 5.1]]), kind)
    assert box_candidates(before, after).tolist() == [True, False, False, False, True]
    assert box_candidates(before[:0], after[:0]).shape == (0,)


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_clip_boxes_cuts_to_the_picture_and_leaves_its_argument(kind):
    boxes = as_kind(np.array([[-5.0, -5, 50, 50, 9], [30, 30, 40, 40, 8]]), kind)
    assert clip_boxes(boxes, 20, 10).tolist() == [[0, 0, 10, 20, 9], [10, 20, 10, 20, 8]]
    assert boxes[0, 0] == -5

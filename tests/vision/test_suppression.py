"""NMS, against the definition in a plain loop, torchvision and OpenCV."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_frame.vision import batched_nms, box_iou, letterbox, nms
from torch_frame.vision._optional import imported


def by_definition(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    overlaps, kept = box_iou(boxes, boxes), []
    for index in sorted(range(len(boxes)), key=lambda k: (-scores[k], k)):
        if (overlaps[index, kept] <= threshold).all():
            kept.append(index)
    return kept


def crowd(
    seed: int, count: int, span: float = 100, size: float = 40, dtype=np.float64
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    corner, sides = rng.uniform(0, span, (count, 2)), rng.uniform(1, size, (count, 2))
    boxes = np.concatenate([corner, corner + sides], axis=1)
    boxes = boxes.round() if seed % 2 else boxes  # whole numbers: IoUs of exactly the threshold
    return boxes.astype(dtype), rng.integers(0, 50, count) / 50  # with ties


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 60), st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]), st.booleans())
def test_nms_keeps_what_the_definition_keeps_and_always_the_best(seed, count, threshold, as_tensor):
    boxes, scores = crowd(seed, count)
    kept = (
        nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold)
        if as_tensor
        else nms(boxes, scores, threshold)
    )
    assert kept.dtype == (torch.int64 if as_tensor else np.int64)
    assert kept.tolist() == by_definition(boxes, scores, threshold)
    kept = np.asarray(kept)
    if count:
        assert kept[0] == scores.argmax()
        between = np.triu(box_iou(boxes[kept], boxes[kept]), 1)
        assert (between <= threshold).all()


@pytest.mark.parametrize(("span", "size", "threshold"), [(60, 40, 0.5), (400, 40, 0.5), (4000, 20, 0.3), (50, 45, 0.9)])
@pytest.mark.parametrize(("seed", "stretch"), [(2, (1, 1)), (3, (1, 1)), (2, (1, 30)), (2, (30, 1))])
def test_blocks_and_strips_change_nothing(span, size, threshold, seed, stretch):
    boxes, scores = crowd(seed, 1500, span, size)
    boxes[::50, seed] = np.nan
    boxes = boxes * [*stretch, *stretch] - 100  # strips along x and along y, and negative coordinates
    order = np.argsort(-scores, kind="stable")
    overlaps, gone, kept = box_iou(boxes, boxes) > threshold, np.zeros(1500, dtype=bool), []
    for index in order:
        if not gone[index]:
            kept.append(int(index))
            gone |= overlaps[index]
    assert nms(boxes, scores, threshold).tolist() == kept


@pytest.mark.parametrize("as_tensor", [False, True])
def test_groups_are_suppressed_each_for_itself(as_tensor):
    boxes, scores = crowd(4, 400)
    boxes -= 60  # some coordinates are negative, which moving groups apart by the largest one does not survive
    groups = np.random.default_rng(0).integers(-1, 6, 400)
    groups[0] = 77  # a group of one
    expected = []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        expected += members[by_definition(boxes[members], scores[members], 0.4)].tolist()
    expected.sort(key=lambda index: (-scores[index], index))
    arguments = [torch.from_numpy(x) if as_tensor else x for x in (boxes, scores, groups)]
    assert batched_nms(*arguments, 0.4).tolist() == expected
    floats = [*arguments[:2], arguments[2].to(torch.float32) if as_tensor else groups.astype(np.float32)]
    assert batched_nms(*floats, 0.4).tolist() == expected


def test_group_numbers_of_any_size_do_not_blur_small_boxes():
    boxes = np.array([[0, 0, 1e-3, 1e-3], [0, 0, 1e-3, 0.4e-3], [0, 0, 1e-3, 1e-3]], dtype=np.float32)
    kept = batched_nms(boxes, np.array([0.9, 0.8, 0.7], dtype=np.float32), np.array([10**6, 10**6, 10**6]), 0.5)
    assert kept.tolist() == [0, 1]


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_empty_odd_and_broken_boxes(kind):
    assert nms(kind(np.zeros((0, 4))), kind(np.zeros(0)), 0.5).tolist() == []
    assert batched_nms(kind(np.zeros((0, 4))), kind(np.zeros(0)), kind(np.zeros(0)), 0.5).tolist() == []
    points = kind(np.array([[3.0, 3, 3, 3], [3, 3, 3, 3], [9, 9, 1, 1]]))  # no area: they overlap nothing
    assert nms(points, kind(np.array([0.5, 0.6, 0.7])), 0.0).tolist() == [2, 1, 0]
    broken = np.array([[0, 0, 10, 10], [np.nan, 0, 10, 10], [0, 0, 10, 10], [-np.inf, 0, np.inf, 10]])
    assert nms(kind(broken), kind(np.array([0.5, 0.4, 0.9, 0.1])), 0.5).tolist() == [2, 1, 3]
    assert nms(kind(broken[[0, 2]]), kind(np.array([np.nan, 0.1])), 0.5).tolist() == [1]  # NaN is the lowest score
    twins = kind(np.tile([0.0, 0, 5, 5], (700, 1)))
    assert nms(twins, kind(np.ones(700)), 0.5).tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.uint8])
def test_tensors_of_any_dtype_and_boxes_and_scores_of_two(dtype):
    boxes = torch.tensor([[0, 0, 200, 200], [0, 0, 200, 190], [0, 0, 200, 90]]).to(dtype)
    scores = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float16)
    before = boxes.clone()
    assert nms(boxes, scores, 0.5).tolist() == [2, 0]
    assert torch.equal(boxes, before)
    if dtype.is_floating_point:
        assert nms(boxes.requires_grad_(), scores, 0.5).tolist() == [2, 0]


def test_wrong_arguments_are_told():
    with pytest.raises(TypeError, match="ndarray, Tensor"):
        nms(np.zeros((1, 4)), torch.zeros(1), 0.5)
    with pytest.raises(ValueError, match=r"\(3, 5\)"):
        nms(np.zeros((3, 5)), np.zeros(3), 0.5)
    with pytest.raises(ValueError, match="There are 3 boxes"):
        nms(np.zeros((3, 4)), np.zeros((3, 1)), 0.5)
    with pytest.raises(ValueError, match="iou_threshold is -1"):
        nms(np.zeros((3, 4)), np.zeros(3), -1)


@pytest.mark.parametrize(
    ("span", "size", "threshold"), [(640, 60, 0.5), (5000, 20, 0.5), (640, 600, 0.5), (640, 600, 0.95)]
)
def test_ten_thousand_boxes_take_less_than_300_ms(span, size, threshold):
    boxes, scores = crowd(0, 10_000, span, size)
    times = []
    for _ in range(3):
        begin = time.thread_time()
        nms(boxes, scores, threshold)
        times.append(time.thread_time() - begin)
    assert min(times) < 0.3


def test_torchvision_keeps_the_same():
    theirs = pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    for seed in range(20):
        boxes, scores = crowd(seed, 300 if seed < 18 else 1200, dtype=np.float32)
        groups = np.random.default_rng(seed).integers(0, 5, len(boxes))
        tensors = [torch.from_numpy(x) for x in (boxes, scores.astype(np.float32), groups)]
        assert nms(boxes, scores, 0.5).tolist() == theirs.ops.nms(*tensors[:2], 0.5).tolist()
        assert batched_nms(*tensors, 0.5).tolist() == batched_nms(boxes, scores, groups, 0.5).tolist()


def test_opencv_keeps_the_same():
    cv2 = pytest.importorskip("cv2")
    for seed in range(0, 20, 2):
        boxes, scores = crowd(seed, 200)
        scores = (
            np.random.default_rng(seed).permutation(200) / 200 + 0.01
        )  # without ties, which it orders in its own way
        rows = np.c_[boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]
        theirs = cv2.dnn.NMSBoxes(rows.tolist(), scores.tolist(), 0.0, 0.5)
        assert nms(boxes, scores, 0.5).tolist() == list(theirs)


@pytest.mark.parametrize(
    ("package", "reason", "use"),
    [
        (
            "torchvision",
            "RuntimeError('operator torchvision::nms does not exist')",
            "NMS runs in NumPy, with the same results",
        ),
        ("cv2", "ImportError('libGL.so.1')", "torch and NumPy change pictures instead, up to a level apart"),
    ],
)
def test_a_package_that_is_broken_counts_as_not_installed_and_is_told_once(
    package, reason, use, tmp_path, caplog, monkeypatch
):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(f"raise {reason}")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    imported.cache_clear()
    try:
        with caplog.at_level("INFO", logger="torch_frame"):
            for _ in range(2):
                assert nms(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([1.0]), 0.5).tolist() == [0]
                assert letterbox(np.full((2, 2), 7, np.uint8), (3, 3)).image.max() == 7
        lines = [record.getMessage() for record in caplog.records if package in record.getMessage()]
        assert lines == [f"{package} can't be imported ({reason[reason.index(chr(39)) + 1 : -2]}); {use}."]
    finally:
        imported.cache_clear()


def test_a_package_that_is_not_installed_is_not_spoken_of(caplog):
    with caplog.at_level("INFO", logger="torch_frame"):
        assert imported("a_package_that_nobody_has.ops", "never mind") is None
        assert not caplog.records
        assert imported("json.nothing", "never mind") is None  # installed, but lacks a part
        assert len(caplog.records) == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_boxes_on_a_card_are_suppressed_as_on_the_cpu():
    boxes, scores = (torch.from_numpy(x) for x in crowd(2, 500, dtype=np.float32))
    groups = torch.arange(500) % 3
    on_card = batched_nms(boxes.cuda(), scores.cuda(), groups.cuda(), 0.5)
    assert on_card.device.type == "cuda"
    assert on_card.tolist() == batched_nms(boxes, scores, groups, 0.5).tolist()
    assert nms(boxes.cuda(), scores.cuda(), 0.5).tolist() == nms(boxes, scores, 0.5).tolist()
    overlaps = box_iou(boxes.cuda(), boxes.cuda(), mode="ciou")
    torch.testing.assert_close(overlaps.cpu(), box_iou(boxes, boxes, mode="ciou"))

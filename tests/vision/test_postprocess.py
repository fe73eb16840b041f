"""det_postprocess: a YOLO head's rows become boxes, and stay as they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torch_frame.vision import box_iou, convert_boxes, det_postprocess


def head(seed: int, images: int = 3, count: int = 60, num_classes: int = 4) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    boxes = np.concatenate([rng.uniform(0, 100, (images, count, 2)), rng.uniform(5, 40, (images, count, 2))], axis=2)
    return torch.from_numpy(np.concatenate([boxes, rng.random((images, count, 1 + num_classes))], axis=2))


def by_definition(rows: np.ndarray, conf: float, limit: float, *, agnostic: bool) -> np.ndarray:
    """(k, 7) in plain loops."""
    labels = rows[:, 5:].argmax(axis=1)
    best = rows[np.arange(len(rows)), 5 + labels]
    scores = rows[:, 4] * best
    corners = np.c_[rows[:, :2] - rows[:, 2:4] / 2, rows[:, :2] + rows[:, 2:4] / 2]
    overlaps, kept = box_iou(corners, corners), []
    for i in sorted(np.flatnonzero(scores >= conf), key=lambda k: -scores[k]):
        if all(overlaps[i, j] <= limit or not (agnostic or labels[i] == labels[j]) for j in kept):
            kept.append(i)
    return np.c_[corners, rows[:, 4], best, labels][kept]


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_boxes_are_those_of_the_definition_and_the_prediction_stays(seed, agnostic):
    prediction = head(seed)
    before = prediction.clone()
    found = det_postprocess(prediction, 4, 0.3, 0.4, class_agnostic=agnostic)
    assert torch.equal(prediction, before)
    for rows, result in zip(prediction.numpy(), found, strict=True):
        np.testing.assert_allclose(result, by_definition(rows, 0.3, 0.4, agnostic=agnostic), atol=1e-12)
    merged = det_postprocess(prediction, 4, 0.3, 0.4, agnostic, merge_score=True, ret_np=True)
    for result, row in zip(found, merged, strict=True):
        assert row.dtype == np.float64
        expected = torch.cat([result[:, :4], result[:, 4:5] * result[:, 5:6], result[:, 6:]], dim=1)
        np.testing.assert_allclose(row, expected, rtol=1e-6)


def test_one_candidate_no_candidate_and_no_rows():
    one = head(0, images=1, count=1)
    one[..., 4:] = 0.9
    (rows,) = det_postprocess(one, 4)  # 1.7: IndexError
    assert rows.shape == (1, 7)
    assert det_postprocess(one, 4, conf_thre=0.95) == [None]
    assert det_postprocess(one[:, :0], 4) == [None]
    assert det_postprocess(one[:0], 4) == []
    assert det_postprocess(torch.full((1, 3, 9), torch.nan), 4) == [None]  # NaN reaches no threshold


def test_the_threshold_itself_is_kept_and_an_iou_of_exactly_the_limit_too():
    rows = torch.tensor([[[5.0, 5, 10, 10, 0.5, 1], [5, 2.5, 10, 5, 0.5, 1], [5, 5, 10, 9, 0.5, 1]]])
    (kept,) = det_postprocess(rows, 1, conf_thre=0.5, nms_thre=0.5)
    assert kept[:, 3].tolist() == [10, 5]


def test_leaves_that_require_gradients_and_inference_tensors_work():
    prediction = head(1).float().requires_grad_()
    found = det_postprocess(prediction, 4, 0.2)
    found[0].sum().backward()
    assert prediction.grad is not None
    assert isinstance(det_postprocess(prediction, 4, 0.2, ret_np=True)[0], np.ndarray)
    with torch.inference_mode():
        frozen = head(1)
        assert det_postprocess(frozen, 4, 0.2)[0] is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_dtype_works_and_class_numbers_are_exact(dtype):
    num_classes = 3000  # bfloat16 counts to 256
    prediction = torch.zeros(1, 2, 5 + num_classes, dtype=dtype)
    prediction[0, :, :4] = torch.tensor([[50, 50, 20, 20], [150, 50, 20, 20]], dtype=dtype)
    prediction[0, :, 4] = 1
    prediction[0, 0, 5 + 2999] = prediction[0, 1, 5 + 2001] = 1
    (rows,) = det_postprocess(prediction, num_classes)
    (array,) = det_postprocess(prediction, num_classes, ret_np=True)
    assert array.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    assert rows[:, 6].tolist() == [2999, 2001]
    assert rows[0, :4].tolist() == [40, 40, 60, 60]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_heads_of_half_precision_are_computed_in_float32(dtype):
    """A corner of bfloat16 beyond 256 is rounded to even pixels, and a product of scores to three digits."""
    prediction = (head(4) * torch.tensor([6.0] * 4 + [1.0] * 5)).to(dtype)
    for ours, expected in zip(
        det_postprocess(prediction, 4, 0.3), det_postprocess(prediction.float(), 4, 0.3), strict=True
    ):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, expected)
    (rows,) = det_postprocess(torch.tensor([[[302.0, 302, 21, 21, 0.9375, 0.9375]]], dtype=dtype), 1, merge_score=True)
    assert rows[0, :5].tolist() == [291.5, 291.5, 312.5, 312.5, 0.9375**2]


def test_further_columns_are_no_classes_and_too_few_are_told():
    prediction = head(2, num_classes=4)
    wider = torch.cat([prediction, torch.full((3, 60, 2), 9.0)], dim=2)
    for ours, expected in zip(det_postprocess(wider, 4, 0.3), det_postprocess(prediction, 4, 0.3), strict=True):
        assert torch.equal(ours, expected)
    with pytest.raises(ValueError, match=r"\(3, 60, 9\); for 5 classes it has to be \(B, N, 10\)"):
        det_postprocess(prediction, 5)
    with pytest.raises(TypeError, match="this is a ndarray"):
        det_postprocess(prediction.numpy(), 4)


def test_boxes_come_back_as_they_went_in():
    prediction = head(3, images=1)
    (rows,) = det_postprocess(prediction, 4, conf_thre=0.0, nms_thre=1.0)
    given = {tuple(np.round(row, 9)) for row in prediction[0, :, :4].tolist()}
    assert {tuple(np.round(row, 9)) for row in convert_boxes(rows[:, :4], "xyxy", "cxcywh").tolist()} == given

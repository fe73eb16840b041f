"""VOC's average precision over dicts, as 1.7 has it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from torch_frame.metrics import ObjDetMAPMetric
from torch_frame.vision import eval_map
from torch_frame.vision.tools.object_detection import cal_match, calc_ap, clac_voc_ap


def images(seed: int, classes: int = 3, count: int = 12) -> tuple[dict, dict]:
    """Truth and detections near it, without ties and without IoUs at the threshold."""
    rng = np.random.default_rng(seed)
    truth, found = {}, {}
    for name in range(classes):
        truth[name], found[name] = [], []
        for _ in range(count):
            corner = rng.uniform(0, 60, (rng.integers(0, 4), 2))
            boxes = np.concatenate([corner, corner + rng.uniform(10, 30, corner.shape)], axis=1)
            near = np.concatenate(
                [boxes + rng.normal(0, 2, boxes.shape), rng.uniform(0, 20, (2, 4)) + np.array([0, 0, 20, 20])]
            )
            truth[name].append({"bboxes": boxes} if len(boxes) else {})
            found[name].append({"bboxes": near, "confidence": rng.random(len(near))})
    return truth, found


@pytest.mark.parametrize("seed", range(10))
def test_eval_map_is_the_metrics_value_and_leaves_its_arguments(seed):
    truth, found = images(seed)
    before = copy.deepcopy((truth, found))
    ours = eval_map(truth, found)
    for given, kept in zip((truth, found), before, strict=True):
        assert str(given) == str(kept)  # 1.7 wrote "b_det" into the truth
    metric = ObjDetMAPMetric({str(name): name for name in truth}, is_xyxy=True, postprocess=lambda outputs: outputs)
    for image in range(12):
        rows = [
            np.c_[f[image]["bboxes"], f[image]["confidence"], np.full(len(f[image]["bboxes"]), n)]
            for n, f in found.items()
        ]
        boxes = [np.c_[np.full(len(t[image]["bboxes"]), n), t[image]["bboxes"]] for n, t in truth.items() if t[image]]
        metric.update(lambda outputs: outputs, ([np.concatenate(rows)], [np.concatenate(boxes or [np.zeros((0, 5))])]))
    expected = metric.evaluate()
    for name in truth:
        assert ours[name] == pytest.approx(expected[f"ap_{name}"], abs=1e-12)


def test_edges_no_truth_no_detections_lists_and_one_truth_once():
    box = [0, 0, 10, 10]
    assert eval_map({"a": [{}], "b": [{"bboxes": [box]}], "c": [{}]}, {"a": [{}], "b": [{}], "c": [found([box])]}) == {
        "a": 0.0,
        "b": 0.0,
        "c": 0.0,
    }
    assert eval_map({"a": [{"bboxes": [box]}]}, {"a": [found([box])]}) == {"a": 1.0}
    recall, precision, ap = clac_voc_ap([{"bboxes": [box, [20, 20, 30, 30]]}], [found([box, box])])
    assert recall.tolist() == [0.5, 0.5]
    assert precision.tolist() == [1, 0.5]
    assert ap == pytest.approx(6 / 11)
    with pytest.raises(KeyError):
        eval_map({"a": [{}]}, {})
    with pytest.raises(ValueError, match="2 images and predictions of 1"):
        clac_voc_ap([{}, {}], [{}])


def found(boxes: list) -> dict:
    return {"bboxes": boxes, "confidence": [0.9 - 0.1 * place for place in range(len(boxes))]}


def test_an_iou_of_exactly_the_threshold_does_not_count_here():
    truth, half = {"a": [{"bboxes": [[0, 0, 10, 10]]}]}, {"a": [found([[0, 0, 10, 5]])]}
    assert eval_map(truth, half, 0.5) == {"a": 0.0}
    assert eval_map(truth, half, 0.4999) == {"a": 1.0}


def test_whole_tenths_of_recall_are_reached():
    for right in range(1, 11):
        recall = np.arange(1, right + 1) / 10
        assert calc_ap(recall, np.ones(right)) == pytest.approx((right + 1) / 11)  # 1.7 missed 0.3, 0.6 and 0.7


@pytest.mark.parametrize("seed", range(10))
def test_the_area_is_scikit_learns_where_precision_only_falls(seed):
    right = np.sort(np.random.default_rng(seed).random(30) < 0.5)[::-1]  # all that is right comes first
    recall, precision = right.cumsum() / max(right.sum(), 1), right.cumsum() / np.arange(1, 31)
    expected = average_precision_score(right, -np.arange(30)) if right.any() else 0
    assert calc_ap(recall, precision, use_07_metric=False) == pytest.approx(expected)
    mixed = np.random.default_rng(seed).random(30) < 0.5
    recall, precision = mixed.cumsum() / mixed.sum(), mixed.cumsum() / np.arange(1, 31)
    area = sum((recall[k] - (recall[k - 1] if k else 0)) * precision[k:].max() for k in range(30))
    assert calc_ap(recall, precision, use_07_metric=False) == pytest.approx(area)
    assert calc_ap([], []) == calc_ap([], [], use_07_metric=False) == 0


def test_cal_match_counts_each_truth_once():
    truth = np.array([[1.0, 0, 0, 50, 50], [2, 0, 0, 50, 50]])
    close = np.array([[1.0, 1, 1, 50, 50], [1, 0, 0, 50, 50], [2, 0, 0, 50, 46], [2, 0, 0, 50, 44.9]])
    assert cal_match(close, truth) == 0.5
    assert cal_match(close[2:], truth) == 0.5
    assert cal_match(close[:0], truth) == 0
    assert cal_match(close, truth[:0]) == 0

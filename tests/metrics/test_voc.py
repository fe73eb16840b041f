"""VOC's average precision against closed forms and the development kit's procedure, written out one box at a time."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from tests.metrics.coco_reference import Case, random_case
from tests.metrics.test_detection import COCO100, coco100, metric_of
from torch_frame.metrics import voc, voc_average_precision


def rows_of(case: Case) -> tuple[list[list[float]], list[list[float]]]:
    """Detections (image, x, y, w, h, score, class) and truth (image, x, y, w, h, area, crowd, class)."""
    detections = [
        [i, *box, score, label]
        for i, rows in enumerate(case.preds)
        for box, score, label in zip(*(rows[name].tolist() for name in ("boxes", "scores", "labels")), strict=True)
    ]
    truth = [
        [i, *box, area, crowd, label]
        for i, rows in enumerate(case.targets)
        for box, area, crowd, label in zip(
            *(rows[name].tolist() for name in ("boxes", "area", "iscrowd", "labels")), strict=True
        )
    ]
    return detections, truth


def devkit(case: Case, threshold: float) -> tuple[list[float], list[float]]:
    """(area, eleven-point) of each class as VOCevaldet.m and VOCap.m say it, in exact fractions."""
    detections, truth = rows_of(case)
    return tuple(zip(*(devkit_of_class(detections, truth, k, threshold) for k in range(case.num_classes)), strict=True))


def devkit_of_class(detections, truth, k, threshold):
    num_truth = sum(row[-1] == k and not row[6] for row in truth)
    if num_truth == 0:
        return -1.0, -1.0
    taken, right, curve = set(), 0, []  # curve: (recall, precision)
    for row in sorted((row for row in detections if row[-1] == k), key=lambda row: -row[5]):
        best, best_iou = None, 0.0
        for j, other in enumerate(truth):
            if other[0] == row[0] and other[-1] == k and iou(row[1:5], other[1:5]) > best_iou:
                best, best_iou = j, iou(row[1:5], other[1:5])
        matched = best is not None and best_iou >= threshold
        if matched and truth[best][6]:
            continue
        right += matched and best not in taken
        if matched:
            taken.add(best)
        curve.append((Fraction(right, num_truth), Fraction(right, len(curve) + 1)))
    recalls = sorted({recall for recall, _ in curve} | {Fraction(0)})
    area = sum((b - a) * reached(curve, b) for a, b in itertools.pairwise(recalls))
    return float(area), float(sum(reached(curve, Fraction(k, 10)) for k in range(11)) / 11)


def reached(curve, recall):
    return max((p for r, p in curve if r >= recall), default=Fraction(0))


def iou(a, b):
    w, h = (min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    return w * h / (a[2] * a[3] + b[2] * b[3] - w * h) if w > 0 and h > 0 else 0.0


@pytest.mark.parametrize("pairs_at_once", [1, 7, voc.PAIRS_AT_ONCE])
def test_random_cases_are_as_the_development_kit_has_them(pairs_at_once, monkeypatch):
    monkeypatch.setattr(voc, "PAIRS_AT_ONCE", pairs_at_once)
    for seed in range(60):
        case, threshold = random_case(seed), [0.5, 0.3, 1.0][seed % 3]
        detections, truth = rows_of(case)
        detections, truth = np.array(detections, float).reshape(-1, 7), np.array(truth, float).reshape(-1, 8)
        ours = voc_average_precision(detections, truth, case.num_classes, threshold)
        area, eleven_point = devkit(case, threshold)
        assert ours.area == pytest.approx(area, abs=1e-14), seed
        assert ours.eleven_point == pytest.approx(eleven_point, abs=1e-14), seed


@pytest.mark.parametrize("num_truth", [1, 3, 7, 10])
@pytest.mark.parametrize("num_found", [0, 1, 3, 6, 7, 10])
def test_recalls_of_tenths_are_reached(num_truth, num_found):
    num_found = min(num_truth, num_found)
    truth = np.array([[i, 0, 0, 10, 10, 100, 0, 0] for i in range(num_truth)], float)
    detections = np.array([[i, 0, 0, 10, 10, 1 - i / 100, 0] for i in range(num_found)], float).reshape(-1, 7)
    result = voc_average_precision(detections, truth, num_classes=1)  # each detection is right
    assert result.area[0] == pytest.approx(num_found / num_truth)
    assert result.eleven_point[0] == pytest.approx((10 * num_found // num_truth + 1) / 11 if num_found else 0)


def test_a_second_detection_of_a_box_is_wrong_even_where_another_box_is_free():
    truth = np.array([[0, 0, 0, 100, 100, 1e4, 0, 0], [0, 0, 5, 100, 100, 1e4, 0, 0]], float)
    detections = np.array([[0, 0, 0, 100, 100, 0.9, 0], [0, 0, 1, 100, 100, 0.8, 0]], float)
    assert voc_average_precision(detections, truth, 1).area.tolist() == [0.5]  # COCO gives the second box to the second


def test_a_hundred_real_images():
    if not COCO100.is_dir():
        pytest.skip(f"the COCO images' truth and detections are not there: {COCO100}")
    results, (area, eleven_point) = metric_of(coco100()).compute(), devkit(coco100(), 0.5)
    assert list(results["voc_map_per_class"].values()) == pytest.approx(area, abs=1e-14)
    assert list(results["voc07_map_per_class"].values()) == pytest.approx(eleven_point, abs=1e-14)
    assert results["voc_map"] == pytest.approx(np.mean([value for value in area if value >= 0]))
    assert results["voc07_map"] == pytest.approx(np.mean([value for value in eleven_point if value >= 0]))

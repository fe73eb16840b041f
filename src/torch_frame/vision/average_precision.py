"""VOC's average precision of boxes given as dicts, as 1.7 has it. `torch_frame.metrics` has the metrics of today."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from torch_frame.vision.boxes import bboxes_iou, box_iou

Floats = npt.NDArray[np.float64]
Class = TypeVar("Class")


def eval_map(
    annotation_result: Mapping[Class, Sequence[Mapping[str, Any]]],
    detector_result: Mapping[Class, Sequence[Mapping[str, Any]]],
    ovthresh: float = 0.5,
) -> dict[Class, float]:
    """class -> its eleven-point average precision (VOC 2007). Both arguments are left as they are.

    `torch_frame.metrics.ObjDetMAPMetric` and `VocAP` take what a model returns; they also count an IoU of exactly `ovthresh`, as
    VOC's development kit does.

    Args:
        annotation_result: class -> for each image {} or {"bboxes": (n, 4) xyxy, ...}.
        detector_result: class -> for each image {} or {"bboxes": (n, 4), "confidence": (n,)}; the same classes and images.
        ovthresh: a detection is right if its IoU with a truth that no better one has is above it.

    Raises:
        KeyError: a class without detections (give it [{}, ...]).
        ValueError: other numbers of images.
    """
    return {
        name: clac_voc_ap(annotations, detector_result[name], ovthresh)[2]
        for name, annotations in annotation_result.items()
    }


def clac_voc_ap(
    annotation: Sequence[Mapping[str, Any]], prediction: Sequence[Mapping[str, Any]], ovthresh: float = 0.5
) -> tuple[Floats, Floats, float]:
    """One class's (recall, precision, average precision), the first two (n,) over its detections by falling confidence.

    Of equal confidences the earlier image's detection comes first. A class without truth has recall 0 and average precision 0.

    Args:
        annotation: for each image {} or {"bboxes": (n, 4) xyxy, ...}.
        prediction: for each image {} or {"bboxes": (n, 4), "confidence": (n,)}.
        ovthresh: lowest IoU, excluded.
    """
    if len(annotation) != len(prediction):
        raise ValueError(f"There are annotations of {len(annotation)} images and predictions of {len(prediction)}.")
    truths = [_boxes(image) for image in annotation]
    found = [(score, place, box) for place, image in enumerate(prediction) for score, box in _scored(image)]
    found.sort(key=lambda detection: -detection[0])  # stable
    taken = [np.zeros(len(boxes), dtype=bool) for boxes in truths]
    right = np.zeros(len(found), dtype=bool)
    for k, (_, place, box) in enumerate(found):
        if len(truths[place]):
            overlaps = box_iou(box[None], truths[place])[0]
            best = int(overlaps.argmax())
            right[k] = overlaps[best] > ovthresh and not taken[place][best]
            taken[place][best] |= right[k]
    num_right, num_truths = right.cumsum(), sum(len(boxes) for boxes in truths)
    recall = num_right / max(num_truths, 1)
    precision = num_right / np.arange(1, len(found) + 1)
    return recall, precision, calc_ap(recall, precision)


def calc_ap(recall: Any, precision: Any, use_07_metric: bool = True) -> float:
    """Average precision of a curve.

    Args:
        recall: (n,) rising. precision: (n,).
        use_07_metric: the mean of the best precisions from recall 0, 0.1, ..., 1 on (VOC 2007); else the area under the
            envelope (VOC 2010).

    >>> calc_ap([0.5, 1.0], [1.0, 0.5], use_07_metric=False)
    0.75
    """
    recall, precision = np.asarray(recall, dtype=np.float64), np.asarray(precision, dtype=np.float64)
    if use_07_metric:
        tenths = np.arange(11) / 10  # each the float nearest to its tenth: 3 right of 10 are 0.3
        best = [precision[recall >= tenth].max(initial=0.0) for tenth in tenths]
        return float(np.sum(best) / 11)
    steps = np.diff(recall, prepend=0.0)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(steps * envelope))


def cal_match(pred_box: npt.NDArray[Any], gt_box: npt.NDArray[Any]) -> float:
    """The share of predictions that are a truth: of its class, IoU at least 0.9, every edge nearer than 5; each truth once.

    Args:
        pred_box: (n, 5) class, x1, y1, x2, y2. gt_box: (m, 5).

    Returns:
        0 to 1; 0 without predictions.
    """
    if len(pred_box) == 0:
        return 0.0
    iou = bboxes_iou(pred_box[:, 1:], gt_box[:, 1:])
    apart = np.abs(pred_box[:, None, 1:] - gt_box[None, :, 1:]).max(axis=2, initial=0.0)
    same = (iou >= 0.9) & (apart < 5) & (pred_box[:, None, 0] == gt_box[None, :, 0])
    free = np.ones(len(gt_box), dtype=bool)
    count = 0
    for fits in same:
        left = np.flatnonzero(fits & free)
        if len(left):
            free[left[0]] = False
            count += 1
    return count / len(pred_box)


def _boxes(image: Mapping[str, Any]) -> Floats:
    return np.asarray(image.get("bboxes", ()), dtype=np.float64).reshape(-1, 4)


def _scored(image: Mapping[str, Any]) -> list[tuple[float, Floats]]:
    scores = np.asarray(image.get("confidence", ()), dtype=np.float64).reshape(-1).tolist()
    return list(zip(scores, _boxes(image), strict=True))

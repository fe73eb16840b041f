"""Pascal VOC's average precision: by the area under the curve (since 2010) and by eleven points (2007)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

PAIRS_AT_ONCE = 1 << 20
"""Pairs of a detection and a truth box whose IoU is taken in one go: some 100 MB."""


@dataclass(frozen=True)
class VocAP:
    """VOC's average precision of each class.

    Attributes:
        area: (K,) area under the curve of precision, made to fall, over recall; -1 for a class without truth.
        eleven_point: (K,) mean of that precision at the recalls 0, 0.1, ..., 1; -1 for a class without truth.
    """

    area: Array
    eleven_point: Array


def voc_average_precision(detections: Array, truth: Array, num_classes: int, iou_threshold: float = 0.5) -> VocAP:
    """VOC's average precision of each class, as the PASCAL VOC development kit defines it (Everingham et al., 2010).

    A detection, best score first, takes the truth box of its image and class that it overlaps most. It is right where their IoU
    reaches the threshold and no detection took that box before; it is left out where that box is crowd (VOC's "difficult"). Boxes
    are continuous (no +1 for the last pixel). Recalls are compared as fractions, so that 3 of 10 reaches 0.3.

    Args:
        detections: (N, 7) image, x, y, w, h, score, class; equal scores count in this order.
        truth: (M, 8) image, x, y, w, h, area, crowd, class.
        num_classes: K; classes are 0 to K - 1.
        iou_threshold: in (0, 1].

    >>> truth = np.array([[0, 0, 0, 10, 10, 100, 0, 0], [0, 50, 50, 10, 10, 100, 0, 0]], float)
    >>> detections = np.array([[0, 0, 0, 10, 10, 0.9, 0], [0, 20, 20, 10, 10, 0.8, 0]], float)
    >>> result = voc_average_precision(detections, truth, num_classes=1)
    >>> result.area.tolist(), (11 * result.eleven_point).tolist()
    ([0.5], [6.0])
    """
    truth = truth[np.argsort(_group(truth, num_classes), kind="stable")]
    best_iou, best = _best_truth(detections, truth, num_classes)
    order = _by_class_and_score(detections, num_classes)
    best = np.where(best_iou >= iou_threshold, best, -1)[order]
    matched = np.flatnonzero(best >= 0)
    first = np.empty(len(truth), np.int64)
    first[best[matched[::-1]]] = matched[
        ::-1
    ]  # of several detections of one truth the last one written is the best one
    right, counted = np.zeros(len(order), bool), np.ones(len(order), bool)
    right[matched] = first[best[matched]] == matched
    crowd = truth[:, 6] != 0
    counted[matched] = ~crowd[best[matched]]
    classes, right = detections[order, 6][counted], right[counted]
    num_truth = np.bincount(truth[~crowd, 7].astype(np.int64), minlength=num_classes)
    ends = np.searchsorted(classes, np.arange(num_classes + 1))
    of_classes = [_of_class(right[ends[k] : ends[k + 1]], int(num_truth[k])) for k in range(num_classes)]
    area, eleven_point = np.array(of_classes).reshape(num_classes, 2).T
    return VocAP(area, eleven_point)


def _of_class(right: npt.NDArray[np.bool_], num_truth: int) -> tuple[float, float]:
    """(area, eleven-point) of detections in falling order of scores."""
    if num_truth == 0:
        return -1.0, -1.0
    if len(right) == 0:
        return 0.0, 0.0
    num_right = np.cumsum(right)
    precision = num_right / np.arange(1, len(right) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    area = float(precision[right].sum()) / num_truth  # recall grows by 1 / num_truth where a detection is right
    reached = np.searchsorted(10 * num_right, np.arange(11) * num_truth)
    return area, float(precision[reached[reached < len(right)]].sum()) / 11


def _by_class_and_score(detections: Array, num_classes: int) -> Indices:
    """The order of detections: by class, then falling score, then as they came."""
    order = np.argsort(-detections[:, 5], kind="stable")
    small = detections[order, 6].astype(np.min_scalar_type(num_classes))  # one or two bytes are sorted by radix
    return order[np.argsort(small, kind="stable")]


def _group(rows: Array, num_classes: int) -> Indices:
    """One number for each pair of image and class."""
    return (rows[:, 0] * num_classes + rows[:, -1]).astype(np.int64)


def _best_truth(detections: Array, truth: Array, num_classes: int) -> tuple[Array, Indices]:
    """For each detection the highest IoU with truth of its image and class, and the first such truth; (0, -1) where none is.

    `truth` is ordered by group.
    """
    groups, firsts, sizes = np.unique(_group(truth, num_classes), return_index=True, return_counts=True)
    wanted = _group(detections, num_classes)
    place = np.searchsorted(groups, wanted).clip(max=max(len(groups) - 1, 0))
    there = groups[place] == wanted if len(groups) else np.zeros(len(wanted), bool)
    starts, counts = np.zeros_like(wanted), np.zeros_like(wanted)
    starts[there], counts[there] = firsts[place[there]], sizes[place[there]]
    best_iou, best = np.zeros(len(detections)), np.full(len(detections), -1)
    with_truth = np.flatnonzero(counts)
    for some in _parts(with_truth, counts):
        sizes = counts[some]
        offsets = np.cumsum(sizes) - sizes
        pairs = np.arange(sizes.sum()) - np.repeat(offsets - starts[some], sizes)  # truth of each pair
        iou = _iou(detections[np.repeat(some, sizes), 1:5], truth[pairs, 1:5])
        highest = np.maximum.reduceat(iou, offsets)
        is_highest = np.flatnonzero(iou == np.repeat(highest, sizes))
        best_iou[some] = highest
        best[some] = pairs[is_highest[np.searchsorted(is_highest, offsets)]]
    return best_iou, best


def _parts(indices: Indices, counts: Indices) -> Iterator[Indices]:
    """The indices in runs of about `PAIRS_AT_ONCE` pairs."""
    run = np.cumsum(counts[indices]) // PAIRS_AT_ONCE
    yield from (part for part in np.split(indices, np.flatnonzero(np.diff(run)) + 1) if len(part))


def _iou(boxes: Array, others: Array) -> Array:
    """(P, 4) and (P, 4) xywh -> (P,) intersection over union; 0 where they don't overlap, as in pycocotools."""
    ends, other_ends = boxes[:, :2] + boxes[:, 2:], others[:, :2] + others[:, 2:]
    sides = np.minimum(ends, other_ends) - np.maximum(boxes[:, :2], others[:, :2])
    overlap = np.where((sides > 0).all(axis=1), sides[:, 0] * sides[:, 1], 0.0)
    union = boxes[:, 2] * boxes[:, 3] + others[:, 2] * others[:, 3] - overlap
    return np.divide(overlap, union, out=np.zeros(len(overlap)), where=overlap > 0)

"""Non-maximum suppression: of boxes that overlap, the one with the best score."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torch_frame.vision._optional import torchvision_ops
from torch_frame.vision.boxes import Array

# Boxes that are settled at a time, and boxes that they are compared with at a time: the tables fit into the processor's cache.
_BLOCK, _STRIP = 128, 256
_FEW = 1000  # fewer boxes on the CPU are faster in torchvision, more of them here


def nms(boxes: Array, scores: Array, iou_threshold: float) -> Array:
    """Indices (k,) int64 of the boxes that stay, by falling score.

    The best box stays, all that overlap it by an IoU above `iou_threshold` go, and so on with the best one left. Of equal scores
    the first counts as better. A score of NaN counts as the lowest, a box with NaN overlaps nothing.

    Args:
        boxes: (n, 4) xyxy, an array or a tensor of any dtype, on any device; left as it is.
        scores: (n,).
        iou_threshold: highest IoU of two boxes that both stay.

    Raises:
        TypeError: not two arrays or two tensors.
        ValueError: shapes that do not fit.

    >>> boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10]])
    >>> nms(boxes, np.array([0.8, 0.9, 0.7]), 0.5)
    array([1, 2])
    """
    _check(boxes, scores)
    kept: Array = _of_groups(boxes, scores, None, iou_threshold)
    return kept


def batched_nms(boxes: Array, scores: Array, groups: Array, iou_threshold: float) -> Array:
    """`nms` within each group (class, image) by itself; indices (k,) int64 over all, by falling score.

    Groups are never moved apart on one plane, which costs digits: the result is that of one `nms` a group.

    Args:
        boxes: (n, 4) xyxy. scores: (n,).
        groups: (n,) the group of each box: integers, or floats that are.
        iou_threshold: highest IoU of two boxes of a group that both stay.

    Raises:
        TypeError: not arrays alone or tensors alone.
        ValueError: shapes that do not fit.
    """
    _check(boxes, scores, groups)
    kept: Array = _of_groups(boxes, scores, groups, iou_threshold)
    return kept


def _check(boxes: Any, *columns: Any) -> None:
    kinds = {
        np.ndarray if isinstance(x, np.ndarray) else Tensor if isinstance(x, Tensor) else None
        for x in (boxes, *columns)
    }
    if len(kinds) > 1 or None in kinds:
        names = ", ".join(type(x).__name__ for x in (boxes, *columns))
        raise TypeError(f"NMS takes NumPy arrays alone or tensors alone; these are {names}. Convert the others.")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"Boxes are of shape (n, 4); these are of shape {tuple(boxes.shape)}.")
    for column in columns:
        if column.shape != boxes.shape[:1]:
            raise ValueError(
                f"There are {len(boxes)} boxes, so scores and groups are of shape ({len(boxes)},); these are "
                f"{tuple(column.shape)}."
            )


def _of_groups(boxes: Any, scores: Any, groups: Any, iou_threshold: float) -> Any:
    if not iou_threshold >= 0:
        raise ValueError(f"iou_threshold is {iou_threshold}; an IoU is 0 to 1.")
    if isinstance(boxes, np.ndarray):
        boxes = boxes.astype(np.result_type(boxes.dtype, np.float32), copy=False)  # int32, int64: float64
        return _numpy_groups(boxes, scores.astype(np.float64, copy=False), groups, iou_threshold)
    boxes, scores = boxes.detach(), scores.detach()
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32) if boxes.is_floating_point() else torch.float64)
    theirs = torchvision_ops()
    if theirs is not None and (boxes.device.type != "cpu" or len(boxes) < _FEW):
        return _torchvision_groups(theirs, boxes, scores, groups, iou_threshold)
    numbers = None if groups is None else groups.detach().double().cpu().numpy()
    kept = _numpy_groups(boxes.cpu().numpy(), scores.double().cpu().numpy(), numbers, iou_threshold)
    return torch.from_numpy(kept).to(boxes.device)


def _numpy_groups(
    boxes: npt.NDArray[Any], scores: npt.NDArray[np.float64], groups: npt.NDArray[Any] | None, iou_threshold: float
) -> npt.NDArray[np.int64]:
    order = np.argsort(-scores, kind="stable")  # NaN comes last
    kept = np.zeros(len(order), dtype=bool)  # by place in the order
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):  # NaN, infinite boxes, boxes without area
        for members in _members(groups, order):
            kept[members[_suppress(boxes[order[members]], iou_threshold)]] = True
    return order[kept].astype(np.int64, copy=False)


def _members(groups: npt.NDArray[Any] | None, order: npt.NDArray[np.intp]) -> list[npt.NDArray[np.intp]]:
    """For each group the places of its boxes in the order, best first."""
    if groups is None:
        return [np.arange(len(order))]
    by_group = np.argsort(groups[order], kind="stable")
    return np.split(by_group, np.flatnonzero(np.diff(groups[order][by_group])) + 1)


def _suppress(boxes: npt.NDArray[Any], iou_threshold: float) -> npt.NDArray[np.intp]:
    """Places of the (n, 4) boxes, best first, that stay.

    Block by block: the best boxes left are settled among themselves; then those that stay meet all boxes after them, in strips
    of the picture, so that boxes far apart are never compared.
    """
    columns = np.ascontiguousarray(boxes.T)  # (4, n)
    areas = (columns[2] - columns[0]).clip(min=0) * (columns[3] - columns[1]).clip(min=0)
    axis = _sparse_axis(columns)
    low, high = columns[axis], columns[axis + 2]
    by_place = np.argsort(low, kind="stable")
    left, alive, kept = np.arange(len(boxes)), np.ones(len(boxes), dtype=bool), []
    while len(left):
        head, left = left[:_BLOCK], left[_BLOCK:]
        stay = head[_settled(_iou(columns[:, head], areas[head], columns[:, head], areas[head]) > iou_threshold)]
        kept.append(stay)
        alive[head] = False
        by_place = by_place[alive[by_place]]
        for start in range(0, len(by_place), _STRIP):
            strip = by_place[start : start + _STRIP]
            near = stay[(low[stay] < np.fmax.reduce(high[strip])) & (high[stay] > low[strip[0]])]
            if len(near):
                overlap = _iou(columns[:, near], areas[near], columns[:, strip], areas[strip])
                alive[strip[(overlap > iou_threshold).any(axis=0)]] = False
        left = left[alive[left]]
    return np.concatenate(kept) if kept else np.empty(0, dtype=np.intp)


def _sparse_axis(columns: npt.NDArray[Any]) -> int:
    """0 for x, 1 for y: the one along which fewer boxes share a place."""
    if columns.size == 0:
        return 0
    x, y = (np.abs(columns[k + 2] - columns[k]).sum() / np.ptp(columns[[k, k + 2]]) for k in (0, 1))
    return int(y < x)


def _settled(overlaps: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """(n, n) who overlaps whom, best first -> (n,) who stays."""
    worse = np.triu(overlaps, 1)
    stay = np.ones(len(overlaps), dtype=bool)
    for place in np.flatnonzero(worse.any(axis=1)):
        if stay[place]:
            stay[worse[place]] = False
    return stay


def _iou(
    a: npt.NDArray[Any], area_a: npt.NDArray[Any], b: npt.NDArray[Any], area_b: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    """(4, n), (n,), (4, m), (m,) -> (n, m). In place where it can be: what this costs is memory."""
    wide: npt.NDArray[Any] = np.minimum(a[2][:, None], b[2])
    wide -= np.maximum(a[0][:, None], b[0])
    np.maximum(wide, 0, out=wide)
    high = np.minimum(a[3][:, None], b[3])
    high -= np.maximum(a[1][:, None], b[1])  # below 0 where boxes are apart, and so is the IoU: below every threshold
    wide *= high
    union = area_a[:, None] + area_b
    union -= wide
    wide /= union  # 0 / 0 is NaN, which is above no threshold
    return wide


def _torchvision_groups(
    theirs: Any, boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float
) -> Tensor:
    order = (-scores.double()).argsort(stable=True)  # NaN comes last
    boxes = boxes[order]
    falling = torch.arange(len(order), 0, -1, device=boxes.device).to(boxes.dtype)  # scores without ties, in this order
    if groups is None:
        return order[theirs.nms(boxes, falling, iou_threshold)]
    groups = groups[order]
    kept = torch.zeros(len(order), dtype=torch.bool, device=boxes.device)
    for group in groups.unique():
        members = torch.nonzero(groups == group)[:, 0]
        kept[members[theirs.nms(boxes[members], falling[members], iou_threshold)]] = True
    return order[kept]

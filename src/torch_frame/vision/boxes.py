"""Boxes: their formats, how far they overlap, which of them are worth keeping. NumPy arrays and tensors alike.

A box is four numbers in pixels (or any other unit, the same in both directions), measured on edges, not on pixel centres: the
pixel in the top left corner is the box 0, 0, 1, 1. Formats:

    xyxy    x1, y1, x2, y2     left, top, right, bottom edge
    xywh    x1, y1, w, h       left, top edge, width, height (COCO's files)
    cxcywh  cx, cy, w, h       centre, width, height (YOLO's heads)

Nothing here changes its arguments, but `xyxy2cxcywh`, whose users rely on it.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = TypeVar("Array", npt.NDArray[Any], Tensor)
"""A NumPy array or a tensor; what comes back is of the same kind."""

FORMATS = ("xyxy", "xywh", "cxcywh")
MODES = ("iou", "iof", "giou", "ciou")


def convert_boxes(boxes: Array, source: str, target: str) -> Array:
    """The boxes in another format, as a new array; further columns are copied.

    Integers stay integers, exactly, between xyxy and xywh (unsigned and small ones become int64, as sums and differences may lie
    beyond them). A centre may lie between two pixels: from and to cxcywh they become floats (float64; of a tensor torch's default
    dtype).

    Args:
        boxes: (..., 4 or more) in the format `source`.
        source: "xyxy", "xywh" or "cxcywh".
        target: likewise.

    Raises:
        ValueError: an unknown format, or fewer than 4 columns.

    >>> convert_boxes(np.array([[10, 20, 40, 60]]), "xyxy", "cxcywh")
    array([[25., 40., 30., 40.]])
    """
    _check_format(source)
    _check_format(target)
    if boxes.shape[-1] < 4:
        raise ValueError(f"Boxes have at least 4 columns, the last dimension; these are of shape {tuple(boxes.shape)}.")
    if "cxcywh" in (source, target) and source != target:
        boxes = _floating(boxes)
    boxes = _safe_integers(boxes)
    a, b, c, d = (boxes[..., k] for k in range(4))
    if source == "xyxy" != target:
        a, b, c, d = a, b, c - a, d - b
    if source == "cxcywh" != target:
        a, b = a - c / 2, b - d / 2
    if target == "cxcywh" != source:
        a, b = a + c / 2, b + d / 2
    if target == "xyxy" != source:
        c, d = a + c, b + d
    columns: Any = [a, b, c, d, *(boxes[..., k] for k in range(4, boxes.shape[-1]))]
    return torch.stack(columns, -1) if isinstance(boxes, Tensor) else np.stack(columns, -1)


def xyxy2cxcywh(bboxes: Array) -> Array:
    """xyxy -> cxcywh IN PLACE: the argument itself comes back, changed, further columns untouched.

    `convert_boxes` leaves its argument alone. In an array of integers halves are cut off.

    Args:
        bboxes: (n, 4 or more) xyxy, an array or a tensor.

    >>> boxes = np.array([[10.0, 20.0, 40.0, 60.0]])
    >>> xyxy2cxcywh(boxes) is boxes, boxes.tolist()
    (True, [[25.0, 40.0, 30.0, 40.0]])
    """
    corners, sizes = bboxes[:, :2], bboxes[:, 2:4]  # views
    sizes[...] = sizes - corners
    corners[...] = corners + sizes * 0.5
    return bboxes


def clip_boxes(boxes: Array, height: float, width: float) -> Array:
    """The part of each box that lies in a picture, as a new array; a box outside it becomes one without area, at its edge.

    Gradients flow. Unsigned and small integers become int64.

    Args:
        boxes: (n, 4 or more) xyxy; further columns are copied.
        height: of the picture. width: likewise.
    """
    boxes = _safe_integers(boxes)
    columns: Any = [boxes[:, k].clip(0, limit) for k, limit in enumerate((width, height, width, height))]
    if isinstance(boxes, Tensor):
        return torch.cat([torch.stack(columns, 1).to(boxes.dtype), boxes[:, 4:]], 1)
    return np.concatenate([np.stack(columns, 1).astype(boxes.dtype, copy=False), boxes[:, 4:]], 1)


def filter_box(boxes: Array, min_scale: float | None = None, max_scale: float | None = None) -> Array:
    """The boxes whose area lies between min_scale ** 2 and max_scale ** 2, both excluded, as a new array.

    Args:
        boxes: (n, 4 or more) xyxy.
        min_scale: side of a square, in the boxes' unit. None: 0, so that boxes without area are left out.
        max_scale: likewise. None: no limit.
    """
    sides = _wide_integers(boxes)
    area = (sides[:, 2] - sides[:, 0]) * (sides[:, 3] - sides[:, 1])
    low = 0.0 if min_scale is None else min_scale * min_scale
    top = math.inf if max_scale is None else max_scale * max_scale
    kept: Array = boxes[(area > low) & (area < top)]
    return kept


def box_candidates(box1: Array, box2: Array, wh_thr: float = 2, ar_thr: float = 20, area_thr: float = 0.2) -> Array:
    """Which boxes are still worth learning from after an augmentation: a mask (n,).

    Args:
        box1: (n, 4) xyxy before the augmentation.
        box2: (n, 4) xyxy after it.
        wh_thr: width and height, in the boxes' unit, have to be above it.
        ar_thr: the longer side over the shorter one has to be below it.
        area_thr: the area after over the area before has to be above it.
    """
    before, after = _wide_integers(box1), _wide_integers(box2)
    w1, h1 = before[:, 2] - before[:, 0], before[:, 3] - before[:, 1]
    w2, h2 = after[:, 2] - after[:, 0], after[:, 3] - after[:, 1]
    tiny = 1e-16  # boxes without area divide by it
    compact = (w2 / (h2 + tiny) < ar_thr) & (h2 / (w2 + tiny) < ar_thr)
    mask: Array = (w2 > wh_thr) & (h2 > wh_thr) & compact & (w2 * h2 / (w1 * h1 + tiny) > area_thr)
    return mask


def box_iou(
    boxes_a: Array,
    boxes_b: Array,
    *,
    mode: str = "iou",
    box_format: str = "xyxy",
    paired: bool = False,
    eps: float = 0.0,
) -> Array:
    """How far boxes overlap: each of a with each of b, or row by row. Gradients flow.

    | mode | |
    |---|---|
    | "iou" | intersection over union, 0 to 1 |
    | "iof" | intersection over the smaller of the two areas, 0 to 1 |
    | "giou" | IoU minus the share of the enclosing box that neither covers, -1 to 1 (Rezatofighi et al. 2019) |
    | "ciou" | IoU minus the centres' distance, and minus how far the shapes differ (Zheng et al. 2020) |

    Boxes without area, and inverted ones (x2 < x1), have an IoU of 0 with everything. Integers are exact: areas are computed in
    int64. float16 and bfloat16 are computed in float32 and come back in their own dtype; for a loss take float32, because CIoU's
    gradient at very thin boxes is beyond what float16 holds.

    Args:
        boxes_a: (n, 4). boxes_b: (m, 4), of the same kind.
        mode: see above.
        box_format: "xyxy", "xywh" or "cxcywh", of both.
        paired: compare row with row (n = m, result (n,)), as a loss needs it.
        eps: denominators are at least this.

    Returns:
        (n, m) or (n,); floats of the boxes' dtype (for integers float64, of tensors torch's default dtype).

    Raises:
        TypeError: not two arrays or two tensors.
        ValueError: shapes, an unknown mode or format.

    >>> box_iou(np.array([[0, 0, 10, 10]]), np.array([[5, 0, 15, 10], [20, 20, 30, 30]]))
    array([[0.33333333, 0.        ]])
    """
    _check_kind(boxes_a, boxes_b)
    _check_format(box_format)
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it has to be one of {', '.join(MODES)}.")
    for boxes in (boxes_a, boxes_b):
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(f"Boxes are of shape (n, 4); these are of shape {tuple(boxes.shape)}.")
    if paired and len(boxes_a) != len(boxes_b):
        raise ValueError(f"paired=True compares row with row, but there are {len(boxes_a)} and {len(boxes_b)} boxes.")
    with np.errstate(invalid="ignore", over="ignore"):  # infinite boxes: NaN, without a warning
        overlap = _overlap(boxes_a, boxes_b, mode, box_format, paired, eps)
    result: Array = _in_dtype_of(overlap, boxes_a, boxes_b)
    return result


def bboxes_iou(bboxes_a: Array, bboxes_b: Array, xyxy: bool = True, mode: str = "iou", eps: float = 1e-6) -> Array:
    """`box_iou` of each box with each, as 1.7 has it: (n, 4), (m, 4) -> (n, m).

    Args:
        bboxes_a: (n, 4). bboxes_b: (m, 4); two arrays or two tensors.
        xyxy: x1, y1, x2, y2; else cx, cy, w, h.
        mode: "iou", "iof" (over the smaller area), "giou" or "ciou".
        eps: denominators are at least this: if boxes are smaller than that (normalised ones), their IoU is too small. `box_iou`
            has none.

    Returns:
        (n, m): float64 of arrays, the boxes' dtype of tensors (of integers torch's default dtype).

    Raises:
        TypeError: not two arrays or two tensors.
        IndexError: boxes of another width than 4.
        ValueError: an unknown mode.
    """
    _check_kind(bboxes_a, bboxes_b)
    for boxes in (bboxes_a, bboxes_b):
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise IndexError(f"Boxes are of shape (n, 4); these are of shape {tuple(boxes.shape)}.")
    if isinstance(bboxes_a, np.ndarray):  # whose floats become float64 here, as in 1.7
        bboxes_a, bboxes_b = (
            x.astype(np.result_type(x, np.float64)) if x.dtype.kind == "f" else x for x in (bboxes_a, bboxes_b)
        )
    return box_iou(bboxes_a, bboxes_b, mode=mode, box_format="xyxy" if xyxy else "cxcywh", eps=eps)


def _overlap(boxes_a: Any, boxes_b: Any, mode: str, box_format: str, paired: bool, eps: float) -> Any:
    numbers: Any = torch if isinstance(boxes_a, Tensor) else np
    exact = mode in ("iou", "iof") and box_format != "cxcywh"
    a, b = (_sides(_computed_in(boxes, exact), box_format) for boxes in (boxes_a, boxes_b))
    if not paired:
        a = tuple(column[:, None] for column in a)
    ax1, ay1, ax2, ay2, aw, ah = a
    bx1, by1, bx2, by2, bw, bh = b
    wide = (numbers.minimum(ax2, bx2) - numbers.maximum(ax1, bx1)).clip(min=0)
    high = (numbers.minimum(ay2, by2) - numbers.maximum(ay1, by1)).clip(min=0)
    # Edges of a small box far from 0 are rounded: they may lie further apart than its sides are long.
    if box_format != "xyxy":
        wide = numbers.minimum(wide, numbers.minimum(aw, bw))
        high = numbers.minimum(high, numbers.minimum(ah, bh))
    both, area_a, area_b = wide * high, aw * ah, bw * bh
    if mode == "iof":
        return _share(both, numbers.minimum(area_a, area_b), eps)
    union = area_a + area_b - both
    iou = _share(both, union, eps)
    if mode == "iou":
        return iou
    hull_w = numbers.maximum(ax2, bx2) - numbers.minimum(ax1, bx1)
    hull_h = numbers.maximum(ay2, by2) - numbers.minimum(ay1, by1)
    if mode == "giou":
        hull = hull_w * hull_h
        return iou - _share((hull - union).clip(min=0), hull, eps)  # below 0 by rounding alone
    apart = (ax1 + ax2 - bx1 - bx2) ** 2 / 4 + (ay1 + ay2 - by1 - by2) ** 2 / 4
    shape = 4 / math.pi**2 * (numbers.arctan2(bw, bh) - numbers.arctan2(aw, ah)) ** 2
    weight = _share(shape, 1 - iou + shape, eps)  # a constant to the gradient, as in the paper
    return iou - _share(apart, hull_w**2 + hull_h**2, eps) - (weight.detach() if numbers is torch else weight) * shape


def _sides(boxes: Any, box_format: str) -> tuple[Any, ...]:
    """x1, y1, x2, y2, w, h, each (n,); w and h are at least 0."""
    a, b, c, d = (boxes[:, k] for k in range(4))
    if box_format == "xyxy":
        return a, b, c, d, (c - a).clip(min=0), (d - b).clip(min=0)
    x1, y1 = (a, b) if box_format == "xywh" else (a - c / 2, b - d / 2)
    return x1, y1, x1 + c, y1 + d, c.clip(min=0), d.clip(min=0)


def _share(part: Any, whole: Any, eps: float) -> Any:
    """part / whole, 0 for 0 / 0, without dividing by 0 anywhere: its gradient would be NaN."""
    if eps > 0:
        return part / whole.clip(min=eps)
    return part / (whole + (whole == 0))


def _computed_in(boxes: Any, exact: bool) -> Any:
    """Integers as int64, if that is exact, else as float64; 16-bit floats as float32."""
    if isinstance(boxes, Tensor):
        if not boxes.is_floating_point():
            return boxes.to(torch.int64 if exact else torch.float64)
        return boxes.float() if boxes.element_size() < 4 else boxes
    if not np.issubdtype(boxes.dtype, np.floating):
        return boxes.astype(np.int64 if exact else np.float64)
    return boxes.astype(np.float32) if boxes.dtype.itemsize < 4 else boxes


def _in_dtype_of(overlap: Any, boxes_a: Any, boxes_b: Any) -> Any:
    if isinstance(overlap, Tensor):
        common = torch.promote_types(boxes_a.dtype, boxes_b.dtype)
        return overlap.to(common if common.is_floating_point else torch.get_default_dtype())
    dtype = np.result_type(boxes_a.dtype, boxes_b.dtype)
    return overlap.astype(dtype if np.issubdtype(dtype, np.floating) else np.float64, copy=False)


def _floating(boxes: Any) -> Any:
    if isinstance(boxes, Tensor):
        return boxes if boxes.is_floating_point() else boxes.to(torch.get_default_dtype())
    return boxes if np.issubdtype(boxes.dtype, np.floating) else boxes.astype(np.float64)


def _safe_integers(boxes: Any) -> Any:
    """Unsigned integers, and those of less than 32 bits, as int64: sums and differences of coordinates would wrap around."""
    if isinstance(boxes, Tensor):
        is_safe = boxes.is_floating_point() or boxes.dtype in (torch.int32, torch.int64)
        return boxes if is_safe else boxes.to(torch.int64)
    is_safe = boxes.dtype.kind not in "iu" or (boxes.dtype.kind == "i" and boxes.dtype.itemsize >= 4)
    return boxes if is_safe else boxes.astype(np.int64)


def _wide_integers(boxes: Any) -> Any:
    """Integers as int64: areas would wrap around."""
    if isinstance(boxes, Tensor):
        return boxes if boxes.is_floating_point() else boxes.to(torch.int64)
    return boxes if np.issubdtype(boxes.dtype, np.floating) else boxes.astype(np.int64)


def _check_format(box_format: str) -> None:
    if box_format not in FORMATS:
        raise ValueError(f"The box format is {box_format!r}; it has to be one of {', '.join(FORMATS)}.")


def _check_kind(boxes_a: Any, boxes_b: Any) -> None:
    arrays, tensors = (all(isinstance(boxes, kind) for boxes in (boxes_a, boxes_b)) for kind in (np.ndarray, Tensor))
    if not arrays and not tensors:
        kinds = f"{type(boxes_a).__name__} and {type(boxes_b).__name__}"
        raise TypeError(f"Boxes are two NumPy arrays or two tensors; these are {kinds}. Convert one of them.")

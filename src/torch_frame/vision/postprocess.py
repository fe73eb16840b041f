"""From what a YOLO head returns to boxes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_frame.vision.boxes import convert_boxes
from torch_frame.vision.suppression import batched_nms, nms


def det_postprocess(
    prediction: Tensor,
    num_classes: int,
    conf_thre: float = 0.7,
    nms_thre: float = 0.45,
    class_agnostic: bool = False,
    merge_score: bool = False,
    ret_np: bool = False,
) -> list[Any]:
    """A YOLO head's boxes of each image that score high enough and that no better box overlaps too much.

    The prediction is left as it is; what comes back is new.

    Args:
        prediction: (B, N, 5 + num_classes or more) cx, cy, w, h in pixels, objectness, class scores; any float dtype, any device.
            float16 and bfloat16 are computed in float32.
        num_classes: how many class scores there are.
        conf_thre: lowest objectness * best class score that is kept.
        nms_thre: highest IoU of two boxes that are both kept.
        class_agnostic: a box may be suppressed by one of another class.
        merge_score: one score, the product, in place of two.
        ret_np: NumPy arrays in place of tensors; both are float32, of a prediction of float64 float64.

    Returns:
        For each image None, where nothing is left, or (k, 7) x1, y1, x2, y2, objectness, class score, class index by falling
        product of the two; with merge_score (k, 6) x1, y1, x2, y2, product, class index.

    Raises:
        TypeError: no tensor. ValueError: a prediction of another shape.

    >>> head = torch.tensor([[[50.0, 50.0, 20.0, 20.0, 0.9, 0.1, 1.0]]])
    >>> [rows.tolist() for rows in det_postprocess(head, 2, ret_np=True, merge_score=True)]
    [[[40.0, 40.0, 60.0, 60.0, 0.8999999761581421, 1.0]]]
    """
    if not isinstance(prediction, Tensor):
        raise TypeError(f"The prediction is a tensor (B, N, 5 + num_classes); this is a {type(prediction).__name__}.")
    if prediction.ndim != 3 or prediction.shape[2] < 5 + num_classes or num_classes < 1:
        wanted, shape = 5 + num_classes, tuple(prediction.shape)
        raise ValueError(
            f"The prediction is of shape {shape}; for {num_classes} classes it has to be (B, N, {wanted})."
        )
    if prediction.is_floating_point() and prediction.element_size() < 4:
        prediction = prediction.float()  # corners of bfloat16 would lie whole pixels off
    results = [
        _image_boxes(rows[:, : 5 + num_classes], conf_thre, nms_thre, class_agnostic, merge_score)
        for rows in prediction
    ]
    return [None if rows is None else rows.detach().cpu().numpy() for rows in results] if ret_np else results


def _image_boxes(
    rows: Tensor, conf_thre: float, nms_thre: float, class_agnostic: bool, merge_score: bool
) -> Tensor | None:
    if len(rows) == 0:
        return None
    class_scores, labels = rows[:, 5:].max(dim=1)
    scores = rows[:, 4] * class_scores
    candidates = scores >= conf_thre
    if not candidates.any():
        return None
    boxes = convert_boxes(rows[candidates, :4], "cxcywh", "xyxy")
    class_scores, labels, scores = class_scores[candidates], labels[candidates], scores[candidates]
    kept = nms(boxes, scores, nms_thre) if class_agnostic else batched_nms(boxes, scores, labels, nms_thre)
    parts = [scores] if merge_score else [rows[candidates, 4], class_scores]
    return torch.cat([boxes, torch.stack([*parts, labels.float()], dim=1)], dim=1)[kept]

"""The boxes that augmentations move: rows of an array, the box first or behind the class."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_FAR = 1e9  # pixels: a box without end ends here, for infinity times 0 is no number

Rows = npt.NDArray[Any]
"""(n, 4 or more) x1, y1, x2, y2, ..., or (n, 5 or more) class, x1, y1, x2, y2, ...; pixels, on the pixels' edges."""


def rows_of(boxes: Any, *, class_first: bool) -> Rows:
    """The boxes as a new array, float16 as float32, integers of less than 32 bits as int64; without boxes (0, 5) or (0, 4).

    Raises:
        ValueError: a shape that no boxes have, or NaN.
    """
    if isinstance(boxes, Tensor):
        boxes = boxes.detach().cpu()
        boxes = (boxes.float() if boxes.dtype == torch.bfloat16 else boxes).numpy()  # NumPy has no bfloat16
    rows = np.array(boxes)  # a copy
    rows = rows.astype(np.float32) if rows.dtype == np.float16 else rows  # which holds no half pixels beyond 1024
    # what is moved may lie beyond the 255 of uint8
    rows = rows.astype(np.int64) if rows.dtype.kind in "iu" and rows.dtype.itemsize < 4 else rows
    width = 5 if class_first else 4
    if rows.size == 0 and (rows.ndim != 2 or rows.shape[1] < width):
        return np.zeros((0, width))
    if rows.ndim != 2 or rows.shape[1] < width or not np.issubdtype(rows.dtype, np.number):
        columns = "class, x1, y1, x2, y2" if class_first else "x1, y1, x2, y2"
        raise ValueError(f"Boxes are rows of numbers {columns}; these are of shape {rows.shape} and {rows.dtype}.")
    broken = np.isnan(rows[:, :width]).any(axis=1)
    if broken.any():
        first = broken.argmax()
        raise ValueError(f"Boxes have NaN, first in row {first}: {rows[first].tolist()}. Leave it out, or mend it.")
    if np.issubdtype(rows.dtype, np.floating):
        rows[:, width - 4 : width] = rows[:, width - 4 : width].clip(-_FAR, _FAR)
    return rows


def check_share(area_thr: float) -> None:
    """A threshold of the share of a box that is seen, which some share can be above.

    Raises:
        ValueError: it leaves whole boxes out too.
    """
    if area_thr >= 1:
        raise ValueError(
            f"area_thr is {area_thr}; the share of a box that is seen has to be above it, and a whole box has 1. Take 0.999 for "
            "whole boxes only."
        )


def corners(rows: Rows, *, class_first: bool) -> Rows:
    """The (n, 4) xyxy columns: a view, so that what is written there is written into the rows."""
    return rows[:, 1:5] if class_first else rows[:, :4]


def floating(rows: Rows) -> Rows:
    """Integers as float64."""
    return rows if np.issubdtype(rows.dtype, np.floating) else rows.astype(np.float64)


def moved(corner_columns: Rows, scale_x: float, scale_y: float, left: float, top: float) -> Rows:
    """(n, 4) xyxy scaled, then shifted, as a new array."""
    return np.asarray(corner_columns * np.array([scale_x, scale_y] * 2) + np.array([left, top] * 2))


def clip(corner_columns: Rows, x1: float, y1: float, x2: float, y2: float) -> None:
    """Cut (n, 4) xyxy to a window, in place."""
    np.clip(corner_columns[:, 0::2], x1, x2, out=corner_columns[:, 0::2])
    np.clip(corner_columns[:, 1::2], y1, y2, out=corner_columns[:, 1::2])

"""Augmentations that move a picture and its boxes: letterbox, flips, crops, perspective.

**Pictures** are arrays (H, W), (H, W, 1) or (H, W, C) of uint8, or of floats, which count as 0..1; the result has their dtype and
number of dimensions. **Boxes** are rows x1, y1, x2, y2, and any further columns, in pixels, measured on the pixels' edges: the
pixel in the top left corner is 0, 0, 1, 1. With `class_first=True` they are class, x1, y1, x2, y2, as in `mosaic`. Lists, tuples
and tensors are taken too, [] for none; integers come back as float64 where a box is scaled or turned.

Inputs are never changed; results never share memory with them. Boxes that come back lie inside the picture.

**Random numbers** come from python's `random`, which torch-frame seeds for each sample, so that a resumed run augments as the
uninterrupted one, or from `rng`: a random.Random, numpy.random.Generator or torch.Generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from torch_frame.vision._images import Fill, Image, canvas, checked, resized, warped
from torch_frame.vision._random import Draws, Generator, draws, probability
from torch_frame.vision._rows import Rows, check_share, clip, corners, floating, moved, rows_of
from torch_frame.vision.boxes import box_candidates


class Letterboxed(NamedTuple):
    """What `letterbox` returns; `unletterbox` takes the last four."""

    image: Image
    """(height, width[, C])"""
    boxes: Rows
    """(n, 4 or more), all that were given, in the order given."""
    scale_x: float
    """A pixel of the source is this many pixels wide."""
    scale_y: float
    left: int
    """Pixels of padding on the left."""
    top: int


def letterbox(
    image: Image,
    size: Sequence[int],
    boxes: Any = (),
    *,
    fill_value: Fill = 114,
    centre: bool = True,
    enlarge: bool = True,
    class_first: bool = False,
) -> Letterboxed:
    """The whole picture in a given size: resized with its aspect kept, and padded. New arrays come back.

    All boxes come back, cut to the picture.

    Args:
        image: picture.
        size: (height, width) of the result, pixels.
        boxes: (n, 4 or more) rows, pixels of the picture.
        fill_value: level of the padding, 0..255: a number, or one for each channel.
        centre: padding on both sides; else on the right and at the bottom alone, as YOLOX has it.
        enlarge: make pictures larger that are smaller than `size`; else they are only padded.
        class_first: rows begin with the class; else with x1.

    Raises:
        TypeError: no picture. ValueError: a size or boxes that do not fit.

    >>> result = letterbox(np.zeros((20, 40, 3), dtype=np.uint8), (80, 80), [[0, 0, 40, 20]])
    >>> result.image.shape, result.boxes.tolist(), result.top
    ((80, 80, 3), [[0.0, 20.0, 80.0, 60.0]], 20)
    """
    height, width = _whole_size(size)
    old_height, old_width = checked(image).shape[:2]
    scale = min(height / old_height, width / old_width)
    scale = scale if enlarge else min(scale, 1.0)
    new_height, new_width = max(1, round(old_height * scale)), max(1, round(old_width * scale))
    top, left = ((height - new_height) // 2, (width - new_width) // 2) if centre else (0, 0)
    result = canvas(image, height, width, fill_value)
    result[top : top + new_height, left : left + new_width] = resized(image, new_height, new_width)
    rows = floating(rows_of(boxes, class_first=class_first))
    columns = corners(rows, class_first=class_first)
    scale_x, scale_y = new_width / old_width, new_height / old_height  # exact: sides are rounded, each for itself
    columns[:] = moved(columns, scale_x, scale_y, left, top)
    clip(columns, left, top, left + new_width, top + new_height)
    return Letterboxed(result, rows, scale_x, scale_y, left, top)


def unletterbox(boxes: Any, scale_x: float, scale_y: float, left: int, top: int, *, class_first: bool = False) -> Rows:
    """Boxes on a letterboxed picture -> on its source, as a new array; not cut to the source (see `clip_boxes`).

    >>> source = letterbox(np.zeros((20, 40), dtype=np.uint8), (80, 80))
    >>> unletterbox([[0, 20, 80, 60]], *source[2:])
    array([[ 0.,  0., 40., 20.]])
    """
    rows = floating(rows_of(boxes, class_first=class_first))
    columns = corners(rows, class_first=class_first)
    columns[:] = moved(columns - np.array([left, top, left, top]), 1 / scale_x, 1 / scale_y, 0, 0)
    return rows


def flip(
    image: Image, boxes: Any = (), *, horizontal: bool = True, vertical: bool = False, class_first: bool = False
) -> tuple[Image, Rows]:
    """Left and right changed over, or top and bottom, or both. New arrays come back.

    All boxes come back, cut to the picture; integers stay integers.

    Args:
        image: picture. boxes: (n, 4 or more) rows, pixels.
        horizontal: left and right. vertical: top and bottom.
        class_first: rows begin with the class; else with x1.
    """
    height, width = checked(image).shape[:2]
    image = image[:: -1 if vertical else 1, :: -1 if horizontal else 1].copy()  # a view would have negative strides
    rows = rows_of(boxes, class_first=class_first)
    columns = corners(rows, class_first=class_first)
    clip(columns, 0, 0, width, height)
    if horizontal:
        columns[:, [0, 2]] = width - columns[:, [2, 0]]
    if vertical:
        columns[:, [1, 3]] = height - columns[:, [3, 1]]
    return image, rows


def random_flip(
    image: Image,
    boxes: Any = (),
    *,
    p: float = 0.5,
    vertical_p: float = 0.0,
    class_first: bool = False,
    rng: Generator = None,
) -> tuple[Image, Rows]:
    """`flip` from left to right with probability p, from top to bottom with vertical_p. New arrays come back in any case.

    Args:
        image: picture. boxes: (n, 4 or more) rows, pixels; all come back.
        p: probability of a flip, 0 to 1. vertical_p: likewise.
        class_first: rows begin with the class; else with x1.
        rng: the generator to draw from. None: python's `random`.
    """
    draw = draws(rng)
    horizontal = draw.random() < probability(p)
    vertical = draw.random() < probability(vertical_p, "vertical_p")
    return flip(image, boxes, horizontal=horizontal, vertical=vertical, class_first=class_first)


def crop(
    image: Image,
    boxes: Any,
    window: Sequence[int],
    *,
    wh_thr: float = 0,
    ar_thr: float = math.inf,
    area_thr: float = 0,
    class_first: bool = False,
) -> tuple[Image, Rows]:
    """The part of a picture in a window, with the boxes in it. New arrays come back.

    Boxes are cut to the window; of them come back, in the order given, those that `box_candidates` lets through: with the default
    thresholds all of which anything is seen. Integers stay integers.

    Args:
        image: picture. boxes: (n, 4 or more) rows, pixels.
        window: x1, y1, x2, y2, whole pixels; cut to the picture.
        wh_thr: `box_candidates`' threshold, as ar_thr and area_thr (0.3: more than 30 % of the box are still seen).
        class_first: rows begin with the class; else with x1.

    Raises:
        ValueError: no pixel of the picture is in the window, or area_thr is 1 or more.
    """
    check_share(area_thr)
    height, width = checked(image).shape[:2]
    x1, y1, x2, y2 = (int(edge) for edge in window)
    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if x1 >= x2 or y1 >= y2:
        raise ValueError(
            f"window is {tuple(window)} (x1, y1, x2, y2); no pixel of the picture {width} x {height} is in it."
        )
    rows = rows_of(boxes, class_first=class_first)
    columns = corners(rows, class_first=class_first)
    before = columns.copy()
    clip(columns, x1, y1, x2, y2)
    columns -= np.array([x1, y1, x1, y1], dtype=rows.dtype)
    return image[y1:y2, x1:x2].copy(), rows[box_candidates(before, columns, wh_thr, ar_thr, area_thr)]


def random_crop(
    image: Image,
    boxes: Any = (),
    *,
    scale: tuple[float, float] = (0.5, 1.0),
    p: float = 1.0,
    wh_thr: float = 0,
    ar_thr: float = math.inf,
    area_thr: float = 0,
    class_first: bool = False,
    rng: Generator = None,
) -> tuple[Image, Rows]:
    """`crop` to a random window with probability p: height and width each a share of the picture's, at a random place.

    Args:
        image: picture. boxes: (n, 4 or more) rows, pixels; which of them come back: see `crop`.
        scale: lowest and highest share of a side, above 0 to 1.
        p: probability of cropping, 0 to 1.
        wh_thr: `box_candidates`' threshold, as ar_thr and area_thr.
        class_first: rows begin with the class; else with x1.
        rng: the generator to draw from. None: python's `random`.

    Raises:
        ValueError: shares outside of 0..1.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale is {scale}; it is the lowest and the highest share of a side, above 0 and at most 1.")
    height, width = checked(image).shape[:2]
    draw = draws(rng)
    window = [0, 0, width, height]
    if draw.random() < probability(p):
        new_height, new_width = (max(1, round(side * draw.uniform(*scale))) for side in (height, width))
        top, left = draw.randint(0, height - new_height), draw.randint(0, width - new_width)
        window = [left, top, left + new_width, top + new_height]
    return crop(image, boxes, window, wh_thr=wh_thr, ar_thr=ar_thr, area_thr=area_thr, class_first=class_first)


def random_perspective(
    img: Image,
    targets: Any,
    angle: float = 10,
    translate: float = 0.1,
    scale: tuple[float, float] = (0.7, 1.5),
    shear: float = 2.0,
    border: Sequence[int] = (0, 0),
    fill_value: Fill = (128, 128, 128),
    *,
    perspective: float = 0.0,
    wh_thr: float = 2,
    ar_thr: float = 20,
    area_thr: float = 0.2,
    class_first: bool = False,
    rng: Generator = None,
) -> tuple[Image, Rows]:
    """A picture padded, turned, scaled, sheared, shifted and, if asked for, seen from aside. New arrays come back.

    Each box becomes the box around its four moved corners, cut to the picture. Of them come back, in the order given, those that
    `box_candidates` lets through, compared with the box times the scale.

    Args:
        img: picture. targets: (n, 4 or more) rows, pixels.
        angle: degrees; turned by -angle to angle, counterclockwise.
        translate: shifted by up to this share of the width and the height, each way.
        scale: lowest and highest factor.
        shear: degrees, each way, in x and y.
        border: pixels that are padded on each side before: (above and below, left and right). Negative: cut off, as it takes the
            middle out of a mosaic.
        fill_value: level of empty places, 0..255: a number, or one for each channel.
        perspective: how much nearer or farther the picture's edge is than its centre, as a share: drawn from -perspective to
            perspective, in x and in y. 0: an affine warp.
        wh_thr: `box_candidates`' threshold, as ar_thr and area_thr.
        class_first: rows begin with the class; else with x1.
        rng: the generator to draw from. None: python's `random`.

    Raises:
        ValueError: nothing is left of the picture; perspective is not within 0..0.5, a scale not above 0, or shear 45 or more.
        TypeError: no picture.
    """
    rows = floating(rows_of(targets, class_first=class_first))
    padded, columns = _padded(checked(img), border, fill_value), corners(rows, class_first=class_first)
    height, width = padded.shape[:2]
    if not 0 <= perspective <= 0.5:
        raise ValueError(f"perspective is {perspective}; it has to be within 0..0.5.")
    if not (min(scale) > 0 and abs(shear) < 45):
        raise ValueError(
            f"scale is {scale} and shear is {shear}; scales are above 0, shears below 45 degrees each way."
        )
    matrix, factor = _random_matrix(draws(rng), height, width, angle, translate, scale, shear, perspective)
    if not np.array_equal(matrix, np.eye(3)):
        padded = warped(padded, matrix, height, width, fill_value)
    columns += np.array([border[1], border[0]] * 2)
    after = _warped_boxes(columns, matrix)
    clip(after, 0, 0, width, height)
    keep = box_candidates(columns * factor, after, wh_thr, ar_thr, area_thr)
    columns[:] = after
    return padded, rows[keep]


def _padded(image: Image, border: Sequence[int], fill_value: Fill) -> Image:
    """The picture with (above and below, left and right) pixels more on each side, or less; a new array."""
    high, wide = (int(length) for length in border)
    height, width = image.shape[0] + 2 * high, image.shape[1] + 2 * wide
    if height < 1 or width < 1:
        raise ValueError(f"border is {tuple(border)}; nothing is left of a picture of {image.shape[:2]}.")
    result = canvas(image, height, width, fill_value)
    inner = image[max(-high, 0) : image.shape[0] - max(-high, 0), max(-wide, 0) : image.shape[1] - max(-wide, 0)]
    top, left = max(high, 0), max(wide, 0)
    result[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return result


def _random_matrix(
    draw: Draws,
    height: int,
    width: int,
    angle: float,
    translate: float,
    scale: tuple[float, float],
    shear: float,
    perspective: float,
) -> tuple[npt.NDArray[np.float64], float]:
    """The 3x3 matrix from pixel to pixel (x, y, 1), and the scale in it. Drawn in 1.7's order: angle, scale, shears, shifts."""
    centre = np.array([[1, 0, -width / 2], [0, 1, -height / 2], [0, 0, 1]])
    turn = math.radians(draw.uniform(-angle, angle))
    factor = draw.uniform(*scale)
    cos, sin = factor * math.cos(turn), factor * math.sin(turn)
    rotate = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    shear_x, shear_y = (math.tan(math.radians(draw.uniform(-shear, shear))) for _ in range(2))
    sheared = np.array([[1, shear_x, 0], [shear_y, 1, 0], [0, 0, 1]])
    shift_x, shift_y = (draw.uniform(0.5 - translate, 0.5 + translate) * length for length in (width, height))
    back = np.array([[1, 0, shift_x], [0, 1, shift_y], [0, 0, 1]])
    tilted = np.eye(3)
    if perspective:
        tilted[2, :2] = [2 * draw.uniform(-perspective, perspective) / length for length in (width, height)]
    return back @ sheared @ rotate @ tilted @ centre, factor


def _warped_boxes(columns: Rows, matrix: npt.NDArray[np.float64]) -> Rows:
    """(n, 4) xyxy -> the boxes around their moved corners. Edges lie half a pixel beside the pixels that the matrix moves."""
    # (n, 4, 3)
    points = np.stack([columns[:, [0, 2, 2, 0]], columns[:, [1, 1, 3, 3]], np.ones((len(columns), 4))], axis=-1)
    half = np.array([0.5, 0.5, 0])
    ends = (points - half) @ matrix.T
    depth = ends[..., 2:]
    # behind the viewer: no place, so that the box is left out
    ends = ends[..., :2] / np.where(depth > 0, depth, np.nan) + 0.5
    return np.concatenate([ends.min(axis=1), ends.max(axis=1)], axis=1)


def _whole_size(size: Sequence[int]) -> tuple[int, int]:
    if np.shape(size) != (2,) or min(size) < 1:
        raise ValueError(f"size is {size!r}; it is (height, width), in pixels.")
    return int(size[0]), int(size[1])

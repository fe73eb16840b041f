"""Augmentations that make one picture of several: mosaic of four (Bochkovskiy et al. 2020), mixup of two (Zhang et al. 2018).

Pictures, boxes and random numbers: as `torch_frame.vision.geometry` says, but rows are class, x1, y1, x2, y2 by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from torch_frame.vision._images import Fill, Image, canvas, checked, resized, same_channels
from torch_frame.vision._random import Draws, Generator, draws
from torch_frame.vision._rows import Rows, check_share, clip, corners, moved, rows_of
from torch_frame.vision.boxes import box_candidates


def mosaic(
    data: Sequence[tuple[Image, Any]],
    ouput_dim: Sequence[int],
    fill_value: Fill = 114,
    *,
    wh_thr: float | None = None,
    class_first: bool = True,
    rng: Generator = None,
) -> tuple[Image, Rows]:
    """Four pictures around a random centre: top left, top right, bottom left, bottom right. New arrays come back.

    Each is resized to fit `ouput_dim`, keeping its aspect, and put against the centre; what reaches beyond the canvas is cut off.
    The centre is drawn, y first, as whole pixels of 0.5 to 1.5 of `ouput_dim`.

    All boxes come back, in the order of the pictures, cut to what is seen of their picture: those of which nothing is seen have
    no area. `wh_thr` leaves these out.

    Args:
        data: four pairs (picture, boxes). Grey pictures among colour ones get their channels. Boxes are (n, 5 or more)
            rows class, x1, y1, x2, y2 in pixels of their picture; no boxes are [] or (0, 5). Integers stay integers, cut off.
        ouput_dim: (height, width); the canvas is twice as high and wide. (The name is 1.7's.)
        fill_value: level of empty places, 0..255: a number, or one for each channel.
        wh_thr: boxes that are not wider and higher than this in the end are left out, in pixels. None: all come back.
        class_first: rows begin with the class; else with x1.
        rng: the generator to draw from. None: python's `random`.

    Returns:
        (2 * height, 2 * width[, C]) of the pictures' dtype, and (n, 5 or more) rows of the boxes' dtype (small integers: int64).

    Raises:
        ValueError: not four pairs, or pictures that differ in dtype or number of channels. TypeError: no pictures.

    >>> white = np.full((20, 10, 3), 255, dtype=np.uint8)
    >>> image, boxes = mosaic([(white, [[0, 0, 0, 10, 20]])] * 4, (40, 40))
    >>> image.shape, boxes.shape
    ((80, 80, 3), (4, 5))
    """
    if len(data) != 4:
        raise ValueError(f"A mosaic is made of 4 pairs (picture, boxes); these are {len(data)}.")
    if np.shape(ouput_dim) != (2,) or min(ouput_dim) < 1:
        raise ValueError(f"ouput_dim is {ouput_dim!r}; it is (height, width), in pixels.")
    height, width = (int(length) for length in ouput_dim)
    draw = draws(rng)
    centre_y, centre_x = (int(draw.uniform(0.5 * length, 1.5 * length)) for length in (height, width))
    images = same_channels([checked(image) for image, _ in data])
    result, parts = canvas(images[0], 2 * height, 2 * width, fill_value), []
    for place, (image, (_, boxes)) in enumerate(zip(images, data, strict=True)):
        rows = rows_of(boxes, class_first=class_first)
        scale = min(height / image.shape[0], width / image.shape[1])
        piece = resized(image, *(max(1, int(length * scale)) for length in image.shape[:2]))
        left = centre_x - piece.shape[1] if place % 2 == 0 else centre_x
        top = centre_y - piece.shape[0] if place < 2 else centre_y
        _paste(result, piece, left, top)
        columns = corners(rows, class_first=class_first)
        placed = moved(columns, scale, scale, left, top)
        x1, y1 = max(left, 0), max(top, 0)
        x2, y2 = min(left + image.shape[1] * scale, 2 * width), min(top + image.shape[0] * scale, 2 * height)
        clip(placed, x1, y1, max(x1, x2), max(y1, y2))
        columns[:] = placed  # an array of integers cuts off what is behind the point
        parts.append(rows)
    merged = _stacked(parts)
    return result, merged if wh_thr is None else merged[_larger(corners(merged, class_first=class_first), wh_thr)]


def mixup_boxes(
    img1: Image,
    boxes1: Any,
    img2: Image,
    boxes2: Any,
    mixup_scale: float = 0.1,
    wh_thr: float = 0,
    ar_thr: float = 100,
    area_thr: float = 0,
    *,
    class_first: bool = True,
    rng: Generator = None,
) -> tuple[Image, Rows]:
    """Two pictures over one another on a black canvas, each at a random place, with the boxes of both. New arrays come back.

    The canvas is as high as the higher and as wide as the wider one. The first picture's weight is drawn from 0.5 - mixup_scale
    to 0.5 + mixup_scale, the second one's is the rest; then the places, y before x, the first picture's first. Levels of uint8
    are cut off to whole ones.

    Boxes are cut to the canvas; of them come back, the first picture's first, those that `box_candidates` lets through: with the
    default thresholds all that have an area and are less than 100 times as long as wide.

    Args:
        img1: picture. img2: another, of any size, of the same dtype; a grey one gets the other's channels.
        boxes1: (n, 5 or more) rows class, x1, y1, x2, y2 in pixels; no boxes are [] or (0, 5). boxes2: likewise.
        mixup_scale: 0 to 0.5.
        wh_thr: `box_candidates`' threshold, as ar_thr and area_thr.
        class_first: rows begin with the class; else with x1.
        rng: the generator to draw from. None: python's `random`.

    Raises:
        ValueError: pictures that differ in dtype or number of channels, mixup_scale or area_thr beyond its range.
        TypeError: no pictures.
    """
    if not 0 <= mixup_scale <= 0.5:
        raise ValueError(f"mixup_scale is {mixup_scale}; weights are 0..1, so it has to be within 0..0.5.")
    check_share(area_thr)
    draw = draws(rng)
    alpha = draw.uniform(0.5 - mixup_scale, 0.5 + mixup_scale)
    images = same_channels([checked(img1), checked(img2)])
    places, result = _blended(images, alpha, draw)
    height, width = result.shape[:2]
    parts = []
    for boxes, (left, top) in zip((boxes1, boxes2), places, strict=True):
        rows = rows_of(boxes, class_first=class_first)
        before = corners(rows, class_first=class_first).copy()
        columns = corners(rows, class_first=class_first)
        columns += np.array([left, top, left, top], dtype=rows.dtype)
        clip(columns, 0, 0, width, height)
        parts.append(rows[box_candidates(before, columns, wh_thr, ar_thr, area_thr)])
    return result, _stacked(parts)


def mixup(img1: Image, img2: Image, mixup_scale: float = 0.1, *, rng: Generator = None) -> Image:
    """`mixup_boxes` without boxes: the picture alone.

    Args:
        img1: picture. img2: another, of any size. mixup_scale: 0 to 0.5.
        rng: the generator to draw from. None: python's `random`.
    """
    return mixup_boxes(img1, (), img2, (), mixup_scale, rng=rng)[0]


def _paste(result: Image, piece: Image, left: int, top: int) -> None:
    """Put a piece onto the canvas; what reaches beyond it is cut off."""
    x1, y1 = max(left, 0), max(top, 0)
    x2, y2 = min(left + piece.shape[1], result.shape[1]), min(top + piece.shape[0], result.shape[0])
    result[y1:y2, x1:x2] = piece[y1 - top : y2 - top, x1 - left : x2 - left]


def _blended(images: Sequence[Image], alpha: float, draw: Draws) -> tuple[list[tuple[int, int]], Image]:
    """The (left, top) of each picture, and the mixture."""
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    total = np.zeros((height, width, *images[0].shape[2:]), dtype=np.float64)
    places = []
    for image, weight in zip(images, (alpha, 1 - alpha), strict=True):
        top, left = draw.randint(0, height - image.shape[0]), draw.randint(0, width - image.shape[1])
        total[top : top + image.shape[0], left : left + image.shape[1]] += np.multiply(image, weight, dtype=np.float64)
        places.append((left, top))
    return places, total.astype(images[0].dtype)


def _stacked(parts: Sequence[Rows]) -> Rows:
    """The rows of all pictures; an empty part does not decide on the dtype, nor on the number of columns."""
    filled = [part for part in parts if len(part)] or parts[:1]
    if len({part.shape[1] for part in filled}) > 1:
        raise ValueError(
            f"Boxes have {', '.join(str(part.shape[1]) for part in filled)} columns; they have to have the same number."
        )
    return np.concatenate(filled)


def _larger(columns: Rows, threshold: float) -> Any:
    return (columns[:, 2] - columns[:, 0] > threshold) & (columns[:, 3] - columns[:, 1] > threshold)

"""Boxes, labels, scores and masks on a picture, as a matplotlib figure (extra `report`)."""

from __future__ import annotations

import colorsys
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 100
_SHORTEST, _LONGEST = 640, 1600  # pixels that the longer side of a figure has at least and at most
_SHORTEST_IN_GRID = 320  # of a picture in a grid, as far as the figure is large enough
_MASK_ALPHA = 0.45
_SMALLEST_LETTERS, _LARGEST_LETTERS = 5.5, 10.0  # points
_NARROWEST = 48  # pixels that the shorter side has at least, however long the picture is


def draw(
    image: Any,
    boxes: Any = None,
    labels: Any = None,
    scores: Any = None,
    masks: Any = None,
    *,
    classes: Sequence[Any] | None = None,
    min_score: float = 0.0,
    channel_order: str = "rgb",
) -> Figure:
    """A picture with what was found on it, each class in its colour. Nothing that is given is changed.

    Lines and letters have the size that they need on the figure, not on the picture: a picture of 32 pixels is enlarged, one of
    8,000 reduced. Among many or small boxes letters are smaller. A box is cut to the picture, one outside it is left out, a
    label is moved inside; the best score is drawn on top. Arrays and tensors, on any device, are taken. Letters are of
    matplotlib's font: if it lacks yours (Chinese, say), matplotlib warns, and `matplotlib.rcParams["font.family"] = [...]` helps.

    Args:
        image: array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or tensor (H, W) or (1 or 3 or 4, H, W); bool, integers of 0..255,
            or floats of 0..1 (what is outside of it is cut off).
        boxes: (N, 4) xyxy in pixels of the image; None: none.
        labels: (N,) indices into `classes`, or anything that has a text, such as names. None: none are written.
        scores: (N,), written behind the label with two digits.
        masks: (N, H, W), bool, integers (0 is outside) or floats that are 0 or 1: painted over the picture.
        classes: names of the labels.
        min_score: what has a lower score is left out.
        channel_order: of the image: "rgb", as PIL and torchvision read it, or "bgr", as OpenCV does.

    Returns:
        A figure of a size of its own: `draw(...).savefig("found.png")`. It belongs to no window and no pyplot.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError, ValueError: no picture, or numbers that do not belong together.

    >>> figure = draw(np.zeros((32, 32), np.uint8), [[4, 4, 20, 28]], [1], [0.9], classes=["cat", "dog"])
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['dog 0.90']
    """
    figure, axes = _panels(1, 1, [picture := _picture(image, channel_order)])
    found = {"boxes": boxes, "labels": labels, "scores": scores, "masks": masks}
    _draw_on(axes[0], picture, _Found(picture, found, classes, min_score))
    return figure


def draw_grid(images: Sequence[Any], founds: Sequence[Any], *, columns: int | None = None, **settings: Any) -> Figure:
    """Several pictures with what was found on each.

    Args:
        images: each as `draw` takes it.
        founds: for each image a dict of `boxes`, `labels`, `scores`, `masks`, as far as there are; other keys are not read.
        columns: pictures in a row; None: about as many as there are rows.
        settings: `classes`, `min_score`, `channel_order` of `draw`.

    Raises:
        ModuleNotFoundError, TypeError, ValueError: as `draw`.
    """
    if len(images) == 0 or len(images) != len(founds):
        raise ValueError(
            f"There are {len(images)} images and {len(founds)} dicts; give one dict for each image, at least one."
        )
    pictures = [_picture(image, settings.get("channel_order", "rgb")) for image in images]
    columns = min(columns or math.ceil(math.sqrt(len(pictures))), len(pictures))
    figure, axes = _panels(math.ceil(len(pictures) / columns), columns, pictures)
    classes, min_score = settings.get("classes"), settings.get("min_score", 0.0)
    unknown = settings.keys() - {"classes", "min_score", "channel_order"}
    if unknown:
        raise TypeError(
            f"draw_grid() knows no {', '.join(map(repr, sorted(unknown)))}; only classes, min_score, channel_order."
        )
    for one, picture, found in zip(axes, pictures, founds, strict=False):
        _draw_on(one, picture, _Found(picture, found, classes, min_score))
    return figure


# ---------------------------------------------------------------- what is given


def _array(value: Any) -> npt.NDArray[Any]:
    return (
        value.detach().cpu().float().numpy()
        if _is_small_float(value)
        else np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    )


def _is_small_float(value: Any) -> bool:
    """bfloat16 and the like, which NumPy does not have."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.itemsize < 4


def _picture(image: Any, channel_order: str) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8, red, green, blue."""
    if channel_order not in ("rgb", "bgr"):
        raise ValueError(f"channel_order is {channel_order!r}; it is 'rgb' or 'bgr'.")
    array = _array(image)
    if isinstance(image, Tensor) and array.ndim == 3:
        array = np.moveaxis(array, 0, 2)
    shape = tuple(image.shape) if isinstance(image, Tensor) else array.shape
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
        raise ValueError(
            f"The image has shape {shape}; an array has to be (H, W) or (H, W, 1, 3 or 4), a tensor (H, W) or (1, 3 or 4, H, W)."
        )
    if array.dtype == bool:
        levels = array.astype(np.uint8) * np.uint8(255)
    elif np.issubdtype(array.dtype, np.floating):
        levels = (np.nan_to_num(array, nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1) * 255).round().astype(np.uint8)
    elif np.issubdtype(array.dtype, np.integer):
        levels = array.clip(0, 255).astype(np.uint8)
    else:
        raise TypeError(f"The image is of {array.dtype}; it has to be bool, integers of 0..255, or floats of 0..1.")
    colours = np.repeat(levels, 3, axis=2) if levels.shape[2] == 1 else levels[:, :, :3]
    return np.ascontiguousarray(colours[:, :, ::-1] if channel_order == "bgr" else colours)


class _Found:
    """What is drawn on a picture, the best score last.

    Attributes:
        boxes: (N, 4), cut to the picture; without area where there is nothing to see.
        texts: N labels. colours: N of red, green, blue, 0..1. masks: (N, H, W) bool, or None.
    """

    def __init__(
        self,
        picture: npt.NDArray[np.uint8],
        found: Mapping[str, Any],
        classes: Sequence[Any] | None,
        min_score: float,
    ) -> None:
        height, width = picture.shape[:2]
        given = {name: _array(found[name]) for name in ("boxes", "scores", "masks") if found.get(name) is not None}
        labels = found.get("labels")
        names = None if labels is None else [label.item() if hasattr(label, "item") else label for label in labels]
        counts = {name: len(value) for name, value in given.items()} | ({} if names is None else {"labels": len(names)})
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"There are {', '.join(f'{n} {name}' for name, n in counts.items())}; give one of each for each thing."
            )
        number = next(iter(counts.values()), 0)
        corners = given.get("boxes", np.empty((0, 4))).astype(np.float64)
        if corners.size and corners.shape[1:] != (4,):
            raise ValueError(f"The boxes have shape {corners.shape}; they have to be (N, 4): x1, y1, x2, y2.")
        seen = given.get("masks")
        if seen is not None and seen.size and seen.shape[1:] != (height, width):
            raise ValueError(
                f"The masks have shape {seen.shape}; they have to be (N, {height}, {width}), as the image."
            )
        if seen is not None and seen.dtype.kind == "f" and not ((seen == 0) | (seen == 1)).all():
            raise ValueError(
                "The masks have values between 0 and 1, or others; they have to be bool, or integers (0 is outside). Choose a "
                "threshold: masks > 0.5."
            )
        of_things = np.nan_to_num(given.get("scores", np.zeros(number)).astype(np.float64).reshape(-1), nan=-np.inf)
        order = np.argsort(of_things, kind="stable")
        if "scores" in given:
            order = order[of_things[order] >= min_score]
        limits = np.array([width, height, width, height])
        self.boxes = np.nan_to_num(
            corners.reshape(-1, 4)[order] if "boxes" in given else np.zeros((len(order), 4))
        ).clip(0, limits)
        self.masks = None if seen is None or not seen.size else seen[order] != 0
        self.texts = [_text(names, of_things if "scores" in given else None, classes, k) for k in order.tolist()]
        self.colours = [_colour(0 if names is None else names[k], classes) for k in order.tolist()]


def _text(
    names: list[Any] | None, scores: npt.NDArray[np.float64] | None, classes: Sequence[Any] | None, k: int
) -> str:
    parts = [] if names is None else [str(_name(names[k], classes))]
    return " ".join(parts if scores is None else [*parts, f"{scores[k]:.2f}"])


def _name(label: Any, classes: Sequence[Any] | None) -> Any:
    """The class's name; a label that `classes` does not have is written as it is."""
    is_index = isinstance(label, int | float) and math.isfinite(label) and label == int(label)
    return classes[int(label)] if classes is not None and is_index and 0 <= label < len(classes) else label


def _colour(label: Any, classes: Sequence[Any] | None) -> tuple[float, float, float]:
    """One colour for each label, the same in each figure: hues a golden angle apart, so that neighbours differ."""
    name = _name(label, classes)
    if classes is not None and name in classes:
        number = list(classes).index(name)
    else:
        number = int(label) if isinstance(label, int | float) and math.isfinite(label) else sum(map(ord, str(label)))
    return colorsys.hsv_to_rgb(number * 0.61803398875 % 1, 0.85 if number % 2 else 0.6, 0.95)


# ---------------------------------------------------------------- the figure


def _panels(rows: int, columns: int, pictures: Sequence[npt.NDArray[np.uint8]]) -> tuple[Figure, list[Any]]:
    """A figure with a place for each picture, of the pictures' shape, in pixels that fit a screen."""
    try:
        from matplotlib.figure import Figure  # no pyplot: no display, no global state
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Drawing needs matplotlib: pip install 'torch-frame[report]'") from error

    height = rows * max(picture.shape[0] for picture in pictures)
    width = columns * max(picture.shape[1] for picture in pictures)
    longest = max(height, width)
    shortest = max(_SHORTEST, _SHORTEST_IN_GRID * max(rows, columns))
    scale = min(max(shortest, longest), _LONGEST) / longest
    if scale > 1:
        scale = math.ceil(scale) if math.ceil(scale) * longest <= _LONGEST else scale  # whole pixels for a pixel
    size = [max(side * scale, _NARROWEST) for side in (width, height)]
    figure = Figure(figsize=(size[0] / _DPI, size[1] / _DPI), dpi=_DPI)
    gap = 0.02 if rows * columns > 1 else 0.0
    figure.subplots_adjust(0, 0, 1, 1, wspace=gap, hspace=gap)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for one in axes:
        one.set_axis_off()
    return figure, axes


def _draw_on(axes: Any, picture: npt.NDArray[np.uint8], found: _Found) -> None:
    from matplotlib.patches import Rectangle

    height, width = picture.shape[:2]
    cell = axes.get_position()
    figure_width, figure_height = axes.figure.get_size_inches() * 72  # points
    points = min(cell.width * figure_width / width, cell.height * figure_height / height)  # of a pixel of the picture
    axes.imshow(
        _painted(picture, found),
        interpolation="nearest" if points >= 0.72 else "antialiased",
        extent=(0, width, height, 0),
    )
    axes.set(xlim=(0, width), ylim=(height, 0))
    sides = found.boxes[:, 2:] - found.boxes[:, :2]
    visible = sides.min(axis=1) > 0
    typical = float(np.median(sides[visible].max(axis=1))) * points if visible.any() else 100.0
    size = min(max(typical / 6, _SMALLEST_LETTERS), _LARGEST_LETTERS)
    for k in range(len(found.texts)):
        if visible[k]:
            colour = found.colours[k]
            left, top, wide, high = np.concatenate([found.boxes[k, :2], sides[k]]).tolist()
            axes.add_patch(
                Rectangle((left, top), wide, high, edgecolor=colour, linewidth=size / 5, fill=False, zorder=2 + k)
            )
            _write(axes, found.texts[k], found.boxes[k], colour, size, points, (height, width), zorder=2 + k)
        elif found.masks is not None and found.masks[k].any():
            rows, columns = np.nonzero(found.masks[k])
            around = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], np.float64)
            _write(axes, found.texts[k], around, found.colours[k], size, points, (height, width), zorder=2 + k)


def _painted(picture: npt.NDArray[np.uint8], found: _Found) -> npt.NDArray[np.uint8]:
    if found.masks is None:
        return picture
    painted = picture.astype(np.float32)
    for mask, colour in zip(found.masks, found.colours, strict=True):
        painted[mask] += _MASK_ALPHA * (np.array(colour, np.float32) * 255 - painted[mask])
    return painted.round().astype(np.uint8)


def _write(
    axes: Any,
    text: str,
    box: npt.NDArray[np.float64],
    colour: tuple[float, float, float],
    size: float,
    points: float,
    shape: tuple[int, int],
    zorder: float,
) -> None:
    """The label above its box, or below its upper edge where there is no room above; never outside of the picture."""
    if not text:
        return
    letters = sum(1.6 if unicodedata.east_asian_width(letter) in "FW" else 1.0 for letter in text)
    wide, high = letters * size * 0.62 / points, size * 1.35 / points  # in pixels of the picture, about
    left = max(min(box[0], shape[1] - wide), 0)
    top = box[1] - high if box[1] >= high else min(box[1], max(shape[0] - high, 0))
    dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.55
    ground = {"boxstyle": "square,pad=0.12", "facecolor": colour, "edgecolor": "none", "alpha": 0.85}
    place = {"ha": "left", "va": "top", "clip_on": True, "zorder": zorder + 0.5, "parse_math": False}
    axes.text(left, top, text, fontsize=size, color="white" if dark else "black", bbox=ground, **place)

"""What the augmentations share: which pictures they take, how a picture is resized and warped, what an empty place holds.

OpenCV does it where it is installed, for it is faster; torch does it otherwise. The two differ by at most a level or two of 255.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from torch_frame.vision._optional import opencv

Image = npt.NDArray[Any]
"""(H, W), (H, W, 1) or (H, W, C): uint8, levels 0..255, or floats, 0..1."""

Fill = float | Sequence[float]
"""The level of an empty place, 0..255 (in a picture of floats divided by 255): one number, or one for each channel."""


def checked(image: Any) -> Image:
    """The picture itself.

    Raises:
        TypeError: something else than an array of uint8 or floats. ValueError: a shape that no picture has.
    """
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"A picture is a NumPy array; this is a {type(image).__name__}. Convert it: np.asarray(picture)."
        )
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise TypeError(
            f"A picture is of uint8 (0..255) or floats (0..1); this one is of {image.dtype}. Scale it and convert it first."
        )
    if image.ndim not in (2, 3) or image.size == 0:
        raise ValueError(f"A picture is (H, W) or (H, W, C), with at least a pixel; this one is {image.shape}.")
    return image


def level(image: Image, value: float) -> float:
    """A level of 0..255 in the picture's own unit."""
    return value if image.dtype == np.uint8 else value / 255


def fill_of(image: Image, fill_value: Fill) -> float | list[float]:
    """What an empty place of the picture holds, in its own unit: one number, or one for each of its channels."""
    values = np.atleast_1d(np.asarray(fill_value, dtype=np.float64))
    channels = 1 if image.ndim == 2 else image.shape[2]
    if not ((values >= 0) & (values <= 255)).all():
        raise ValueError(f"fill_value is {fill_value!r}; levels are 0..255, whatever the picture's dtype.")
    if values.ndim != 1 or (len(values) not in (1, channels) and np.ptp(values) > 0):
        raise ValueError(f"fill_value is {fill_value!r}; it is one number, or one for each of the {channels} channels.")
    if len(values) != channels or channels == 1:
        return level(image, float(values[0]))
    return [level(image, value) for value in values.tolist()]


def canvas(image: Image, height: int, width: int, fill_value: Fill) -> Image:
    """A picture (height, width) of the given one's channels and dtype that holds fill_value."""
    empty = np.empty((height, width, *image.shape[2:]), dtype=image.dtype)
    empty[...] = fill_of(image, fill_value)
    return empty


def same_channels(images: Sequence[Image]) -> list[Image]:
    """Grey pictures among colour ones with as many channels as those; all of one dtype.

    Raises:
        ValueError: other numbers of channels, or several dtypes.
    """
    if len({image.dtype for image in images}) > 1:
        raise ValueError(
            f"The pictures are of {', '.join(str(image.dtype) for image in images)}; they have to be of one dtype."
        )
    shapes = {image.shape[2:] for image in images}
    if len(shapes) == 1:
        return list(images)
    channels = {image.shape[2] if image.ndim == 3 else 1 for image in images}
    if len(channels - {1}) > 1:
        raise ValueError(
            f"The pictures have {sorted(channels)} channels; they have to have the same number, or be grey."
        )
    return [
        np.repeat(np.atleast_3d(image), max(channels), 2) if np.atleast_3d(image).shape[2] == 1 else image
        for image in images
    ]


def resized(image: Image, height: int, width: int) -> Image:
    """The picture in another size, bilinear, as a new array of its dtype."""
    if image.shape[:2] == (height, width):
        return image.copy()
    cv2 = opencv()
    if cv2 is None or image.dtype not in (np.uint8, np.float32, np.float64) or np.atleast_3d(image).shape[2] > 4:
        return _resized_by_torch(image, height, width)
    result = cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(result).reshape(height, width, *image.shape[2:])


def warped(image: Image, matrix: npt.NDArray[np.float64], height: int, width: int, fill_value: Fill) -> Image:
    """The picture moved by a 3x3 matrix that takes a pixel's (column, row) to where it goes, bilinear, as a new array.

    Its last row is 0, 0, 1 for an affine warp. Pixels are points at whole numbers here, as OpenCV counts.
    """
    fill = fill_of(image, fill_value)
    cv2 = opencv()
    # OpenCV warps float64 by coordinates that are rounded to 1/32 of a pixel
    if cv2 is None or image.dtype not in (np.uint8, np.float32) or np.atleast_3d(image).shape[2] > 4:
        return _warped_by_torch(image, matrix, height, width, fill)
    border = [fill] * 4 if isinstance(fill, float | int) else fill
    picture = np.ascontiguousarray(image)
    if (matrix[2] == (0, 0, 1)).all():
        result = cv2.warpAffine(picture, matrix[:2], dsize=(width, height), borderValue=border)
    else:
        result = cv2.warpPerspective(picture, matrix, dsize=(width, height), borderValue=border)
    return np.asarray(result).reshape(height, width, *image.shape[2:])


def _resized_by_torch(image: Image, height: int, width: int) -> Image:
    result = torch.nn.functional.interpolate(_planes(image), (height, width), mode="bilinear", align_corners=False)
    return _picture(result, image)


def _warped_by_torch(
    image: Image, matrix: npt.NDArray[np.float64], height: int, width: int, fill: float | list[float]
) -> Image:
    planes = _planes(image)  # (1, C, H, W)
    empty = torch.as_tensor(fill, dtype=planes.dtype).reshape(-1, 1, 1)
    rows, columns = np.mgrid[:height, :width]
    x, y, w = np.einsum("ij,jhw->ihw", np.linalg.inv(matrix), np.stack([columns, rows, np.ones_like(rows)]))
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = np.where(w == 0, -2.0, x / w), np.where(w == 0, -2.0, y / w)  # OpenCV looks up nothing there either
    # grid_sample counts from -1 at the left edge of the first pixel to 1 at the right edge of the last one
    grid = np.stack([(2 * x + 1) / image.shape[1] - 1, (2 * y + 1) / image.shape[0] - 1], axis=-1)
    places = torch.from_numpy(grid)[None].to(planes.dtype)
    result = torch.nn.functional.grid_sample(planes - empty, places, align_corners=False) + empty
    return _picture(result, image)


def _planes(image: Image) -> torch.Tensor:
    """(1, C, H, W), float32, or float64 of a picture of float64."""
    dtype = np.float64 if image.dtype.itemsize >= 8 else np.float32
    return torch.from_numpy(np.atleast_3d(image).astype(dtype)).permute(2, 0, 1)[None]


def _picture(planes: torch.Tensor, like: Image) -> Image:
    values = planes[0].permute(1, 2, 0).numpy().reshape(*planes.shape[2:], *like.shape[2:])
    if like.dtype == np.uint8:
        values = values.round().clip(0, 255)
    return np.ascontiguousarray(values.astype(like.dtype))

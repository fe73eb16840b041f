"""The four augmentations of a picture's levels: brightness, contrast, gamma, hue and saturation.

Pictures are arrays (H, W), (H, W, 1) or (H, W, C) of uint8, levels 0..255, or of floats 0..1. What comes back is a new array of
the same shape and dtype; boxes stay where they are. Colour is BGR, as OpenCV reads it, unless `channel_order="rgb"`.

In the classes of 1.7, whose names begin with Random, `p` is the probability of doing NOTHING. In `ColorJitter` it is that of
changing the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from torch_frame.vision._images import Image, checked, level
from torch_frame.vision._optional import opencv
from torch_frame.vision._random import Generator, draws, probability


def adjust_brightness(image: Image, amount: float) -> Image:
    """The picture with `amount` added to every level, cut to the levels there are.

    Args:
        image: picture. amount: in levels of 0..255, whatever the dtype: 51 adds a fifth of the range.
    """
    return _by_level(image, lambda levels: levels + np.asarray(level(image, amount), levels.dtype))


def adjust_contrast(image: Image, factor: float) -> Image:
    """The picture with every level multiplied, cut to the levels there are.

    Args:
        image: picture. factor: 1 leaves it as it is, 0 makes it black.
    """
    return _by_level(image, lambda levels: levels * np.asarray(factor, levels.dtype))


def adjust_gamma(image: Image, gamma: float) -> Image:
    """The picture with every level x (of 0..1) as x ** gamma.

    Args:
        image: picture. gamma: above 0; below 1 makes it lighter, above 1 darker.

    Raises:
        ValueError: gamma is not above 0.
    """
    if not gamma > 0:
        raise ValueError(f"gamma is {gamma}; it has to be above 0.")
    if checked(image).dtype != np.uint8:
        return _by_level(image, lambda levels: np.power(levels.clip(0, 1), np.asarray(gamma, levels.dtype)))
    table = np.power(np.arange(256) / 255, gamma) * 255
    return table.astype(np.uint8)[image]


def adjust_hue_saturation(image: Image, hue: float, saturation: float, *, channel_order: str = "bgr") -> Image:
    """The picture with its hue turned and its saturation multiplied, cut to what there is. Grey pictures stay as they are.

    A picture of uint8 goes through OpenCV's HSV of uint8, as in 1.7: hue in steps of 2 degrees.

    Args:
        image: picture, grey or with 3 channels.
        hue: -180 to 180, in OpenCV's unit: 180 is the whole circle.
        saturation: a factor, at least 0; 0 makes it grey.
        channel_order: "bgr" or "rgb".

    Raises:
        ValueError: another number of channels, an unknown order, a saturation below 0.
    """
    if channel_order not in ("bgr", "rgb"):
        raise ValueError(f"channel_order is {channel_order!r}; it has to be 'bgr' or 'rgb'.")
    if not saturation >= 0:
        raise ValueError(f"saturation is {saturation}; it has to be at least 0.")
    if checked(image).ndim == 2 or image.shape[2] == 1:
        return image.copy()
    if image.shape[2] != 3:
        raise ValueError(
            f"The picture has {image.shape[2]} channels; a hue needs 3. Take them apart: picture[..., :3]."
        )
    if channel_order == "rgb":
        return np.ascontiguousarray(_turned(image[..., ::-1], hue, saturation)[..., ::-1])
    return _turned(image, hue, saturation)


class ColorJitter:
    """Brightness, contrast, gamma, hue and saturation, each drawn from its range, all or nothing with probability `p`.

    Args:
        brightness: lowest and highest amount, levels of 0..255.
        contrast: lowest and highest factor. gamma: lowest and highest exponent.
        hue: lowest and highest turn; 180 is the whole circle. saturation: lowest and highest factor.
        p: probability of changing the picture, 0 to 1; else a copy comes back.
        channel_order: "bgr" or "rgb".
        rng: the generator to draw from. None: python's `random`, which torch-frame seeds for each sample. A generator that is
            passed is copied into each of a DataLoader's workers, which then draw the same numbers.

    Raises:
        ValueError: something else than a pair of numbers, a gamma or a saturation below 0, or p outside of 0..1.

    >>> ColorJitter(brightness=(20, 20), p=1.0)(np.full((1, 1), 100, dtype=np.uint8))
    array([[120]], dtype=uint8)
    """

    def __init__(
        self,
        brightness: tuple[float, float] = (0.0, 0.0),
        contrast: tuple[float, float] = (1.0, 1.0),
        gamma: tuple[float, float] = (1.0, 1.0),
        hue: tuple[float, float] = (0.0, 0.0),
        saturation: tuple[float, float] = (1.0, 1.0),
        *,
        p: float = 0.5,
        channel_order: str = "bgr",
        rng: Generator = None,
    ) -> None:
        self.brightness = _pair("brightness", brightness)
        self.contrast = _pair("contrast", contrast)
        self.gamma = _pair("gamma", gamma, lowest=0)
        self.hue = _pair("hue", hue)
        self.saturation = _pair("saturation", saturation, lowest=0)
        self.p = probability(p)
        self.channel_order = channel_order
        self.rng = rng

    def __call__(self, image: Image) -> Image:
        """A new picture."""
        draw = draws(self.rng)
        if draw.random() >= self.p:
            return checked(image).copy()
        if self.brightness != (0, 0):
            image = adjust_brightness(image, draw.uniform(*self.brightness))
        if self.contrast != (1, 1):
            image = adjust_contrast(image, draw.uniform(*self.contrast))
        if self.gamma != (1, 1):
            image = adjust_gamma(image, draw.uniform(*self.gamma))
        if self.hue != (0, 0) or self.saturation != (1, 1):
            hue, saturation = draw.uniform(*self.hue), draw.uniform(*self.saturation)
            image = adjust_hue_saturation(image, hue, saturation, channel_order=self.channel_order)
        return checked(image).copy()


class RandomBrightness:
    """Adds a whole number drawn from low..high; with probability `p` NOTHING is done and the very picture comes back.

    Args:
        low: lowest amount, levels of 0..255; at least -80. high: highest; at most 80.
        p: probability of doing nothing, 0 to 1.
        rng: the generator to draw from. None: python's `random`.

    Raises:
        ValueError: low or high beyond its limit or no whole number, low above high, or p outside of 0..1.
    """

    def __init__(self, low: int = -10, high: int = 10, p: float = 0.2, *, rng: Generator = None) -> None:
        if not -80 <= low <= high <= 80 or low != int(low) or high != int(high):
            raise ValueError(
                f"low is {low} and high is {high}; they are whole numbers, low at least -80, high at most 80 and not below low."
            )
        self.low = int(low)
        self.high = int(high)
        self.p = probability(p)
        self.rng = rng

    def __call__(self, image: Image) -> Image:
        """A new picture, or with probability p the argument."""
        draw = draws(self.rng)
        if draw.random() < self.p:
            return image
        return adjust_brightness(image, draw.randint(self.low, self.high))


class RandomContrast:
    """Multiplies by a number drawn from low..high; with probability `p` NOTHING is done and the very picture comes back.

    Args:
        low: lowest factor, at least 0.5. high: highest, at most 2.
        p: probability of doing nothing, 0 to 1.
        rng: the generator to draw from. None: python's `random`.

    Raises:
        ValueError: low or high beyond its limit, low not below high, or p outside of 0..1.
    """

    def __init__(self, low: float = 0.9, high: float = 1.1, p: float = 0.2, *, rng: Generator = None) -> None:
        if not 0.5 <= low < high <= 2:
            raise ValueError(f"low is {low} and high is {high}; low has to be below high, both within 0.5..2.")
        self.low = low
        self.high = high
        self.p = probability(p)
        self.rng = rng

    def __call__(self, image: Image) -> Image:
        """A new picture, or with probability p the argument."""
        return _by_chance(image, self.p, self.rng, adjust_contrast, self.low, self.high)


class RandomGammaCorrection:
    """A gamma drawn from lower..upper; with probability `p` NOTHING is done and the very picture comes back.

    Args:
        lower: lowest exponent; below 1 makes pictures lighter. upper: highest.
        p: probability of doing nothing, 0 to 1.
        rng: the generator to draw from. None: python's `random`.
    """

    def __init__(self, lower: float = 0.666, upper: float = 1.5, p: float = 0.5, *, rng: Generator = None) -> None:
        self.lower, self.upper = _pair("(lower, upper)", (lower, upper), lowest=0)
        self.p = probability(p)
        self.rng = rng

    def __call__(self, image: Image) -> Image:
        """A new picture, or with probability p the argument."""
        return _by_chance(image, self.p, self.rng, adjust_gamma, self.lower, self.upper)


class RandomHueSaturation:
    """Turns the hue and multiplies the saturation; with probability `p` NOTHING is done and the very picture comes back.

    Args:
        hue_lower: lowest turn; 180 is the whole circle. hue_upper: highest.
        sat_lower: lowest factor of the saturation. sat_upper: highest.
        p: probability of doing nothing, 0 to 1.
        channel_order: "bgr", as in 1.7, or "rgb".
        rng: the generator to draw from. None: python's `random`.
    """

    def __init__(
        self,
        hue_lower: float = -12,
        hue_upper: float = 12,
        sat_lower: float = 0.6,
        sat_upper: float = 1.5,
        p: float = 0.5,
        *,
        channel_order: str = "bgr",
        rng: Generator = None,
    ) -> None:
        self.hue_lower, self.hue_upper = _pair("(hue_lower, hue_upper)", (hue_lower, hue_upper))
        self.sat_lower, self.sat_upper = _pair("(sat_lower, sat_upper)", (sat_lower, sat_upper), lowest=0)
        self.p = probability(p)
        self.channel_order = channel_order
        self.rng = rng

    def __call__(self, image: Image) -> Image:
        """A new picture, or with probability p the argument."""
        draw = draws(self.rng)
        if draw.random() < self.p:
            return image
        hue, saturation = draw.uniform(self.hue_lower, self.hue_upper), draw.uniform(self.sat_lower, self.sat_upper)
        return adjust_hue_saturation(image, hue, saturation, channel_order=self.channel_order)


def _pair(name: str, given: Any, lowest: float = -math.inf) -> tuple[float, float]:
    """(lowest, highest) as they were given: a wrong one would be told only by some of the draws."""
    try:
        first, second = given
        fits = first >= lowest and second >= lowest
    except (TypeError, ValueError):
        fits = False
    if not fits:
        limit = "" if lowest == -math.inf else f", neither below {lowest:g}"
        raise ValueError(f"{name} is {given!r}; it has to be a pair of numbers, the lowest and the highest{limit}.")
    return first, second


def _by_chance(
    image: Image, p: float, rng: Generator, adjust: Callable[[Image, float], Image], lowest: float, highest: float
) -> Image:
    """The picture adjusted by a number drawn from lowest..highest, or with probability `p` the very picture."""
    draw = draws(rng)
    return image if draw.random() < p else adjust(image, draw.uniform(lowest, highest))


def _by_level(image: Image, change: Any) -> Image:
    """A function of levels, put to every level there is in a picture of uint8, else to the picture."""
    if checked(image).dtype == np.uint8:
        table = change(np.arange(256, dtype=np.float32)).clip(0, 255).astype(np.uint8)
        return np.asarray(table[image])
    _check_range(image)
    return np.asarray(change(image).clip(0, 1))


def _check_range(image: Image) -> None:
    lowest, highest = float(image.min()), float(image.max())
    if not (lowest >= -_SLACK and highest <= 1 + _SLACK):  # NaN too
        raise ValueError(
            f"A picture of {image.dtype} has levels 0..1; this one's are {lowest:g}..{highest:g}. Divide it by 255, or change "
            "colours before it is normalised."
        )


_SLACK = 1e-3  # what resizing and rounding may leave


def _turned(image: Image, hue: float, saturation: float) -> Image:
    """A BGR picture."""
    if image.dtype != np.uint8:
        _check_range(image)
        planes = _hsv(image.clip(0, 1))
        return _bgr((planes[0] + hue) % 180, (planes[1] * saturation).clip(0, 1), planes[2]).astype(image.dtype)
    cv2 = opencv()
    hsv = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_BGR2HSV) if cv2 is not None else _hsv_of_bytes(image)
    changed = _changed_bytes(np.asarray(hsv, np.uint8), hue, saturation)
    return np.asarray(cv2.cvtColor(changed, cv2.COLOR_HSV2BGR)) if cv2 is not None else _bgr_of_bytes(changed)


def _changed_bytes(hsv: npt.NDArray[np.uint8], hue: float, saturation: float) -> npt.NDArray[np.uint8]:
    changed = hsv.astype(np.float32)
    changed[..., 0] = (changed[..., 0] + np.float32(hue)) % 180
    changed[..., 1] = (changed[..., 1] * np.float32(saturation)).clip(max=255)
    return changed.astype(np.uint8)


def _hsv(image: Image) -> tuple[Image, Image, Image]:
    """BGR of 0..1 -> hue (H, W) 0..180, saturation and value 0..1 (Smith 1978)."""
    blue, green, red = (image[..., k] for k in range(3))
    value = image.max(axis=-1)
    spread = value - image.min(axis=-1)
    apart = np.where(spread == 0, 1, spread)
    sector = np.where(
        value == red,
        (green - blue) / apart,
        np.where(value == green, (blue - red) / apart + 2, (red - green) / apart + 4),
    )
    return sector * 30 % 180, spread / np.where(value == 0, 1, value), value


def _bgr(hue: Image, saturation: Image, value: Image) -> Image:
    """The way back from `_hsv`."""
    sector = (hue / 30).astype(np.intp) % 6
    part = hue / 30 - np.floor(hue / 30)
    low, falling, rising = (
        value * (1 - saturation),
        value * (1 - saturation * part),
        value * (1 - saturation * (1 - part)),
    )
    red = np.choose(sector, [value, falling, low, low, rising, value])
    green = np.choose(sector, [rising, value, value, falling, low, low])
    blue = np.choose(sector, [low, low, rising, value, value, falling])
    return np.stack([blue, green, red], axis=-1)


def _hsv_of_bytes(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """OpenCV's HSV of uint8: hue 0..179, saturation and value 0..255, by its tables of reciprocals times 4096."""
    blue, green, red = (image[..., k].astype(np.int32) for k in range(3))
    value = image.max(axis=-1).astype(np.int32)
    spread = value - image.min(axis=-1)
    numbers = np.arange(1, 256)
    of_value, of_spread = (np.r_[0, np.rint(top * 4096 / numbers)].astype(np.int32) for top in (255, 30))
    turn = np.where(
        value == red, green - blue, np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    )
    hue = (turn * of_spread[spread] + 2048) >> 12
    saturation = (spread * of_value[value] + 2048) >> 12
    return np.stack([hue % 180, saturation, value], axis=-1).astype(np.uint8)


def _bgr_of_bytes(hsv: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    hue, saturation, value = (hsv[..., k].astype(np.float32) for k in range(3))
    return np.asarray(np.rint(_bgr(hue, saturation / 255, value / 255) * 255), np.uint8)

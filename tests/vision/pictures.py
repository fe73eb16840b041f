"""Pictures of every kind for the tests of augmentations, and a way to do without OpenCV."""

from __future__ import annotations

import numpy as np
import pytest

from torch_frame.vision import _images, colors

KINDS = ["uint8 grey", "uint8 1", "uint8 3", "uint8 4", "float32 grey", "float32 3", "float64 3", "float16 3"]


def picture(kind: str, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Noise: "dtype grey" is (H, W), "dtype C" (H, W, C)."""
    dtype, channels = kind.split()
    levels = rng.integers(0, 256, (height, width) if channels == "grey" else (height, width, int(channels)))
    return (levels if dtype == "uint8" else levels / 255).astype(dtype)


def with_a_rectangle(rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """A black (60, 80) picture with one white rectangle, and its box."""
    image = np.zeros((60, 80), np.uint8)
    x1, y1 = rng.integers(5, 40), rng.integers(5, 30)
    x2, y2 = x1 + rng.integers(8, 30), y1 + rng.integers(8, 25)
    image[y1:y2, x1:x2] = 255
    return image, [int(edge) for edge in (x1, y1, x2, y2)]


def bounds(image: np.ndarray) -> list[int]:
    """x1, y1, x2, y2 of what is white."""
    rows, columns = np.nonzero(image > 127)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def without_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if OpenCV were not installed."""
    monkeypatch.setattr(_images, "opencv", lambda: None)
    monkeypatch.setattr(colors, "opencv", lambda: None)

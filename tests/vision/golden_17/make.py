"""How results.npz was made: what torch_frame.vision of 1.7.5 returns for valid input, with OpenCV 5.0.0 and torchvision 0.29.1.

    python -m venv .venv17 && .venv17/bin/pip install torch==2.14.1 torchvision==0.29.1 tensorboard torch-frame==1.7.5
    .venv17/bin/pip install opencv-python-headless==5.0.0.93
    .venv17/bin/python tests/vision/golden_17/make.py

1.7.5 fails on any NumPy since 1.24 for want of `np.float`, which is put back here. Left out is what its bugs change: mosaics that
are not square (other columns are clipped), boxes in `mixup_boxes` whose class is above their y1, saturations that wrap around,
recalls of whole tenths, `random_perspective` with boxes.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).with_name("results.npz")


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """(height, width, 3) uint8: slopes and noise by a formula."""
    y, x, channel = np.mgrid[:height, :width, :3]
    return ((x * 7 + y * 5 * (channel + 1) + seed * 31 + (x * y * 13 + channel) % 17) % 256).astype(np.uint8)


def boxes(height: int, width: int, count: int, seed: int) -> np.ndarray:
    """(count, 5) class, x1, y1, x2, y2 inside a picture; classes are 0 and 1, y1 is at least 2."""
    numbers = np.random.default_rng(seed).random((count, 4))
    corner = numbers[:, :2] * [width * 0.6, height * 0.6 - 2] + [0, 2]
    return np.c_[np.arange(count) % 2, corner, corner + 1 + numbers[:, 2:] * [width * 0.3, height * 0.3]]


def results(vision: Any) -> dict[str, np.ndarray]:
    """A name of a call -> what it returned."""
    return {**_mixed(vision), **_colors(vision), **_boxes(vision), **_postprocessed(vision), **_precision(vision)}


def _mixed(vision: Any) -> dict[str, np.ndarray]:
    found = {}
    for seed, dtype in enumerate((np.float64, np.float32, np.int64)):
        sizes = [(20 + 3 * seed, 31), (40, 17 + seed), (9, 12), (25, 25)]
        data = [
            (picture(*size, seed + place), boxes(*size, place + 1, seed + place).astype(dtype))
            for place, size in enumerate(sizes)
        ]
        random.seed(seed)
        image, rows = vision.mosaic(data, (24 + seed, 24 + seed), fill_value=(1, 2, 3) if seed else 114)
        rows[:, 4] = rows[:, 4].clip(0, 48 + 2 * seed)  # which 1.7.5 forgot
        found |= {f"mosaic image {seed}": image, f"mosaic boxes {seed}": rows}
        random.seed(seed)
        image, rows = vision.mixup_boxes(*data[0], *data[1])
        found |= {f"mixup image {seed}": image, f"mixup boxes {seed}": rows}
        random.seed(seed)
        image, _ = vision.random_perspective(data[0][0], np.zeros((0, 4)), border=(3, 2), shear=float(seed))
        found[f"perspective image {seed}"] = image
    return found


def _colors(vision: Any) -> dict[str, np.ndarray]:
    found = {}
    settings: dict[str, dict[str, float]] = {
        "RandomBrightness": {},
        "RandomContrast": {},
        "RandomGammaCorrection": {},
        "RandomHueSaturation": {"sat_upper": 1.0},
    }
    for name, arguments in settings.items():
        augment = getattr(vision, name)(**arguments)
        for seed in range(4):
            random.seed(seed)
            found[f"{name} {seed}"] = augment(picture(13, 11, seed))
    return found


def _boxes(vision: Any) -> dict[str, np.ndarray]:
    found = {}
    first, second = boxes(40, 50, 5, 1)[:, 1:], boxes(40, 50, 7, 2)[:, 1:]
    casts = {
        "float64": lambda x: x,
        "float32": lambda x: x.astype(np.float32),
        "int64": lambda x: x.astype(np.int64),
        "tensor float32": lambda x: torch.from_numpy(x).float(),
        "tensor float16": lambda x: torch.from_numpy(x).half(),
        "tensor int64": lambda x: torch.from_numpy(x).long(),
    }
    for name, cast in casts.items():
        for xyxy in (True, False):
            for mode in ("iou", "iof"):
                found[f"iou {name} {xyxy} {mode}"] = np.asarray(
                    vision.bboxes_iou(cast(first), cast(second), xyxy, mode)
                )
        found[f"cxcywh {name}"] = np.asarray(vision.xyxy2cxcywh(cast(first.copy())))
        found[f"filter_box {name}"] = np.asarray(vision.filter_box(cast(second), 5, 11))
    found["box_candidates"] = vision.box_candidates(first, first * [1, 1, 0.8, 0.7])
    return found


def _postprocessed(vision: Any) -> dict[str, np.ndarray]:
    found = {}
    rng = np.random.default_rng(3)
    head = np.c_[rng.uniform(10, 90, (120, 2)), rng.uniform(5, 30, (120, 2)), rng.random((120, 4))].astype(np.float32)
    for agnostic in (False, True):
        for merge in (False, True):
            for as_array in (False, True):
                name = f"det_postprocess {agnostic} {merge} {as_array}"
                head_now = torch.from_numpy(head.reshape(3, 40, 8).copy())
                rows = vision.det_postprocess(head_now, 3, 0.3, 0.4, agnostic, merge, as_array)
                found |= {f"{name} {image}": np.asarray(part) for image, part in enumerate(rows)}
    return found


def _precision(vision: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    truth, found = [], []
    for image in range(7):
        rows = boxes(60, 60, image % 3, image)[:, 1:]
        shifted = np.concatenate(
            [rows + rng.normal(0, 1, rows.shape), rng.uniform(0, 20, (1, 4)) + np.array([0, 0, 30, 30])]
        )
        truth.append({"bboxes": rows} if len(rows) else {})
        found.append({"bboxes": shifted, "confidence": rng.random(len(shifted))})
    precision = vision.eval_map({"cat": truth, "dog": [{}]}, {"cat": found, "dog": [{}]}, 0.5)
    return {"eval_map": np.array([precision["cat"], precision["dog"]])}


if __name__ == "__main__":
    np.float = float  # type: ignore[attr-defined]
    from torch_frame import vision

    np.savez_compressed(RESULTS, **results(vision))  # type: ignore[arg-type]

"""Import path of torch-frame 1.7; see `torch_frame.vision`."""

from torch_frame.vision.augmentations import base as base
from torch_frame.vision.augmentations.boxes import mixup_boxes, mosaic, random_perspective
from torch_frame.vision.augmentations.colors import (
    RandomBrightness,
    RandomContrast,
    RandomGammaCorrection,
    RandomHueSaturation,
)

__all__ = [
    "RandomBrightness",
    "RandomContrast",
    "RandomGammaCorrection",
    "RandomHueSaturation",
    "mixup_boxes",
    "mosaic",
    "random_perspective",
]

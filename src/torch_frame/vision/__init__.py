"""Boxes, non-maximum suppression and augmentations for detection, on NumPy arrays; boxes also as tensors.

`from torch_frame.vision import X` gives the names of 1.7 and those added since; docs/vision.md is the guide. OpenCV and
torchvision are used where they are installed, for speed alone, and imported at the first use.
"""

from torch_frame.vision import augmentations, tools
from torch_frame.vision.average_precision import eval_map
from torch_frame.vision.boxes import (
    bboxes_iou,
    box_candidates,
    box_iou,
    clip_boxes,
    convert_boxes,
    filter_box,
    xyxy2cxcywh,
)
from torch_frame.vision.colors import (
    ColorJitter,
    RandomBrightness,
    RandomContrast,
    RandomGammaCorrection,
    RandomHueSaturation,
    adjust_brightness,
    adjust_contrast,
    adjust_gamma,
    adjust_hue_saturation,
)
from torch_frame.vision.drawing import draw, draw_grid
from torch_frame.vision.geometry import (
    Letterboxed,
    crop,
    flip,
    letterbox,
    random_crop,
    random_flip,
    random_perspective,
    unletterbox,
)
from torch_frame.vision.mixing import mixup, mixup_boxes, mosaic
from torch_frame.vision.postprocess import det_postprocess
from torch_frame.vision.suppression import batched_nms, nms

__all__ = [
    "ColorJitter",
    "Letterboxed",
    "RandomBrightness",
    "RandomContrast",
    "RandomGammaCorrection",
    "RandomHueSaturation",
    "adjust_brightness",
    "adjust_contrast",
    "adjust_gamma",
    "adjust_hue_saturation",
    "augmentations",
    "batched_nms",
    "bboxes_iou",
    "box_candidates",
    "box_iou",
    "clip_boxes",
    "convert_boxes",
    "crop",
    "det_postprocess",
    "draw",
    "draw_grid",
    "eval_map",
    "filter_box",
    "flip",
    "letterbox",
    "mixup",
    "mixup_boxes",
    "mosaic",
    "nms",
    "random_crop",
    "random_flip",
    "random_perspective",
    "tools",
    "unletterbox",
    "xyxy2cxcywh",
]

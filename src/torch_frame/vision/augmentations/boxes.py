"""Import path of torch-frame 1.7; see `torch_frame.vision`."""

from torch_frame.vision.boxes import box_candidates
from torch_frame.vision.geometry import random_perspective
from torch_frame.vision.mixing import mixup_boxes, mosaic

__all__ = ["box_candidates", "mixup_boxes", "mosaic", "random_perspective"]

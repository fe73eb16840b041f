"""Import path of torch-frame 1.7; see `torch_frame.vision`."""

from torch_frame.vision.mixing import mixup

__all__ = ["mixup"]

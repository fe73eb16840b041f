"""Import path of torch-frame 1.7; see `torch_frame.tracking.bar`."""

from torch_frame.tracking.bar import ProgressBar

__all__ = ["ProgressBar"]

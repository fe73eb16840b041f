"""Import path of torch-frame 1.7; see `torch_frame.data.repeat`."""

from torch_frame.data.repeat import RepeatDataset

__all__ = ["RepeatDataset"]

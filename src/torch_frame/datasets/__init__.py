"""Import path of torch-frame 1.7; see `torch_frame.data`."""

from torch_frame.data.infinite import InfiniteDataLoader
from torch_frame.data.repeat import RepeatDataset

__all__ = ["InfiniteDataLoader", "RepeatDataset"]

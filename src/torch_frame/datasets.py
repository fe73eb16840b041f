"""Import path of torch-frame 1.7; see `torch_frame.data`."""

from torch_frame.data.repeat import RepeatDataset
from torch_frame.data.source import InfiniteDataLoader

__all__ = ["InfiniteDataLoader", "RepeatDataset"]

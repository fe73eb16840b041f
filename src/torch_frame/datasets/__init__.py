"""Import path of torch-frame 1.7; see `torch_frame.data`."""

from torch_frame.data.infinite import InfiniteDataLoader
from torch_frame.data.repeat import RepeatDataset
from torch_frame.datasets import dataloader_wrappers as dataloader_wrappers
from torch_frame.datasets import dataset_wrappers as dataset_wrappers

__all__ = ["InfiniteDataLoader", "RepeatDataset"]

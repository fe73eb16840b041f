"""Import path of torch-frame 1.7; see `torch_frame.data.infinite`."""

from torch_frame.data.infinite import InfiniteDataLoader

__all__ = ["InfiniteDataLoader"]

"""Import path of torch-frame 1.7; see `torch_frame.training.schedules`."""

from torch_frame.training.schedules import LRWarmupScheduler

__all__ = ["LRWarmupScheduler"]

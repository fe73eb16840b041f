"""Import path of torch-frame 1.7; see `torch_frame.training.ema`."""

from torch_frame.training.ema import EMA

__all__ = ["EMA"]

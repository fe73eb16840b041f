"""Import path of torch-frame 1.7; see `torch_frame.hooks.logger`."""

from torch_frame.hooks.logger import LoggerHook

__all__ = ["LoggerHook"]

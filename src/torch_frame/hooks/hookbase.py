"""Import path of torch-frame 1.7; see `torch_frame.hooks.base`."""

from torch_frame.hooks.base import HookBase

__all__ = ["HookBase"]

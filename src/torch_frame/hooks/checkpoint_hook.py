"""Import path of torch-frame 1.7; see `torch_frame.hooks.checkpoint`."""

from torch_frame.hooks.checkpoint import CheckpointerHook

__all__ = ["CheckpointerHook"]

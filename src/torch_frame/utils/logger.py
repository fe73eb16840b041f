"""Import path of torch-frame 1.7; see `torch_frame.tracking.console`."""

from torch_frame.tracking.console import setup_logger

__all__ = ["setup_logger"]

"""Import path of torch-frame 1.7; see `torch_frame.tracking.history`."""

from torch_frame.tracking.history import HistoryBuffer

__all__ = ["HistoryBuffer"]

"""Import path of torch-frame 1.7; see `torch_frame.distributed.comm`."""

from torch_frame.distributed.comm import get_rank, get_world_size, is_dist_avail_and_initialized

__all__ = ["get_rank", "get_world_size", "is_dist_avail_and_initialized"]

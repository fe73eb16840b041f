"""Which process this is, and how many there are."""

from __future__ import annotations

import torch.distributed as dist


def is_dist_avail_and_initialized() -> bool:
    """A process group is up."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Index of this process in the group; 0 without one."""
    return dist.get_rank() if is_dist_avail_and_initialized() else 0


def get_world_size() -> int:
    """Number of processes in the group; 1 without one."""
    return dist.get_world_size() if is_dist_avail_and_initialized() else 1


def is_main() -> bool:
    """This is the process that writes files and prints."""
    return get_rank() == 0

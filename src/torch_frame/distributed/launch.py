"""Which processes train together: the process group that is there, or the one that torchrun's environment describes."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping

import torch
import torch.distributed as dist

from torch_frame.distributed.comm import is_dist_avail_and_initialized

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def num_processes(environ: Mapping[str, str] = os.environ) -> int:
    """Processes of the group that is there, or that the environment describes; 1 without either.

    >>> num_processes({"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"})
    4
    """
    if is_dist_avail_and_initialized():
        return dist.get_world_size()
    return int(environ["WORLD_SIZE"]) if dist.is_available() and all(name in environ for name in _VARIABLES) else 1


def join_group() -> None:
    """Make the process group that torchrun's environment describes, if there is none yet; this process gets its GPU.

    At the process's end the group is left, the script's own too: a gloo group that still stands then may abort the process.

    Raises:
        ValueError: with neither a group nor that environment.
    """
    if is_dist_avail_and_initialized():
        atexit.register(_leave_group)
        return
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(
            f"There is no process group, and the environment has no {', '.join(missing)}. Start the script with "
            "`torchrun --nproc-per-node N script.py`, or call torch.distributed.init_process_group(...) first."
        )
    use_own_gpu()
    dist.init_process_group()  # gloo for tensors on the CPU, NCCL for those on GPUs
    atexit.register(_leave_group)


def use_own_gpu(environ: Mapping[str, str] = os.environ) -> None:
    """Make the GPU of this process's number the current one, so that "cuda" is another one on each rank of a machine."""
    local_rank = environ.get("LOCAL_RANK")
    if local_rank is not None and torch.cuda.is_available() and int(local_rank) < torch.cuda.device_count():
        torch.cuda.set_device(int(local_rank))


def _leave_group() -> None:
    if is_dist_avail_and_initialized():
        dist.destroy_process_group()

"""The most memory that a run has held on its device."""

from __future__ import annotations

import sys

import torch


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most bytes that this process's tensors have held at once on an accelerator, since it began or since
    `reset_peak_memory`.

    None for the CPU, and for devices whose allocator does not count (MPS): only the accelerators of `torch.accelerator` do.

    >>> peak_memory_bytes(torch.device("cpu")) is None
    True
    """
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != device.type:
        return None
    try:
        return int(torch.accelerator.max_memory_allocated(device))
    except (RuntimeError, NotImplementedError):
        return None


def reset_peak_memory(device: torch.device) -> None:
    """Count the peak from what is held now on; nothing on devices that do not count."""
    if peak_memory_bytes(device) is not None:
        torch.accelerator.reset_peak_memory_stats(device)


def peak_resident_bytes() -> int | None:
    """The most memory that this process has held; None on Windows, which Python's standard library cannot ask."""
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

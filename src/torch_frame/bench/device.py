"""Which device is measured, and what it is called."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from torch_frame.errors import SettingError


def device_to_measure(index: int | None = None) -> torch.device:
    """The accelerator that torch has, or the CPU if there is none.

    Args:
        index: of the accelerator; None: the current one.

    Raises:
        SettingError: for an index that no device has, or that is none.
    """
    if index is not None and not hasattr(index, "__index__"):
        raise SettingError(f"gpu_id is {index!r}; it has to be a whole number, or None for the current device.")
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    num_devices = torch.accelerator.device_count()
    index = torch.accelerator.current_device_index() if index is None else index
    if not 0 <= index < num_devices:
        raise SettingError(f"gpu_id is {index}, but there are {num_devices} {kind.type} devices; the first one is 0.")
    return torch.device(kind.type, index)


def name_of(device: torch.device) -> str:
    """What the maker calls the device."""
    if device.type == "cpu":
        return _cpu_name()
    try:
        return str(torch.get_device_module(device).get_device_name(device))
    except (AttributeError, RuntimeError):
        return device.type


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name} (CPU, {threads} thread{'s' * (threads > 1)})"

"""What a run runs on, and two small things that 1.7 had beside it."""

import importlib.metadata
import os
import sys
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_OPENCV_NAMES = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")


def _version(*names: str) -> str | None:
    """The version of the first of these distributions that is installed; nothing is imported."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _gpus() -> dict[str, str]:
    """`{"GPU 0,1": "NVIDIA H100"}`: devices of one kind share a row."""
    devices = defaultdict(list)
    for index in range(torch.cuda.device_count()):
        devices[torch.cuda.get_device_name(index)].append(str(index))
    return {f"GPU {','.join(indices)}": name for name, indices in devices.items()}


def collect_env() -> str:
    """Describes what this process runs on: platform, Python, packages, GPUs, and how torch was built.

    Returns:
        Aligned lines, then the output of `torch.__config__.show()`.

    >>> "PyTorch" in collect_env()
    True
    """
    is_cuda_available = torch.cuda.is_available()
    rows: dict[str, str | None] = {
        "sys.platform": sys.platform,
        "Python": sys.version.replace("\n", ""),
        "Numpy": np.__version__,
        "CUDA available": str(is_cuda_available),
        **(_gpus() if is_cuda_available else {}),
        "PyTorch": torch.__version__,
        "TorchVision": _version("torchvision"),
        "OpenCV": _version(*_OPENCV_NAMES),
    }
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {value}" for name, value in rows.items() if value is not None]
    return "\n".join(lines) + "\n" + torch.__config__.show()


def _cell(value: Any) -> str:
    text = f"{value:.3f}" if isinstance(value, float | np.floating) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def create_small_table(small_dict: Mapping[str, Any]) -> str:
    """Draws a dict as a Markdown table of one row, its keys as the head.

    Args:
        small_dict: a few items; floats are shown with three decimals.

    Returns:
        The table; an empty string for an empty dict.

    >>> print(create_small_table({"map": 0.41237, "epoch": 3}))
    |  map  | epoch |
    |:-----:|:-----:|
    | 0.412 |   3   |
    """
    if not small_dict:
        return ""
    columns = [(_cell(key), _cell(value)) for key, value in small_dict.items()]
    widths = [max(3, len(head), len(value)) for head, value in columns]
    heads, values = zip(*columns, strict=True)
    rules = [f":{'-' * width}:" for width in widths]
    return "\n".join((_row(heads, widths), f"|{'|'.join(rules)}|", _row(values, widths)))


def _row(cells: tuple[str, ...], widths: list[int]) -> str:
    return "| " + " | ".join(f"{cell:^{width}}" for cell, width in zip(cells, widths, strict=True)) + " |"


def symlink(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    overwrite: bool = True,
    *,
    target_is_directory: bool = False,
    dir_fd: int | None = None,
) -> None:
    """Makes the link `dst` that points to `src`.

    Args:
        src: what the link points to; a relative path counts from the link's own folder.
        dst: where the link is put.
        overwrite: replaces a file or link that is there, in one step: at every moment one of the two is in place.
        target_is_directory: Windows wants to know where `src` is a folder that does not exist yet.
        dir_fd: an open folder that a relative `dst` counts from.

    Raises:
        FileExistsError: `dst` exists and `overwrite` is False.
    """
    if not overwrite:
        os.symlink(src, dst, target_is_directory=target_is_directory, dir_fd=dir_fd)
        return
    temporary = f"{os.fspath(dst)}.{os.getpid()}.tmp"
    os.symlink(src, temporary, target_is_directory=target_is_directory, dir_fd=dir_fd)
    try:
        os.replace(temporary, dst, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except BaseException:
        os.remove(temporary, dir_fd=dir_fd)
        raise

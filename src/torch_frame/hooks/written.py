"""What a trainer's own `save_checkpoint` writes for a name: files and folders, which go by the hook's rule as our files do."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Marks = Mapping[str, Any]
"""name in the folder -> what shows that it has been written to."""


def is_overridden(trainer: Any) -> bool:
    """`save_checkpoint` is the script's."""
    function = trainer.__class__.save_checkpoint
    return not f"{getattr(function, '__module__', '')}.".startswith("torch_frame.")


def watch(folder: str, file_name: str) -> Callable[[], list[str]]:
    """Look at a folder before a save; what is returned says after it what the save has written there.

    Args:
        folder: of the checkpoints.
        file_name: that is asked for, such as "epoch_3.pth". Only entries that are named by it count: "epoch_3",
            "epoch_3.pth", "epoch_3.safetensors", "epoch_3-ema", but not "epoch_30" or "notes". Others are never touched.
    """
    before = _marks(folder, file_name)

    def written() -> list[str]:
        return [name for name, mark in _marks(folder, file_name).items() if before.get(name) != mark]

    return written


def paths(folder: str, file_name: str, found: Sequence[str] | None) -> list[str]:
    """What to remove with a file that is not needed any more; folders end with a separator, as the trainer wants them.

    Args:
        found: what was written for it; None: only the file itself. A folder that has its name is not known to be the save's then.
    """
    if found is None:
        return [os.path.join(folder, file_name)]
    there = [os.path.join(folder, name) for name in found]
    return [os.path.join(path, "") if os.path.isdir(path) and not os.path.islink(path) else path for path in there]


def _marks(folder: str, file_name: str) -> Marks:
    stem = os.path.splitext(file_name)[0]
    try:
        with os.scandir(folder) as entries:
            named = [entry for entry in entries if _is_named_by(entry.name, stem)]
            return {entry.name: _mark(entry) for entry in named}
    except OSError:  # it is not there yet
        return {}


def _is_named_by(name: str, stem: str) -> bool:
    return name.startswith(stem) and not name[len(stem) : len(stem) + 1].isalnum()


def _mark(entry: os.DirEntry[str]) -> Any:
    if not entry.is_dir(follow_symlinks=False):
        return _times_of(entry.path)
    inside = [os.path.join(root, name) for root, _, names in os.walk(entry.path) for name in names]
    return _times_of(entry.path), sorted((path, _times_of(path)) for path in inside)


def _times_of(path: str) -> tuple[int, int, int]:
    try:
        found = os.lstat(path)
    except OSError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_size, found.st_ino

"""A run's files: its work dir, and the saves that have been asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

from torch_frame.tracking.work_dir import claim_work_dir, find_checkpoint, get_workspace


class WorkDir:
    """Where a run's files go: proposed when the trainer is made, a folder of this run alone when training begins.

    Args:
        work_dir: as the user gave it.
        create_new_dir: what to do where it exists; see `Trainer`.

    Attributes:
        path: final once `claim` has been called.
    """

    def __init__(self, work_dir: str | os.PathLike[str], create_new_dir: str | None) -> None:
        self.path = get_workspace(work_dir, create_new_dir)
        self._given = os.fspath(work_dir)
        self._create_new_dir = create_new_dir
        self._claimed = False

    def claim(self) -> None:
        """Make the folder; under another name where somebody has taken the proposed one in the meantime."""
        if not self._claimed:
            base = self.path if self._create_new_dir is None else self._given
            self.path = claim_work_dir(base, self._create_new_dir)
            self._claimed = True

    def find(self, checkpoint: str | os.PathLike[str]) -> str:
        """The checkpoint's place: as given, in this work dir, or in the newest sibling."""
        return find_checkpoint(os.fspath(checkpoint), self._given)

    def move_to(self, checkpoint_path: str) -> None:
        """Go on in the work dir that a checkpoint lies in, known from the file's own place."""
        folder = os.path.dirname(os.path.abspath(checkpoint_path))
        if os.path.basename(folder) == "checkpoints":
            self.path = os.path.dirname(folder)
            self._create_new_dir = None
            self._claimed = False


class SaveRequest(NamedTuple):
    """A file that is to be written at the next safe point."""

    file_name: str
    save_single_model: bool
    then_remove: list[str]
    """Files that are not needed any more once this one is written."""


class SaveRequests:
    """The saves that hooks have asked for since the last safe point; a file asked for twice is written once."""

    def __init__(self) -> None:
        self._requests: dict[str, SaveRequest] = {}

    def __bool__(self) -> bool:
        return bool(self._requests)

    def add(self, file_name: str, save_single_model: bool, then_remove: Iterable[str]) -> None:
        before = self._requests.get(file_name)
        outdated = [] if before is None else before.then_remove
        self._requests[file_name] = SaveRequest(file_name, save_single_model, [*outdated, *then_remove])

    def take(self) -> list[SaveRequest]:
        """All requests, which are forgotten then; full states last, so that they speak of files that are there."""
        requests, self._requests = self._requests, {}
        return sorted(requests.values(), key=lambda request: not request.save_single_model)

"""The saves that have been asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


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

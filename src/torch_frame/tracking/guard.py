"""A writer that ends no run: what goes wrong in it is told once."""

from __future__ import annotations

import errno
import logging
from typing import Any

from torch_frame.tracking.writers import RunInfo, Writer

_logger = logging.getLogger("torch_frame")
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS}
_MOST_FAILURES = 3
"""So many in a row, and a writer is given up: a server that does not answer would slow the run each time."""


class GuardedWriter:
    """Calls a writer's methods; an error in one of them is told, and the run goes on.

    A full disk is tried again at each log point; anything else three times in a row.

    Args:
        writer: of the user, or one of ours.
    """

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.name = type(writer).__name__
        self._failures = 0
        self._told: set[str] = set()
        self._given_up = False

    def begin(self, run: RunInfo, saved: Any = None) -> None:
        """Restore the writer's state, and begin. Raises what the writer raises."""
        if saved is not None and hasattr(self.writer, "load_state_dict"):
            self.writer.load_state_dict(saved)
        if hasattr(self.writer, "begin"):
            self.writer.begin(run)

    def call(self, method: str, *args: Any) -> Any:
        """Call a method, if the writer has it; None after an error."""
        function = getattr(self.writer, method, None)
        if function is None or (self._given_up and method != "close"):
            return None
        try:
            result = function(*args)
        except Exception as error:
            self._tell(method, error)
            return None
        self._failures = 0
        return result

    def _tell(self, method: str, error: Exception) -> None:
        on_disk = isinstance(error, OSError) and error.errno in _OF_THE_DISK
        self._failures += 1
        self._given_up = not on_disk and self._failures >= _MOST_FAILURES
        what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if what not in self._told or self._given_up:
            self._told.add(what)
            then = (
                "It is given up; the run goes on." if self._given_up else "The run goes on without what it was given."
            )
            _logger.warning("%s.%s failed (%s). %s", self.name, method, what, then)

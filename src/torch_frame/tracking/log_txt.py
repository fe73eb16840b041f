"""log.txt on a disk that may be full."""

from __future__ import annotations

import contextlib
import logging
import sys


class LogTxt(logging.FileHandler):
    """A file of records. One that cannot be written does not end the run: the other handlers say so once, and the next is tried.

    Args:
        path: of the file; records are appended.
        may_fail: one that cannot be opened is tried again, and told, at the first record, and does not end the run either.
    """

    def __init__(self, path: str, *, may_fail: bool = False) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace", delay=True)
        self._failure: OSError | None = None
        try:
            self.stream = self._open()
        except OSError:
            if not may_fail:
                raise

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; a record that fits no format is the caller's mistake, which `logging` shows."""
        told = self._failure
        try:
            super().emit(record)
        except OSError as error:  # it cannot be opened
            self._failure = error
        if self._failure is not None and told is None:
            text = "%s cannot be written, and the run goes on without: %s."
            logging.getLogger("torch_frame").warning(text, self.baseFilename, self._failure)

    def handleError(self, record: logging.LogRecord) -> None:  # logging's name
        """Called by `logging` inside its handling of an error; it would print a traceback for each record."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._failure = error
        else:
            super().handleError(record)

    def flush(self) -> None:
        """Called by `emit`, and when `logging` shuts down."""
        if self.stream is not None:
            self.stream.flush()

    def close(self) -> None:
        """Close the file; what a full disk has not taken is lost."""
        with contextlib.suppress(OSError):
            super().close()

"""Work that goes on beside the training: one piece at a time, none of it dropped, no failure unseen."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs jobs in a thread, one at a time; who brings the next one waits for the one before.

    Args:
        on_failure: called in the thread where a job has failed, so that the trainer looks at its next safe point.
    """

    def __init__(self, on_failure: Callable[[], None]) -> None:
        self._on_failure = on_failure
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._cancelled = False

    @property
    def busy(self) -> bool:
        """A job is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Callable[[], None]) -> None:
        """Wait for the job before, then begin this one and return.

        Raises:
            BaseException: what the job before failed with; this one is not begun then.
        """
        self.wait()
        self._cancelled = False
        self._thread = threading.Thread(target=self._run, args=(job,), name="torch_frame.checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is under way.

        Raises:
            BaseException: what the job failed with, once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_failure()

    def cancel(self) -> None:
        """Ask the job under way to give up soon; it looks at `is_cancelled`."""
        self._cancelled = True

    def is_cancelled(self) -> bool:
        return self._cancelled

    def raise_failure(self) -> None:
        """Raise what a job has failed with, if one has; don't wait."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error
            self._on_failure()

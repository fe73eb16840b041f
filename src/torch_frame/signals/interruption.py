"""Where the main thread may be interrupted: in a wait for data, and nowhere else."""

from __future__ import annotations


class StopRequested(BaseException):
    """The run is to end here, with its state as it is. Not an Exception: no `except Exception` is to catch it."""


class Interruption:
    """Three flags. When all are set `StopRequested` is raised: in the signal's handler, or where the last one of them is set.

    Attributes:
        allowed: set by the loop while it asks for a batch: the run may end here, for no window is open.
        here: set by the code that loads, around a user's dataset and collate function and around torch's wait for workers. All
            else (random numbers that are exchanged, samplers, workers that are started) would be half done.
        came: a signal has come.
    """

    allowed = here = came = False

    def reset(self) -> None:
        """No flag is set."""
        self.allowed = self.here = self.came = False

    def begin(self) -> None:
        """What follows may be interrupted; `here = False` ends it, after an error too."""
        self.here = True
        if self.came:
            self.end_if_wanted()

    def end_if_wanted(self) -> None:
        """Raise if all flags are set."""
        if self.came and self.here and self.allowed:
            self.here = False
            raise StopRequested


INTERRUPTION = Interruption()
"""The process's: signals are the process's, and their handlers run in its main thread."""

"""How long a step takes, and how long its batch was waited for."""

from __future__ import annotations

from time import perf_counter


class StepTimes:
    """The times of the step under way, in seconds, from the moment its batch was asked for.

    Attributes:
        data_s: how long the batch was waited for.
    """

    def __init__(self) -> None:
        self._asked = perf_counter()
        self.data_s = 0.0

    def ask(self) -> None:
        """A batch is asked for."""
        self._asked = perf_counter()

    def receive(self) -> None:
        """The batch has come, and is on its device."""
        self.data_s = perf_counter() - self._asked

    @property
    def step_s(self) -> float:
        """Since the batch was asked for."""
        return perf_counter() - self._asked

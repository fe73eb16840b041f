"""How long a step takes, how long its batch was waited for, and, if a hook asks for it, where all of the run's time goes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from time import perf_counter
from typing import NamedTuple

_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


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

    def end_asking(self) -> None:
        """No batch is waited for any more."""

    def saving(self) -> AbstractContextManager[None]:
        """Around a save, and around the wait for one."""
        return _NOTHING

    @property
    def step_s(self) -> float:
        """Since the batch was asked for."""
        return perf_counter() - self._asked


class Parts(NamedTuple):
    """Seconds, by what they went to.

    Attributes:
        data: waiting for batches.
        step: all that is nothing else: forward, backward, update, the loop.
        hooks: in hooks, evaluations among it.
        save: saves, as far as the training waits for them.
    """

    data: float
    step: float
    hooks: float
    save: float

    @property
    def total(self) -> float:
        return sum(self)

    def since(self, earlier: Parts) -> Parts:
        """What has been added.

        >>> Parts(3, 5, 1, 1).since(Parts(1, 2, 1, 0))
        Parts(data=2, step=3, hooks=0, save=1)
        """
        return Parts(*(now - before for now, before in zip(self, earlier, strict=True)))


_DATA, _STEP, _SAVE = 0, 1, 2  # places in `TimeSplit._seconds`; hooks follow


class TimeSplit(StepTimes):
    """Splits all of a run's time: at every moment it goes to one of data, step, a hook, or save, so the parts make up the whole.

    A change from one to another reads the clock once and adds once: 0.1 us, about six times a step. A trainer without it has
    a plain `StepTimes`, and its stages hold the hooks' methods only.

    Args:
        now: returns seconds.
    """

    def __init__(self, now: Callable[[], float] = perf_counter) -> None:
        super().__init__()
        self._now = now
        self._names: list[str] = []  # of the hooks, in the order of their places
        self._seconds = [0.0] * 3
        self._place = _STEP
        self._since = now()

    def start(self) -> None:
        """Begin anew: the run begins."""
        self._seconds = [0.0] * len(self._seconds)
        self._since = self._now()

    # ------------------------------------------------------------ what the trainer tells

    def to(self, place: int) -> None:
        """From now on the time goes to this place."""
        now = self._now()
        self._seconds[self._place] += now - self._since
        self._place, self._since = place, now

    def ask(self) -> None:
        super().ask()
        self.to(_DATA)

    def receive(self) -> None:
        super().receive()
        self.to(_STEP)

    def end_asking(self) -> None:
        self.to(_STEP)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        before = self._place  # a hook may save there and then
        self.to(_SAVE)
        try:
            yield
        finally:
            self.to(before)

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Inside, a hook waits for the device: that time is the step's."""
        before = self._place
        self.to(_STEP)
        try:
            yield
        finally:
            self.to(before)

    def around(self, calls: Iterable[tuple[str, Callable[..., None]]]) -> list[Callable[..., None]]:
        """A stage's calls, with the time of each going to its hook; behind them it is the step's again.

        Args:
            calls: (name of the hook, its method).
        """
        timed: list[Callable[..., None]] = []
        for name, call in calls:
            timed += [partial(self.to, self._place_of(name)), call]
        return [*timed, partial(self.to, _STEP)] if timed else []

    def _place_of(self, name: str) -> int:
        """Hooks of one class share a place."""
        if name not in self._names:
            self._names.append(name)
            self._seconds.append(0.0)
        return 3 + self._names.index(name)

    # ------------------------------------------------------------ what has been found

    def parts(self) -> Parts:
        """The seconds since `start`."""
        self.to(self._place)
        data, step, save, *hooks = self._seconds
        return Parts(data, step, sum(hooks), save)

    def hooks(self) -> dict[str, float]:
        """name -> seconds since `start`, the slowest first."""
        seconds = dict(zip(self._names, self._seconds[3:], strict=True))
        return dict(sorted(seconds.items(), key=lambda item: -item[1]))

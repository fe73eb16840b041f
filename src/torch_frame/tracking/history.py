"""The last values of one name: a window, and the sums over the epoch and the run."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from torch_frame.types import Number


class HistoryBuffer:
    """The last values of one name, their sum over the epoch and over the run; comparisons are of the window's mean.

    Args:
        window_size: how many values `avg` is over.

    >>> history = HistoryBuffer(window_size=2)
    >>> for value in (1.0, 2.0, 4.0):
    ...     history.update(value)
    >>> history.latest, history.avg, history.global_sum
    (4.0, 3.0, 7.0)
    """

    def __init__(self, window_size: int = 20) -> None:
        self._history: deque[float] = deque(maxlen=window_size)
        self._count = 0
        self._sum = 0.0
        self._epoch_count = 0
        self._epoch_sum = 0.0
        self._epoch_is_over = False  # the sums are the last epoch's until a value of the next one comes
        self.read_pending: weakref.WeakMethod[Callable[[], None]] | None = None
        """Brings values that have been recorded and not read yet: of a storage."""

    def update(self, value: Tensor | Number) -> None:
        """Add a value; where the window is full its oldest one leaves."""
        self.extend([float(value.detach() if isinstance(value, Tensor) else value)])

    def extend(self, values: Sequence[float]) -> None:
        """Add several values, in their order."""
        if self._epoch_is_over and values:
            self._epoch_is_over, self._epoch_count, self._epoch_sum = False, 0, 0.0
        self._history.extend(values)
        self._count += len(values)
        self._epoch_count += len(values)
        for value in values:  # one by one: the same sum whenever the values are read
            self._sum += value
            self._epoch_sum += value

    def read(self) -> Collection[float]:
        """The window's values, those included that have been recorded and not read yet."""
        flush = None if self.read_pending is None else self.read_pending()
        if flush is not None:
            flush()
        return self._history

    def take_back_latest(self) -> None:
        """The latest value leaves: another one takes its place."""
        value = self._history.pop()
        self._count -= 1
        self._sum = self._sum - value if self._count else 0.0
        if self._epoch_count:
            self._epoch_count -= 1
            self._epoch_sum = self._epoch_sum - value if self._epoch_count else 0.0

    def end_epoch(self) -> None:
        """Values that come are of another epoch."""
        self._epoch_is_over = True

    @property
    def is_of_this_epoch(self) -> bool:
        """A value has come since the epoch under way began."""
        return bool(self.read()) and not self._epoch_is_over

    @property
    def num_in_epoch(self) -> int:
        """Values that `epoch_avg` is over."""
        self.read()
        return self._epoch_count

    @property
    def latest(self) -> float:
        self.read()
        return self._history[-1]

    @property
    def avg(self) -> float:
        """Mean of the window; NaN if there is no value, or if the window holds both infinities."""
        return _mean(self.read())

    @property
    def epoch_avg(self) -> float:
        """Mean of the values of the epoch under way, or of the last epoch that had one; NaN if there is no value."""
        self.read()
        return self._epoch_sum / self._epoch_count if self._epoch_count else math.nan

    @property
    def global_avg(self) -> float:
        """Mean of all values since the run began; NaN if there is none."""
        self.read()
        return self._sum / self._count if self._count else math.nan

    @property
    def global_sum(self) -> float:
        self.read()
        return self._sum

    def state_dict(self) -> dict[str, Any]:
        return {
            "window": list(self._history),
            "window_size": self._history.maxlen,
            "count": self._count,
            "sum": self._sum,
            "epoch_count": self._epoch_count,
            "epoch_sum": self._epoch_sum,
            "epoch_is_over": self._epoch_is_over,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of a new buffer, with a window of that size."""
        self._history.extend(state["window"])
        self._count, self._sum = state["count"], state["sum"]
        self._epoch_count, self._epoch_sum = state.get("epoch_count", 0), state.get("epoch_sum", 0.0)
        self._epoch_is_over = state.get("epoch_is_over", False)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the values, without the storage that they come from."""
        self.read()
        return {**vars(self), "read_pending": None}

    def __float__(self) -> float:
        return self.avg

    def __lt__(self, other: Any) -> bool:
        return self.avg < float(other)

    def __le__(self, other: Any) -> bool:
        return self.avg <= float(other)

    def __gt__(self, other: Any) -> bool:
        return self.avg > float(other)

    def __ge__(self, other: Any) -> bool:
        return self.avg >= float(other)

    def __str__(self) -> str:
        return str(round(self.avg, 4))

    def __repr__(self) -> str:
        return f"HistoryBuffer(avg={self}, window={self._history.maxlen}, count={self._count})"


def _mean(values: Collection[float]) -> float:
    if not values:
        return math.nan
    try:
        return math.fsum(values) / len(values)
    except ValueError:  # both infinities
        return math.nan
    except OverflowError:  # near float64's limit
        return math.fsum(value / len(values) for value in values)

"""The last values of one name: a window, and the sums over the epoch and the run."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from torch_frame.types import Number

Trained = Literal["all", "part", "none"]
"""What a batch was trained by: all optimizers that it had losses for; some, the others skipped; none, its update was skipped."""


class HistoryBuffer:
    """The last values of one name, their sum over the epoch and over the run; comparisons are of the window's mean.

    NaN is no number: it is in `latest` and makes `avg` NaN, and the sums leave it out. The epoch's sum leaves out the values of
    batches that were not trained on too.

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
        self._run = Sum()
        self._epoch = Sum()
        self._epoch_skipped = 0  # values of batches that were not trained on
        self._held: list[float] = []  # of a window under way, whose update may be skipped
        self._epoch_is_over = False  # the sums are the last epoch's until a value of the next one comes
        self.read_pending: weakref.WeakMethod[Callable[[], None]] | None = None
        """Brings values that have been recorded and not read yet: of a storage."""

    def update(self, value: Tensor | Number) -> None:
        """Add a value; where the window is full its oldest one leaves."""
        self.extend([float(value.detach() if isinstance(value, Tensor) else value)])

    def extend(self, values: Sequence[float], trained: Sequence[Trained | None] | None = None) -> None:
        """Add several values, in their order.

        Args:
            trained: of each value's batch; None in it: its window is under way, and `settle` will say. None: "all" of each.
        """
        if self._epoch_is_over and values:
            self._epoch_is_over, self._epoch, self._epoch_skipped = False, Sum(), 0
        self._history.extend(values)
        if trained is None:
            _add_to_both(self._run, self._epoch, values)
            return
        self._run.add(values)
        for value, by in zip(values, trained, strict=True):
            if by is None:
                self._held.append(value)
            else:
                self._add_to_epoch([value], by)

    def settle(self, trained: Trained) -> None:
        """The window under way has ended."""
        held, self._held = self._held, []
        self._add_to_epoch(held, trained)

    def _add_to_epoch(self, values: Sequence[float], trained: Trained) -> None:
        kept = values if trained == "all" else [v for v in values if trained == "part" and math.isfinite(v)]
        self._epoch.add(kept)
        self._epoch_skipped += len(values) - len(kept)

    def read(self) -> Collection[float]:
        """The window's values, those included that have been recorded and not read yet."""
        flush = None if self.read_pending is None else self.read_pending()
        if flush is not None:
            flush()
        return self._history

    def take_back_latest(self) -> None:
        """The latest value leaves: another one takes its place."""
        value = self._history.pop()
        self._run.take_back(value)
        self._epoch.take_back(value)

    def end_epoch(self) -> None:
        """Values that come are of another epoch."""
        self._epoch_is_over = True

    @property
    def is_of_this_epoch(self) -> bool:
        """A value has come since the epoch under way began."""
        return bool(self.read()) and not self._epoch_is_over

    @property
    def epoch_counts(self) -> tuple[int, int, int]:
        """Values of the epoch: those that `epoch_avg` is over, those of batches that were not trained on, other NaNs."""
        self.read()
        return self._with_held().count, self._epoch_skipped, self._with_held().num_nan

    def _with_held(self) -> Sum:
        """The epoch's sum as it is if the window under way makes its update."""
        if not self._held:
            return self._epoch
        whole = Sum(self._epoch.count, self._epoch.total, self._epoch.num_nan)
        whole.add(self._held)
        return whole

    @property
    def latest(self) -> float:
        self.read()
        return self._history[-1]

    @property
    def avg(self) -> float:
        """Mean of the window; NaN if there is no value, or if the window holds both infinities."""
        return _mean(self.read())

    @property
    def window_avg(self) -> float:
        """Mean of the window without NaN; NaN if it holds nothing else."""
        values = self.read()
        return _mean([value for value in values if not math.isnan(value)])

    @property
    def epoch_avg(self) -> float:
        """Mean over the epoch under way, or over the last epoch that had a value; NaN if there is none.

        Of the batches that were trained on, and without NaN.
        """
        self.read()
        return self._with_held().mean

    @property
    def global_avg(self) -> float:
        """Mean of all values since the run began, without NaN; NaN if there is none."""
        self.read()
        return self._run.mean

    @property
    def global_sum(self) -> float:
        self.read()
        return self._run.total

    def state_dict(self) -> dict[str, Any]:
        return {
            "window": list(self._history),
            "window_size": self._history.maxlen,
            "count": self._run.count,
            "sum": self._run.total,
            "epoch_count": self._epoch.count,
            "epoch_sum": self._epoch.total,
            "epoch_nan": self._epoch.num_nan,
            "epoch_skipped": self._epoch_skipped,
            "epoch_is_over": self._epoch_is_over,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of a new buffer, with a window of that size."""
        self._history.extend(state["window"])
        self._run = Sum(state["count"], state["sum"])
        self._epoch = Sum(state.get("epoch_count", 0), state.get("epoch_sum", 0.0), state.get("epoch_nan", 0))
        self._epoch_skipped = state.get("epoch_skipped", 0)
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
        return f"HistoryBuffer(avg={self}, window={self._history.maxlen}, count={self._run.count})"


class Sum:
    """Of values that are numbers, added one by one: the same whenever they are read.

    Attributes:
        count: how many there are.
        total: their sum.
        num_nan: values that were NaN.
    """

    __slots__ = ("count", "num_nan", "total")

    def __init__(self, count: int = 0, total: float = 0.0, num_nan: int = 0) -> None:
        self.count = count
        self.total = total
        self.num_nan = num_nan

    def add(self, values: Sequence[float]) -> None:
        for value in values:
            if math.isnan(value):
                self.num_nan += 1
            else:
                self.count += 1
                self.total += value

    def take_back(self, value: float) -> None:
        if math.isnan(value):
            self.num_nan = max(self.num_nan - 1, 0)
        elif self.count:
            self.count -= 1
            self.total = self.total - value if self.count else 0.0

    @property
    def mean(self) -> float:
        """NaN if there is no number."""
        return self.total / self.count if self.count else math.nan


def _add_to_both(first: Sum, second: Sum, values: Sequence[float]) -> None:
    """In one pass: this is done for each value of each step."""
    total_1, total_2 = first.total, second.total
    for value in values:  # one by one: the same sum whenever the values are read
        total_1 += value
        total_2 += value
    if math.isnan(total_1) or math.isnan(total_2):
        first.add(values)
        second.add(values)
        return
    first.total, second.total = total_1, total_2
    first.count += len(values)
    second.count += len(values)


def _mean(values: Collection[float]) -> float:
    if not values:
        return math.nan
    try:
        return math.fsum(values) / len(values)
    except ValueError:  # both infinities
        return math.nan
    except OverflowError:  # near float64's limit
        return math.fsum(value / len(values) for value in values)

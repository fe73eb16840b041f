"""The values of a run as it goes: a history for each name, read from the device only when they are asked for."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_frame.errors import SettingError
from torch_frame.scalars import number_or_copy
from torch_frame.tracking.history import HistoryBuffer, Trained
from torch_frame.types import Number

ROWS_KEPT_UNREAD = 50
"""Rows of device values are read in one transfer when so many are waiting, or when one is asked for."""


class MetricStorage(dict[str, HistoryBuffer]):
    """The named values of a run: name -> HistoryBuffer.

    What is given is its value at that moment. Tensors of a device are copied there and read in one transfer for many rows, so
    recording a step costs no wait for the device.

    Args:
        default_win_size: window of a name that does not ask for its own.

    >>> storage = MetricStorage()
    >>> storage.update(iter=0, loss=torch.tensor(0.25))
    >>> storage.update(iter=1, loss=0.75)
    >>> storage.update(iter=1, lr=0.1, smooth=False)
    >>> storage.values_maybe_smooth
    {'loss': (1, 0.5), 'lr': (1, 0.1)}
    """

    def __init__(self, default_win_size: int = 20) -> None:
        super().__init__()
        self._default_win_size = default_win_size
        self._smooth: dict[str, bool] = {}
        self._windowed: set[str] = set()  # names that asked for a window of their own
        self._latest_iter: dict[str, int] = {}
        self._pending: list[Mapping[str, Tensor | Number]] = []
        self._step_names: tuple[str, ...] = ()
        self._step_rows: list[tuple[Any, ...]] = []  # (iteration, a value for each name, None where the step had none)
        self._declared: dict[str, bool] = {}
        self._restored: set[str] = set()  # names whose latest value is from a checkpoint
        self.on_read: Callable[[Mapping[str, tuple[list[int], list[float]]]], None] | None = None
        """Called with name -> (iters, values) when values of training steps have been read from the device; may raise."""
        self.before_record: Callable[[int], None] | None = None
        """Called with the iteration before its values are recorded: of a run that may skip updates, to `hold` and `settle`."""
        self._held_from: int | None = (
            None  # the iteration that the window under way begins with, if its update may be skipped
        )
        self._skipped: dict[int, Trained] = {}  # iterations whose values are not read yet
        self.renamed: Callable[[str], str] | None = None
        """The name under which a value that `update` is given is recorded: of a run, whose own names nothing else has."""

    def update(  # type: ignore[override]  # 1.7's signature: this dict is filled through it
        self,
        iter: int | None = None,
        smooth: bool = True,
        window_size: int | None = None,
        **kwargs: Tensor | Number,
    ) -> None:
        """Add a value for each name, as it is now.

        Args:
            iter: when the values are of, growing for each name; None counts from 0.
            smooth: whether readers want a mean or the latest value. The same in each call for one name.
            window_size: the window of names seen for the first time; `value` is then its mean.
            kwargs: numbers (numpy's too), or tensors and arrays of one element.

        Raises:
            TypeError: naming a value that is no number; nothing is added then.
            ValueError: where a name gets two values for one `iter`, or another `smooth` than before.
        """
        kwargs = {name: number_or_copy(value, name) for name, value in kwargs.items()}
        if self.renamed is not None:
            kwargs = {self.renamed(name): value for name, value in kwargs.items()}
        for name in kwargs:
            self._admit(name, smooth, window_size)
            if name in self._restored:
                self._restored.remove(name)
                self.flush()  # a step may have recorded a later one under this name
                if iter == self._latest_iter[name]:  # a run that was saved in after_epoch goes through it again
                    self[name].take_back_latest()
                    self._latest_iter[name] = -1
            self._latest_iter[name] = self._next_iter(name, iter)
        self._pending.append(kwargs)
        if len(self._pending) >= ROWS_KEPT_UNREAD:
            self.flush()

    def record(self, iter: int, values: Mapping[str, Tensor | Number]) -> None:
        """Add a training step's values, smoothed unless declared otherwise, without reading them: the fast way in.

        Args:
            iter: index of the batch in the run.
            values: one-element tensors and numbers; kept until they are read.
        """
        if self.before_record is not None:
            self.before_record(iter)
        if tuple(values) != self._step_names:
            values = self._aligned(values)
        self._step_rows.append((iter, *values.values()))
        if len(self._step_rows) >= ROWS_KEPT_UNREAD:
            self.flush()

    def _aligned(self, values: Mapping[str, Tensor | Number]) -> Mapping[str, Any]:
        """A step's values in the order of the rows, with None for names that other steps had; new names are in all later rows."""
        for name in [name for name in values if name not in self._step_names]:
            self.flush()  # what hooks have logged under such a name comes first
            self._admit(name, self._smooth.get(name, True), None)
            self._step_names += (name,)
        return {**dict.fromkeys(self._step_names), **values}

    def hold(self, iter: int) -> None:
        """The values of this iteration are in the epoch's means only if its window, which is under way, makes its update."""
        if self._held_from is None:
            self._held_from = iter

    def settle(self, iter: int, trained: Trained) -> None:
        """A window ends with this iteration, before its values are recorded."""
        first = iter if self._held_from is None else self._held_from
        if self._held_from is not None:
            self._held_from = None
            for buffer in self.values():
                buffer.settle(trained)
        if trained != "all":
            self._skipped |= dict.fromkeys(range(first, iter + 1), trained)

    def flush(self) -> None:
        """Read what has been recorded, in one transfer."""
        if self._pending:
            self._flush_updates()
        if self._step_rows:
            self._flush_steps()

    def _flush_updates(self) -> None:
        rows, self._pending = self._pending, []
        columns: dict[str, list[Any]] = {}
        for row in rows:
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
        for name, values in _read_columns(columns).items():
            self[name].extend(values)

    def _flush_steps(self) -> None:
        iters, *values_of = map(list, zip(*self._step_rows, strict=True))
        self._step_rows = []
        trained = self._trained_by(iters)
        rows = zip(self._step_names, values_of, strict=True)
        unread = {name: _Column(*_without_none(iters, values)) for name, values in rows}
        columns = _read_columns({name: column.values for name, column in unread.items() if column.iters})
        for name, values in columns.items():
            self[name].extend(values, None if trained is None else [trained[iter] for iter in unread[name].iters])
            self._latest_iter[name] = unread[name].iters[-1]
        if self.on_read is not None:
            self.on_read({name: (unread[name].iters, values) for name, values in columns.items()})

    def _trained_by(self, iters: Sequence[int]) -> dict[int, Trained | None] | None:
        """Of each of these iterations, whether its batch was trained on; None: all were."""
        if not self._skipped and self._held_from is None:
            return None
        found: dict[int, Trained | None] = {iter: self._skipped.pop(iter, "all") for iter in dict.fromkeys(iters)}
        held_from = math.inf if self._held_from is None else self._held_from
        return {iter: trained if iter < held_from else None for iter, trained in found.items()}

    def take_place_of(self, other: MetricStorage) -> None:
        """Record a run's values from now on, as the storage did that was the run's until now."""
        if other is self:
            return
        other.flush()
        for name, smooth in other._declared.items():
            self.declare(name, smooth=smooth)
        self.on_read, self.renamed = other.on_read, other.renamed
        other.on_read = other.renamed = other.before_record = None

    def begin_epoch(self) -> None:
        """From now on values are of a new epoch."""
        self.flush()
        for buffer in self.values():
            buffer.end_epoch()

    def value(self, name: str) -> float:
        """What a name is worth now: what decides which weights are best, when to stop, when a plateau is reached.

        The latest value if it was logged with `smooth=False`; the window's mean if it was logged with a `window_size`; else (the
        values of steps) the mean over the epoch under way, or over the last epoch that had a value. An epoch's mean is over the
        batches that were trained on. Means leave NaN out, and are NaN if there is nothing else.

        Raises:
            SettingError: listing the names there are, if this one is not among them.

        >>> storage = MetricStorage()
        >>> for step, loss in enumerate((3.0, 2.0, 1.0)):
        ...     storage.update(step, loss=loss)
        ...     storage.update(step, score=-loss, smooth=False)
        >>> storage.value("loss"), storage.value("score")
        (2.0, -1.0)
        """
        if name not in self:
            raise SettingError(
                f"There is no value {name!r}: nothing has been logged under this name; there are: "
                f"{', '.join(sorted(self)) or 'none'}."
            )
        buffer = self[name]
        if not self._smooth[name]:
            return buffer.latest if buffer.read() else math.nan
        return buffer.window_avg if name in self._windowed or not any(buffer.epoch_counts) else buffer.epoch_avg

    def shown(self, name: str) -> float:
        """For people, inside an epoch: the window's mean without NaN; the latest if it was logged with `smooth=False`."""
        return self[name].window_avg if self._smooth[name] else self.value(name)

    def left_out(self) -> dict[str, tuple[int, int, int]]:
        """Of names whose epoch's mean is not over all values: name -> (counted, of batches not trained on, other NaNs)."""
        means = [name for name in self if self._smooth[name] and name not in self._windowed]
        counts = {name: self[name].epoch_counts for name in means if self.is_of_this_epoch(name)}
        return {name: found for name, found in counts.items() if any(found[1:])}

    def is_of_this_epoch(self, name: str) -> bool:
        """The name has got a value since the epoch under way began."""
        return self[name].is_of_this_epoch

    def declare(self, name: str, *, smooth: bool) -> None:
        """Say how a name that `record` will bring is to be read."""
        self._declared[name] = smooth
        self._smooth.setdefault(name, smooth)

    def _admit(self, name: str, smooth: bool, window_size: int | None) -> None:
        if self._smooth.setdefault(name, smooth) != smooth:
            raise ValueError(
                f"Metric {name!r} was logged with smooth={self._smooth[name]} before and now with smooth={smooth}. "
                "Log it the same way each time, or under another name."
            )
        if name not in self:
            buffer = self[name] = HistoryBuffer(window_size or self._default_win_size)
            buffer.read_pending = weakref.WeakMethod(self.flush)
            self._latest_iter[name] = -1
            if window_size:
                self._windowed.add(name)

    def _next_iter(self, name: str, iter: int | None) -> int:
        if name in self._step_names:
            self.flush()
        latest = self._latest_iter[name]
        if iter is None:
            return latest + 1
        if iter <= latest:
            raise ValueError(
                f"Metric {name!r} already has a value for {latest}, and now came one for {iter}. "
                "Do two hooks, or a hook and the step, log the same name? Rename one."
            )
        return iter

    def updated_at(self, name: str) -> int | None:
        """When the latest value is of that `update` was given under a name, or None; reads nothing from the device."""
        return self._latest_iter.get(name)

    def latest_iters(self) -> dict[str, int]:
        """For each name, when its latest value is of."""
        self.flush()
        return dict(self._latest_iter)

    @property
    def values_maybe_smooth(self) -> dict[str, tuple[int, float]]:
        """For each name, (when its latest value is of, the window's mean or, where logged with smooth=False, the latest)."""
        self.flush()
        return {
            name: (self._latest_iter[name], buffer.avg if self._smooth[name] else buffer.latest)
            for name, buffer in self.items()
        }

    def state_dict(self) -> dict[str, Any]:
        self.flush()
        return {
            name: {
                **buffer.state_dict(),
                "smooth": self._smooth[name],
                "windowed": name in self._windowed,
                "latest_iter": self._latest_iter[name],
            }
            for name, buffer in self.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clear()
        self._pending, self._smooth, self._latest_iter = [], dict(self._declared), {}
        self._step_names, self._step_rows = (), []
        self._held_from, self._skipped = None, {}
        for name, saved in state.items():
            self._admit(name, saved["smooth"], saved["window_size"])
            self._latest_iter[name] = saved["latest_iter"]
            self[name].load_state_dict(saved)
        # older states do not say who asked for a window: those that have another one than the usual
        asked = {
            name: saved.get("windowed", saved["window_size"] != self._default_win_size) for name, saved in state.items()
        }
        self._windowed = {name for name, windowed in asked.items() if windowed}
        self.allow_repeats()

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles: the values as they are now; a copy does not follow the run."""
        return _storage_of, (self._default_win_size, dict(self._declared), self.state_dict())

    def allow_repeats(self) -> None:
        """From now on a value for a name's latest moment takes that one's place, once: a run goes through it again."""
        self.flush()
        self._restored = set(self)


def _storage_of(default_win_size: int, declared: dict[str, bool], state: dict[str, Any]) -> MetricStorage:
    storage = MetricStorage(default_win_size)
    for name, smooth in declared.items():
        storage.declare(name, smooth=smooth)
    storage.load_state_dict(state)
    storage._restored = set()
    return storage


class _Column(NamedTuple):
    """Values of one name that training steps have recorded and nobody has read, and of which iterations they are."""

    iters: list[int]
    values: list[Any]


def _without_none(iters: list[int], values: list[Any]) -> tuple[list[int], list[Any]]:
    if type(None) not in set(map(type, values)):
        return iters, values
    kept = [(iter, value) for iter, value in zip(iters, values, strict=True) if value is not None]
    return [iter for iter, _ in kept], [value for _, value in kept]


def _read_columns(columns: Mapping[str, list[Any]]) -> dict[str, list[float]]:
    """The values as floats; tensors are read in one transfer for each kind (device and dtype), whatever their number."""
    waiting: dict[tuple[torch.device, torch.dtype], list[tuple[list[Any], int, Tensor]]] = {}
    kinds = {name: set(map(type, column)) for name, column in columns.items()}
    for name, column in columns.items():
        if not kinds[name] <= {float, int}:
            for index, value in enumerate(column):
                if isinstance(value, Tensor):
                    waiting.setdefault((value.device, value.dtype), []).append((column, index, value))
    for places in waiting.values():
        numbers = torch.stack([value.detach().reshape(()) for _, _, value in places]).tolist()
        for (column, index, _), number in zip(places, numbers, strict=True):
            column[index] = number
    return {name: column if kinds[name] == {float} else list(map(float, column)) for name, column in columns.items()}

"""How long a run is: in epochs, in batches, or both; and where in an epoch it ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any, TypeVar

from torch_frame.errors import SettingError
from torch_frame.progress import Progress
from torch_frame.scalars import is_whole
from torch_frame.tracking.format import counted

T = TypeVar("T")
_logger = logging.getLogger("torch_frame")


class RunLength:
    """The end of a run: after `max_epochs` epochs or `max_iters` batches, whichever comes first.

    If `max_iters` is reached inside an epoch, the run is *cut* there: `after_epoch` runs, but the epoch is not counted, and a run
    that is continued with more goes on inside it.

    Args:
        max_epochs: None: as many as `max_iters` takes.
        max_iters: batches; None: as many as `max_epochs` takes.
        limit_batches: an epoch has at most so many batches: a dry run. None: all.
        progress: where the run stands.
        loader_len: gives the batches of the loader in use; None if it has no length.

    Attributes:
        max_epochs, limit_batches: as given; they may be set.
        own_max_iters: `max_iters` as given.
    """

    def __init__(
        self,
        max_epochs: int | None,
        max_iters: int | None,
        limit_batches: int | None,
        progress: Progress,
        loader_len: Callable[[], int | None],
    ) -> None:
        self.max_epochs, self.own_max_iters, self.limit_batches = max_epochs, max_iters, limit_batches
        self._progress = progress
        self._loader_len = loader_len

    def __setattr__(self, name: str, value: Any) -> None:
        # A whole number of NumPy's overflows where a count of batches no longer fits into its kind.
        super().__setattr__(name, int(value) if is_whole(value) else value)

    # ---------------------------------------------------------------- lengths

    @property
    def epoch_len(self) -> int | None:
        """Batches in an epoch; None if the loader has no length."""
        length = self._loader_len()
        return length if length is None or self.limit_batches is None else min(length, self.limit_batches)

    @property
    def max_iters(self) -> int | None:
        """Batches in the whole run, by whichever comes first; None if that is not known."""
        length = self.epoch_len
        by_epochs = None if length is None or self.max_epochs is None else length * self.max_epochs
        known = [count for count in (by_epochs, self.own_max_iters) if count is not None]
        return min(known, default=None)

    @max_iters.setter
    def max_iters(self, count: int | None) -> None:
        self.own_max_iters = count

    def updates_per_epoch(self, window: int, *, limited: bool = True) -> int | None:
        """Optimizer steps in an epoch; None if the loader has no length.

        Args:
            window: batches in an update.
            limited: as `limit_batches` makes them.
        """
        length = self.epoch_len if limited else self._loader_len()
        return None if length is None else -(-length // window)

    def num_updates(self, window: int, *, limited: bool = True) -> int | None:
        """Optimizer steps in the whole run; None if that is not known."""
        length = self.epoch_len if limited else self._loader_len()
        if length is None:
            return None if self.own_max_iters is None else -(-self.own_max_iters // window)
        if length == 0:
            return 0
        by_epochs = None if self.max_epochs is None else self.max_epochs * -(-length // window)
        if self.own_max_iters is None:
            return by_epochs
        epochs, rest = divmod(self.own_max_iters, length)
        by_iters = epochs * -(-length // window) + -(-rest // window)
        return by_iters if by_epochs is None else min(by_epochs, by_iters)

    @property
    def last_epoch(self) -> int | None:
        """Index of the last epoch, as far as `max_epochs` says."""
        return None if self.max_epochs is None else self.max_epochs - 1

    def check(self) -> None:
        """The lengths, which may have been set, are counts, and the run has an end."""
        check_lengths(self.max_epochs, self.own_max_iters, self.limit_batches)

    def epochs_left(self) -> int:
        """Epochs that are still to be begun, or gone on with; 1 if that is not known."""
        if self.is_over():
            return 0
        return 1 if self.max_epochs is None else self.max_epochs - self._progress.epoch

    # ---------------------------------------------------------------- where it ends

    def is_over(self) -> bool:
        """No epoch is begun or gone on with.

        A run that was cut inside an epoch is not over: its `after_epoch` may not have been reached, and runs again.
        """
        if self.max_epochs is not None and self._progress.epoch >= self.max_epochs:
            return True
        return self._iters_are_done() and not self._progress.is_inside_epoch

    def _iters_are_done(self) -> bool:
        return self.own_max_iters is not None and self._progress.iter >= self.own_max_iters

    def is_cut(self) -> bool:
        """The batches of the epoch under way end here because `max_iters` is reached, and not because there are no more."""
        return self._iters_are_done() and self._progress.inner_iter != self.epoch_len

    def is_last_epoch(self) -> bool:
        """The epoch under way is the last; of a loader without a length `max_iters` tells with the last batch only."""
        if self.max_epochs is not None and self._progress.current_epoch >= self.max_epochs - 1:
            return True
        if self.own_max_iters is None:
            return False
        done, length = self._progress, self.epoch_len
        return self._iters_are_done() or (
            length is not None and done.iter - done.inner_iter + length >= self.own_max_iters
        )

    @property
    def batches_in_epoch(self) -> int | None:
        """Of the epoch under way, as it will be trained; None if that is not known."""
        length = self.epoch_len
        if self.own_max_iters is None:
            return length
        left = max(self.own_max_iters - self._progress.iter + self._progress.inner_iter, 0)
        return left if length is None else min(left, length)

    def iters_left(self) -> int | None:
        """Batches that are still to be trained behind the epoch under way, or this point in it; None if that is not known."""
        done, length = self._progress, self.epoch_len
        by_iters = None if self.own_max_iters is None else max(self.own_max_iters - done.iter, 0)
        if length is None or self.max_epochs is None:
            return by_iters
        inside = 0 if done.epoch_trained else max(length - done.inner_iter, 0)
        by_epochs = max(self.max_epochs - done.current_epoch - 1, 0) * length + inside
        return by_epochs if by_iters is None else min(by_epochs, by_iters)

    def limited(self, batches: Iterator[T]) -> Iterator[T]:
        """An epoch's batches, as many of those that are left as belong to the run."""
        done = self._progress
        limits = [
            limit - trained
            for limit, trained in ((self.own_max_iters, done.iter), (self.limit_batches, done.inner_iter))
            if limit is not None
        ]
        if not limits:
            return batches
        limit, length = max(min(limits), 0), self._loader_len()
        if length is not None and limit == length - done.inner_iter:  # it ends with the epoch, for the loader too
            return chain(islice(batches, limit), _ended(batches))
        return islice(batches, limit)

    # ---------------------------------------------------------------- in words

    def log_beginning(self, window: int) -> None:
        """Log where training begins, and what is particular about its length."""
        done = self._progress
        if self.is_over() or (self._iters_are_done() and done.inner_iter):
            if self.max_epochs is not None and done.epoch >= self.max_epochs:
                what = f"max_epochs is {self.max_epochs}, and {done.epoch} epochs are done"
            else:
                what = f"max_iters is {self.own_max_iters}, and {done.iter} batches are done"
            _logger.info("Nothing to train: %s.", what)
            return
        of = "" if self.max_epochs is None else f" of {self.max_epochs}"
        iters = "" if self.own_max_iters is None else f", batch {done.iter + 1} of {self.own_max_iters}"
        _logger.info("Training begins at epoch %d%s%s.", done.epoch + 1, of, iters)
        if self.limit_batches is not None:
            _logger.warning("limit_batches is %d: a dry run, of the first batches of everything.", self.limit_batches)
        self._tell_of_cut_window(window)

    def _tell_of_cut_window(self, window: int) -> None:
        length = self.epoch_len
        if self.own_max_iters is None or window == 1:
            return
        last = (self.own_max_iters % length if length else self.own_max_iters) % window
        ends_first = (
            length is not None and self.max_epochs is not None and length * self.max_epochs <= self.own_max_iters
        )
        if last and not ends_first:
            _logger.warning(
                "max_iters=%d ends the run inside a window of gradient_accumulation_steps=%d: the last update is made of %d "
                "batches, so a run that is continued from there is not that of a larger max_iters to the last bit.",
                self.own_max_iters,
                window,
                last,
            )

    def row(self, window: int) -> str:
        """How long the run is, for the first lines."""
        return steps_row(self.max_epochs, self.epoch_len, self.num_updates(window), self.own_max_iters)


def steps_row(
    max_epochs: int | None, epoch_len: int | None, num_updates: int | None, max_iters: int | None = None
) -> str:
    """How long a run is; what is not known is None.

    >>> steps_row(3, 10, 15)
    '3 epochs x 10 batches, 15 updates'
    >>> steps_row(None, None, 250, max_iters=1000)
    'max_iters=1000 batches; the loader has no length'
    """
    if epoch_len is None:
        parts = [] if max_epochs is None else [counted(max_epochs, "epoch")]
        parts += [] if max_iters is None else [f"max_iters={max_iters} batches"]
        return f"{' or '.join(parts)}; the loader has no length"
    batches = counted(epoch_len, "batch", "batches")
    epochs = f"epochs of {batches}" if max_epochs is None else f"{counted(max_epochs, 'epoch')} x {batches}"
    ends = "" if max_iters is None else f", at most max_iters={max_iters} batches"
    return f"{epochs}{ends}, {counted(num_updates or 0, 'update')}"


def check_lengths(max_epochs: Any, max_iters: Any, limit_batches: Any) -> None:
    """They are counts, and one of the first two is there.

    Raises:
        TypeError, SettingError: naming the first that is not.
    """
    if max_epochs is None and max_iters is None:
        raise SettingError(
            "max_epochs and max_iters are both None, so the run would have no end. Pass max_epochs, or max_iters: the number "
            "of batches in the run."
        )
    for name, value, least in (
        ("max_epochs", max_epochs, 0),
        ("max_iters", max_iters, 0),
        ("limit_batches", limit_batches, 1),
    ):
        if value is None:
            continue
        if not is_whole(value):
            raise TypeError(f"{name} is {value!r}; it has to be a whole number.")
        if value < least:
            raise SettingError(
                f"{name} is {value}; it {'cannot be negative' if least == 0 else 'has to be 1 or more'}."
            )


def check_schedules_have_epochs(schedulers: Iterable[Any], interval: str, max_epochs: int | None) -> None:
    """A run of an unknown number of epochs has no schedule by epochs.

    Raises:
        SettingError: if it has.
    """
    if interval == "epoch" and max_epochs is None and any(one is not None for one in schedulers):
        raise SettingError(
            "lr_scheduler_interval is 'epoch', but max_epochs is None: over a stream the schedule would never step. Pass "
            "lr_scheduler_interval='iter', with a schedule made for the number of updates, or max_epochs."
        )


def _ended(batches: Iterator[T]) -> Iterator[T]:
    """No batch; but the iteration is brought to its end, where torch's RandomSampler draws once more."""
    next(batches, None)
    return
    yield

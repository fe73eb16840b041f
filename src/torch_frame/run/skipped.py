"""Batches that were not trained on, for their update was skipped: no epoch's mean holds them, and its end tells of them."""

from __future__ import annotations

import logging

from torch_frame.tracking.storage import MetricStorage
from torch_frame.training.optimization import Optimization

_logger = logging.getLogger("torch_frame")
_NAMES_TOLD = 6


def follow_skips(storage: MetricStorage, optimization: Optimization, *, has_scaler: bool) -> None:
    """From now on the storage knows which batches were trained on, if updates may be skipped at all."""
    may_skip = has_scaler or optimization.on_nonfinite == "skip"
    storage.before_record = _Skips(storage, optimization).note if may_skip else None


class _Skips:
    """Sees behind each batch whether its window has ended, and by an update or without."""

    def __init__(self, storage: MetricStorage, optimization: Optimization) -> None:
        self._storage = storage
        self._optimization = optimization
        self._units = optimization.units
        self._num_skipped = self._count()
        self._num_updates = optimization.num_updates

    def note(self, iter: int) -> None:
        optimization = self._optimization
        if optimization.window_open:
            self._storage.hold(iter)
            return
        if optimization.units is not self._units:  # others were set: they begin to count
            self._units, self._num_skipped = optimization.units, 0
        skipped, updates = self._count(), optimization.num_updates
        if skipped == self._num_skipped:
            self._storage.settle(iter, "all")
        else:
            self._storage.settle(iter, "none" if updates == self._num_updates else "part")
        self._num_skipped, self._num_updates = skipped, updates

    def _count(self) -> int:
        return sum(unit.updater.num_skipped for unit in self._units.values())


def tell_of_left_out(storage: MetricStorage, epoch: int, on_nonfinite: str) -> None:
    """At an epoch's end: how many of its batches were not trained on, and which values were NaN in some.

    Args:
        epoch: its index.
        on_nonfinite: of the run; with "raise" what is skipped is fp16's search for its scale, an INFO.
    """
    storage.flush()
    left_out = storage.left_out()
    said = []
    counted, skipped, nan = max(left_out.values(), key=lambda found: found[1], default=(0, 0, 0))
    if skipped:
        means = "its means are of the others" if counted else "its means are NaN"
        said.append(
            f"{skipped} of {counted + skipped + nan} batches were not trained on, because a loss or a gradient was not "
            f"finite: {means}"
        )
    nans = [
        f"{name} was NaN in {nan} of {counted + skipped + nan}"
        for name, (counted, skipped, nan) in left_out.items()
        if nan
    ]
    if nans:
        more = f" and {len(nans) - _NAMES_TOLD} more" if len(nans) > _NAMES_TOLD else ""
        said.append(f"{', '.join(nans[:_NAMES_TOLD])}{more}, which its mean leaves out")
    if said:
        level = logging.WARNING if nans or on_nonfinite == "skip" else logging.INFO
        _logger.log(level, "Epoch %d: %s.", epoch + 1, "; ".join(said))

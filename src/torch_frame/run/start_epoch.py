"""The epoch that a run begins with, which scripts of 1.7 set by hand."""

from __future__ import annotations

import logging

from torch_frame.errors import SettingError
from torch_frame.progress import Progress

_logger = logging.getLogger("torch_frame")


class StartEpoch:
    """Behind `trainer.start_epoch`.

    Attributes:
        in_train: `train()` has begun.
    """

    def __init__(self) -> None:
        self.in_train = False
        self._epoch = 0
        self._asked: int | None = None

    @property
    def epoch(self) -> int:
        """Index of the epoch that this `train()` began with, or is to begin with."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        if self.in_train:
            _logger.warning(
                "trainer.start_epoch was set to %s while the run is under way, which changes nothing.", epoch
            )
            return
        self._epoch = self._asked = int(epoch)

    def stand_at(self, progress: Progress) -> None:
        """The run has been resumed, or continues."""
        if self._asked is None:
            self._epoch = progress.epoch

    def apply(self, progress: Progress, epoch_len: int | None) -> None:
        """Begin where the script has asked for: the epochs before it count as done.

        Raises:
            SettingError: for an epoch that is trained already, or begun.
        """
        asked, self._asked = self._asked, None
        if asked is None or asked == progress.epoch:
            return
        if asked < progress.epoch or progress.inner_iter > 0:
            raise SettingError(
                f"trainer.start_epoch was set to {asked}, but {progress.epoch} epochs and {progress.inner_iter} batches are "
                "trained. A run goes on where it is; to train them again, make a new trainer."
            )
        progress.epoch, progress.iter, progress.epoch_begun = asked, asked * (epoch_len or 0), False
        self._epoch = asked
        _logger.info(
            "trainer.start_epoch was set: training begins with epoch %d. Schedules and warm-up stand where they are.",
            asked + 1,
        )

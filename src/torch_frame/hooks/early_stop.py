"""EarlyStoppingHook: ends a run that no longer gets better."""

from __future__ import annotations

import logging
import math
from typing import Any

from torch_frame.errors import NonFiniteError, SettingError
from torch_frame.hooks.base import HookBase

_logger = logging.getLogger("torch_frame")


class EarlyStoppingHook(HookBase):
    """Ends training when a metric has not become better for `patience` epochs in a row.

    Runs after each epoch in which the metric was logged; register it behind the hook that logs it. The run ends as it would
    after its last epoch: `after_train` is called, and `latest.pth` is written if a CheckpointerHook writes it.

    Args:
        metric: name in `trainer.metric_storage`, such as "eval_acc" or "total_loss".
        patience: epochs without an improvement before training ends.
        max_first: higher is better; False: lower is better.
        min_delta: what an improvement has to be larger than.

    Stores: the best value, and for how many epochs it has stood. They belong to the metric and its direction: resumed with
    another one, the hook begins anew.
    """

    identified_by = ("metric", "max_first")

    def __init__(self, metric: str, patience: int = 10, max_first: bool = True, min_delta: float = 0.0) -> None:
        if not isinstance(patience, int) or patience < 1:
            raise SettingError(f"patience is {patience!r}; it has to be a positive number of epochs.")
        if not min_delta >= 0:
            raise SettingError(f"min_delta is {min_delta!r}; it has to be 0 or more.")
        self.metric = metric
        self.patience = patience
        self.max_first = max_first
        self.min_delta = min_delta
        self.best = -math.inf if max_first else math.inf
        self.num_bad_epochs = 0
        self._seen_at = -1

    def before_train(self) -> None:
        if self.num_bad_epochs >= self.patience:  # a run that had ended this way is resumed
            self._stop()

    def followed_metrics(self) -> list[tuple[str, str]]:
        return [("EarlyStoppingHook's metric", self.metric)]

    def logged_metrics(self) -> set[str] | None:
        return set() if type(self) is EarlyStoppingHook else None

    def after_epoch(self) -> None:
        if self.metric not in self.metric_storage:
            if self.is_last_epoch():  # before it an evaluation every few epochs may be still to come
                _logger.warning(
                    "EarlyStoppingHook follows %r, but nothing has been logged under this name; there are: %s. Register it "
                    "behind the hook that logs it.",
                    self.metric,
                    ", ".join(sorted(self.metric_storage)) or "none",
                )
            return
        logged_at = self.metric_storage.latest_iters()[self.metric]
        if logged_at == self._seen_at:  # not evaluated in this epoch
            return
        self._seen_at = logged_at
        value = self.metric_storage[self.metric].avg
        if math.isnan(value):
            raise NonFiniteError(
                f"EarlyStoppingHook follows {self.metric!r}, which is NaN in epoch {self.trainer.epoch}."
            )
        gain = value - self.best if self.max_first else self.best - value
        if gain > self.min_delta:
            self.best, self.num_bad_epochs = value, 0
        else:
            self.num_bad_epochs += 1
        if self.num_bad_epochs >= self.patience:
            self._stop()

    def _stop(self) -> None:
        _logger.info(
            "Training ends early: %s has not been better than %.6g for %d epochs.",
            self.metric,
            self.best,
            self.num_bad_epochs,
        )
        self.trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "num_bad_epochs": self.num_bad_epochs, "seen_at": self._seen_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
        self.num_bad_epochs = state_dict["num_bad_epochs"]
        self._seen_at = state_dict["seen_at"]

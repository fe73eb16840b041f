"""EarlyStoppingHook: ends a run that no longer gets better."""

from __future__ import annotations

import logging
import math
from typing import Any

from torch_frame.errors import NonFiniteError, SettingError
from torch_frame.hooks.base import HookBase
from torch_frame.hooks.checkpoint import check_direction
from torch_frame.hooks.evaluation import evaluates_in_steps
from torch_frame.scalars import is_whole

_logger = logging.getLogger("torch_frame")


class EarlyStoppingHook(HookBase):
    """Ends training when a metric has not become better in `patience` of its evaluations in a row.

    Runs after each epoch; an epoch in which the metric was not logged (an evaluation every few epochs) does not count. Of
    evaluations with `period_unit="iter"` each one counts, and the run may end behind it, inside an epoch. Register it behind the
    hook that logs the metric. On several ranks the value of rank 0 decides. The run ends as it would after its last epoch:
    `after_train` is called, and `latest.pth` is written if a CheckpointerHook writes it.

    Args:
        metric: name in `trainer.metric_storage`, such as "eval_acc" or "total_loss"; what it is worth is `trainer.value(metric)`.
        patience: evaluations without an improvement before training ends: with an evaluation each epoch, epochs.
        max_first: higher is better; False: lower is better.
        min_delta: what an improvement has to be larger than.

    Stores: the best value, its epoch, and for how many evaluations it has stood. They belong to the metric and its direction:
    resumed with another one, the hook begins anew.
    """

    identified_by = ("metric", "max_first")
    _looks_in_steps = False  # an evaluation that is counted in iterations logs the metric

    def __init__(self, metric: str, patience: int = 10, max_first: bool = True, min_delta: float = 0.0) -> None:
        if not is_whole(patience) or patience < 1:
            raise SettingError(f"patience is {patience!r}; it has to be a positive number of evaluations.")
        if not min_delta >= 0:
            raise SettingError(f"min_delta is {min_delta!r}; it has to be 0 or more.")
        self.metric = metric
        self.patience = int(patience)
        self.max_first = max_first
        self.min_delta = min_delta
        self.best = -math.inf if max_first else math.inf
        self.num_bad_epochs = 0
        self.best_epoch: int | None = None
        self._seen_at = -1

    def check(self) -> None:
        check_direction(self.trainer.hooks, "EarlyStoppingHook's metric", self.metric, self.max_first)
        self._looks_in_steps = any(evaluates_in_steps(hook, self.metric) for hook in self.trainer.hooks)
        if type(self).after_iter is EarlyStoppingHook.after_iter:
            self.idle_stages = frozenset(() if self._looks_in_steps else ("after_iter",))

    @property
    def asks_in_steps(self) -> bool:
        return self._looks_in_steps

    def before_train(self) -> None:
        if self.num_bad_epochs >= self.patience:  # a run that had ended this way is resumed
            self._stop()

    def followed_metrics(self) -> list[tuple[str, str]]:
        return [("EarlyStoppingHook's metric", self.metric)]

    def logged_metrics(self) -> set[str] | None:
        return set() if type(self) is EarlyStoppingHook else None

    def after_iter(self) -> None:
        if self._looks_in_steps and self.metric_storage.updated_at(self.metric) not in (None, self._seen_at):
            self._look()

    def after_epoch(self) -> None:
        self._look()

    def _look(self) -> None:
        storage = self.metric_storage
        found = (storage.value(self.metric), storage.latest_iters()[self.metric]) if self.metric in storage else None
        found = self.trainer.hook_strategy.broadcast(found)  # rank 0's decides for all
        if found is None:
            if self.is_last_epoch():  # before it an evaluation every few epochs may be still to come
                _logger.warning(
                    "EarlyStoppingHook follows %r, but nothing has been logged under this name; there are: %s. Register it "
                    "behind the hook that logs it.",
                    self.metric,
                    ", ".join(sorted(self.metric_storage)) or "none",
                )
            return
        value, logged_at = found
        if logged_at == self._seen_at:  # not evaluated in this epoch
            return
        self._seen_at = logged_at
        if math.isnan(value):
            raise NonFiniteError(
                f"EarlyStoppingHook follows {self.metric!r}, which is NaN in epoch {self.trainer.epoch + 1}."
            )
        gain = value - self.best if self.max_first else self.best - value
        if gain > self.min_delta:
            self.best, self.best_epoch, self.num_bad_epochs = value, self.trainer.epoch, 0
        else:
            self.num_bad_epochs += 1
        if self.num_bad_epochs >= self.patience:
            self._stop()

    def _stop(self) -> None:
        since = self.trainer.epoch - self.best_epoch if self.best_epoch is not None else self.trainer.epoch + 1
        _logger.info(
            "Training ends early: %s has not been better than %.6g for %d evaluations, %d epochs.",
            self.metric,
            self.best,
            self.num_bad_epochs,
            since,
        )
        self.trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "best_epoch": self.best_epoch,
            "num_bad_epochs": self.num_bad_epochs,
            "seen_at": self._seen_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
        self.num_bad_epochs = state_dict["num_bad_epochs"]
        self._seen_at = state_dict["seen_at"]
        self.best_epoch = state_dict.get("best_epoch")
        if self.best_epoch is None and self.best not in (math.inf, -math.inf):  # older states: an evaluation each epoch
            self.best_epoch = self._seen_at - self.num_bad_epochs

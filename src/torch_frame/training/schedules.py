"""Learning rates: any torch scheduler, with a warm-up in front of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from torch_frame.errors import SettingError
from torch_frame.training.schedule_state import load_state, state_of

WarmupMethod = Literal["constant", "linear", "exp"]
Interval = Literal["epoch", "iter"]


class Scheduler(Protocol):
    """What a learning-rate scheduler has to offer; torch's own all do."""

    optimizer: Optimizer

    def step(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def warmup_factor_at(method: WarmupMethod | None, step: int, warmup_iters: int, warmup_factor: float) -> float:
    """The factor on the learning rate after `step` updates.

    With f = `warmup_factor` and a = step / `warmup_iters`: constant f; linear f (1 - a) + a; exp f ** (1 - a);
    1 from `warmup_iters` on. As in torch-frame 1.7 and detectron2's `WarmupMultiStepLR`.

    >>> [warmup_factor_at("linear", step, 4, 0.1) for step in (0, 2, 4)]
    [0.1, 0.55, 1.0]
    """
    if method is None or step >= warmup_iters:
        return 1.0
    alpha = step / warmup_iters
    if method == "constant":
        return warmup_factor
    if method == "linear":
        return warmup_factor * (1 - alpha) + alpha
    return float(warmup_factor ** (1 - alpha))


def with_warm_up(
    scheduler: Any, method: WarmupMethod | None, iters: int, factor: float, *, optimizer: Optimizer
) -> LRWarmupScheduler:
    """The schedule of a run; a script's own LRWarmupScheduler is used as it is.

    Raises:
        SettingError: for a warm-up of a schedule that has one.
    """
    if not isinstance(scheduler, LRWarmupScheduler):
        return LRWarmupScheduler(scheduler, None, method, iters, factor, optimizer=optimizer)
    if method is not None:
        raise SettingError(
            f"lr_scheduler is an LRWarmupScheduler, but warmup_method is {method!r}: there would be two warm-ups. Pass the "
            "scheduler inside, or no warmup_method."
        )
    return scheduler


class LRWarmupScheduler(LRScheduler):
    """Puts a warm-up in front of any torch scheduler; counted in updates. A torch scheduler itself, as 1.7's was.

    The wrapped scheduler never sees the warm-up: before it steps, the learning rates are what it left behind, so recursive
    schedulers (ExponentialLR, OneCycleLR, SequentialLR ...) follow their own sequence to the last bit, and each group's rate
    is that rate times the factor. Without a warm-up nothing is multiplied at all.

    Args:
        scheduler: a torch scheduler, or None for a constant learning rate (pass `optimizer` then).
        epoch_len: updates in an epoch. Given, `step()` after each update is all that has to be called, as in 1.7: it steps
            `scheduler` at the end of each epoch. None: the caller calls `step_scheduler()` when an epoch (or, with a
            scheduler that counts iterations, an update) ends.
        warmup_method: "constant", "linear", "exp" or None.
        warmup_iters: length of the warm-up, in updates.
        warmup_factor: the learning rate begins at this fraction of the scheduler's.
        last_epoch: updates made before, minus one (1.7's argument).
        optimizer: needed only if `scheduler` is None.

    Attributes:
        counts_updates: the scheduler does, so `step()` steps it each time; `step_scheduler()` behind it does nothing then.
    """

    counts_updates: bool = False
    _stepped_at: int | None = None  # the update that has stepped the scheduler

    def __init__(
        self,
        scheduler: Any,
        epoch_len: int | None = None,
        warmup_method: WarmupMethod | None = None,
        warmup_iters: int = 1000,
        warmup_factor: float = 0.001,
        last_epoch: int = -1,
        *,
        optimizer: Optimizer | None = None,
    ) -> None:
        # torch's own __init__ is not called: it would make a step, and wrap the optimizer's.
        _check_warmup(warmup_method, warmup_iters, warmup_factor)
        self.scheduler: Scheduler | None = scheduler
        self.optimizer: Optimizer = scheduler.optimizer if scheduler is not None else _given(optimizer)
        self.epoch_len = epoch_len
        _check_rates(self.optimizer)
        self.warmup_method = warmup_method
        self.warmup_iters = warmup_iters if warmup_method is not None else 0
        self.warmup_factor = warmup_factor
        self.num_updates = last_epoch + 1
        self._metric_at: int | None = None
        self.epoch_lrs: list[float] | None = None  # what an epoch's last steps were made with, if it has ended
        self.regular_lrs = self._read()
        self.base_lrs = [group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups]
        self._apply_warmup()

    @property
    def warming_up(self) -> bool:
        return self.num_updates < self.warmup_iters

    @property
    def needs_metric(self) -> bool:
        """The scheduler steps by a metric (ReduceLROnPlateau), so after evaluation."""
        return isinstance(self.scheduler, ReduceLROnPlateau)

    @property
    def last_epoch(self) -> int:  # type: ignore[override]  # torch's name for what it counts
        """Updates made, as 1.7 and torch call them."""
        return self.num_updates

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """The rates in force."""
        return self._read()

    def step(self, epoch: int | None = None) -> None:
        """An update has been made. epoch: torch's old argument, without effect."""
        was_warming_up = self.num_updates < self.warmup_iters
        self.num_updates += 1
        ends_epoch = bool(self.epoch_len) and self.num_updates % (self.epoch_len or 1) == 0
        if (self.counts_updates or ends_epoch) and self.scheduler is not None:
            self.step_scheduler()
            self._stepped_at = self.num_updates
        elif was_warming_up:
            self._apply_warmup()

    def step_scheduler(self) -> None:
        """Step the wrapped scheduler: an epoch has ended, or an update that has not stepped it already (`counts_updates`)."""
        is_done = self.counts_updates and self._stepped_at == self.num_updates
        if self.scheduler is not None and not is_done:
            self._step_wrapped(self.scheduler.step)

    def step_by_metric(self, metric: float, at: int) -> None:
        """Step a ReduceLROnPlateau, unless it has seen this value.

        Args:
            metric: what it follows.
            at: when the value is of; each moment counts once.
        """
        if at != self._metric_at:
            self._metric_at = at
            self._step_wrapped(functools.partial(self.scheduler.step, metric))  # type: ignore[union-attr, call-arg]  # a plateau

    def _step_wrapped(self, step: Callable[[], None]) -> None:
        if not self.warming_up and not self._scaled:
            step()
            return
        self._take_in_new_groups()
        self._write(self.regular_lrs)
        step()
        self.regular_lrs = self._read()
        self._apply_warmup()

    def _apply_warmup(self) -> None:
        if not self.warmup_iters:
            return
        factor = self._factor
        self._take_in_new_groups()
        self._scaled = factor != 1.0
        self._write(self._lrs_times(factor))

    @property
    def _factor(self) -> float:
        return warmup_factor_at(self.warmup_method, self.num_updates, self.warmup_iters, self.warmup_factor)

    def _lrs_times(self, factor: float) -> list[float]:
        return [lr if factor == 1.0 else lr * factor for lr in self.regular_lrs]

    _scaled = False
    """The optimizer's rates are the scheduler's times a factor, not the scheduler's own."""

    def _take_in_new_groups(self) -> None:
        """A group that was added during the warm-up comes with a rate of its own."""
        self.regular_lrs += self._read()[len(self.regular_lrs) :]

    def _read(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def _write(self, lrs: list[float]) -> None:
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            self._write_one(group, lr)

    @staticmethod
    def _write_one(group: dict[str, Any], lr: float) -> None:
        if isinstance(group["lr"], Tensor):  # capturable optimizers keep the rate on the device
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr

    def replaced(self, scheduler: Any, optimizer: Optimizer) -> LRWarmupScheduler:
        """A schedule of another scheduler (or None) and its optimizer, as far into the warm-up as this one."""
        if self._scaled and optimizer is self.optimizer:
            self._undo_warmup(scheduler)
        made = LRWarmupScheduler(
            scheduler,
            self.epoch_len,
            self.warmup_method,
            self.warmup_iters,
            self.warmup_factor,
            optimizer=optimizer,
        )
        made.num_updates = self.num_updates
        made._apply_warmup()
        return made

    def _undo_warmup(self, scheduler: Any) -> None:
        """A scheduler was made of rates that the warm-up had scaled: give it those that they are made of."""
        factor = self._factor
        bases = getattr(scheduler, "base_lrs", [])
        for index, (group, regular) in enumerate(zip(self.optimizer.param_groups, self.regular_lrs, strict=False)):
            scaled = float(group["lr"])
            if scaled != regular * factor:  # the scheduler has set it
                continue
            self._write_one(group, regular)
            if index < len(bases) and float(bases[index]) == scaled:
                bases[index] = group["initial_lr"] = regular

    def get_last_lr(self) -> list[float]:  # type: ignore[override]
        """The rates in force, one for each parameter group."""
        return self._read()

    def state_dict(self) -> dict[str, Any]:
        if self._scaled:
            self._take_in_new_groups()
        return {
            "num_updates": self.num_updates,
            "metric_at": self._metric_at,
            "regular_lrs": self.regular_lrs if self._scaled else self._read(),
            "warmup": [self.warmup_method, self.warmup_iters, self.warmup_factor],
            "scheduler": None if self.scheduler is None else state_of(self.scheduler),
            **({"in_force": self._read()} if self._scaled and self._read() != self._lrs_times(self._factor) else {}),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the schedule with its settings, those of the warm-up too, and the optimizer's rates with it.

        Raises:
            SettingError: if the saved run had a scheduler and this one has none, or the other way round.
        """
        if (state_dict["scheduler"] is None) != (self.scheduler is None):
            had, has = ("no scheduler", "one") if self.scheduler is not None else ("a scheduler", "none")
            raise SettingError(f"The saved run had {had}, this one has {has}. Build the trainer as it was built then.")
        if self.scheduler is not None:
            load_state(self.scheduler, state_dict["scheduler"])
        self.warmup_method, self.warmup_iters, self.warmup_factor = state_dict["warmup"]
        self.continue_at(state_dict, state_dict["regular_lrs"])
        if "in_force" in state_dict:  # a hook has set rates, which hold until the next update of the warm-up
            self._write(state_dict["in_force"])

    def continue_at(self, counts: Mapping[str, Any], regular_lrs: Iterable[float]) -> None:
        """Take on the counts of a saved schedule, but not its settings.

        Args:
            counts: what `state_dict` returned.
            regular_lrs: the rates of the groups, without the warm-up.
        """
        self.num_updates, self._stepped_at = counts["num_updates"], None
        self._metric_at = counts["metric_at"]
        if self.num_updates > 0:  # by the run: torch would warn that its optimizer has not stepped yet
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
        self.regular_lrs = list(regular_lrs)
        self._write(self.regular_lrs)
        self._scaled = False
        self._apply_warmup()


def _given(optimizer: Optimizer | None) -> Optimizer:
    if optimizer is None:
        raise SettingError("LRWarmupScheduler needs a scheduler, or an optimizer if there is none.")
    return optimizer


def _check_rates(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        if group.get("lr") is None:
            raise SettingError(
                f"{type(optimizer).__name__} has a parameter group without a learning rate (its 'lr' is None, or missing), which "
                "schedules and the log need. Give it one, such as lr=1e-3 (and relative_step=False, if it is transformers' "
                "Adafactor)."
            )


def _check_warmup(method: str | None, iters: int, factor: float) -> None:
    if method is None:
        return
    if method not in ("constant", "linear", "exp"):
        raise SettingError(f"warmup_method is {method!r}; it has to be 'constant', 'linear', 'exp' or None.")
    if iters <= 0:
        raise SettingError(f"warmup_iters is {iters}; it has to be a positive number of updates.")
    if not 0 < factor <= 1:
        raise SettingError(f"warmup_factor is {factor}; it has to be in (0, 1].")

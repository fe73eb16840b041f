"""What makes weights better: the optimizers with their schedules, EMA, the window of gradients and the count of updates.

One optimizer, or a list that steps as one, has one `Unit`. A dict has a unit for each name: each is driven by losses of its own
(`Trainer.update(loss, name)`), and all share the window, EMA and the scaler of fp16.
"""

from __future__ import annotations

import functools
import itertools
import logging
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_frame.distributed.strategy import Strategy, shares_gradients
from torch_frame.errors import NonFiniteError, SettingError
from torch_frame.progress import Progress
from torch_frame.training.ema import EMA
from torch_frame.training.finite import nonfinite_message
from torch_frame.training.losses import describe
from torch_frame.training.metric_names import MetricNames
from torch_frame.training.precision import Precision
from torch_frame.training.schedules import Interval, LRWarmupScheduler, WarmupMethod, with_warm_up
from torch_frame.training.several import check_apart, in_form_of, labelled, labelled_schedulers, schedule_label
from torch_frame.training.update import OnNonFinite, Update

_logger = logging.getLogger("torch_frame")

Stages = Mapping[str, Sequence[Callable[..., None]]]
Values = MutableMapping[str, Any]
Calls = Iterable[Callable[[], Any]]
"""What is to be done, in order. The caller calls each, so that an error in a hook has no frame more above it."""


class Warmup(NamedTuple):
    """Of the learning rates; see `LRWarmupScheduler`."""

    method: WarmupMethod | None
    iters: int
    factor: float


class UpdateSettings(NamedTuple):
    """How updates are made; see `Update`."""

    clip_grad_norm: float
    window_len: int
    weighted: bool
    on_nonfinite: OnNonFinite
    on_cpu: bool


class Unit:
    """Optimizers that step as one.

    Attributes:
        name: of the dict; None for one optimizer or a list.
        updater: makes their updates.
        schedules: of their rates.
        was_stepped: by its last update.
        num_calls: of `Trainer.update`, in the batch under way.
    """

    def __init__(self, name: str | None, updater: Update, schedules: list[LRWarmupScheduler]) -> None:
        self.name = name
        self.updater = updater
        self.schedules = schedules
        self.was_stepped = False
        self.num_calls = 0
        self.norm_name = "grad_norm" if name is None else f"grad_norm_{name}"


class Optimization:
    """See the module's text.

    Args:
        model: as the loop calls it.
        optimizer: one, a list, or a dict of names.
        lr_scheduler: torch's, in the same form; None: constant rates.
        ema: of the model, or None.
        precision: has the gradient scaler, if there is one.
        strategy: how the training is spread over processes.
        progress: counts the updates.
        stages: methods of the hooks, of which "before_update" and "after_update" are called here.
        latest: the last values of the run, for messages.
        interval: "iter" if the schedulers step after each update.
        warmup, settings: as the trainer has them.

    Attributes:
        optimizers: label -> optimizer (`torch_frame.training.several`).
        schedules: label of the optimizer -> its schedule.
        units: name -> unit; the name is None unless there is a dict of optimizers.
        ema: of the model, or None.
        num_batches: of the window under way, if there is a dict.
        on_change: called with the schedules when a script or a hook has set others.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        lr_scheduler: Any,
        ema: EMA | None,
        precision: Precision,
        strategy: Strategy,
        progress: Progress,
        stages: Stages,
        latest: Callable[[], Mapping[str, Any]],
        *,
        interval: Interval,
        warmup: Warmup,
        settings: UpdateSettings,
    ) -> None:
        self.ema = ema
        self._interval = interval
        self.num_batches = 0
        self.on_change: Callable[[Mapping[str, LRWarmupScheduler]], None] = lambda schedules: None
        self.names = MetricNames()  # of the run, if it has its own
        self._model = model
        self._precision = precision
        self._strategy = strategy
        self._progress = progress
        self._stages = stages
        self._latest = latest
        self._settings = settings
        self._window_len = int(settings.window_len)  # a whole number of NumPy's overflows
        self._has_cleared = False  # gradients of the whole model, in the window under way
        self._has_stepped = False  # one of several units, in the window under way
        self._scaler_is_due = False
        self._told: set[str] = set()
        schedulers = labelled_schedulers(lr_scheduler, optimizer)
        schedules = {
            label: with_warm_up(schedulers[label], *warmup, optimizer=one) for label, one in labelled(optimizer).items()
        }
        self._take(optimizer, schedules)
        if self.by_name:  # nothing else lets the ranks begin with the same weights
            for tensor in (*model.parameters(), *model.buffers(), *self._outside_model()):
                strategy.share([tensor])  # one by one: no second copy of a large model

    def _outside_model(self) -> Iterator[Tensor]:
        in_model = set(map(id, self._model.parameters()))
        groups = (group for optimizer in self.optimizers.values() for group in optimizer.param_groups)
        yield from (p for group in groups for p in group["params"] if id(p) not in in_model)

    def _take(self, optimizer: Any, schedules: dict[str, LRWarmupScheduler]) -> None:
        """Use these optimizers and schedules from now on."""
        self._given = optimizer
        self.optimizers = labelled(optimizer)
        self.schedules = schedules
        self._note_interval()
        self.by_name = isinstance(optimizer, Mapping)
        units: list[tuple[str | None, list[str]]] = [(None, list(self.optimizers))]
        if self.by_name:
            units = [(name, [label]) for name, label in zip(optimizer, self.optimizers, strict=True)]
        self.units: dict[str | None, Unit] = {name: self._unit(name, labels) for name, labels in units}
        self.unit = next(iter(self.units.values()))
        self._first = next(iter(self.optimizers.values()))

    def _unit(self, name: str | None, labels: Sequence[str]) -> Unit:
        settings = self._settings._replace(window_len=self._window_len)
        optimizers = [self.optimizers[label] for label in labels]
        updater = Update(
            self._model, optimizers, self._precision, self._strategy, **settings._asdict(), is_alone=name is None
        )
        return Unit(name, updater, [self.schedules[label] for label in labels])

    def use_model(self, model: nn.Module) -> None:
        """The loop calls the model as this from now on: prepared, or wrapped in another way."""
        self._model = model
        self._take(self._given, self.schedules)

    # ---------------------------------------------------------------- what scripts and hooks read and set

    @property
    def optimizer(self) -> Any:
        """One, a tuple, or a mapping that cannot be changed, as it was given."""
        return in_form_of(self._given, self.optimizers)

    @optimizer.setter
    def optimizer(self, optimizer: Any) -> None:
        self._check_outside_window("optimizer")
        self._check_trains(labelled(optimizer).values())
        schedules = {label: self._schedule_for(label, one) for label, one in labelled(optimizer).items()}
        self._take(optimizer, schedules)
        self.on_change(self.schedules)

    def _schedule_for(self, label: str, optimizer: Optimizer) -> LRWarmupScheduler:
        """The schedule of an optimizer that has just been set: that which drives it, or the place's."""
        for schedule in self.schedules.values():
            if schedule.optimizer is optimizer:
                return schedule
        old = self.schedules.get(label, next(iter(self.schedules.values())))
        if label in self.schedules and old.scheduler is not None:
            return old  # told, if no other one is set until it counts
        return old.replaced(None, optimizer)

    @property
    def lr_scheduler(self) -> Any:
        """The schedulers inside their warm-ups, in the form of the optimizers."""
        return in_form_of(self._given, self.schedules)

    @lr_scheduler.setter
    def lr_scheduler(self, lr_scheduler: Any) -> None:
        self._check_outside_window("lr_scheduler")
        given = labelled_schedulers(lr_scheduler, self._given)
        schedules = {}
        for label, one in given.items():
            ready = isinstance(one, LRWarmupScheduler)
            schedules[label] = one if ready else self.schedules[label].replaced(one, self.optimizers[label])
        self._take(self._given, schedules)
        self.on_change(self.schedules)

    def _check_trains(self, optimizers: Iterable[Optimizer]) -> None:
        optimized = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
        if not any(p.requires_grad and id(p) in optimized for p in self._model.parameters()):
            raise SettingError(
                "trainer.optimizer was set to one that has none of the model's trainable parameters. Make it from trainer.model."
            )

    def _check_outside_window(self, name: str) -> None:
        if self.window_open:
            raise SettingError(
                f"trainer.{name} was set inside a window of gradient_accumulation_steps, whose gradients wait for their update. "
                "Set it in before_epoch, or where a window is complete (after_update)."
            )

    @property
    def model(self) -> nn.Module:
        """As the loop calls it."""
        return self._model

    @property
    def updater(self) -> Update:
        """Of the first unit."""
        return self.unit.updater

    @property
    def window_len(self) -> int:
        """Batches in a full window; one that is set counts from the next window on."""
        return self._window_len

    @window_len.setter
    def window_len(self, window_len: int) -> None:
        if not isinstance(window_len, numbers.Integral) or window_len < 1:
            raise SettingError(
                f"gradient_accumulation_steps was set to {window_len!r}; it has to be a positive whole number."
            )
        self._window_len = int(window_len)
        for unit in self.units.values():
            unit.updater.window_len = self._window_len

    @property
    def interval(self) -> Interval:
        """When the schedules step; one that is set counts from then on."""
        return self._interval

    @interval.setter
    def interval(self, interval: Interval) -> None:
        if interval not in get_args(Interval):
            raise SettingError(f"lr_scheduler_interval was set to {interval!r}; it has to be 'epoch' or 'iter'.")
        self._interval = interval
        self._note_interval()

    def _note_interval(self) -> None:
        """A step of a schedule steps its scheduler too, if that counts updates; one of the script's own may count by itself."""
        for schedule in self.schedules.values():
            schedule.counts_updates = (
                self._interval == "iter" and schedule.epoch_len is None and not schedule.needs_metric
            )

    @property
    def on_nonfinite(self) -> OnNonFinite:
        return self._settings.on_nonfinite

    @property
    def num_updates(self) -> int:
        """Windows in which something was updated."""
        return self._progress.num_updates

    @property
    def norm_names(self) -> list[str]:
        """Names under which the norms of clipped gradients are recorded."""
        return [unit.norm_name for unit in self.units.values()]

    @property
    def lr(self) -> float:
        """Learning rate of the first optimizer's first parameter group."""
        return float(self._first.param_groups[0]["lr"])

    # ---------------------------------------------------------------- begins

    def refresh(self) -> None:
        """An epoch begins: look up parameters anew, and tell of a schedule that drives none of the run's optimizers."""
        # What a hook does to a gradient may differ, as hooks may.
        own = bool(self._stages["before_update"]) or not shares_gradients(self._strategy)
        trusts = self._settings.on_cpu and self._strategy.world_size > 1 and not self._strategy.agree(own)
        for unit in self.units.values():
            unit.updater.refresh()
            unit.updater.trusts_exchange = trusts
        self._tell_of_undriven()

    def tell_of_interrupted(self) -> None:
        """`train()` goes on behind an error: say what is lost with the window that it has interrupted."""
        if self.window_open:
            _logger.warning(
                "An error has interrupted a window of gradient_accumulation_steps=%d: the gradients of its %d batches are "
                "dropped, and training goes on with the next batch. Load the last checkpoint to train on them again.",
                self._window_len,
                self.num_open,
            )

    def reset(self) -> None:
        """Forget a window that was interrupted."""
        for unit in self.units.values():
            unit.updater.reset()
        self.num_batches = 0
        self._has_cleared = self._has_stepped = self._scaler_is_due = False

    def check(self) -> None:
        """Before the first step.

        Raises:
            SettingError: if optimizers of a dict share a parameter, and gradients are accumulated, which would be mixed.
        """
        if self.by_name and self._window_len > 1:
            check_apart(self.optimizers, "whose gradients would be mixed in a window of gradient_accumulation_steps")

    def _tell_of_undriven(self) -> None:
        for label, schedule in self.schedules.items():
            drives_another = schedule.scheduler is not None and schedule.optimizer is not self.optimizers[label]
            if drives_another and label not in self._told:
                self._told.add(label)
                _logger.warning(
                    "trainer.%s was set during the run, but %s drives the old one, so its learning rate does not change. Set "
                    "trainer.lr_scheduler too.",
                    label,
                    schedule_label(label),
                )

    # ---------------------------------------------------------------- the window

    @property
    def window_open(self) -> bool:
        """Gradients of some batches wait for the rest of their window."""
        return self.num_batches > 0 if self.by_name else self.unit.updater.num_micro_batches > 0

    @property
    def num_open(self) -> int:
        """Batches in the window under way, without the one that is being trained."""
        return self.num_batches if self.by_name else self.unit.updater.num_micro_batches

    def backward(self, unit: Unit, loss: Tensor, weight: Tensor | float | None, values: Values) -> None:
        """Add the gradient of a unit's loss to its window's.

        Args:
            unit: whose loss it is.
            loss: one element, with its graph.
            weight: see `Update.backward`.
            values: of the step, for messages.

        Raises:
            NonFiniteError: with the values, if the loss is not finite and the host may look at it.
        """
        try:
            unit.updater.backward(loss, weight)
        except NonFiniteError as error:
            raise self.nonfinite(str(error), values or {"loss": loss}) from None

    def before_step(self, unit: Unit) -> Calls:
        """A unit's window is complete: what is to be called before its step."""
        hooks = self._stages["before_update"]
        return itertools.chain((unit.updater.collect,), hooks) if hooks else ()  # they see the window's mean

    def step(self, unit: Unit, values: Values) -> Calls:
        """A unit's step, and what follows one that was made: schedule, EMA, count.

        Args:
            unit: whose window is complete.
            values: of the step, for messages; the norm of a clipped gradient is added.

        Returns:
            What is to be called next.

        Raises:
            NonFiniteError: with the values, before the weights are touched, if the host may look at the gradient.
        """
        updater = unit.updater
        try:
            unit.was_stepped = updater.step()
        except NonFiniteError as error:
            raise self.nonfinite(str(error), values or self._latest()) from None
        if updater.grad_norm is not None:
            self.names.put(values, unit.norm_name, updater.grad_norm)
        if unit.was_stepped:
            for schedule in unit.schedules:
                schedule.step()
            if not self.by_name:
                self._count_update()
        if self.by_name:
            self._note_step(unit)
        return self._stages["after_update"] if unit.was_stepped else ()

    def end_window(self, unit: Unit, values: Values) -> Calls:
        """All that is to be called, `before_step` and `step`, for a caller that has more to call."""
        yield from self.before_step(unit)
        yield functools.partial(self.step, unit, values)
        if unit.was_stepped:
            yield from self._stages["after_update"]

    def _count_update(self) -> None:
        if self.ema is not None:
            self.ema.update(self._model)
        self._progress.num_updates += 1

    def nonfinite(self, what: str, values: Mapping[str, Any], iteration: int | None = None) -> NonFiniteError:
        """The error that a run ends with."""
        progress = self._progress
        iteration = progress.current_iter if iteration is None else iteration
        return NonFiniteError(nonfinite_message(what, describe(values), progress.current_epoch, iteration))

    # ---------------------------------------------------------------- for a train_one_iter of the user's

    def begin_batch(self) -> None:
        """Before a batch: what is to be put back if its update is skipped."""
        for unit in self.units.values():
            unit.num_calls = 0
            if not self.window_open:
                unit.updater.note_buffers()

    def begin_update(self, unit: Unit) -> None:
        """Before a loss's backward: at a window's begin gradients are cleared, if that has not been done."""
        if unit.updater.num_micro_batches > 0:
            return
        if self.by_name and not self._has_cleared:
            self._has_cleared = True
            for parameter in self._model.parameters():
                parameter.grad = None
        if self.by_name and unit.num_calls > 1 and self._scaler_is_due:
            self._update_scaler()  # it takes one step of an optimizer
        unit.updater.begin()

    def accumulating(self, *, is_last: bool) -> AbstractContextManager[Any] | None:
        """Around forward and backward of a batch after which more follow in its window; None if none do."""
        return None if is_last else self._strategy.accumulating(self._model)

    def _note_step(self, unit: Unit) -> None:
        """One of several units has made its update, or has skipped it."""
        self._has_stepped |= unit.was_stepped
        self._scaler_is_due |= unit.updater.has_unscaled
        for other in self.units.values():
            other.updater.note_buffers()

    def end_batch(self, values: Values, *, is_last: bool) -> Calls:
        """Behind a batch of a dict of optimizers.

        Args:
            values: norms are added to it.
            is_last: the window ends with it: optimizers whose gradients wait make their updates.
        """
        self.num_batches += 1
        return self.close_window(values) if is_last else ()

    def close_window(self, values: Values) -> Calls:
        """The window ends: what waits is updated, EMA follows, the update is counted."""
        for unit in self.units.values():
            if unit.updater.window_open:
                yield from self.end_window(unit, values)
        if self.by_name:
            yield self._end_shared

    def _end_shared(self) -> None:
        if self._scaler_is_due:
            self._update_scaler()
        self._strategy.share(list(self._model.buffers()))
        if self._has_stepped:
            self._count_update()
        self.num_batches = 0
        self._has_cleared = self._has_stepped = False

    def _update_scaler(self) -> None:
        assert self._precision.scaler is not None
        self._scaler_is_due = False
        self._precision.scaler.update()

    def settings_of_steps(self) -> dict[str, Any]:
        """What is told if it is another at a resume, as it was saved."""
        settings = self._settings
        return {
            "gradient_accumulation_steps": self._window_len,
            "clip_grad_norm": max(settings.clip_grad_norm, 0.0),
            "loss_weight": settings.weighted,
            "on_nonfinite": settings.on_nonfinite,
            "ema_decay": None if self.ema is None else self.ema.limit,
            "ema_ramp": None if self.ema is None else self.ema.ramp,
            "lr_scheduler_interval": self.interval,
        }

    def in_words(self, hooks: Sequence[str]) -> dict[str, str]:
        """The settings that a step of the user's goes through by `Trainer.autocast` and `.update` only: kind -> in words.

        Args:
            hooks: names of those with something to do before or after an update.
        """
        settings, schedules = self._settings, list(self.schedules.values())
        precision = f"precision={self._precision.name!r}"
        said = {
            "precision": ("" if self._precision.is_full else precision),
            "scaler": (f"the gradient scaler of {precision}" if self._precision.scaler is not None else ""),
            "accumulation": f"gradient_accumulation_steps={self._window_len}" if self._window_len > 1 else "",
            "weight": "loss_weight" if settings.weighted else "",
            "clipping": f"clip_grad_norm={settings.clip_grad_norm:g}" if settings.clip_grad_norm > 0 else "",
            "finite": "on_nonfinite='skip'" if settings.on_nonfinite == "skip" else "",
            "warm-up": f"warmup_method={schedules[0].warmup_method!r}" if any(s.warming_up for s in schedules) else "",
            "schedule": "",
            "ema": "" if self.ema is None else "use_ema=True",
            "hooks": ", ".join(f"before_update and after_update of {name}" for name in hooks),
        }
        if self._interval == "iter" and any(schedule.scheduler is not None for schedule in schedules):
            said["schedule"] = "the lr_scheduler with lr_scheduler_interval='iter'"
        return {kind: text for kind, text in said.items() if text}

    # ---------------------------------------------------------------- the schedules

    def step_by_epoch(self) -> None:
        """An epoch's batches are trained."""
        self._tell_of_undriven()
        for schedule in self.schedules.values():
            schedule.epoch_lrs = schedule.get_lr()
            if schedule.epoch_len is None and not schedule.counts_updates and not schedule.needs_metric:
                schedule.step_scheduler()

    def step_by_metric(self, metric: float, at: int) -> None:
        """A metric that ReduceLROnPlateau follows has a new value."""
        for schedule in self.schedules.values():
            if schedule.needs_metric:
                schedule.step_by_metric(metric, at)

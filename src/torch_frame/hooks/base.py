"""HookBase: what runs beside the loop, and when."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from torch_frame.distributed.strategy import Strategy
from torch_frame.progress import Progress
from torch_frame.tracking.media import Media
from torch_frame.tracking.step_times import TimeSplit
from torch_frame.tracking.storage import MetricStorage
from torch_frame.training.ema import EMA
from torch_frame.training.precision import Precision
from torch_frame.training.schedule_free import ScheduleFree

STAGES = (
    "before_train",
    "after_train",
    "before_epoch",
    "after_epoch",
    "before_iter",
    "after_iter",
    "before_update",
    "after_update",
    "on_exception",
    "close",
)


class Length(Protocol):
    """Where a run ends: `torch_frame.run.length.RunLength`.

    Attributes:
        limit_batches: an epoch and an evaluation have at most so many batches: a dry run; None: all.
    """

    own_max_iters: int | None
    """Batches in the run, if its length is given in batches."""

    limit_batches: int | None

    @property
    def batches_in_epoch(self) -> int | None:
        """Of the epoch under way, as it will be trained; None if that is not known."""
        ...

    def is_last_epoch(self) -> bool:
        """The epoch under way is the last, as far as that is known."""
        ...

    def is_over(self) -> bool:
        """Nothing is left to train."""
        ...

    def iters_left(self) -> int | None:
        """Batches that are still to be trained; None if that is not known."""
        ...


class HookTrainer(Protocol):
    """What a hook may use of its trainer, whichever trainer that is. Trainers are checked against it by mypy.

    The attributes may be set, by hooks and by scripts; the properties are read only.

    Attributes:
        model: the model that trains, in its wrapper if it has one.
        optimizer: one, or as it was given: a tuple, or a mapping of names.
        lr_scheduler: the scheduler inside its warm-up (`LRWarmupScheduler`), in the same form.
        data_loader: of the training.
        max_epochs: epochs of the run; None if `max_iters` alone ends it.
        start_epoch: index of the epoch that this `train()` began with.
        should_stop: set it to True to end the run at the next safe point: after this batch, or with the epoch.
    """

    model: nn.Module
    optimizer: Any
    lr_scheduler: Any
    data_loader: Iterable[Any]
    max_epochs: int | None
    start_epoch: int
    should_stop: bool

    # ------------------------------------------------------------ where the run stands; all count from 0

    @property
    def epoch(self) -> int:
        """Index of the epoch under way, or of the last one."""
        ...

    @property
    def inner_iter(self) -> int:
        """Index in its epoch of the batch under way, or of the last one."""
        ...

    @property
    def cur_iter(self) -> int:
        """Index in the run of the batch under way, or of the last one."""
        ...

    @property
    def epoch_len(self) -> int | None:
        """Batches in an epoch; None if the loader has no length."""
        ...

    @property
    def max_iters(self) -> int | None:
        """Batches in the whole run, by whichever of `max_epochs` and `max_iters` comes first; None if that is not known."""
        ...

    @property
    def length(self) -> Length:
        """Where the run ends."""
        ...

    @property
    def window_open(self) -> bool:
        """The gradients of some batches wait for the rest of their window."""
        ...

    @property
    def progress(self) -> Progress:
        """The counters."""
        ...

    @property
    def resumed_iter(self) -> int | None:
        """Iterations that were done when this `train()` resumed the run; None if it began anew."""
        ...

    # ------------------------------------------------------------ model and values

    @property
    def model_or_module(self) -> nn.Module:
        """The bare model."""
        ...

    @property
    def schedule_free(self) -> ScheduleFree:
        """Switches schedule-free optimizers: `with trainer.schedule_free.shown():` around an evaluation of your own."""
        ...

    @property
    def model_evaluate(self) -> nn.Module:
        """The model to evaluate: EMA's if EMA is on."""
        ...

    @property
    def model_ema(self) -> EMA | None: ...

    @property
    def device(self) -> torch.device:
        """Where the model and the batches are."""
        ...

    @property
    def precision(self) -> Precision:
        """That the steps are computed in."""
        ...

    @property
    def strategy(self) -> Strategy:
        """Which rank this is, and what is done together with the others."""
        ...

    @property
    def hook_strategy(self) -> Strategy:
        """What hooks do together: `strategy`, or one process if only rank 0 has hooks."""
        ...

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group."""
        ...

    @property
    def metric_storage(self) -> MetricStorage:
        """The run's values by name."""
        ...

    def log(self, *args: Any, **kwargs: Any) -> None:
        """log(iter, name=value, ..., smooth=True, window_size=None)."""
        ...

    def value(self, name: str) -> float:
        """What a name is worth now: `MetricStorage.value`."""
        ...

    def add_figure(self, name: str, figure: Any, step: int | None = None) -> None:
        """Give a matplotlib figure to the writers, as a picture."""
        ...

    @property
    def run_media(self) -> Media:
        """Brings pictures, texts and histograms to the writers."""
        ...

    @property
    def run_parameters(self) -> dict[str, Any]:
        """The run's settings as numbers, texts and booleans."""
        ...

    def log_param(self, *args: Any, **kwargs: Any) -> None:
        """Lines to put into the log when training begins."""
        ...

    def check_main(self) -> bool:
        """This is the process that writes and prints."""
        ...

    def register(self, name: str, thing: Any) -> None:
        """Keep an object's state in the checkpoints; in `before_train` at the latest."""
        ...

    # ------------------------------------------------------------ files and hooks

    @property
    def work_dir(self) -> str: ...

    @property
    def ckpt_dir(self) -> str: ...

    @property
    def tb_log_dir(self) -> str: ...

    @property
    def hooks(self) -> tuple[HookBase, ...]:
        """The registered hooks, in the order they run; `register_hooks` adds to them."""
        ...

    def register_hooks(self, hooks: Iterable[HookBase | None]) -> None:
        """Add hooks behind those there are."""
        ...

    def save_at_safe_point(
        self, file_name: str, save_single_model: bool = True, then_remove: Iterable[str] = ()
    ) -> None:
        """Ask for a save: weights are copied now, a whole state at the next safe point; both are written there."""
        ...

    def save_checkpoint(self, file_name: str, save_single_model: bool = True, print_info: bool = False) -> None:
        """Save there and then."""
        ...

    def load_checkpoint(
        self, path: str | os.PathLike[str] | None = None, checkpoint: Mapping[str, Any] | None = None
    ) -> object:
        """Continue a saved run, or begin with given weights."""
        ...

    def wait_for_saves(self) -> None:
        """Return when the files of the save under way, and the weights that were asked for, are complete."""
        ...

    def check_stop(self) -> None:
        """End the run here if a signal asks for it; for hooks that work for long."""
        ...


class HookBase:
    """Base of hooks: override the stages you need, the trainer calls only those.

    The order of calls:

        restore a checkpoint, if one was loaded
        before_train
        for each epoch:
            before_epoch                        # not repeated if a run resumes behind it, inside the epoch
            for each batch:
                before_iter
                forward, backward
                if a window of gradient_accumulation_steps batches is complete, or the epoch ends:
                    unscale, mean of the window
                    before_update               # what it changes of the gradient counts
                    finite?, clip, optimizer.step, scheduler (per iteration), EMA
                    after_update                # only after an update that was made
                after_iter                      # this batch's values are recorded
                a safe point, if a window is complete: saves that were asked for are carried out
            scheduler (per epoch)
            after_epoch                         # evaluate, ask for saves, log
            a safe point
        after_train                             # a normal end
        on an exception: on_exception(error)
        always: close

    Hooks of one stage run in the order they were registered in, LoggerHook last. A hook that raises ends the run;
    in `close` all hooks are called all the same.

    Attributes:
        trainer: the trainer, from `register_hooks` on (a weak reference: hooks and trainer do not keep each other alive).
        time_split: of a hook that wants the run's time split; the trainer and the calls of all hooks then tell it.
        idle_stages: stages that this object does not need although its class has them; they are not called.
        identified_by: names of attributes that a saved state has to agree in to be this hook's, such as `("prefix",)`. Among
            several hooks of a class all attributes tell them apart, as they are when the hooks are registered: numbers, texts,
            flags, containers of these, functions by their names, other objects by their classes.
    """

    idle_stages: frozenset[str] = frozenset()
    time_split: TimeSplit | None = None
    identified_by: tuple[str, ...] = ()

    _begun_run: str
    """Of the run whose before_train the hook has been through."""

    trainer: HookTrainer = None  # type: ignore[assignment]  # set when the hook is registered

    @property
    def asks_in_steps(self) -> bool:
        """On several ranks: what the hook wants in `before_iter`, `before_update`, `after_update` or `after_iter` (a save,
        `should_stop`) counts at this very batch, so the ranks ask each other after each one. False (a class attribute will do):
        they ask when 0.1 s have passed, which is faster if steps are short."""
        return True

    def before_train(self) -> None:
        """Before the first epoch, after a checkpoint was restored."""

    def after_train(self) -> None:
        """After the last epoch."""

    def before_epoch(self) -> None:
        """Before an epoch's first batch."""

    def after_epoch(self) -> None:
        """After an epoch's last batch."""

    def before_iter(self) -> None:
        """Before a batch's forward pass."""

    def after_iter(self) -> None:
        """After a batch; its values are in `metric_storage`."""

    def before_update(self) -> None:
        """Before the gradient is clipped and used: the mean over the window and the ranks, unscaled."""

    def after_update(self) -> None:
        """After an update that was made: optimizer, a per-iteration scheduler, EMA (of a dict of optimizers: before EMA)."""

    def on_exception(self, error: BaseException) -> None:
        """When training ends by an exception, Ctrl-C included; it reaches the caller afterwards."""

    def close(self) -> None:
        """At the very end, whatever happened: close files, stop threads."""

    def check(self) -> None:
        """Before the run begins and before anything is written: raise `SettingError` if the hook cannot do its work."""

    def followed_metrics(self) -> list[tuple[str, str]]:
        """The metrics that the hook depends on, as (what follows it, name): checked after the first step, if possible."""
        return []

    def logged_metrics(self) -> set[str] | None:
        """The names that the hook logs beside the step's own; None: not known before it has."""
        return None

    def expected_names(self) -> Iterable[str]:
        """The names that the hook will log, as far as they are known now: columns of the table, blank until there is a value."""
        return sorted(self.logged_metrics() or ())

    def metric_prefixes(self) -> list[str]:
        """First words of the names that the hook logs, which writers group them by: `val` of `val_acc`."""
        return []

    def higher_is_better(self, name: str) -> bool | None:
        """What the hook knows of a metric that it logs, by its full name; None: nothing."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this hook.

        Plain types, tensors, and what `torch_frame.checkpoint.values` lists (arrays, dates, paths, sets, enums, generators of
        random numbers, ...) reach `load_state_dict` as they were; anything else is refused before the first step.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take on the state of the run that is resumed."""

    @property
    def saves_last_state(self) -> bool:
        """The hook saves the whole state at the run's end, so one is saved at an early end too."""
        return False

    @property
    def checkpointable(self) -> bool:
        """The hook has state of its own to save."""
        return type(self).state_dict is not HookBase.state_dict

    @property
    def class_name(self) -> str:
        return type(self).__name__

    @property
    def metric_storage(self) -> MetricStorage:
        return self.trainer.metric_storage

    def log(self, *args: Any, **kwargs: Any) -> None:
        """`trainer.log`: log(iter, name=value, ..., smooth=True, window_size=None)."""
        self.trainer.log(*args, **kwargs)

    # ------------------------------------------------------------ is it time?

    def every_n_epochs(self, n: int) -> bool:
        """This epoch is the n-th, 2n-th, ... one; never for n <= 0."""
        return n > 0 and (self.trainer.epoch + 1) % n == 0

    def every_n_iters(self, n: int) -> bool:
        """This batch is the n-th, 2n-th, ... of the run; never for n <= 0."""
        return n > 0 and (self.trainer.cur_iter + 1) % n == 0

    def every_n_inner_iters(self, n: int) -> bool:
        """This batch is the n-th, 2n-th, ... of its epoch; never for n <= 0."""
        return n > 0 and (self.trainer.inner_iter + 1) % n == 0

    def is_last_epoch(self) -> bool:
        """This epoch is the run's last: `max_epochs` or `max_iters` is reached in it, or `trainer.should_stop` is set.

        Of a loader without a length it is not known before its end that `max_iters` is reached.
        """
        return self.trainer.length.is_last_epoch() or self.trainer.should_stop

    def is_last_iter(self) -> bool:
        """This batch is the run's last, as far as `max_iters` or the loader's length tells."""
        return self.is_last_epoch() and self.is_last_inner_iter()

    def is_last_inner_iter(self) -> bool:
        """This batch is its epoch's last, as far as `max_iters` or the loader's length tells."""
        return self.trainer.inner_iter + 1 == self.trainer.length.batches_in_epoch


def is_ours(kind: type) -> bool:
    """A class of torch-frame's own, not a user's subclass."""
    return kind.__module__.partition(".")[0] == "torch_frame"

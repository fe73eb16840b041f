"""HookBase: what runs beside the loop, and when."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_frame.tracking.history import MetricStorage
    from torch_frame.trainer import Trainer

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


class HookBase:
    """Base of hooks: override the stages you need, the trainer calls only those.

    The order of calls:

        restore a checkpoint, if one was loaded
        before_train
        for each epoch:
            before_epoch                        # not repeated where a run resumes inside an epoch
            for each batch:
                before_iter
                forward, backward
                where a window of gradient_accumulation_steps batches is complete, or the epoch ends:
                    before_update
                    unscale, finite?, clip, optimizer.step, scheduler (per iteration), EMA
                    after_update
                after_iter                      # this batch's values are recorded
                a safe point, where a window is complete: saves that were asked for are carried out
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
        idle_stages: stages that this object does not need although its class has them; they are not called.
    """

    idle_stages: frozenset[str] = frozenset()

    trainer: Trainer = None  # type: ignore[assignment]  # set when the hook is registered

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
        """Before gradients are unscaled, clipped and used; they are complete."""

    def after_update(self) -> None:
        """After the optimizer, a per-iteration scheduler and EMA."""

    def on_exception(self, error: BaseException) -> None:
        """When training ends by an exception, Ctrl-C included; it goes on to the caller afterwards."""

    def close(self) -> None:
        """At the very end, whatever happened: close files, stop threads."""

    def check(self) -> None:
        """Before the run begins and before anything is written: raise `SettingError` where the hook cannot do its work."""

    def followed_metrics(self) -> list[tuple[str, str]]:
        """The metrics that the hook depends on, as (what follows it, name): checked after the first step, where possible."""
        return []

    def logged_metrics(self) -> set[str] | None:
        """The names that the hook logs beside the step's own; None: not known before it has."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this hook, in plain types and tensors."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of the run that is resumed."""

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
        """This epoch is the run's last: `max_epochs` is reached, or somebody has set `trainer.should_stop`."""
        return self.trainer.epoch >= self.trainer.max_epochs - 1 or self.trainer.should_stop

    def is_last_iter(self) -> bool:
        """This batch is the run's last; never where the loader has no length."""
        return self.is_last_epoch() and self.is_last_inner_iter()

    def is_last_inner_iter(self) -> bool:
        """This batch is its epoch's last; never where the loader has no length."""
        return self.trainer.inner_iter + 1 == self.trainer.epoch_len

"""Trainer: the loop, and what a run needs around it.

Read `train`, `train_one_epoch` and `train_one_iter` first: they are a batch's whole way.
"""

from __future__ import annotations

import functools
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_frame import state
from torch_frame.banner import banner
from torch_frame.checkpoint.background import Background
from torch_frame.checkpoint.snapshot import HostBuffers
from torch_frame.checkpoint.weights import WeightsReport
from torch_frame.data.move import move_to_device, resolve_device
from torch_frame.data.prefetch import prefetch_to_device
from torch_frame.data.source import Source, source_of
from torch_frame.distributed.comm import is_main
from torch_frame.errors import NonFiniteError, SettingError
from torch_frame.files import SaveRequest, SaveRequests
from torch_frame.hooks.base import HookBase
from torch_frame.hooks.caller import HookCaller, checked_hooks
from torch_frame.hooks.checkpoint import CheckpointerHook
from torch_frame.hooks.evaluate import EvaluationHook
from torch_frame.hooks.logger import LoggerHook
from torch_frame.progress import Progress
from torch_frame.run import checks
from torch_frame.run.work_dir import WorkDir
from torch_frame.stopping import StopRequested, StopSignals
from torch_frame.tracking.bar import ProgressBar
from torch_frame.tracking.console import logger, open_run_log
from torch_frame.tracking.history import MetricStorage
from torch_frame.training.ema import EMA
from torch_frame.training.finite import Columns, first_nonfinite, nonfinite_message
from torch_frame.training.losses import describe, read_losses
from torch_frame.training.precision import Precision, PrecisionName, choose_precision
from torch_frame.training.schedules import Interval, LRWarmupScheduler, WarmupMethod
from torch_frame.training.update import OnNonFinite, Update, check_weight
from torch_frame.types import Device, Number, StepFn, Values

__all__ = ["MetricStorage", "Trainer", "logger"]

CreateNewDir = Literal["time_s", "time_m", "time_h", "time_d", "count"]


class Trainer:
    """Trains a model, epoch by epoch.

    The model is called with a batch and returns its loss; see `torch_frame.training.losses` for the forms.

    Args:
        model: called as `model(batch)`, or by `step_fn`.
        optimizer: of the model's parameters.
        lr_scheduler: any torch scheduler of that optimizer; None: a constant learning rate.
        data_loader: a DataLoader, or any iterable of batches that can be iterated again for each epoch; a list too.
        max_epochs: epochs to train; 0 trains nothing.
        work_dir: where the run's files go: `checkpoints/`, `tb_logs/`, `log.txt`, `metrics.jsonl`. Made when `train()` begins.
        clip_grad_norm: clip the gradient to this 2-norm; 0 or less: don't.
        enable_amp: fp16 with a gradient scaler, on CUDA (1.7's switch; `precision` says more).
        warmup_method: "constant", "linear", "exp" or None.
        warmup_iters: length of the warm-up, in updates.
        warmup_factor: the learning rate begins at this fraction.
        hooks: see `HookBase`; None: `[CheckpointerHook(), LoggerHook()]`; `[]`: none.
        use_ema: keep an exponential moving average of the weights, evaluate it and save it as `best.pth`.
        ema_decay: its decay.
        create_new_dir: where `work_dir` exists already: None uses it; "time_s", "time_m", "time_h", "time_d" make a new one with
            the time behind its name, "count" one with a number.
        step_fn: (model, batch) -> what a model may return; for models that don't hold their loss.
        device: where the model and batches go; None: where the model is.
        precision: "fp32", "bf16" or "fp16".
        gradient_accumulation_steps: batches in an update; an epoch's last window holds what is left.
        loss_weight: (batch) -> number of items or tokens that its loss is a mean of; weights the batches of a window.
        lr_scheduler_interval: "epoch" or "iter": the scheduler steps after each epoch, or after each update.
        lr_scheduler_metric: name of the metric that ReduceLROnPlateau follows.
        on_nonfinite: "raise" where a loss or a gradient is NaN or infinite, or "skip" that update.
        seed: of the data's order and augmentation; None: that of the loader's own generator, if it was given one, else
            `torch.initial_seed()`. Kept in the checkpoint.
        resume: None; "auto": go on from the newest whole checkpoint in `work_dir`, which is used as it is named, or begin anew
            where there is none; a path: go on from that file, as `load_checkpoint(path)` does. The state is restored when
            `train()` begins, so that hooks registered until then get theirs.
        take_over: give a plain DataLoader an order and augmentation seeds that are a function of (seed, epoch, position), so that
            they do not depend on workers and any place is reached directly; False: leave it as torch has it.
        compile: compile the model in place (`nn.Module.compile`), which keeps the names of its weights; a dict is passed to
            torch.compile. EMA's copy, which is only evaluated, is not compiled.

    Attributes:
        progress: the counters (`torch_frame.progress.Progress`).
        should_stop: set it to True to end the run after the epoch under way.
        metric_storage: the run's values by name.
        model_ema: the `EMA`, or None.
        lr_scheduler: the scheduler inside its warm-up (`LRWarmupScheduler`).

    >>> import torch
    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> trainer = Trainer(
    ...     model,
    ...     optimizer,
    ...     None,
    ...     [torch.ones(4, 2)],
    ...     max_epochs=2,
    ...     hooks=[],
    ...     step_fn=lambda model, batch: model(batch).square().mean(),
    ... )
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        lr_scheduler: Any,
        data_loader: Iterable[Any],
        max_epochs: int,
        work_dir: str | os.PathLike[str] = "work_dir",
        clip_grad_norm: float = 0.0,
        enable_amp: bool = False,
        warmup_method: WarmupMethod | None = None,
        warmup_iters: int = 1000,
        warmup_factor: float = 0.001,
        hooks: Iterable[HookBase | None] | None = None,
        use_ema: bool = False,
        ema_decay: float = 0.9999,
        create_new_dir: CreateNewDir | None = "time_s",
        *,
        step_fn: StepFn | None = None,
        device: Device | None = None,
        precision: PrecisionName | None = None,
        gradient_accumulation_steps: int = 1,
        loss_weight: Callable[[Any], Tensor | float] | None = None,
        lr_scheduler_interval: Interval = "epoch",
        lr_scheduler_metric: str | None = None,
        on_nonfinite: OnNonFinite = "raise",
        seed: int | None = None,
        take_over: bool = True,
        resume: str | os.PathLike[str] | None = None,
        compile: bool | Mapping[str, Any] = False,
    ) -> None:
        checks.check_arguments(model, optimizer, lr_scheduler, data_loader)
        checks.check_numbers(max_epochs, gradient_accumulation_steps, clip_grad_norm)
        checks.check_functions(step_fn=step_fn, loss_weight=loss_weight)
        checks.check_flags(enable_amp=enable_amp, use_ema=use_ema, take_over=take_over)
        checks.check_warmup_and_ema(warmup_iters, warmup_factor, ema_decay)
        checks.check_scheduler(lr_scheduler, lr_scheduler_interval, lr_scheduler_metric)
        checks.check_choice("on_nonfinite", on_nonfinite, ("raise", "skip"))
        self.device = checks.device_of(model) if device is None else resolve_device(device)
        self.model = model if device is None else model.to(self.device)
        self.optimizer = optimizer
        self.data_loader = data_loader
        self.max_epochs = max_epochs
        self.step_fn = step_fn
        self.loss_weight = loss_weight
        self.model_ema = EMA(model, ema_decay) if use_ema else None
        self.precision = Precision(choose_precision(precision, enable_amp, self.device), self.device)
        self.lr_scheduler = LRWarmupScheduler(
            lr_scheduler, None, warmup_method, warmup_iters, warmup_factor, optimizer=optimizer
        )
        if compile is not False:
            self.model_or_module.compile(**({} if compile is True else compile))
        self.lr_scheduler_interval = lr_scheduler_interval
        self.lr_scheduler_metric = lr_scheduler_metric
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.on_nonfinite = on_nonfinite
        self.updater = Update(
            self.model,
            optimizer,
            self.precision,
            clip_grad_norm=clip_grad_norm,
            window_len=gradient_accumulation_steps,
            on_nonfinite=on_nonfinite,
            on_cpu=self.device.type == "cpu",
        )

        self.seed = checks.checked_seed(seed, data_loader)
        self.seed_is_explicit = seed is not None
        self.take_over = take_over
        self.source = self._source()
        self.progress = Progress()
        self.should_stop = False
        self.start_epoch = 0
        self.metric_storage = MetricStorage()
        self.metric_storage.declare("lr", smooth=False)
        proxy = weakref.proxy(self)  # the storage must not keep the trainer, and so the model, alive
        self.metric_storage.on_read = lambda columns: proxy._check_read_values(columns)
        self.resumed_iter: int | None = None
        self._resumed_state: Mapping[str, Any] | None = None
        self._resume = checks.checked_resume(resume)

        self._work_dir = WorkDir(work_dir, None if resume == "auto" else create_new_dir)
        self._info_params: list[str] = []
        self._news: list[tuple[int, str]] = []  # (level, what happened before there was a log)
        self._saves = SaveRequests()
        self._background = Background(on_failure=lambda: proxy._look())
        self._host_buffers = HostBuffers()
        self.stop_signals = StopSignals(on_first=lambda: proxy._look())
        self._something_waits = False  # for the next safe point: a save, a stop signal, a save that failed
        self.before_after_epoch: Mapping[str, Any] | None = None  # set in after_epoch: what a stop there saves
        self._names_checked = False
        self.pbar = ProgressBar(disable=True)  # overrides of train_one_iter written for 1.7 put their values there

        self.hook_caller = HookCaller()
        self.stages = self.hook_caller.stages
        self.register_hooks([CheckpointerHook(), LoggerHook()] if hooks is None else hooks)

    # ---------------------------------------------------------------- the loop

    def train(self, console_log_level: int = 2, file_log_level: int = 2) -> None:
        """Train from where the run stands to `max_epochs`.

        SIGTERM, SIGUSR1 and Ctrl-C end the run at the next point where its state is whole: `latest.pth` is saved, whatever the
        hooks, `after_train` is called, and the process ends as by that signal (`SystemExit(143)`, `SystemExit(138)`,
        `KeyboardInterrupt`). A second Ctrl-C stops at once. Outside the main thread no signal is listened to.

        Args:
            console_log_level: 0..5 = NOTSET, DEBUG, INFO, WARNING, ERROR, FATAL.
            file_log_level: the same for `log.txt`.
        """
        self._restore()
        self._check()
        self._work_dir.claim()
        self.source = self._source()  # the seed may be a checkpoint's by now
        failed = True
        log_file = self.log_file if is_main() else None
        with open_run_log(log_file, console_log_level, file_log_level), self.stop_signals.listening():
            try:
                self._begin()
                self.call("before_train")
                self._restore_rng()
                try:
                    while self.progress.epoch < self.max_epochs and not self.should_stop:
                        self.safe_point()  # a signal may have come before the first step
                        self.progress.begin_epoch()
                        if not self.progress.epoch_trained:
                            self.train_one_epoch()
                        self.before_after_epoch = state.before_after_epoch(self)
                        self.call("after_epoch")
                        self._step_plateau()
                        self._save_if_stopping()
                        self.before_after_epoch = None
                        self.progress.end_epoch()
                        self.safe_point()
                except StopRequested:
                    self._save_for_stop()
                self.call("after_train")
                self._background.wait()
                failed = False
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    self._background.cancel()  # at once: a file that is half written is given up
                self._report(error)
                raise
            finally:
                self.resumed_iter = None  # another train() goes on where this one ended
                self.before_after_epoch = None
                self.source.close()
                self._close(failed)
        if self.stop_signals.received is not None:
            self.stop_signals.end()

    def evaluate(self) -> dict[str, float]:
        """Run the evaluations of the registered hooks now; nothing is logged or saved, training is undisturbed.

        Returns:
            full name -> value, such as "eval_acc". What is no number is in each hook's `results`.

        Raises:
            SettingError: where no hook evaluates.
        """
        hooks = [hook for hook in self.hooks if isinstance(hook, EvaluationHook)]
        if not hooks:
            raise SettingError("No hook evaluates. Register one: hooks=[EvalHook(...)] or EvalTotalHook(...).")
        return {name: value for hook in hooks for name, value in hook.evaluate().items()}

    def train_one_epoch(self) -> None:
        """The batches' way: loader -> device -> losses -> update."""
        if self.progress.inner_iter == 0:
            self.call("before_epoch")
        self.model.train()
        self.updater.refresh()
        for batch in self.batches():  # on the device, prefetched
            self.progress.begin_iter()
            self.call("before_iter")
            self._lr_used = self.lr
            values = self.train_one_iter(batch)  # forward -> losses -> backward -> update
            self.progress.end_iter(self._position)
            self.record(values)  # nothing is read from the device until somebody looks
            self.call("after_iter")
            self.safe_point()
        self._finish_epoch()

    def train_one_iter(self, batch: Any) -> Mapping[str, Tensor | Number]:
        """Forward, losses, backward and, where the window is complete, the update.

        Override it for another way to train (several optimizers, say); return the values to record, by name.

        Args:
            batch: on the model's device.

        Returns:
            name -> one-element tensor or number, `total_loss` among them.
        """
        updater = self.updater
        updater.begin()
        if self.step_fn is None and self.precision.is_full:
            output = self.model(batch)
        else:
            with self.precision.autocast():
                output = self.model(batch) if self.step_fn is None else self.step_fn(self.model, batch)
        total, values = read_losses(output)
        try:
            weight = 1.0 if self.loss_weight is None else check_weight(self.loss_weight(batch))
            updater.backward(total, weight)
            if self._window_complete():
                for before_update in self.stages["before_update"]:
                    before_update()
                if updater.step():
                    self._after_step()
                for after_update in self.stages["after_update"]:
                    after_update()
                if updater.grad_norm is not None:
                    values["grad_norm"] = updater.grad_norm
        except NonFiniteError as error:
            raise self._nonfinite(str(error), values) from None
        return values

    def batches(self) -> Iterator[Any]:
        """The epoch's batches, on the device; of a resumed epoch those that are left."""
        placed = self.source.epoch(self.progress.epoch, self.progress.position)
        if self.device.type == "cuda":
            placed = prefetch_to_device(placed, self.device)
        self._fetch_started = time.perf_counter()
        signals, may_interrupt = self.stop_signals, self.source.interruptible
        try:
            signals.begin_wait(may_interrupt and not self.updater.window_open)
            for batch, position in placed:
                signals.may_interrupt = False
                moved = move_to_device(batch, self.device)
                self._position = position
                self._data_time = time.perf_counter() - self._fetch_started
                yield moved
                self._fetch_started = time.perf_counter()
                signals.begin_wait(may_interrupt and not self.updater.window_open)
        finally:  # a fetch that failed, too: what is waited for afterwards is not broken off
            signals.may_interrupt = False

    def record(self, values: Values) -> None:
        """Keep a step's values and times for whoever looks at them."""
        if type(values) is not dict and not isinstance(values, Mapping):
            raise TypeError(
                f"train_one_iter returned {type(values).__name__}; it has to return a dict of the values to record, "
                "for example {'total_loss': loss}."
            )
        row: dict[str, Tensor | Number] = {**values}
        for name, value in values.items():
            if isinstance(value, Tensor):
                row[name] = value.item() if value.is_cpu else _kept(value)
        row["data_time"] = self._data_time
        row["iter_time"] = time.perf_counter() - self._fetch_started
        row["lr"] = self._lr_used
        self.metric_storage.record(self.progress.iter - 1, row)
        if not self._names_checked:
            self._check_names()

    def call(self, stage: str) -> None:
        """Run the hooks of a stage."""
        for run in self.stages[stage]:
            run()

    # ---------------------------------------------------------------- between the steps

    def _window_complete(self) -> bool:
        window = self.gradient_accumulation_steps
        return window == 1 or self.updater.num_micro_batches == window or self.inner_iter + 1 == self.epoch_len

    def _after_step(self) -> None:
        """What follows an optimizer step: schedule, EMA, count."""
        self.lr_scheduler.step()
        if self.lr_scheduler_interval == "iter":
            self.lr_scheduler.step_scheduler()
        if self.model_ema is not None:
            self.model_ema.update(self.model)
        self.progress.num_updates += 1

    def _finish_epoch(self) -> None:
        if self.updater.window_open:  # the loader yielded fewer batches than its length says, or has none
            for before_update in self.stages["before_update"]:
                before_update()
            try:
                if self.updater.step():
                    self._after_step()
            except NonFiniteError as error:
                latest = {name: buffer.latest for name, buffer in self.metric_storage.items()}
                raise self._nonfinite(str(error), latest) from None
            for after_update in self.stages["after_update"]:
                after_update()
            if self.updater.grad_norm is not None:
                self.log(self.cur_iter, grad_norm=self.updater.grad_norm)
        if self.progress.inner_iter == 0:
            raise SettingError(checks.empty_loader_message(self.data_loader, self.epoch))
        if self.lr_scheduler_interval == "epoch" and not self.lr_scheduler.needs_metric:
            self.lr_scheduler.step_scheduler()
        self.progress.end_batches()

    def _step_plateau(self) -> None:
        """ReduceLROnPlateau: a step for each new value of its metric."""
        name = self.lr_scheduler_metric
        if name is None:
            return
        if name in self.metric_storage:
            self.lr_scheduler.step_by_metric(self.metric_storage[name].avg, self.metric_storage.latest_iters()[name])
        elif self.epoch == self.max_epochs - 1:
            raise SettingError(
                f"lr_scheduler_metric is {name!r}, but nothing has been logged under this name; there are: "
                f"{', '.join(sorted(self.metric_storage))}."
            )

    def _save_if_stopping(self) -> None:
        """A run that ends early leaves a `latest.pth`, also where the hook that writes it ran before the decision."""
        if self.should_stop and any(isinstance(hook, CheckpointerHook) and hook.save_last for hook in self.hooks):
            self.save_at_safe_point("latest.pth", save_single_model=False)

    def _source(self) -> Source:
        return source_of(self.data_loader, self.seed, take_over=self.take_over, last_epoch=self.max_epochs - 1)

    def _check_read_values(self, columns: Columns) -> None:
        """Values of steps have been read from the device: are losses and gradients finite?"""
        if self.on_nonfinite == "skip" or self.precision.scaler is not None:
            return
        bad = first_nonfinite(columns)
        if bad is not None:
            raise self._nonfinite(f"{bad.name} is not finite", bad.values, bad.iteration)

    def _nonfinite(self, what: str, values: Values, iteration: int | None = None) -> NonFiniteError:
        iteration = self.cur_iter if iteration is None else iteration
        return NonFiniteError(nonfinite_message(what, describe(values), self.epoch, iteration))

    # ---------------------------------------------------------------- begin and end

    def _check(self) -> None:
        if checks.device_of(self.model) != self.device:
            raise SettingError(
                f"The model was on {self.device} when the Trainer was made and is on {checks.device_of(self.model)} now. "
                "Move it before, or pass device= to the Trainer."
            )
        checks.check_loader(self.data_loader, self.max_epochs - self.progress.epoch, self.epoch_len)
        if self.progress.epoch < self.max_epochs:
            checks.check_one_cycle(
                self.lr_scheduler.scheduler, self.lr_scheduler_interval, self.updates_per_epoch, self.max_epochs
            )
        for hook in self.hooks:
            hook.check()

    def _begin(self) -> None:
        state.remove_halves(self.ckpt_dir)
        self.start_epoch = self.progress.epoch
        self.should_stop = False
        self.updater.reset()
        self.metric_storage.allow_repeats()
        if self.source.is_ours:
            logger.info(
                "The DataLoader's order and augmentation are functions of seed %d and the position.", self.source.seed
            )
        if self.model_ema is not None:
            self.model_ema.bind(self.model)
        self.hook_caller.warn_of_unclaimed()
        logger.info("\n%s", banner(self))
        for level, line in self._news:
            logger.log(level, line)
        self._news.clear()
        if self._info_params:
            logger.info("\n%s", "\n".join(self._info_params))
        if self.progress.epoch >= self.max_epochs:
            logger.info(
                "Nothing to train: max_epochs is %d, and %d epochs are done.", self.max_epochs, self.progress.epoch
            )
        else:
            logger.info("Training begins at epoch %d of %d.", self.start_epoch + 1, self.max_epochs)

    def _check_names(self) -> None:
        """Once, after the first step: names that are followed exist, unless a hook may yet log what it has not told."""
        self._names_checked = True
        logged = [hook.logged_metrics() for hook in self.hooks]
        known = set(self.metric_storage).union(*(names for names in logged if names is not None))
        wanted = [pair for hook in self.hooks for pair in hook.followed_metrics()]
        if self.lr_scheduler_metric is not None:
            wanted.append(("lr_scheduler_metric", self.lr_scheduler_metric))
        if None not in logged:
            checks.check_metric_names(wanted, known)

    def _report(self, error: BaseException) -> None:
        """Tell the hooks of an error; one that fails at it does not hide the error itself."""
        checks.note_on_device(error, self.device)
        logger.error("Training ended in epoch %d, iteration %d: %s", self.epoch, self.cur_iter, type(error).__name__)
        for on_exception in self.stages["on_exception"]:
            try:
                on_exception(error)
            except Exception:
                logger.exception("A hook's on_exception failed as well")

    def _close(self, failed: bool) -> None:
        """Close all hooks; the first one that fails is raised, unless training failed before."""
        first: Exception | None = None
        try:
            self._background.wait()
        except Exception as error:
            logger.error("A save in the background failed: %s", error)
            first = error
        for close in self.stages["close"]:
            try:
                close()
            except Exception as error:
                logger.exception("A hook's close failed")
                first = first or error
        if first is not None and not failed:
            raise first

    # ---------------------------------------------------------------- checkpoints

    def save_at_safe_point(
        self, file_name: str, save_single_model: bool = True, then_remove: Iterable[str] = ()
    ) -> None:
        """Ask for a save; it is carried out when all hooks of the event have run and the counters are advanced.

        Args:
            file_name: below `ckpt_dir`.
            save_single_model: the weights alone; False: the whole state.
            then_remove: files that are not needed any more once this one is written.
        """
        self._saves.add(file_name, save_single_model, then_remove)
        self._look()

    def safe_point(self) -> None:
        """Carry out the saves that were asked for and end where a signal asks for it, unless a window of gradients is open."""
        if self._something_waits and not self.updater.window_open:
            self._attend()

    def check_stop(self) -> None:
        """For hooks that work for long in `after_epoch`, between two pieces: end here where a signal asks for it.

        The run is saved as it was before `after_epoch`, and goes through it again when it is resumed.
        """
        if self.stop_signals.received is not None and self.before_after_epoch is not None:
            raise StopRequested

    def _look(self) -> None:
        self._something_waits = True

    def _attend(self) -> None:
        self._something_waits = False
        self._background.raise_failure()
        if self._saves:
            self._save(self._saves.take())
        if self.stop_signals.received is not None:
            raise StopRequested

    def _save(self, requests: Sequence[SaveRequest]) -> None:
        """Take a snapshot, and write it while training goes on."""
        if type(self).save_checkpoint is not Trainer.save_checkpoint:  # a subclass of 1.7 saves in its own way
            self._save_by_override(requests)
            return
        self._write_in_background(requests)

    def _save_by_override(self, requests: Sequence[SaveRequest]) -> None:
        for file_name, save_single_model, outdated in requests:
            self.save_checkpoint(file_name, save_single_model)
            state.remove(outdated)

    def _write_in_background(self, requests: Sequence[SaveRequest]) -> None:
        self._background.wait()  # whose snapshot is in the buffers
        files = self._host_buffers.copy(state.contents(self, requests))
        self._background.start(functools.partial(state.write_files, files, self._background.is_cancelled))

    def _save_for_stop(self) -> None:
        """The last save before the run ends by a signal: complete when this returns."""
        assert self.stop_signals.received is not None
        if self.before_after_epoch is not None:
            self._saves.take()  # asked for in an after_epoch that will be gone through again
        self._saves.add("latest.pth", save_single_model=False, then_remove=())
        self._save(self._saves.take())
        self._background.wait()
        name = self.stop_signals.received.name
        logger.warning("%s came: saved after iteration %d as %s/latest.pth.", name, self.progress.iter, self.ckpt_dir)

    def save_checkpoint(self, file_name: str, save_single_model: bool = True, print_info: bool = False) -> None:
        """Save there and then; the file is complete when this returns.

        Args:
            file_name: below `ckpt_dir`, or an absolute path. A full state called `latest.pth` keeps the one before it as
                `previous.pth`.
            save_single_model: the weights alone (EMA's where EMA is on), a plain `state_dict`; False: the whole state.
            print_info: log where it was written.

        Raises:
            CheckpointError: where it cannot be written; the file that was there before is untouched.
            NonFiniteError: where the weights hold NaN or infinite values.
        """
        self._work_dir.claim()
        self._write_in_background([SaveRequest(file_name, save_single_model, [])])
        self._background.wait()
        if print_info:
            logger.info("Saved %s", os.path.join(self.ckpt_dir, file_name))

    def wait_for_saves(self) -> None:
        """Return when the files of the save under way are complete: before somebody copies them, say. `train` ends so itself.

        Raises:
            CheckpointError: where a file could not be written.
            NonFiniteError: where the weights hold NaN or infinite values.
        """
        self._background.wait()

    def load_checkpoint(
        self, path: str | os.PathLike[str] | None = None, checkpoint: Mapping[str, Any] | None = None
    ) -> WeightsReport | None:
        """Continue a saved run, or begin with given weights.

        Args:
            path: a full state (`latest.pth`): looked for as given, then in the work dir's `checkpoints`, then in those of the
                newest `<work_dir>_*`. The run goes on in that file's work dir.
            checkpoint: weights alone, a `state_dict` such as `torch.load("best.pth")` gives; what fits is loaded.

        Returns:
            For weights, what was loaded and what was not.

        Raises:
            FileNotFoundError: with all the places looked at.
            CheckpointError: where the file is damaged, or does not fit this trainer; nothing is changed then.
        """
        if checkpoint is not None and path is None:
            report = state.load_weights_only(self, checkpoint)
            self._news.append((logging.INFO, f"Loaded weights only: {report}."))
            return report
        if path is None or checkpoint is not None:
            raise SettingError("load_checkpoint takes a path (a full state), or checkpoint= (weights): one of the two.")
        self._resume = None  # this one is it
        found = self._work_dir.find(path)
        self._take_up(found, state.read(found))
        return None

    def _restore(self) -> None:
        """What `resume=` asked for, once."""
        resume, self._resume = self._resume, None
        if resume == "auto":
            found = state.newest(self.ckpt_dir, self._news)
            if found is not None:
                self._take_up(*found)
        elif resume is not None:
            self.load_checkpoint(resume)

    def _take_up(self, path: str, saved: Mapping[str, Any]) -> None:
        state.restore(self, saved)
        self._resumed_state = saved
        self.resumed_iter = self.progress.iter
        self.start_epoch = self.progress.epoch
        self._work_dir.move_to(path)
        done = self.progress
        place = f"epoch {done.epoch + 1}, after {done.inner_iter} of its batches"
        counts = f"{done.iter} iterations and {done.num_updates} updates in all"
        self._news.append((logging.INFO, f"Resumed from {path}: {place}; {counts}."))
        differences = state.environment_differences(self, saved)
        if differences:
            text = "The run goes on, but not to the last bit as it would have, because " + "; ".join(differences) + "."
            self._news.append((logging.WARNING, text))

    def _restore_rng(self) -> None:
        if self._resumed_state is not None:
            state.restore_rng(self, self._resumed_state)
            self._resumed_state = None

    # ---------------------------------------------------------------- hooks and values

    def register_hooks(self, hooks: Iterable[HookBase | None]) -> None:
        """Add hooks behind those there are; LoggerHook stays last. None in the list is left out."""
        hooks = checked_hooks(hooks)
        for hook in hooks:
            hook.trainer = weakref.proxy(self)
        self.hook_caller.add(hooks)

    def check_main(self) -> bool:
        """This is the process that writes and prints (1.7's name)."""
        return is_main()

    def logger_print(self, string: str, function: Callable[[str], None] = logger.info) -> None:
        """Log on the main process (1.7's name)."""
        if is_main():
            function(string)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """`metric_storage.update`: log(iter, name=value, ..., smooth=True, window_size=None)."""
        self.metric_storage.update(*args, **kwargs)

    def log_param(self, *args: Any, **kwargs: Any) -> None:
        """Lines to put into the log when training begins: texts, and names with values."""
        self._info_params += [str(arg) for arg in args] + [f"{name}: {value}" for name, value in kwargs.items()]

    @property
    def hooks(self) -> list[HookBase]:
        """The registered hooks, in the order they run."""
        return list(self.hook_caller.hooks)

    @property
    def registered_hook_names(self) -> list[str]:
        return [hook.class_name for hook in self.hook_caller.hooks]

    # ---------------------------------------------------------------- where the run stands

    @property
    def epoch(self) -> int:
        """Index of the epoch under way, or of the last one."""
        return self.progress.current_epoch

    @property
    def inner_iter(self) -> int:
        """Index in its epoch of the batch under way, or of the last one."""
        return self.progress.current_inner_iter

    @property
    def cur_iter(self) -> int:
        """Index in the run of the batch under way, or of the last one."""
        return self.progress.current_iter

    @property
    def epoch_len(self) -> int | None:
        """Batches in an epoch; None where the loader has no length."""
        return checks.length_of(self.data_loader)

    @property
    def max_iters(self) -> int | None:
        """Batches in the whole run; None where the loader has no length."""
        return None if self.epoch_len is None else self.epoch_len * self.max_epochs

    @property
    def updates_per_epoch(self) -> int | None:
        """Optimizer steps in an epoch; None where the loader has no length."""
        return None if self.epoch_len is None else -(-self.epoch_len // self.gradient_accumulation_steps)

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def model_or_module(self) -> nn.Module:
        """The bare model, without the wrapper of DDP or DataParallel."""
        wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
        return self.model.module if isinstance(self.model, wrappers) else self.model

    @property
    def model_evaluate(self) -> nn.Module:
        """The model to evaluate and to use: EMA's where EMA is on."""
        return self.model_or_module if self.model_ema is None else self.model_ema.model

    @property
    def work_dir(self) -> str:
        """Where the run's files go; final once `train()` has begun."""
        return self._work_dir.path

    @property
    def ckpt_dir(self) -> str:
        return os.path.join(self.work_dir, "checkpoints")

    @property
    def tb_log_dir(self) -> str:
        return os.path.join(self.work_dir, "tb_logs")

    @property
    def log_file(self) -> str:
        return os.path.join(self.work_dir, "log.txt")


def _kept(value: Tensor) -> Tensor:
    """A value as it is now, unread: a tensor that nobody changes, without its graph."""
    return value.detach() if value.requires_grad else value.clone()

"""Trainer: the loop, and what a run needs around it.

Read `train`, `train_one_epoch` and `train_one_iter` first: they are a batch's whole way.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NoReturn

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_frame.checkpoint.weights import WeightsReport
from torch_frame.data.move import resolve_device
from torch_frame.data.workers import keep_parents_garbage
from torch_frame.distributed.comm import is_main
from torch_frame.distributed.strategy import Strategy
from torch_frame.errors import SettingError
from torch_frame.hooks import asking
from torch_frame.hooks.base import HookBase, HookTrainer
from torch_frame.hooks.caller import HookCaller, checked_hooks
from torch_frame.hooks.defaults import default_hooks
from torch_frame.hooks.evaluation import evaluate_all
from torch_frame.progress import Progress
from torch_frame.run import alike, checks, opening
from torch_frame.run.attributes import Attributes
from torch_frame.run.delegated import delegated, is_overridden, overridden
from torch_frame.run.feed import Feed
from torch_frame.run.length import RunLength
from torch_frame.run.modes import Modes
from torch_frame.run.plateau import step_by_metric
from torch_frame.run.ranks import Ranks
from torch_frame.run.resume import Found, Resumption, load_best
from torch_frame.run.run import Run
from torch_frame.run.saving import ASKED_BY_RANK_0, Contents, Saver, remove
from torch_frame.run.script_settings import AllSettings, Choice
from torch_frame.run.session import ended_by_signals, log_end_inside, log_late_signal, phase_of
from torch_frame.run.skipped import tell_of_left_out
from torch_frame.run.table import beside_hooks, contents, parts_of_hooks, run_parameters
from torch_frame.run.trained import FrozenParameters, frozen_parameters
from torch_frame.run.values import run_storage
from torch_frame.run.warm_up import warmed_up
from torch_frame.run.work_dir import WorkDir
from torch_frame.signals.interruption import StopRequested
from torch_frame.signals.stop import StopSignals
from torch_frame.tracking.bar import ProgressBar
from torch_frame.tracking.console import logger
from torch_frame.tracking.media import Media
from torch_frame.tracking.storage import MetricStorage
from torch_frame.training.ema import EMA
from torch_frame.training.finite import Columns, first_nonfinite
from torch_frame.training.losses import arguments_of_17, check_counted_once, read_losses
from torch_frame.training.metric_names import MetricNames
from torch_frame.training.optimization import Optimization, UpdateSettings, Warmup
from torch_frame.training.own_step import OwnStep
from torch_frame.training.precision import Precision, PrecisionName, choose_precision
from torch_frame.training.schedule_free import ScheduleFree
from torch_frame.training.schedules import Interval, WarmupMethod
from torch_frame.training.update import OnNonFinite, Update, check_weight
from torch_frame.types import Device, Number, StepFn

__all__ = ["MetricStorage", "Trainer", "logger"]

CreateNewDir = Literal["time_s", "time_m", "time_h", "time_d", "count"]


class Trainer:
    """Trains a model, epoch by epoch.

    The model is called with a batch and returns its loss; see `torch_frame.training.losses` for the forms.

    Args:
        model: called as `model(batch)`, or by `step_fn`.
        optimizer: of the model's parameters; a list of optimizers, which step together; or a dict of names, for a
            `train_one_iter` of your own (docs/optimizers.md).
        lr_scheduler: any torch scheduler of that optimizer, or a list or dict of them as of optimizers; None: a constant rate.
        data_loader: a DataLoader, or any iterable of batches that can be iterated again for each epoch; a list too.
        max_epochs: epochs to train; 0 trains nothing. None: as many as `max_iters` takes, over an endless stream too.
        work_dir: where the run's files go: `checkpoints/`, `tb_logs/`, `log.txt`, `metrics.jsonl`. Made when `train()` begins.
        clip_grad_norm: clip the gradient to this 2-norm; 0 or less: don't.
        enable_amp: fp16 with a gradient scaler, on CUDA (1.7's switch; `precision` says more).
        warmup_method: "constant", "linear", "exp" or None.
        warmup_iters: length of the warm-up, in updates.
        warmup_factor: the learning rate begins at this fraction.
        hooks: see `HookBase`; None: `[CheckpointerHook(), LoggerHook()]`; `[]`: none.
        use_ema: keep an exponential moving average of the weights, evaluate it and save it as `best.pth`.
        ema_decay: its decay.
        create_new_dir: if `work_dir` exists already: None uses it, and puts files of another run aside unless it is resumed;
            "time_s", "time_m", "time_h", "time_d" make a new one with the time behind its name, "count" one with a number.
        step_fn: (model, batch) -> what a model may return; for models that don't hold their loss.
        device: where the model and batches go; None: where the model is.
        precision: "fp32", "bf16" or "fp16".
        gradient_accumulation_steps: batches in an update; an epoch's last window holds what is left.
        loss_weight: (batch) -> number of items or tokens that its loss is a mean of; weights the batches of a window.
        lr_scheduler_interval: "epoch" or "iter": the scheduler steps after each epoch, or after each update.
        lr_scheduler_metric: name of the metric that ReduceLROnPlateau follows.
        on_nonfinite: "raise" if a loss or a gradient is NaN or infinite, or "skip" that update.
        seed: of the data's order and augmentation; None: that of the loader's own generator, if it was given one, else
            `torch.initial_seed()`. Kept in the checkpoint.
        resume: None; "auto": continue from the newest whole checkpoint in `work_dir`, or in a folder that `create_new_dir` made
            beside it, or begin anew in `work_dir`, as it is named, if there is none; a path: continue from that file, as
            `load_checkpoint(path)` does. The state is restored when `train()` begins, so that hooks registered until then get
            theirs.
        take_over: give a plain DataLoader an order and augmentation seeds that are a function of (seed, epoch, position), so that
            they do not depend on workers and any place is reached directly; False: leave it as torch has it.
        compile: compile the model in place (`nn.Module.compile`), which keeps the names of its weights; a dict is passed to
            torch.compile. EMA's copy, which is only evaluated, is not compiled.
        strategy: how the training is spread over processes and devices: "ddp", or an object such as
            `torch_frame.distributed.ddp.DDP(...)`; None: "ddp" if a process group of several processes is there, or torchrun has
            started the script, else one process. Several processes call the same methods of the trainer, in the same order.
        resume_settings: which settings count if those of the script's optimizer and scheduler are others than the checkpoint's:
            "checkpoint", "script", or None: the checkpoint's, but a schedule of another length is an error (docs/resume.md).
        prefetch: False: a batch is fetched when it is trained, on CUDA too, for data that depends on the weights (rollouts,
            self-play). A loader with workers fetches ahead by itself, so it is refused then.
        save_frozen: False: parameters that this run has never trained are in no file, and EMA shares them (fine-tuning with
            adapters). A resumed run takes them from the model that the script makes; one of other values is refused.
        max_iters: batches in the run; with `max_epochs` whichever comes first. Inside an epoch the state is saved and
            `after_epoch` runs as in the last one, without a step of the epoch's schedule; continued with more, the run goes on
            inside that epoch.
        ema_ramp: updates in which EMA's decay is ramped up (see `EMA`); 0: none.
        limit_batches: an epoch and an evaluation have at most so many batches: a dry run of everything.

    Attributes:
        progress: the counters (`torch_frame.progress.Progress`).
        length: where the run ends (`torch_frame.run.length.RunLength`).
        model_ema: the `EMA`, or None.
        optimizer: as it was given: one, a tuple, or a mapping of names; another one may be set.
        lr_scheduler: the scheduler inside its warm-up (`LRWarmupScheduler`), in the same form; a torch scheduler may be set.

    >>> import torch
    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> loss = lambda model, batch: model(batch).square().mean()
    >>> trainer = Trainer(model, optimizer, None, [torch.ones(4, 2)], max_epochs=2, hooks=[], step_fn=loss)
    """

    optimizer: Any = delegated(
        "optimization.optimizer", "One, a tuple, or a mapping of names, as given.", settable=True
    )
    lr_scheduler: Any = delegated(
        "optimization.lr_scheduler", "Each inside its warm-up, in optimizer's form.", settable=True
    )
    gradient_accumulation_steps: int = delegated("optimization.window_len", "Batches in an update.", settable=True)
    model_ema: EMA | None = delegated("optimization.ema", "The average of the weights, or None.", settable=True)
    updater: Update = delegated("optimization.updater", "Makes the updates of the (first) optimizer.")
    schedule_free: ScheduleFree = delegated(
        "_run.schedule_free", "Switches schedule-free optimizers around evaluations."
    )
    lr: float = delegated("optimization.lr", "Learning rate of the first optimizer's first parameter group.")
    start_epoch: int = delegated(
        "_run.start.epoch", "Index of the epoch that `train()` begins with; set it before.", settable=True
    )
    epoch: int = delegated("progress.current_epoch", "Index of the epoch under way, or of the last one.")
    inner_iter: int = delegated(
        "progress.current_inner_iter", "Index in its epoch of the batch under way, or the last one."
    )
    cur_iter: int = delegated("progress.current_iter", "Index in the run of the batch under way, or of the last one.")
    hook_strategy: Strategy = delegated("_ranks.of_hooks", "`strategy`, or one process if only rank 0 has hooks.")
    metric_storage: MetricStorage = delegated("_run.metric_storage", "The run's values by name.", settable=True)
    model: nn.Module = delegated("_run.model", "As the loop calls it: prepared, wrapped.", settable=True)
    seed: int = delegated("_run.script_seed", "Of the data's order; set it before `train()`.", settable=True)
    lr_scheduler_metric: str | None = delegated("_run.lr_scheduler_metric", "What a plateau follows.", settable=True)
    lr_scheduler_interval: Interval = delegated("optimization.interval", '"epoch" or "iter".', settable=True)
    resumed_iter: int | None = delegated(
        "_run.resumed_iter", "Batches trained when this `train()` resumed the run; None if it began anew."
    )
    info_params: list[str] = delegated("_run.info_params", "Lines for the log, from `log_param`.", settable=True)
    start_iter: int = delegated(
        "_run.start_iter", "Batches before the epoch that this `train()` began with (1.7's name)."
    )
    updates_per_epoch: int | None = delegated("_run.updates_per_epoch", "Optimizer steps in an epoch; None: not known.")
    hooks: tuple[HookBase, ...] = delegated("hook_caller.registered", "The registered hooks, in the order they run.")
    model_or_module: nn.Module = delegated("_run.bare_model", "Without the wrapper of DDP or DataParallel.")
    should_stop: bool = delegated("_ranks.stops", "The run ends at the next safe point; set it to True.", settable=True)
    data_loader: Iterable[Any] = delegated(
        "_feed.next_loader", "Of the training; one that is set counts from the next epoch on.", settable=True
    )
    registered_hook_names: list[str] = delegated("hook_caller.names", "The hooks' classes, in the order they run.")
    on_nonfinite: OnNonFinite = delegated("optimization.on_nonfinite", '"raise" or "skip", as given.')
    take_over: bool = delegated("_feed.take_over", "As given.")
    prefetch: bool = delegated("_feed.prefetch", "Counts from the next epoch on.", settable=True)
    window_open: bool = delegated(
        "optimization.window_open", "Gradients of some batches wait for the rest of a window."
    )
    max_epochs: int | None = delegated("length.max_epochs", "None if `max_iters` alone ends the run.", settable=True)
    max_iters: int | None = delegated(
        "length.max_iters", "Batches in the run, by whichever of the two comes first; None: not known.", settable=True
    )
    epoch_len: int | None = delegated("length.epoch_len", "Batches in an epoch, on this rank; None: not known.")
    work_dir: str = delegated("_run.work_dir.path", "Where the run's files go; final once `train()` has begun.")
    ckpt_dir: str = delegated("_run.work_dir.default_checkpoints", "Where its checkpoints go.")
    tb_log_dir: str = delegated("_run.work_dir.tb_logs", "Where TensorBoard's files go.")
    log_file: str = delegated("_run.work_dir.default_log", "The run's log.txt.")
    _own_attributes: frozenset[str] = frozenset()  # that a trainer of ours sets before Trainer.__init__

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer],
        lr_scheduler: Any,
        data_loader: Iterable[Any],
        max_epochs: int | None = None,
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
        strategy: Strategy | Literal["ddp"] | None = None,
        resume_settings: Choice | None = None,
        prefetch: bool = True,
        save_frozen: bool = True,
        max_iters: int | None = None,
        ema_ramp: float = 2000,
        limit_batches: int | None = None,
    ) -> None:
        names_before = set(vars(self)) - self._own_attributes
        checks.check_given(locals())
        checks.check_names_of_17(type(self))
        # Before the device: "cuda" is this rank's own GPU then.
        self.strategy = strategy = checks.checked_strategy(strategy)
        self.rank = strategy.rank
        self.device = checks.device_of(model) if device is None else resolve_device(device)
        self.precision = Precision(choose_precision(precision, enable_amp, self.device), self.device)
        self.step_fn, self.loss_weight = step_fn, loss_weight
        self.progress = Progress()
        self.hook_caller = HookCaller()
        self.stages = self.hook_caller.stages
        self._names = MetricNames()
        # weak: the storage must not keep the trainer, and so the model, alive
        storage = run_storage(self._names, weakref.WeakMethod(self._check_read))

        prepare = strategy.replicate if isinstance(optimizer, Mapping) else strategy.prepare
        prepared = prepare(model if device is None else model.to(self.device))
        bare = strategy.unwrap(prepared)
        shared = [] if save_frozen else frozen_parameters(model).values()
        proxy = weakref.proxy(self)  # no circle
        all_optimizers: Callable[[], list[Optimizer]] = lambda: proxy._run.attributes.optimizers()  # noqa: E731
        ema = EMA(model, ema_decay, shared=shared, ramp=ema_ramp, optimizers=all_optimizers) if use_ema else None
        frozen = FrozenParameters(bare, ema, left_out=not save_frozen)
        self.optimization = Optimization(
            prepared,
            optimizer,
            lr_scheduler,
            ema,
            self.precision,
            strategy,
            self.progress,
            self.stages,
            lambda: {name: buffer.latest for name, buffer in proxy.metric_storage.items()},
            interval=lr_scheduler_interval,
            warmup=Warmup(warmup_method, warmup_iters, warmup_factor),
            settings=UpdateSettings(
                clip_grad_norm,
                gradient_accumulation_steps,
                loss_weight is not None,
                on_nonfinite,
                self.device.type == "cpu",
            ),
        )
        self.optimization.names = self._names
        self._names.reserve(self.optimization.norm_names if clip_grad_norm > 0 else ())
        names = partial(self.hook_caller.names_with, "before_update", "after_update")
        self._own_step = OwnStep(self.optimization, self.precision, strategy, self.device, names)
        settings = AllSettings(resume_settings, bare, self.optimization.schedules)
        self.optimization.on_change = settings.renew
        if compile is not False:
            bare.compile(**({} if compile is True else compile))

        seed_is_given, seed = seed is not None, strategy.broadcast(checks.checked_seed(seed, data_loader))
        feed_settings = {"take_over": take_over, "prefetch": prefetch}
        self._feed = Feed(data_loader, seed, strategy, self.device, self.progress, **feed_settings)
        self.length = RunLength(max_epochs, max_iters, limit_batches, self.progress, self._feed.epoch_len)
        keep_parents_garbage(self)
        self.run_media = Media(self.hook_caller.takes_media, is_main=self.check_main())
        self._saver = Saver(strategy)
        self._ranks = Ranks(strategy)
        self._ranks.on_stop = self._saver.wake
        self.stop_signals = StopSignals(on_first=self._saver.wake, phase=partial(phase_of, self.progress))
        self._names_checked = False
        self._reads_steps = type(self)._update_iter_metrics is not Trainer._update_iter_metrics
        self.pbar = ProgressBar(disable=True)  # overrides of train_one_iter written for 1.7 put their values there

        attributes = Attributes(self, {*vars(self), "_run"} - names_before)
        self._run = Run(
            prepared,
            self.device,
            strategy,
            self._ranks,
            self.precision,
            self.progress,
            self.length,
            storage,
            self.hook_caller,
            self.optimization,
            settings,
            frozen,
            attributes,
            Modes(bare, self.progress, attributes, prepared),
            self._feed,
            WorkDir(work_dir, None if resume == "auto" else create_new_dir, strategy),
            self._saver,
            self.stop_signals,
            Resumption(checks.checked_resume(resume)),
            seed,
            seed_is_given,
            lr_scheduler_metric,
        )
        self._run.work_dir.own = overridden(self, Trainer, "ckpt_dir", "log_file")
        self.register_hooks(self._build_default_hooks() if hooks is None else hooks)

    # ---------------------------------------------------------------- the loop

    def train(self, console_log_level: int = 2, file_log_level: int = 2) -> None:
        """Train from where the run stands to `max_epochs` or `max_iters`.

        SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C end the run at the next point where its state is whole: `latest.pth` is saved,
        whatever the hooks, `after_train` is called, and the process ends as by that signal (`SystemExit(143)`, 138, 140,
        `KeyboardInterrupt`). If the script has a handler of its own for SIGUSR1 or SIGUSR2, that is called instead, and `train`
        returns. A second Ctrl-C stops at once. Outside the main thread no signal is listened to.

        Args:
            console_log_level: 0..5 = NOTSET, DEBUG, INFO, WARNING, ERROR, FATAL.
            file_log_level: the same for `log.txt`.
        """
        self._prepare()
        run, steps = self._run, (self.train_one_iter, Trainer.train_one_iter)
        levels = console_log_level, file_log_level
        # Restored, checked, logged inside; reported and closed whatever happens.
        with opening.opened(run, levels, self.load_checkpoint, steps):
            opening.begin(run)
            self._prepare_for_training(console_log_level, file_log_level)
            with self._ranks.alone():
                for call in self.stages["before_train"]:  # not by `call`: a frame less above errors
                    call()
            opening.make_ready(run)  # random numbers are restored last
            with ended_by_signals(self._save_last):
                while not self.length.is_over() and not self._ranks.agree_on_stop():
                    self.safe_point()  # a signal may have come before the first step
                    self.progress.begin_epoch()
                    if not self.progress.epoch_trained:
                        self.train_one_epoch()
                        checks.check_epoch(type(self), self.length, is_trained=self.progress.epoch_trained)
                    with (
                        self.schedule_free.shown(),
                        self._saver.rolled_back_if_stopped(parts_of_hooks(run), partial(beside_hooks, run)),
                    ):
                        self._ranks.share_values(self.metric_storage.state_dict, self.metric_storage.load_state_dict)
                        with self._ranks.alone():
                            for call in self.stages["after_epoch"]:
                                call()
                        alike.follow_length(self._run)
                        is_last, is_whole = self.length.is_last_epoch(), self.progress.epoch_trained
                        metric, storage = self.lr_scheduler_metric if is_whole else None, self.metric_storage
                        step_by_metric(self.optimization, metric, storage, self.strategy, is_last=is_last)
                        self._save_if_stopping()
                    self.progress.end_epoch()
                    self.safe_point()
                    if not is_whole:  # max_iters has cut it
                        break
            self._saver.wait()
            self._ranks.meet()  # all files are complete
            self.schedule_free.show()
            with self._ranks.alone():
                for call in self.stages["after_train"]:
                    call()
            self._leave_together()

    @property
    def model_evaluate(self) -> nn.Module:
        """To evaluate and to use, and what a file of weights holds: EMA's if EMA is on."""
        return self.model_or_module if self.model_ema is None else self._run.model_to_use

    def evaluate(self) -> dict[str, float]:
        """Run the evaluations of the registered hooks now; nothing is logged or saved, training is undisturbed.

        On several ranks all of them call it, and get the same values.

        Returns:
            full name -> value, such as "eval_acc". What is no number is in each hook's `results`.

        Raises:
            SettingError: if no hook evaluates.
        """
        if not self._run.in_train:
            self._ranks.check_hooks(self.registered_hook_names)
        if self._ranks.hooks_on_all or self._run.in_train:
            return evaluate_all(self.hooks)
        with self._ranks.alone():
            values = evaluate_all(self.hooks) if self.strategy.rank == 0 else {}
        return self.strategy.broadcast(values)

    def train_one_epoch(self) -> None:
        """The batches' way: loader -> device -> losses -> update."""
        if not self.progress.is_epoch_begun:
            self.metric_storage.begin_epoch()
            self._run.modes.begin_epoch()
            with self._ranks.alone():
                for run in self.stages["before_epoch"]:
                    run()
            alike.follow_main(self._run)
            self._run.modes.after_before_epoch()
        else:
            self._run.modes.restore()
            alike.follow_main(self._run)
        if self.model_ema is not None:
            self.model_ema.begin(self.model)
        self.optimization.refresh()
        self.schedule_free.train()
        self._own_step.begin_epoch(self.train_one_iter, Trainer.train_one_iter)
        self._run.frozen.look()
        progress, own_step, several_ranks = self.progress, self._own_step, self.strategy.world_size > 1
        before_iter, after_iter = self.stages["before_iter"], self.stages["after_iter"]
        asks = own_step.function is not None or asking.may_ask_in_steps(self.hook_caller.hooks)
        self._ranks.begin_batches(asks=asks or self._saver.pending)
        for batch, position in self.batches():  # on the device, prefetched
            progress.in_iter = True
            for run in before_iter:
                run()
            lr = self.lr
            values = self.train_one_iter(batch)  # forward -> losses -> backward -> update
            row = self._names.step_row(values)
            if own_step.function is not None:
                for run in own_step.end_batch(self._ends_window):
                    run()
                for name, value in own_step.take_values().items():
                    self._names.put(row, name, value)
            progress.end_iter(position)
            row["lr"] = lr  # that the step was made with
            self.record(row)  # nothing is read from the device until the values are
            for run in after_iter:
                run()
            if (several_ranks or self._saver.pending) and self.safe_point(in_epoch=True):
                raise StopRequested
        self._finish_epoch()

    def train_one_iter(self, batch: Any) -> Mapping[str, Tensor | Number]:
        """Forward, losses, backward and, if the window is complete, the update.

        Override it for another way to train (a GAN, a dict of optimizers) with `autocast()` and `update()`, which go through all
        settings (docs/optimizers.md); return the values to record, by name.

        Args:
            batch: on the model's device.

        Returns:
            name -> one-element tensor or number, `total_loss` among them.
        """
        optimization = self.optimization
        updater = optimization.unit.updater
        ends_window = updater.window_len == 1 or self._ends_window()
        with updater.micro_batch(is_last=ends_window):
            if self.step_fn is None and self.precision.is_full:
                output = self.model(batch)
            else:
                with self.strategy.autocast(self.precision.autocast()):
                    output = self.model(batch) if self.step_fn is None else self.step_fn(self.model, batch)
            total, values = read_losses(output, self._names)
            if not self._names_checked:  # the first step
                check_counted_once(output)
            weight = None if self.loss_weight is None else check_weight(self.loss_weight(batch))
            unit = optimization.unit
            optimization.backward(unit, total, weight, values)
        if ends_window:
            for run in optimization.before_step(unit):
                run()
            for run in optimization.step(unit, values):
                run()
        return values

    def autocast(self) -> AbstractContextManager[Any]:
        """For a `train_one_iter` of your own: the context of forward passes and losses, in the trainer's precision.

        On several ranks gradients are not exchanged for batches after which more follow in their window.
        """
        return self._own_step.autocast(is_last=self._ends_window())

    def update(self, loss: Tensor, optimizer: str | None = None, weight: Tensor | float | None = None) -> None:
        """For a `train_one_iter` of your own, in place of `zero_grad`, `backward` and `step`: all that the settings ask for.

        Backward with fp16's scaler; if the batch ends its window of gradient_accumulation_steps: the window's mean,
        before_update, clipping, the optimizer's step (or none, if the gradient is not finite), its schedule, EMA, after_update.

        Args:
            loss: one element, with its graph; the mean over the batch.
            optimizer: which one of a dict of optimizers makes the step: the gradient goes to its parameters only.
            weight: number of items or tokens that the loss is a mean of; None: `loss_weight(batch)`, if that was given.

        Raises:
            SettingError: for an optimizer that there is not, or a second call in a batch of a window of several.
            NonFiniteError: before the weights are touched, on CPU.
        """
        if weight is None and self.loss_weight is not None:
            weight = self.loss_weight(self._own_step.batch)
        for run in self._own_step.update(loss, optimizer, weight, is_last=self._ends_window()):
            run()

    def batches(self) -> Iterator[tuple[Any, int]]:
        """The epoch's batches, on the device, and the position behind each; of a resumed epoch those that are left."""
        self._feed.use_next(self.length.last_epoch)  # a script or a hook may have set another one
        batches = self._feed.batches(self.stop_signals, self.optimization)
        if self.epoch_len is None:
            batches = self._ranks.in_step(batches)
        batches = self.length.limited(batches)
        if self._own_step.function is not None:
            return self._own_step.beginning(batches)
        if self.resumed_iter == self.progress.iter > 0:
            return warmed_up(batches, self.model, self.step_fn, self.strategy, self.precision)
        return batches

    def record(self, values: dict[str, Tensor | Number]) -> None:
        """Keep a step's values, and its times, which are added to them, unread."""
        times = self._feed.times
        values["data_time"] = times.data_s
        values["iter_time"] = times.step_s
        if self._reads_steps:
            with self._names.own_values():
                self._update_iter_metrics(*arguments_of_17(values))
        else:
            self._run.storage.record(self.progress.iter - 1, values)
        if not self._names_checked:
            self._names_checked = True
            if self._ranks.has_hooks:
                checks.check_metric_names(self.hooks, self.lr_scheduler_metric, self.metric_storage)

    def _update_iter_metrics(self, loss_dict: dict[str, float], data_time: float, iter_time: float, lr: float) -> None:
        """1.7's name, for subclasses that override it: keeps a step's values, which are read from the device for that."""
        times = {"lr": lr, "data_time": data_time, "iter_time": iter_time}
        self.metric_storage.record(self.progress.iter - 1, {**loss_dict, **times})

    def _build_default_hooks(self) -> list[HookBase]:
        """1.7's name, for subclasses that override it: the hooks of `hooks=None`."""
        return default_hooks()

    def _prepare_for_training(self, console_log_level: int = 2, file_log_level: int = 2) -> None:
        """1.7's name, for subclasses that override it: called before `before_train`, when the log is open."""

    def _prepare(self) -> None:
        """For subclasses: called before a state is restored and the folder is made."""

    def call(self, stage: str) -> None:
        """Run the hooks of a stage, for steps of your own; the loop calls the hooks itself."""
        for run in self.stages[stage]:
            run()

    # ---------------------------------------------------------------- between the steps

    def _ends_window(self) -> bool:
        """The batch under way completes its window, as far as the loader's length tells."""
        optimization = self.optimization
        window = optimization.window_len
        is_full = window == 1 or optimization.num_open + 1 >= window
        return is_full or self.inner_iter + 1 == self.length.batches_in_epoch

    def _finish_epoch(self) -> None:
        self._own_step.end_look()
        if not self._own_step.ranks_differ:  # told, with the reason
            alike.tell_if_apart(self._run)
        if self.optimization.window_open:  # the loader yielded fewer batches than its length says, or has none
            values: dict[str, Any] = {}
            for run in self.optimization.close_window(values):
                run()
            self.metric_storage.record(self.cur_iter, values)
        tell_of_left_out(self.metric_storage, self.epoch, self.on_nonfinite)
        if self.progress.inner_iter == 0:
            raise SettingError(checks.empty_loader_message(self.data_loader, self.epoch, self.progress.iter))
        if self.length.is_cut():  # its state is that of before after_epoch, for more iterations to come
            if self._run.wants_last_state():
                self.save_at_safe_point("latest.pth", save_single_model=False)
                self._saver.holds_last_state = True
            self.safe_point()
            return
        self.optimization.step_by_epoch()
        self.progress.end_batches()

    def _save_if_stopping(self) -> None:
        """A run that ends early leaves a `latest.pth`, even if the hook that writes it ran before the decision."""
        if self._ranks.agree_on_stop() and self._run.wants_last_state():
            self.save_at_safe_point("latest.pth", save_single_model=False)

    def _leave_together(self) -> None:
        """What was asked for in `after_train` is written; when `train` returns on one rank, this is so on all."""
        with ended_by_signals(partial(log_late_signal, self.stop_signals)):  # after_train may have loaded other weights
            self.safe_point()
        self._saver.wait()
        self._ranks.meet()

    def _check_read(self, columns: Columns) -> None:
        """Values of steps have been read from the device: are losses and gradients finite?"""
        if self.on_nonfinite == "skip" or self.precision.scaler is not None:
            return
        self._own_step.check_losses()
        bad = first_nonfinite(columns, ("total_loss", *self.optimization.norm_names))
        if bad is not None:
            raise self.optimization.nonfinite(f"{bad.name} is not finite", bad.values, bad.iteration)

    # ---------------------------------------------------------------- saves

    def save_at_safe_point(
        self, file_name: str, save_single_model: bool = True, then_remove: Iterable[str] = ()
    ) -> None:
        """Ask for a save. Weights are copied now; a whole state is, when all hooks of the event have run and no window is open.

        Outside `train()` no safe point comes: the file is written there and then.

        Args:
            file_name: below `ckpt_dir`.
            save_single_model: the weights only; False: the whole state.
            then_remove: files that are not needed any more once this one, and the state asked for beside it, are written; a
                path that ends with a separator is a folder's.
        """
        if not self._saver.has_safe_points:
            self.save_checkpoint(file_name, save_single_model)
            remove(then_remove)
            return
        with self.schedule_free.shown() if save_single_model else nullcontext():
            self._saver.request(file_name, save_single_model, then_remove, self._contents())

    def safe_point(self, *, in_epoch: bool = False) -> bool:
        """Carry out the saves that were asked for and end if a signal asks for it, unless a window of gradients is open.

        Args:
            in_epoch: behind a batch: several ranks do not ask each other after every one (`torch_frame.run.meetings`).

        Returns:
            Whether a hook or a script wants the run to end: `should_stop`.
        """
        agree = self._ranks.agree_in_epoch if in_epoch else self.strategy.agree
        if not self.optimization.window_open and agree(self._saver.pending):
            with self._feed.times.saving(), self.schedule_free.trained():
                self._saver.carry_out(self._contents())
            if self.stop_signals.agree(self.strategy):
                raise StopRequested
            return self._ranks.agree_on_stop()
        return False

    def check_stop(self) -> None:
        """For hooks that work for long in `after_epoch`, between two pieces: end here if a signal asks for it.

        The run is saved as it was before `after_epoch`, and goes through it again when it is resumed. If a hook has changed
        weights, an optimizer, a schedule or an attribute of the trainer in this `after_epoch`, its other hooks run first. Several
        ranks end together, at the next safe point.
        """
        is_single = self.strategy.world_size == 1
        if is_single and self.stop_signals.received is not None and self._saver.can_roll_back():
            raise StopRequested

    def _contents(self) -> Contents:
        """What can be saved now."""
        own_save = self.save_checkpoint if is_overridden(self, Trainer, "save_checkpoint") else None
        own_model = self.model_evaluate if is_overridden(self, Trainer, "model_evaluate", "model_or_module") else None
        return contents(self._run, own_save, own_model)

    def _save_last(self) -> None:
        """The last save before the run ends by a signal, or inside an epoch by `should_stop`: complete when this returns."""
        has_signal = self.stop_signals.received is not None
        with self.schedule_free.trained():
            self._saver.save_last(self._contents(), with_state=has_signal or self._run.wants_last_state())
        log_end_inside(self.stop_signals.told() if has_signal else None, self.progress.iter, self.ckpt_dir)

    def save_checkpoint(self, file_name: str, save_single_model: bool = True, print_info: bool = False) -> None:
        """Save there and then; the file is complete when this returns.

        On several ranks, rank 0 writes. All of them call it for a whole state, and before `train`; weights rank 0 may save alone.
        A hook that only rank 0 has may save a whole state too: it is written at the next safe point.

        Args:
            file_name: below `ckpt_dir`, or an absolute path. A full state called `latest.pth` keeps the one before it as
                `previous.pth`.
            save_single_model: the weights only (EMA's if EMA is on), a plain `state_dict`; False: the whole state.
            print_info: log where it was written.

        Raises:
            CheckpointError: if it cannot be written; the file that was there before is untouched.
            NonFiniteError: if the weights hold NaN or infinite values.
        """
        self._run.work_dir.claim(self.strategy)
        asks_alone = not self._ranks.hooks_on_all and not self._saver.saves_own_way
        if asks_alone and not save_single_model and self._run.in_train:
            logger.warning(ASKED_BY_RANK_0, file_name)
            self.save_at_safe_point(file_name, save_single_model=False)
            return
        if save_single_model:
            self._saver.note_weights(file_name)
        else:
            self._ranks.check_all_save(file_name)
        with self._feed.times.saving(), self.schedule_free.for_file(weights_only=save_single_model):
            self._saver.save_now(file_name, save_single_model, self._contents())
        if print_info:
            logger.info("Saved %s", os.path.join(self.ckpt_dir, file_name))

    def wait_for_saves(self) -> None:
        """Return when the files of the save under way and the weights that were asked for are complete: to copy them, say.

        A whole state that was asked for is written at its safe point. All files are complete before `after_train`.

        Raises:
            CheckpointError: if a file could not be written.
            NonFiniteError: if the weights hold NaN or infinite values.
        """
        with self._feed.times.saving():
            self._saver.complete_weights(self._contents())

    def load_best(self) -> WeightsReport:
        """Put the weights of `best.pth` into the model, and into EMA's: in `after_train`, say, to test them. On all ranks.

        Raises:
            FileNotFoundError: if there is none.
            CheckpointError: if it is damaged, or does not fit.
        """
        self.wait_for_saves()
        models = [self.model_or_module] + ([] if self.model_ema is None else [self.model_ema.model])
        return load_best(self.ckpt_dir, models, self.strategy)

    # ---------------------------------------------------------------- the state

    def load_checkpoint(
        self, path: str | os.PathLike[str] | None = None, checkpoint: Mapping[str, Any] | None = None
    ) -> WeightsReport | None:
        """Continue a saved run, or begin with given weights.

        Args:
            path: a full state (`latest.pth`): looked for as given, then in the work dir's `checkpoints`, then in those of the
                newest `<work_dir>_*`. The run continues in that file's work dir.
            checkpoint: weights only, a `state_dict` such as `torch.load("best.pth")` gives; what fits is loaded.

        Returns:
            For weights, what was loaded and what was not.

        Raises:
            FileNotFoundError: with all the places that were searched.
            CheckpointError: if the file is damaged, or does not fit this trainer; nothing is changed then.
        """
        if checkpoint is not None and path is None:
            return self._run.resumption.load_weights(checkpoint, self.model_or_module, self.model_ema, self._run.frozen)
        if path is None or checkpoint is not None:
            raise SettingError("load_checkpoint takes a path (a full state), or checkpoint= (weights): one of the two.")
        opening.restore(self._run, self._ranks.find(lambda: Found.at(self._run.work_dir.find(path))))
        return None

    # ---------------------------------------------------------------- hooks and values

    def register_hooks(self, hooks: Iterable[HookBase | None]) -> None:
        """Add hooks behind those there are; LoggerHook stays last. None in the list is left out."""
        hooks = checked_hooks(hooks)
        self.hook_caller.check_new(hooks)
        trainer: HookTrainer = self  # mypy checks that hooks find what they are promised
        for hook in hooks:
            hook.trainer = weakref.proxy(trainer)
        self.hook_caller.add(hooks, under_way=self._run.in_train, has_begun=self._run.start.in_train)
        self._feed.times = self.hook_caller.time_split or self._feed.times

    def register(self, name: str, thing: Any) -> None:
        """Keep an object's state in the checkpoints, and restore it when the run is resumed, before the first batch.

        Attributes of the trainer that have a state (optimizers, schedules, scalers, modules, own objects) need no registration.

        Args:
            name: of the object in the state.
            thing: with `state_dict()` and `load_state_dict(state)`. What `torch_frame.checkpoint.values` lists comes back as it
                was, tensors on the CPU.

        Raises:
            TypeError: if it lacks one of the two.
            SettingError: if the name is taken, or training has begun.
        """
        self._run.attributes.register(name, thing)

    def check_main(self) -> bool:
        """This is the process that writes and prints (1.7's name)."""
        return self.strategy.rank == 0 and is_main()

    def logger_print(self, string: str, function: Callable[[str], None] = logger.info) -> None:
        """Log on the main process (1.7's name)."""
        if self.check_main():
            function(string)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """`metric_storage.update`: log(iter, name=value, ..., smooth=True, window_size=None)."""
        self.metric_storage.update(*args, **kwargs)

    def value(self, name: str) -> float:
        """What a name is worth now: `MetricStorage.value`. Best, early stopping and plateau go by it."""
        return self.metric_storage.value(name)

    def add_image(self, name: str, image: Any, step: int | None = None) -> None:
        """Give a picture to the writers; see `torch_frame.tracking.media.Media`. step: of the run; None: `cur_iter`."""
        self.run_media.image(self.cur_iter if step is None else step, name, image)

    def add_figure(self, name: str, figure: Any, step: int | None = None) -> None:
        """Give a matplotlib figure to the writers, as a picture."""
        self.run_media.figure(self.cur_iter if step is None else step, name, figure)

    def add_text(self, name: str, text: str, step: int | None = None) -> None:
        """Give a text to the writers."""
        self.run_media.text(self.cur_iter if step is None else step, name, text)

    def add_histogram(self, name: str, values: Any, step: int | None = None) -> None:
        """Give the distribution of a tensor's or array's values to the writers."""
        self.run_media.histogram(self.cur_iter if step is None else step, name, values)

    def log_param(self, *args: Any, **kwargs: Any) -> None:
        """Lines to put into the log when training begins: texts, and names with values."""
        self._run.log_param(args, kwargs)

    @property
    def run_parameters(self) -> dict[str, Any]:
        """The run's settings, and what `log_param` was given by name, as writers show them."""
        return run_parameters(self._run)

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise TypeError("A Trainer cannot be copied: its hooks, files and saves belong to one run. Make a new one.")

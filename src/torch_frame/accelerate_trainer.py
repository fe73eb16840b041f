"""AccelerateTrainer: the same loop on Hugging Face Accelerate (1.7's other trainer)."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from torch_frame.checkpoint.weights import WeightsReport
from torch_frame.data.plan import splits_by_itself
from torch_frame.distributed.accelerate import (
    AcceleratedOne,
    AcceleratedRanks,
    accelerated,
    bare_optimizer,
    bare_scheduler,
    own_window,
    settings_without_effect,
    splits_loaders,
    tell_of_steps,
    unwrap_inside,
)
from torch_frame.errors import SettingError
from torch_frame.hooks.base import HookBase
from torch_frame.run.modes import Modes
from torch_frame.run.resume import load_best
from torch_frame.run.saving import Contents
from torch_frame.run.script_settings import AllSettings
from torch_frame.run.trained import FrozenParameters, frozen_parameters
from torch_frame.trainer import CreateNewDir, Trainer, logger
from torch_frame.training.ema import EMA
from torch_frame.training.named_schedules import ENDLESS, check_schedule_name, schedule_by_name
from torch_frame.training.precision import PrecisionName
from torch_frame.training.schedules import LRWarmupScheduler, WarmupMethod

_PRECISIONS: dict[str, PrecisionName] = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class AccelerateTrainer(Trainer):
    """Trains through an `accelerate.Accelerator`: as a plain script on one device, under `accelerate launch` on several.

    Loop, data order, gradient windows, states and hooks are those of `Trainer`; accelerate places and wraps the model, and runs
    backward. `accelerate` has to be installed: `pip install torch-frame[accelerate]`.

    Args:
        model, optimizer, data_loader, max_epochs, ..., create_new_dir: as in `Trainer`.
        lr_scheduler: a torch scheduler of that optimizer, or a name: "linear", "cosine", "cosine_with_restarts", "polynomial",
            "constant", "constant_with_warmup". Named ones step once an update and end with the run.
        mixed_precision: "no", "bf16", "fp16"; None: what the environment (`accelerate config`) says.
        warmup_method: of a torch scheduler; named ones warm up linearly by themselves.
        warmup_iters: length of the warm-up, in updates.
        gradient_accumulation_steps: batches in an update, on each process; None: the accelerator's, else 1.
        hook_only_main_gpu: hooks are registered on the main process only, and the others wait for them; False: on all.
        accelerator: an `Accelerator` of the script's own; None: one is made.
        own_shards: the data loader gives each process a part of its own already; it is used as it is.
        settings: keyword arguments of `Trainer`.

    Attributes:
        accelerator: there from the constructor on, in hooks too.
        weight_dtype: what the forward pass is computed in; parameters keep their own. Scripts may set another one for parts
            that they cast themselves.

    Raises:
        SettingError: for an unknown name, for settings that accelerate's global state does not have, and where accelerate is not
            installed.
    """

    # fmt: off
    _own_attributes = frozenset((
        "accelerator", "weight_dtype", "_accelerated", "_by_name", "_compile", "_is_prepared",
        "_named_warmup", "_project_dir", "_resume_settings", "_save_frozen", "_serves", "_shown", "_takes_hooks",
    ))
    # fmt: on

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer],
        lr_scheduler: Any,
        data_loader: Iterable[Any],
        max_epochs: int | None = None,
        work_dir: str | os.PathLike[str] = "work_dir",
        clip_grad_norm: float = 0.0,
        mixed_precision: str | None = None,
        warmup_method: WarmupMethod | None = None,
        warmup_iters: int = 0,
        warmup_factor: float = 0.001,
        hooks: Iterable[HookBase | None] | None = None,
        use_ema: bool = False,
        ema_decay: float = 0.9999,
        gradient_accumulation_steps: int | None = None,
        create_new_dir: CreateNewDir | None = "time_s",
        *,
        hook_only_main_gpu: bool = True,
        accelerator: Any = None,
        own_shards: bool = False,
        **settings: Any,
    ) -> None:
        _check_settings(settings)
        is_named = isinstance(lr_scheduler, str)
        if is_named:
            check_schedule_name(lr_scheduler)
            _tell_of_warmup(lr_scheduler, warmup_method, warmup_iters)
            _tell_of_interval(settings.get("lr_scheduler_interval"))
        joined = 1 if accelerator is not None else _window_of_joined()
        self.accelerator = _accelerator(accelerator, mixed_precision, work_dir)
        self._project_dir = os.fspath(work_dir) if accelerator is None else None
        optimizer = _each(bare_optimizer, optimizer)
        self._by_name: Callable[[Any], Any] | None = None  # makes the schedules of these optimizers
        if is_named:
            self._by_name = partial(_schedules_by_name, lr_scheduler, warmup_iters, self._num_updates)
            lr_scheduler = self._by_name(optimizer)
            settings["lr_scheduler_interval"] = "iter"
        self._accelerated = accelerated(self.accelerator, own_shards=own_shards)
        _tell_of_steps(lr_scheduler, settings.get("lr_scheduler_interval"))
        self._takes_hooks = self.accelerator.is_main_process or not hook_only_main_gpu
        hooks = hooks if self._takes_hooks else []
        self._is_prepared = False
        self._save_frozen, self._resume_settings = settings.get("save_frozen", True), settings.get("resume_settings")
        self._compile = settings.get("compile", False)
        self._serves = False  # the other processes wait for what this one's `save_checkpoint` needs of them
        device = self.accelerator.device
        data_seed = self.accelerator.dataloader_config.data_seed
        settings = settings if data_seed is None else {"seed": data_seed, **settings}
        self._shown: Any = None
        self._named_warmup = warmup_iters if is_named else 0
        precision = _precision(self.accelerator)
        self.weight_dtype = _DTYPES[precision]
        super().__init__(
            model,
            optimizer,
            _each(bare_scheduler, lr_scheduler),
            self._split(data_loader, takes_over=settings.get("take_over", True)),
            max_epochs,
            work_dir,
            clip_grad_norm,
            False,
            None if is_named else warmup_method,
            0 if is_named else warmup_iters,
            warmup_factor,
            hooks,
            use_ema,
            ema_decay,
            create_new_dir,
            strategy=self._accelerated,
            device=None if _is_placed(model, device) or not self.accelerator.device_placement else device,
            precision=precision,
            gradient_accumulation_steps=_window(self.accelerator, gradient_accumulation_steps, joined),
            **settings,
        )
        self._use_prepared()
        _share_scaler(self.accelerator, self.precision.scaler)

    def prepare_model(self) -> None:
        """Prepare the model and the optimizer; called once, before the run's folder is made and hooks are called.

        `train` calls it, or `load_checkpoint` of a whole state, which is restored behind it.

        Override it to prepare them in another way, or more: what stands in `model`, `optimizer`, `lr_scheduler` and
        `data_loader` afterwards is used. The data loader stays ours, so that the run resumes exactly; one that accelerate has
        prepared is used as it is.
        """
        if isinstance(self.optimizer, Optimizer):
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        else:  # DistributedDataParallel cannot serve a dict of optimizers: each has losses of its own
            is_dict = isinstance(self.optimizer, Mapping)
            _tell_of_comm_hook(self.accelerator, is_dict)
            self.model = self.accelerator.prepare_model(self.model, evaluation_mode=is_dict)

    def _prepare(self) -> None:
        step = getattr(self.train_one_iter, "__func__", None)  # of the object, where a script may have set it
        self._accelerated.window_sign.is_used = step is Trainer.train_one_iter
        if not self._is_prepared:
            before, ema = self.model_or_module, self.model_ema
            follows = ema is not None and ema.equals(before)
            parts, schedules = _parts(before), dict(self.optimization.schedules)
            self.prepare_model()
            self._is_prepared = True
            self._use_prepared()
            unwrap_inside(self.model_or_module, is_own_step=not self._accelerated.window_sign.is_used)
            is_same = _are_same(_parts(self.model_or_module), parts)
            self._begin_alike(is_same=is_same, ema=ema if follows else None)
            self._name_again(schedules)
            self._tell_of_long_warmup()
        self._accelerated.window_sign.show(True)

    def _begin_alike(self, *, is_same: bool, ema: EMA | None) -> None:
        """All processes, and EMA, begin with the main one's weights as `prepare_model` has left them.

        Args:
            is_same: the model is built of what it was built of before that.
            ema: if it had averaged nothing yet.
        """
        self._accelerated.begin_alike(self.model)
        bare = self.model_or_module
        if is_same:
            if ema is not None:
                ema.reset(bare)
            return
        if self._compile is not False and bare._compiled_call_impl is None:
            bare.compile(**({} if self._compile is True else self._compile))
        if ema is not None:
            self.model_ema = ema.of(bare, () if self._save_frozen else frozen_parameters(bare).values())
        run = self._run
        run.frozen = FrozenParameters(bare, self.model_ema, left_out=not self._save_frozen)
        run.modes = Modes(bare, self.progress, run.attributes, self.model)
        run.settings = AllSettings(self._resume_settings, bare, self.optimization.schedules)
        self.optimization.on_change = run.settings.renew

    def _name_again(self, before: Mapping[str, LRWarmupScheduler]) -> None:
        """Schedules by name drive the optimizers that `prepare_model` has made, if it has set no others."""
        optimizers, schedules = self.optimization.optimizers, self.optimization.schedules
        is_undriven = any(schedules[label].optimizer is not one for label, one in optimizers.items())
        if self._by_name is not None and is_undriven and all(one in before.values() for one in schedules.values()):
            self.lr_scheduler = self._by_name(Trainer.optimizer.fget(self))

    def _prepare_for_training(self, console_log_level: int = 2, file_log_level: int = 2) -> None:
        """The run's folder is there: it is the project's of an Accelerator that was made here."""
        super()._prepare_for_training(console_log_level, file_log_level)
        places = self.accelerator.project_configuration
        for name in ("project_dir", "logging_dir"):
            if self._project_dir is not None and getattr(places, name) == self._project_dir:
                setattr(places, name, self.work_dir)

    def _use_prepared(self) -> None:
        """Train with the model that stands in the attribute now."""
        self._accelerated.adopt(self.model)
        self.optimization.use_model(self.model)
        prepared = [self.model_or_module, *self._run.attributes.modules().values()]
        parts = dict.fromkeys(part for module in prepared for part in module.modules())
        self._own_step.casting = [part for part in parts if hasattr(part, "_original_forward")]

    # ---------------------------------------------------------------- hooks and saves of the main process

    def register_hooks(self, hooks: Iterable[HookBase | None]) -> None:
        """As in `Trainer`; with `hook_only_main_gpu=True` the other processes leave them out."""
        super().register_hooks(hooks if self._takes_hooks else [])

    def batches(self) -> Iterator[tuple[Any, int]]:
        """As in `Trainer`; hooks of the main process see one process meanwhile."""
        if isinstance(self._accelerated, AcceleratedRanks) and self._shares:
            self._accelerated.surround(self.stages)
        return super().batches()

    @property
    def _shares(self) -> bool:
        """The processes hold the same model, and one of them has hooks."""
        ranks = self._accelerated
        return not self._ranks.hooks_on_all and isinstance(ranks, AcceleratedRanks) and not ranks.exchanges_itself

    def save_checkpoint(self, file_name: str, save_single_model: bool = True, print_info: bool = False) -> None:
        """As in `Trainer`. An override is called on the processes that have hooks; the others wait for it."""
        if self._serves and not save_single_model:
            self.strategy.broadcast(file_name)
        super().save_checkpoint(file_name, save_single_model, print_info)

    def load_checkpoint(
        self, path: str | os.PathLike[str] | None = None, checkpoint: Mapping[str, Any] | None = None
    ) -> WeightsReport | None:
        """As in `Trainer`. `prepare_model` is called before a whole state is restored: the weights that it loads, and the model
        that it makes, would be used instead."""
        if path is not None and not self._is_prepared:
            self._prepare()
        return super().load_checkpoint(path, checkpoint)

    def load_best(self) -> WeightsReport:
        """As in `Trainer`; a hook of the main process loads them there, and before the next epoch all processes have them."""
        if isinstance(self._accelerated, AcceleratedOne) or not self._accelerated.is_alone:
            return super().load_best()
        self.wait_for_saves()
        models = [self.model_or_module] + ([] if self.model_ema is None else [self.model_ema.model])
        return load_best(self.ckpt_dir, models, self.hook_strategy)

    def _contents(self) -> Contents:
        own_save: Any = self.save_checkpoint
        if type(self).save_checkpoint is AccelerateTrainer.save_checkpoint:
            own_save = None
        elif isinstance(self._accelerated, AcceleratedRanks) and not self._accelerated.exchanges_itself:
            own_save = self.save_checkpoint if self._ranks.hooks_on_all else self._save_on_main
        return dataclasses.replace(super()._contents(), own_save=own_save)

    def _save_on_main(self, file_name: str, save_single_model: bool) -> None:
        """Call an override of `save_checkpoint` on the main process, as 1.7 did."""
        if save_single_model:  # asked for by a hook, so the others are not here
            with self._accelerated.alone():
                self.save_checkpoint(file_name, True)
        elif self.rank == 0:
            with self._accelerated.alone():
                self._serves = True
                try:
                    self.save_checkpoint(file_name, False)
                finally:
                    self._serves = False
            self.strategy.broadcast(None)
        else:  # it may call the trainer's own method, which all processes take part in
            while (asked := self.strategy.broadcast(None)) is not None:
                super().save_checkpoint(asked, False)

    # ---------------------------------------------------------------- what scripts set

    @property
    def optimizer(self) -> Any:
        """As in `Trainer`; what accelerate has prepared is shown so, and the optimizer inside makes the updates."""
        used = Trainer.optimizer.fget(self)
        return self._shown if bare_optimizer(self._shown) is used else used

    @optimizer.setter
    def optimizer(self, optimizer: Any) -> None:
        if not self._is_prepared:  # prepare_model may have made another model before
            self._use_prepared()
        self._shown = optimizer
        bare = _each(bare_optimizer, optimizer)
        if bare is not Trainer.optimizer.fget(self):
            Trainer.optimizer.fset(self, bare)

    @property
    def lr_scheduler(self) -> Any:
        """As in `Trainer`; one that accelerate has prepared would step once for each process, so the one inside is used."""
        return Trainer.lr_scheduler.fget(self)

    @lr_scheduler.setter
    def lr_scheduler(self, lr_scheduler: Any) -> None:
        _tell_of_steps(lr_scheduler, self.lr_scheduler_interval)
        bare = _each(bare_scheduler, lr_scheduler)
        if bare is not self.lr_scheduler:
            Trainer.lr_scheduler.fset(self, bare)

    def _split(self, loader: Iterable[Any], *, takes_over: bool) -> Iterable[Any]:
        """On several processes accelerate splits a stream, and what the script wants so; else we split, or use it as it is."""
        if self.accelerator.num_processes == 1 or not isinstance(loader, DataLoader) or self._accelerated.own_shards:
            return loader
        is_stream = isinstance(loader.dataset, IterableDataset)
        if not is_stream and (splits_by_itself(loader) or (takes_over and not splits_loaders(self.accelerator))):
            return loader
        _check_batched(self.accelerator, loader)
        prepared: Iterable[Any] = self.accelerator.prepare_data_loader(loader)
        return prepared

    def _tell_of_long_warmup(self) -> None:
        updates = self.length.num_updates(self.gradient_accumulation_steps)
        if self._named_warmup and updates is not None and self._named_warmup >= updates:
            logger.warning(
                "warmup_iters is %d, but the run has %d updates: the learning rate never gets to the optimizer's.",
                self._named_warmup,
                updates,
            )

    def _num_updates(self) -> int:
        updates = self.length.num_updates(self.gradient_accumulation_steps)
        if updates is None:
            raise SettingError(
                "A schedule by name ends with the run, but data_loader has no length. Pass max_iters, or a torch scheduler, "
                f"whose length you choose, or one of {', '.join(map(repr, ENDLESS))}."
            )
        return updates


def _each(function: Callable[[Any], Any], given: Any) -> Any:
    """What a function makes of one optimizer or schedule, or of each in a list or a dict."""
    if isinstance(given, Mapping):
        return {name: function(one) for name, one in given.items()}
    if isinstance(given, list | tuple):
        return [function(one) for one in given]
    return function(given)


def _schedules_by_name(name: str, num_warmup: int, num_steps: Callable[[], int], optimizer: Any) -> Any:
    return _each(lambda one: schedule_by_name(name, one, num_warmup, num_steps), optimizer)


def _parts(model: nn.Module) -> list[tuple[str, Any]]:
    """What a bare model is built of."""
    return [*model.named_modules(), *model.named_parameters()]


def _are_same(parts: Sequence[tuple[str, Any]], others: Sequence[tuple[str, Any]]) -> bool:
    """Nothing has been added, replaced or renamed."""
    pairs = zip(parts, others, strict=False)
    return len(parts) == len(others) and all(a is b and name == other for (name, a), (other, b) in pairs)


def _check_settings(settings: dict[str, Any]) -> None:
    for name, instead in (
        ("enable_amp", "mixed_precision"),
        ("precision", "mixed_precision"),
        ("strategy", "accelerator"),
        ("device", "accelerator"),
    ):
        if name in settings:
            raise SettingError(f"AccelerateTrainer takes no {name}: accelerate decides it. Pass {instead}.")


def _tell_of_warmup(name: str, warmup_method: Any, warmup_iters: Any) -> None:
    if warmup_method is not None:
        logger.warning(
            "warmup_method=%r is ignored: a schedule by name warms up linearly over warmup_iters updates.",
            warmup_method,
        )
    if name == "constant" and warmup_iters:
        logger.warning("warmup_iters=%s is ignored by 'constant'; 'constant_with_warmup' warms up.", warmup_iters)


def _tell_of_interval(interval: str | None) -> None:
    if interval not in (None, "iter"):
        logger.warning("lr_scheduler_interval=%r is ignored: a schedule by name steps once an update.", interval)


def _tell_of_steps(lr_scheduler: Any, interval: str | None) -> None:
    if interval == "iter":
        _each(tell_of_steps, lr_scheduler)


def _tell_of_comm_hook(accelerator: Any, is_dict: bool) -> None:
    hook = getattr(accelerator.ddp_handler, "comm_hook", None)
    if is_dict and accelerator.num_processes > 1 and hook is not None and str(hook.value) != "no":
        logger.warning(
            "comm_hook of DistributedDataParallelKwargs has no effect: with a dict of optimizers the model is not wrapped, and "
            "gradients are averaged behind each update's backward."
        )


def _check_batched(accelerator: Any, loader: DataLoader[Any]) -> None:
    """accelerate can split what has batches, and send on those that a stream yields.

    Raises:
        SettingError: if it cannot.
    """
    has_batches = loader.batch_sampler is not None or isinstance(loader.sampler, BatchSampler)
    is_stream = isinstance(loader.dataset, IterableDataset)
    dispatches = accelerator.dispatch_batches is not False and accelerator.device_placement
    if loader.batch_size is None and not has_batches and not (is_stream and dispatches):
        raise SettingError(
            f"data_loader has batch_size=None, which accelerate cannot split over {accelerator.num_processes} processes. "
            "Leave split_batches, dispatch_batches and take_over as they are, or give each process a part of its own and pass "
            "own_shards=True."
        )


def _is_placed(model: Any, device: torch.device) -> bool:
    """It stands where it has to, or is spread over devices: quantised and spread models refuse `.to()`."""
    devices = (
        {tensor.device for tensor in (*model.parameters(), *model.buffers())} if isinstance(model, nn.Module) else ()
    )
    return devices == {device} or bool(getattr(model, "hf_device_map", None))


def _window_of_joined() -> int:
    """Batches in an update that an Accelerator made before, by the model perhaps, was given; a new one would forget them."""
    module = sys.modules.get("accelerate.state")
    is_there = module is not None and module.GradientState._shared_state
    return int(module.GradientState().num_steps) if is_there else 1  # type: ignore[union-attr]


def _accelerator(given: Any, mixed_precision: str | None, work_dir: Any) -> Any:
    """The script's Accelerator, or a new one.

    Raises:
        SettingError: if accelerate is not installed, or cannot have this precision.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise SettingError(
            f"AccelerateTrainer needs accelerate, which cannot be imported ({error}): pip install 'torch-frame[accelerate]'."
        ) from error
    if given is None:
        try:
            return Accelerator(mixed_precision=mixed_precision, project_dir=os.fspath(work_dir))
        except ValueError as error:
            raise SettingError(f"mixed_precision={mixed_precision!r}: {_sentence(error, mixed_precision)}") from error
    if not isinstance(given, Accelerator):
        raise SettingError(f"accelerator is {given!r}; it has to be an accelerate.Accelerator object, or None.")
    if mixed_precision not in (None, given.mixed_precision):
        raise SettingError(
            f"mixed_precision is {mixed_precision!r}, but the accelerator's is {given.mixed_precision!r}. Pass one of them."
        )
    return given


def _sentence(error: ValueError, mixed_precision: str | None) -> str:
    from accelerate.state import AcceleratorState

    there = AcceleratorState._shared_state.get("_mixed_precision")
    if there is None or there == mixed_precision:
        return str(error)
    return (
        f"an Accelerator with mixed_precision={there!r} was made in this process before (by the model, perhaps), and accelerate "
        "keeps one for all. Make the first one with it, or pass accelerator= and no mixed_precision."
    )


def _precision(accelerator: Any) -> PrecisionName:
    name = str(accelerator.mixed_precision)
    if name not in _PRECISIONS:
        logger.warning("mixed_precision=%r has never been run with torch-frame: it is left to accelerate.", name)
    return _PRECISIONS.get(name, "fp32")


def _window(accelerator: Any, asked: int | None, joined: int) -> int:
    """Batches in an update: as the script says in one of the places."""
    without_effect = settings_without_effect(accelerator)
    if without_effect:
        logger.warning(
            "%s of the accelerator's gradient accumulation has no effect: torch-frame accumulates by itself, and an epoch's "
            "last window holds what is left.",
            ", ".join(without_effect),
        )
    own = max(own_window(accelerator), joined)
    if asked not in (None, own) and own != 1:
        raise SettingError(f"gradient_accumulation_steps is {asked}, but the accelerator's is {own}. Pass it once.")
    return own if asked is None else asked


def _share_scaler(accelerator: Any, scaler: torch.amp.GradScaler | None) -> None:
    """fp16 on a device that accelerate scales for: one scaler for both, with the settings that the script gave accelerate's."""
    if accelerator.scaler is not None and scaler is not None:
        scaler.load_state_dict(accelerator.scaler.state_dict())
        accelerator.scaler = scaler

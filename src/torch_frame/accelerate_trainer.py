"""AccelerateTrainer: the same loop on Hugging Face Accelerate (1.7's other trainer)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from torch_frame.distributed.accelerate import (
    accelerated,
    bare_optimizer,
    bare_scheduler,
    is_accelerates_loader,
)
from torch_frame.errors import SettingError
from torch_frame.hooks.base import HookBase
from torch_frame.trainer import CreateNewDir, Trainer, logger
from torch_frame.training.named_schedules import ENDLESS, check_schedule_name, schedule_by_name
from torch_frame.training.precision import PrecisionName
from torch_frame.training.schedules import WarmupMethod

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
        settings: keyword arguments of `Trainer`.

    Attributes:
        accelerator: there from the constructor on, in hooks too.
        weight_dtype: what the forward pass is computed in; parameters keep their own.

    Raises:
        SettingError: for an unknown name, for settings that accelerate's global state does not have, and where accelerate is not
            installed.
    """

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
        **settings: Any,
    ) -> None:
        _check_settings(settings)
        is_named = isinstance(lr_scheduler, str)
        if is_named:
            check_schedule_name(lr_scheduler)
            _tell_of_warmup(lr_scheduler, warmup_method, warmup_iters)
        self.accelerator = _accelerator(accelerator, mixed_precision, work_dir)
        optimizer = _each(bare_optimizer, optimizer)
        if is_named:
            name = lr_scheduler
            lr_scheduler = _each(lambda one: schedule_by_name(name, one, warmup_iters, self._num_updates), optimizer)
            settings["lr_scheduler_interval"] = "iter"
        self._accelerated = accelerated(self.accelerator)
        hooks = hooks if self.accelerator.is_main_process or not hook_only_main_gpu else []
        self._is_prepared = False
        self._shown: Any = None
        self._named_warmup = warmup_iters if is_named else 0
        super().__init__(
            model,
            optimizer,
            _each(bare_scheduler, lr_scheduler),
            self._split(data_loader),
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
            device=self.accelerator.device if self.accelerator.device_placement else None,
            precision=_precision(self.accelerator),
            gradient_accumulation_steps=_window(self.accelerator, gradient_accumulation_steps),
            **settings,
        )
        self._use_prepared()
        _share_scaler(self.accelerator, self.precision.scaler)

    def prepare_model(self) -> None:
        """Prepare the model and the optimizer; called once, by `train`, before the run's folder is made and hooks are called.

        Override it to prepare them in another way, or more: what stands in `model`, `optimizer`, `lr_scheduler` and
        `data_loader` afterwards is used. The data loader stays ours, so that the run resumes exactly; one that accelerate has
        prepared is used as it is.
        """
        if isinstance(self.optimizer, Optimizer):
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        else:  # DistributedDataParallel cannot serve a dict of optimizers: each has losses of its own
            is_dict = isinstance(self.optimizer, Mapping)
            self.model = self.accelerator.prepare_model(self.model, evaluation_mode=is_dict)

    @property
    def weight_dtype(self) -> torch.dtype:
        return _DTYPES[self.precision.name]

    def _prepare(self) -> None:
        if not self._is_prepared:
            self._is_prepared = True
            self.prepare_model()
            self._use_prepared()
            self._tell_of_long_warmup()

    def _use_prepared(self) -> None:
        """Train with the model and the loader that stand in the attributes now."""
        self._accelerated.adopt(self.model)
        self.optimization.use_model(self.model)
        self._accelerated.own_shards = is_accelerates_loader(self.data_loader)

    @property
    def optimizer(self) -> Any:
        """As in `Trainer`; what accelerate has prepared is shown so, and the optimizer inside makes the updates."""
        used = Trainer.optimizer.fget(self)
        return self._shown if bare_optimizer(self._shown) is used else used

    @optimizer.setter
    def optimizer(self, optimizer: Any) -> None:
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
        bare = _each(bare_scheduler, lr_scheduler)
        if bare is not self.lr_scheduler:
            Trainer.lr_scheduler.fset(self, bare)

    def _split(self, loader: Iterable[Any]) -> Iterable[Any]:
        """On several processes a stream is split by accelerate; everything else we split, or use as it is."""
        if (
            self.accelerator.num_processes > 1
            and isinstance(loader, DataLoader)
            and isinstance(loader.dataset, IterableDataset)
        ):
            loader = self.accelerator.prepare_data_loader(loader)
        self._accelerated.own_shards = is_accelerates_loader(loader)
        return loader

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


def _window(accelerator: Any, asked: int | None) -> int:
    """Batches in an update. accelerate's own accumulation is off, for it would scale what is scaled already."""
    own = accelerator.gradient_accumulation_steps
    if asked not in (None, own) and own != 1:
        raise SettingError(f"gradient_accumulation_steps is {asked}, but the accelerator's is {own}. Pass it once.")
    accelerator.gradient_accumulation_steps = 1
    return own if asked is None else asked


def _share_scaler(accelerator: Any, scaler: torch.amp.GradScaler | None) -> None:
    """fp16 on a device that accelerate scales for: one scaler for both, with the settings that the script gave accelerate's."""
    if accelerator.scaler is not None and scaler is not None:
        scaler.load_state_dict(accelerator.scaler.state_dict())
        accelerator.scaler = scaler

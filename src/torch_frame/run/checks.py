"""What can be seen to be wrong before the first step, each in a sentence."""

from __future__ import annotations

import inspect
import math
import numbers
import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, IterableDataset

from torch_frame.checkpoint.format import plain
from torch_frame.checkpoint.values import encode_most
from torch_frame.data.rng import loader_generators
from torch_frame.data.source import length_of
from torch_frame.distributed.ddp import DDP
from torch_frame.distributed.launch import num_processes
from torch_frame.distributed.strategy import SingleProcess, Strategy
from torch_frame.errors import SettingError
from torch_frame.run.length import RunLength, check_lengths, check_schedules_have_epochs
from torch_frame.run.optimizers import some
from torch_frame.run.state import Part
from torch_frame.scalars import is_whole
from torch_frame.training.optimization import Optimization
from torch_frame.training.several import labelled, labelled_schedulers
from torch_frame.types import is_flag


def check_given(given: Mapping[str, Any]) -> None:
    """The arguments of a Trainer, by name, are what they have to be.

    Raises:
        TypeError, SettingError: naming the first one that is not.
    """
    check_arguments(given["model"], given["optimizer"], given["lr_scheduler"], given["data_loader"])
    check_lengths(given["max_epochs"], given["max_iters"], given["limit_batches"])
    check_numbers(given["gradient_accumulation_steps"], given["clip_grad_norm"])
    check_functions(**{name: given[name] for name in ("step_fn", "loss_weight")})
    check_flags(**{name: given[name] for name in ("enable_amp", "use_ema", "take_over", "prefetch", "save_frozen")})
    check_real(**{name: given[name] for name in ("warmup_iters", "warmup_factor", "ema_decay", "ema_ramp")})
    schedulers = labelled_schedulers(given["lr_scheduler"], given["optimizer"]).values()
    check_schedulers(schedulers, given["lr_scheduler_interval"], given["lr_scheduler_metric"])
    check_schedules_have_epochs(schedulers, given["lr_scheduler_interval"], given["max_epochs"])
    check_choice("on_nonfinite", given["on_nonfinite"], ("raise", "skip"))
    check_choice("resume_settings", given["resume_settings"], (None, "checkpoint", "script"))


def check_arguments(model: Any, optimizer: Any, lr_scheduler: Any, data_loader: Any) -> None:
    """The things that a Trainer is made of are what they have to be, and belong together."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {_described(model)}; it has to be a torch.nn.Module object.")
    _check_parameters(model, labelled(optimizer).values())
    labelled_schedulers(lr_scheduler, optimizer)
    check_loader_kind(data_loader)


def check_loader_kind(data_loader: Any) -> None:
    """It can be iterated, and yields batches as far as that can be seen."""
    if isinstance(data_loader, Dataset) and not _yields_batches(data_loader):
        raise TypeError(
            f"data_loader is a dataset ({_described(data_loader)}); wrap it: DataLoader(dataset, batch_size=..., shuffle=True), "
            "or DataLoader(dataset, batch_size=None) if it yields batches by itself."
        )
    if isinstance(data_loader, str | bytes | dict | type) or not hasattr(data_loader, "__iter__"):
        raise TypeError(
            f"data_loader is {_described(data_loader)}; it has to be a DataLoader or another iterable of batches."
        )


def _yields_batches(dataset: Any) -> bool:
    """webdataset's own loader is an IterableDataset by its class, and a loader by what it does."""
    return isinstance(dataset, IterableDataset) and any(cls.__name__ == "WebLoader" for cls in type(dataset).__mro__)


def check_numbers(accumulation_steps: Any, clip_grad_norm: Any) -> None:
    """The count is a count, and the norm is a number."""
    if not is_whole(accumulation_steps) or accumulation_steps < 1:
        raise SettingError(
            f"gradient_accumulation_steps is {accumulation_steps!r}; it has to be a positive whole number."
        )
    if not isinstance(clip_grad_norm, numbers.Real) or math.isnan(clip_grad_norm):
        raise SettingError(f"clip_grad_norm is {clip_grad_norm!r}; it has to be a number, 0 for no clipping.")


def check_functions(**functions: Any) -> None:
    """The functions that were given can be called."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} is {function!r}; it has to be a function, or None.")


def check_flags(**flags: Any) -> None:
    """What is switched on or off is True or False; None, as 1.7 took it, is False."""
    for name, flag in flags.items():
        if flag is not None and not is_flag(flag):
            raise TypeError(f"{name} is {flag!r}; it has to be True or False.")


def check_real(**settings: Any) -> None:
    """They are numbers; their ranges are checked where they are used."""
    for name, value in settings.items():
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{name} is {value!r}; it has to be a number.")


def checked_seed(seed: Any, loader: Any) -> int:
    """The seed of the data: as given, of the generator that the user gave the loader, or torch's own."""
    if seed is not None:
        try:
            return operator.index(seed)
        except TypeError:
            raise TypeError(f"seed is {seed!r}; it has to be a whole number, or None.") from None
    for owner in (loader, getattr(loader, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            return generator.initial_seed()
    inside = next(iter(loader_generators(loader).values()), None)  # that of the batch sampler, or of the sampler in it
    return torch.initial_seed() if inside is None else inside.initial_seed()


def checked_resume(resume: Any) -> str | os.PathLike[str] | None:
    """None, "auto", or the path of a checkpoint; one that is there is meant whatever the working directory will be."""
    if resume is None or resume == "auto":
        return None if resume is None else "auto"
    if isinstance(resume, str | os.PathLike) and os.fspath(resume):
        return os.path.abspath(resume) if os.path.isfile(resume) and not os.path.isabs(resume) else resume
    raise TypeError(f"resume is {resume!r}; it has to be None, 'auto', or the path of a checkpoint such as latest.pth.")


def _check_need_no_closure(optimizers: Iterable[Optimizer]) -> None:
    """The optimizers make their step without a function that computes the loss again.

    Raises:
        SettingError: for LBFGS, and others whose step needs one.
    """
    for optimizer in optimizers:
        needed = inspect.signature(type(optimizer).step).parameters.get("closure")
        if needed is not None and needed.default is inspect.Parameter.empty:
            raise SettingError(
                f"{type(optimizer).__name__} computes the loss several times in a step, by a closure, which the loop does not "
                "have. Override train_one_iter: def train_one_iter(self, batch): loss = self.optimizer.step(closure), where "
                "closure clears the gradients, computes the loss, calls backward() and returns it; return {'total_loss': loss}. "
                "Or take another optimizer."
            )


def _check_parameters(model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    lazy = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if is_lazy(value)]
    if lazy:
        raise SettingError(
            f"The model has lazy layers, whose shapes are not known yet: {some(lazy)}. Pass one batch "
            "through the model before the Trainer is made: with torch.no_grad(): model(batch)."
        )
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    if not trainable:
        raise SettingError("The model has no parameter that requires a gradient, so there is nothing to train.")
    optimized = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    if not trainable & optimized:
        raise SettingError(
            "None of the model's trainable parameters is in the optimizer. Was the optimizer made from another model, "
            "or before the model was copied or replaced? Make it from this model: Adam(model.parameters(), ...)."
        )


def check_can_be_saved(optimizers: Mapping[str, Optimizer], lr_schedulers: Part) -> None:
    """Before the first step: the settings of the optimizers' groups and the schedules can be saved.

    Raises:
        CheckpointError: with the place of what cannot.
    """
    for label, optimizer in optimizers.items():
        for index, group in enumerate(optimizer.param_groups):
            settings = {name: value for name, value in group.items() if name not in ("params", "param_names")}
            plain(encode_most(settings), f"the settings of the {label}'s group {index}")
    plain(lr_schedulers.state_dict(), "the state of the lr_scheduler")


def check_names_of_17(kind: type) -> None:
    """A subclass does not override a method that 1.7 called, and that has another name now."""
    if hasattr(kind, "_train_one_epoch"):
        raise SettingError(
            f"{kind.__name__} overrides _train_one_epoch, which would never be called: it is train_one_epoch() now. Rename it; "
            "super().train_one_epoch() trains the epoch."
        )
    if hasattr(kind, "_call_hooks"):
        raise SettingError(
            f"{kind.__name__} overrides _call_hooks, which would never be called: the loop calls the methods of the hooks one by "
            "one. Write a hook that does it at the stages you want (HookBase), and register it where it is to run."
        )


def check_epoch(kind: type, length: RunLength, *, is_trained: bool) -> None:
    """An override of train_one_epoch has left the epoch to the loop, which counts and saves.

    Args:
        kind: of the trainer.
        length: of the run, which `max_iters` may have cut.
        is_trained: all of the epoch's batches are counted.
    """
    if not is_trained and not length.is_cut():
        raise SettingError(
            f"{kind.__name__}.train_one_epoch returned, but no epoch was trained and counted. Call super().train_one_epoch() in "
            "it; a step of your own goes into train_one_iter."
        )


def check_step(optimization: Optimization, step: Any, standard: Any) -> None:
    """A dict of optimizers needs a step of the user's, which says which loss is whose; its gradients are not mixed."""
    optimization.check()
    if getattr(step, "__func__", step) is not standard:
        return
    _check_need_no_closure(optimization.optimizers.values())
    if optimization.by_name:
        raise SettingError(
            "optimizer is a dict, so train_one_iter has to say which loss is whose: override it and call "
            "self.update(loss, name) for each (docs/optimizers.md). Optimizers that step together by one loss are a list."
        )


def check_schedulers(schedulers: Iterable[Any], interval: str, metric: str | None) -> None:
    """The schedulers' interval and metric go together with what they are."""
    check_choice("lr_scheduler_interval", interval, ("epoch", "iter"))
    if any(isinstance(one, ReduceLROnPlateau) for one in schedulers):
        if metric is None:
            raise SettingError(
                "ReduceLROnPlateau follows a metric. Name it: Trainer(..., lr_scheduler_metric='eval_loss') or 'total_loss'."
            )
        if interval == "iter":
            raise SettingError("ReduceLROnPlateau steps after an evaluation; leave lr_scheduler_interval at 'epoch'.")
    elif metric is not None:
        raise SettingError(
            f"lr_scheduler_metric is {metric!r}, but only ReduceLROnPlateau follows a metric. Remove it."
        )


def check_schedules(optimization: Optimization, metric: str | None, length: RunLength, *, is_saved: bool) -> None:
    """The schedules that there are by now, others than were given perhaps, go together with the run.

    Args:
        metric: that ReduceLROnPlateau follows.
        length: of the run.
        is_saved: a checkpoint's settings are in force, not the script's.
    """
    interval = optimization.interval
    schedulers = [schedule.scheduler for schedule in optimization.schedules.values()]
    check_schedulers(schedulers, interval, metric)
    check_schedules_have_epochs(schedulers, interval, length.max_epochs)
    if optimization.by_name and interval == "iter":  # how often each steps is the user's
        return
    for scheduler in () if length.is_over() else schedulers:
        _check_one_cycle(scheduler, interval, length, optimization.window_len, is_saved=is_saved)


def _check_one_cycle(
    lr_scheduler: Any, interval: str, length: RunLength, window: int, *, is_saved: bool = False
) -> None:
    """OneCycleLR was made for as many steps as this run takes: with fewer it fails in mid-run, with more it never anneals.

    A few steps too many, less than an epoch's worth, are let pass.
    A dry run (`limit_batches`) is judged by the whole run's length.

    Args:
        length, window: of the run, and the batches in an update.
        is_saved: its length is a checkpoint's, not the script's.
    """
    per_epoch = length.updates_per_epoch(window, limited=False)
    updates, epochs = length.num_updates(window, limited=False), length.max_epochs
    if not isinstance(lr_scheduler, OneCycleLR) or updates is None or (interval == "epoch" and per_epoch is None):
        return
    steps = {"iter": updates, "epoch": updates if epochs is None else epochs}
    slack = {"iter": max(per_epoch or 1, 1), "epoch": 1}
    total = lr_scheduler.total_steps
    if 0 <= total - steps[interval] < slack[interval]:
        return
    other = "epoch" if interval == "iter" else "iter"
    fits_other = 0 <= total - steps[other] < slack[other]
    cure = f"Pass lr_scheduler_interval={other!r}" if fits_other else f"Make it with total_steps={steps[interval]}"
    cure += " and resume with resume_settings='script'" if is_saved else ""
    raise SettingError(
        f"OneCycleLR was made for {total} steps, but with lr_scheduler_interval={interval!r} this run makes {steps[interval]} "
        f"({length.row(window)}). {cure}."
    )


def check_choice(name: str, value: Any, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise SettingError(f"{name} is {value!r}; it has to be one of {', '.join(map(repr, choices))}.")


class LogsAndFollows(Protocol):
    """What is asked of a hook here; see `HookBase`."""

    def followed_metrics(self) -> list[tuple[str, str]]: ...

    def logged_metrics(self) -> set[str] | None: ...


def check_metric_names(hooks: Sequence[LogsAndFollows], plateau_metric: str | None, recorded: Iterable[str]) -> None:
    """After the first step: the names that are followed are among those that will be logged.

    Nothing is checked if a hook does not know yet what it logs.

    Args:
        hooks: the registered ones.
        plateau_metric: `lr_scheduler_metric`.
        recorded: names that the step has recorded.
    """
    logged = [hook.logged_metrics() for hook in hooks]
    known = [names for names in logged if names is not None]
    if len(known) < len(logged):
        return
    followed = [pair for hook in hooks for pair in hook.followed_metrics()]
    if plateau_metric is not None:
        followed.append(("lr_scheduler_metric", plateau_metric))
    names = sorted(set(recorded).union(*known))
    for who, name in followed:
        if name not in names:
            raise SettingError(f"{who} is {name!r}, but nothing logs this name; there are: {', '.join(names)}.")


def unknown_metric_message(who: str, name: str, known: Iterable[str]) -> str:
    """A followed name that nothing has been logged under by the last epoch."""
    return f"{who} is {name!r}, but nothing has been logged under this name; there are: {', '.join(sorted(known))}."


def note_on_device(error: BaseException, device: torch.device) -> None:
    """Add to torch's error about tensors on two devices what the trainer did; the error itself stays as it is."""
    if isinstance(error, RuntimeError) and re.search(r"same device|expected device|is on .*, but", str(error)):
        error.add_note(
            f"torch-frame: the batch's tensors were moved to {device}, where the model is. The other tensor was made in the step "
            "(give it device=...), is held by the model without being a buffer or parameter, or sits in an object without .to()."
        )


def note_on_ddp(error: BaseException) -> None:
    """Add to torch's error about parameters without a gradient what to write here."""
    if isinstance(error, RuntimeError) and "finished reduction in the prior iteration" in str(error):
        error.add_note(
            "torch-frame: some parameters took no part in a step, or were frozen after the trainer was made. Pass "
            "strategy=DDP(find_unused_parameters=True) (from torch_frame.distributed.ddp), or wrap the model so."
        )


def check_loader(loader: Iterable[Any], epochs_left: int, epoch_len: int | None, *, prefetch: bool = True) -> None:
    """The loader has batches for each epoch that is left, and fetches none ahead if `prefetch` is off."""
    num_workers = getattr(loader, "num_workers", 0)
    if not prefetch and isinstance(num_workers, int) and num_workers > 0:
        raise SettingError(
            f"prefetch=False, but data_loader has {num_workers} workers, which fetch ahead of the training. "
            "Make it with num_workers=0."
        )
    if epochs_left <= 0:
        return
    if epoch_len == 0:
        raise SettingError(empty_loader_message(loader, 0))
    if isinstance(loader, Iterator) and epochs_left > 1:
        raise SettingError(
            f"data_loader is an iterator ({_described(loader)}), which is used up after one epoch, "
            f"but {epochs_left} are to be trained. Pass a DataLoader, a list, or an object whose __iter__ begins anew."
        )


def empty_loader_message(loader: Iterable[Any], epoch: int, num_trained: int = 0) -> str:
    """A loader without a batch.

    Args:
        epoch: index of the epoch.
        num_trained: batches of the epochs before.
    """
    message = f"data_loader yielded no batch in epoch {epoch + 1}."
    if num_trained:
        message += (
            f" It was used up after {num_trained} batches: its __iter__ has to begin anew for each epoch, or the run to end there"
            " (max_epochs, max_iters)."
        )
    if isinstance(loader, DataLoader):
        size = length_of(loader.dataset)
        message += f" Its dataset has {'an unknown number of' if size is None else size} samples"
        if loader.batch_size is None:
            message += f", and its sampler's length is {length_of(loader.sampler)}."
        else:
            message += f", batch_size is {loader.batch_size}, drop_last is {loader.drop_last}."
    return message


def check_device(model: nn.Module, device: torch.device) -> None:
    """The model is where it was when the trainer was made."""
    if device_of(model) != device:
        raise SettingError(
            f"The model was on {device} when the Trainer was made and is on {device_of(model)} now. "
            "Move it before, or pass device= to the Trainer."
        )


def checked_strategy(strategy: Any) -> Strategy:
    """The strategy that was given; None: DDP if several processes were started together, else one process."""
    if strategy is None:
        strategy = "ddp" if num_processes() > 1 else SingleProcess()
    if isinstance(strategy, str) and strategy == "ddp":
        try:
            return DDP()
        except ValueError as error:
            raise SettingError(f"strategy='ddp': {error}") from None
    if isinstance(strategy, type) or not isinstance(strategy, Strategy):
        raise TypeError(
            f"strategy is {_described(strategy)}; it has to be None, 'ddp', or an object such as "
            "torch_frame.distributed.ddp.DDP(...)."
        )
    return strategy


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _described(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")

"""Rows of a run's first block: what is trained, on what, how, and from which seed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from torch_frame.tracking.format import rate_text, size_text
from torch_frame.training.schedule_settings import simple

_logger = logging.getLogger("torch_frame")
_NAMES_SHOWN = 4
_SHOWN_SETTINGS = ("momentum", "weight_decay", "nesterov", "amsgrad")


_ORDER = (
    "Model",
    "Frozen",
    "Frozen, in eval mode",
    "Data",
    "Batch",
    "Steps",
    "Optimizer",
    "Schedule",
    "EMA",
    "Device",
    "Hooks",
)


def ordered(rows: Mapping[str, str | None]) -> dict[str, str]:
    """What, on what, how long, how; all else behind that. A row of None is left out.

    >>> list(ordered({"Folder": "here", "EMA": None, "Steps": "3", "Model": "Net"}))
    ['Model', 'Steps', 'Folder']
    """
    names = [name for name in _ORDER if name in rows] + [name for name in rows if name not in _ORDER]
    return {name: text for name in names if (text := rows[name])}


def rows(texts: Mapping[str, Callable[[], str | None]]) -> dict[str, str]:
    """The rows that there is something to say for; an object so odd that it cannot be described has no row.

    >>> rows({"Data": lambda: "Digits", "Frozen": lambda: None, "Seed": lambda: str(1 / 0)})
    {'Data': 'Digits'}
    """
    found = {}
    for name, text in texts.items():
        try:
            found[name] = text()
        except Exception as error:  # a user's own optimizer, scheduler or dataset
            _logger.debug("No row %r: %s: %s", name, type(error).__name__, error)
    return {name: text for name, text in found.items() if text}


def model_row(model: nn.Module) -> str:
    """The size of a bare model."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))
    return f"{type(model).__name__}, {total:,} parameters ({trainable:,} trainable), {size_text(size)}"


def batch_row(batch_size: int | None, accumulation: int, num_processes: int) -> str:
    """The samples that one update is made of.

    Args:
        batch_size: samples in one of the loader's batches, on one process; None: not known.
        accumulation: batches in an update, on one process.

    >>> batch_row(8, 4, 2)
    '64 samples an update (8 a batch x 4 accumulated x 2 processes)'
    """
    if batch_size is None:
        return f"{accumulation * num_processes} of the loader's batches an update"
    parts = [f"{batch_size} a batch"]
    if accumulation > 1:
        parts.append(f"{accumulation} accumulated")
    if num_processes > 1:
        parts.append(f"{num_processes} processes")
    return f"{batch_size * accumulation * num_processes} samples an update ({' x '.join(parts)})"


def data_row(loader: Any, length: tuple[int, str] | None) -> str:
    """What is trained on.

    Args:
        loader: of the training.
        length: of an epoch, as (number, of what); None: not known.
    """
    dataset = getattr(loader, "dataset", None)
    name = type(loader if dataset is None else dataset).__name__
    return name if length is None else f"{name}, {length[0]:,} {length[1]} an epoch"


def seed_row(seed: int, *, is_given: bool, orders_data: bool) -> str:
    """Where the random numbers of the data come from.

    Args:
        seed: of the run.
        is_given: by the script, as `seed=`.
        orders_data: the loader's order and augmentation follow it.
    """
    whose = "" if is_given else " (torch's, or the loader's)"
    if orders_data:
        return f"{seed}{whose}; order and augmentation are functions of seed {seed} and the position"
    return f"{seed}{whose}; the loader orders its data itself"


def optimizer_row(optimizer: Any, lr_scheduler: Any, clip_grad_norm: Any) -> str:
    """Class, learning rate without warm-up, and the settings that are not 0, of each optimizer there is.

    >>> import torch
    >>> optimizer_row(torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1, momentum=0.9), None, 1.0)
    'SGD, lr 0.1, momentum 0.9, clip_grad_norm 1'
    """
    schedules = {id(getattr(one, "optimizer", None)): one for one in each_of(lr_scheduler)}
    texts = [_optimizer_text(one, schedules.get(id(one))) for one in each_of(optimizer)]
    clip = f", clip_grad_norm {clip_grad_norm:g}" if clip_grad_norm > 0 else ""
    return " + ".join(texts) + clip


def _optimizer_text(optimizer: Any, lr_scheduler: Any) -> str:
    groups = optimizer.param_groups
    regular = getattr(lr_scheduler, "regular_lrs", None) or [group["lr"] for group in groups]
    rates = [float(group.get("initial_lr", rate)) for group, rate in zip(groups, regular, strict=True)]
    parts = [type(optimizer).__name__, f"lr {rate_text(rates)}"]
    for name in _SHOWN_SETTINGS:
        value = simple(groups[0].get(name))
        if value:
            parts.append(f"{name} {value if not isinstance(value, float) else format(value, 'g')}")
    return ", ".join(parts) + (f", {len(groups)} groups" if len(groups) > 1 else "")


def schedule_row(lr_scheduler: Any, interval: str, metric: str | None) -> str:
    """The warm-up and the schedule of each optimizer that has one."""
    return " + ".join(_schedule_text(one, interval, metric) for one in each_of(lr_scheduler))


def _schedule_text(warm: Any, interval: str, metric: str | None) -> str:
    if warm is None:
        return "constant"
    parts = []
    if getattr(warm, "warmup_method", None) is not None:
        parts.append(f"{warm.warmup_method} warm-up ({warm.warmup_iters} updates)")
    scheduler = getattr(warm, "scheduler", warm)
    if scheduler is None:
        parts.append("constant")
    elif metric is not None:
        parts.append(f"{type(scheduler).__name__} by {metric}")
    else:
        parts.append(f"{type(scheduler).__name__} by {'epochs' if interval == 'epoch' else 'updates'}")
    return ", ".join(parts)


def frozen_row(model: nn.Module) -> str | None:
    """The topmost modules, or single parameters, that are not trained; None if all are."""
    names = list(_frozen(model, ""))
    if not names or names == [""]:
        return "all of the model" if names else None
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _frozen(module: nn.Module, name: str) -> Iterator[str]:
    parameters = list(module.parameters())
    if not parameters or all(parameter.requires_grad for parameter in parameters):
        return
    if not any(parameter.requires_grad for parameter in parameters):
        yield name
        return
    prefix = f"{name}." if name else ""
    yield from (prefix + own for own, p in module.named_parameters(recurse=False) if not p.requires_grad)
    for child_name, child in module.named_children():
        yield from _frozen(child, prefix + child_name)


def hooks_row(hooks: Sequence[Any]) -> str:
    """The hooks in their order, and which metric decides what is best."""
    texts = []
    for hook in hooks:
        metric = getattr(hook, "save_metric", None)
        better = "higher" if getattr(hook, "max_first", True) else "lower"
        texts.append(hook.class_name if metric is None else f"{hook.class_name} (best by {metric}, {better} is better)")
    return ", ".join(texts) or "none"


def each_of(things: Any) -> list[Any]:
    """One thing, or those of a list or of a dict's values."""
    if isinstance(things, Mapping):
        return list(things.values())
    return list(things) if isinstance(things, list | tuple) else [things]

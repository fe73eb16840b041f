"""Which objects a trainer's attributes hold, in containers too, and which of them have a state of their own."""

from __future__ import annotations

import dataclasses
import types
import weakref
from collections import deque
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader


def ids_of_own(trainer: Any) -> set[int]:
    """What is saved in other ways: id() of the model and its modules, EMA's, the optimizer, ..."""
    ema, optimization = trainer.model_ema, trainer.optimization
    modules = [*trainer.model.modules(), *(() if ema is None else ema.model.modules())]
    things = [
        *modules,
        ema,
        *optimization.optimizers.values(),
        *optimization.schedules.values(),
        *(schedule.scheduler for schedule in optimization.schedules.values()),
        trainer.precision.scaler,
    ]
    return {id(thing) for thing in [*things, *trainer.hooks, trainer.data_loader, trainer.metric_storage]}


_MOST = 256  # elements of a container that is looked into: a list of all losses is none of optimizers
_DEEPEST = 4


def things_in(name: str, value: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """What an attribute holds: itself, or what is in a list, tuple, deque, dict, namespace or dataclass."""
    if isinstance(value, dict | types.MappingProxyType):
        inside = {f"{name}[{key!r}]": item for key, item in value.items()} if len(value) <= _MOST else {}
    elif isinstance(value, list | tuple | deque):
        inside = {f"{name}[{i}]": item for i, item in enumerate(value)} if len(value) <= _MOST else {}
    elif type(value) is types.SimpleNamespace or _is_record(value):
        inside = {f"{name}.{key}": item for key, item in vars(value).items()}
    else:
        yield name, value
        return
    for place, item in inside.items() if depth < _DEEPEST else ():
        yield from things_in(place, item, depth + 1)


def optimizers_in(thing: Any, known: Collection[int]) -> list[str]:
    """Names of an object's attributes that are optimizers."""
    if isinstance(thing, (type, *weakref.ProxyTypes)) or not hasattr(thing, "__dict__"):
        return []
    return [name for name, part in vars(thing).items() if isinstance(part, Optimizer) and id(part) not in known]


def _is_record(value: Any) -> bool:
    is_dataclass = dataclasses.is_dataclass(type(value)) and hasattr(value, "__dict__")
    return is_dataclass and not has_state(value)


def bare(thing: Any) -> Any:
    """A module without the wrappers of torch.compile, DDP and DataParallel, whose names are the same with and without."""
    while isinstance(thing, nn.Module):
        wraps = isinstance(thing, nn.parallel.DistributedDataParallel | nn.DataParallel)
        inner = thing._modules.get("module" if wraps else "_orig_mod")
        if inner is None:
            break
        thing = inner
    return thing


def has_state(thing: Any) -> bool:
    """Its class has `state_dict` and `load_state_dict`, and it is no loader."""
    kind = type(thing)  # asked of the class: an object may invent attributes
    has_methods = callable(getattr(kind, "state_dict", None)) and callable(getattr(kind, "load_state_dict", None))
    return has_methods and not isinstance(thing, (type, DataLoader, *weakref.ProxyTypes))


def restoring_rank(thing: Any) -> int:
    """Modules first, then optimizers, then the rest, for a schedule needs its optimizer."""
    return 0 if isinstance(thing, nn.Module) else 1 if isinstance(thing, Optimizer) else 2

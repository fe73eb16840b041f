"""A learning-rate scheduler's state, without what only its script has: functions, and objects that it was given.

torch's `LRScheduler.state_dict` returns all attributes. A scheduler among them (GradualWarmupScheduler's `after_scheduler`) is
kept by its own state; a function, an optimizer or a module is the script's at a resume, as LambdaLR has it.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

INSIDE = "#scheduler"
"""The key of a dict that stands for a scheduler which is an attribute of another one."""

_OF_THE_SCRIPT = (
    *(types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial),
    *(Optimizer, nn.Module),
)


def state_of(scheduler: Any) -> dict[str, Any]:
    """The scheduler's `state_dict`, with the states of those inside it."""
    state = dict(scheduler.state_dict())
    if "_schedulers" in state:  # torch's own, in a list
        state["_schedulers"] = [state_of(one) for one in scheduler._schedulers]
    return {
        name: {INSIDE: state_of(value)} if isinstance(value, LRScheduler) else value
        for name, value in state.items()
        if not isinstance(value, _OF_THE_SCRIPT)
    }


def load_state(scheduler: Any, state: Mapping[str, Any]) -> None:
    """Restore what `state_of` returned; the state stays as it is."""
    scheduler.load_state_dict(_completed(scheduler, copy.deepcopy(dict(state))))  # CyclicLR takes entries out of it


def _completed(scheduler: Any, state: dict[str, Any]) -> dict[str, Any]:
    """A state with what is the script's; the schedulers that are attributes have been restored."""
    own = scheduler.state_dict()
    for name, value in own.items():
        if isinstance(value, LRScheduler) and is_inside(state.get(name)):
            load_state(value, state[name][INSIDE])
            state[name] = value
        elif isinstance(value, _OF_THE_SCRIPT):
            state.setdefault(name, value)
    if "_schedulers" in own and len(scheduler._schedulers) == len(state.get("_schedulers", ())):
        pairs = zip(scheduler._schedulers, state["_schedulers"], strict=True)
        state["_schedulers"] = [_completed(one, dict(saved)) for one, saved in pairs]
    return state


def schedulers_inside(scheduler: Any) -> list[Any]:
    """Those in a SequentialLR or ChainedScheduler, else those that are attributes."""
    listed = getattr(scheduler, "_schedulers", None)
    return [*([] if listed is None else listed), *_attributes(scheduler)]


def _attributes(scheduler: Any) -> Iterator[Any]:
    return (value for value in scheduler.state_dict().values() if isinstance(value, LRScheduler))


def is_inside(value: Any) -> bool:
    """It stands for a scheduler inside another one."""
    return isinstance(value, Mapping) and set(value) == {INSIDE}


def loads_in_its_own_way(scheduler: Any) -> bool:
    """A scheduler, or one inside it, has a `load_state_dict` that is not torch's, which may refuse a state."""
    return any(not type(one).load_state_dict.__module__.startswith("torch.") for one in _all_of(scheduler))


def kept_as_it_is(schedule: Any) -> Callable[[], None]:
    """What puts a schedule, those inside it, and the settings of its optimizer's groups back as they are now.

    Args:
        schedule: an `LRWarmupScheduler`.
    """
    kept = [(one, _copied(vars(one))) for one in (schedule, *_all_of(schedule.scheduler)) if hasattr(one, "__dict__")]
    groups = [(group, dict(group)) for group in schedule.optimizer.param_groups]

    def put_back() -> None:
        for values, then in [*((vars(one), attributes) for one, attributes in kept), *groups]:
            values.clear()
            values.update(then)

    return put_back


def _all_of(scheduler: Any) -> list[Any]:
    if scheduler is None:
        return []
    return [scheduler, *(deeper for inner in schedulers_inside(scheduler) for deeper in _all_of(inner))]


def _copied(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """With lists and dicts of their own, which may be changed in place."""
    return {name: copy.copy(value) if type(value) in (list, dict) else value for name, value in attributes.items()}

"""What a script has set of a learning-rate schedule, apart from where the schedule stands: for telling two scripts apart."""

from __future__ import annotations

import contextlib
import copy
import math
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim.lr_scheduler import CyclicLR, MultiplicativeLR

from torch_frame.training.schedule_state import is_inside, schedulers_inside, state_of

Record = Mapping[str, Any]

LENGTHS = frozenset({"T_max", "total_steps", "total_iters"})
"""Settings that say how long a schedule is."""
PLACES = frozenset({"milestones", "step_size", "T_0", "total_size"})
"""Settings that say when a schedule acts: people derive them from a run's length."""
_SAID_LENGTHS = LENGTHS | {"num_training_steps"}  # of transformers' functions

_POSITION = frozenset(
    {
        *("last_epoch", "_step_count", "_last_lr", "base_lrs", "T_cur", "T_i"),
        *("best", "num_bad_epochs", "cooldown_counter", "mode_worse"),  # of ReduceLROnPlateau
        *("_get_lr_called_within_step", "_is_initial", "verbose", "optimizer", "_schedulers"),
        *("lr_lambdas", "_scale_fn_custom", "_scale_fn_ref"),  # functions, which are recorded apart
    }
)


def settings_of(scheduler: Any) -> dict[str, Any] | None:
    """What the script has set of a scheduler, of those inside it too, as plain values; None for no scheduler.

    Returns:
        `class`: its name; `settings`: name -> value; `functions`: of each function that it was given, the plain `values` that
        it computes with; `schedulers`: the same of those inside SequentialLR and ChainedScheduler.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    >>> settings_of(torch.optim.lr_scheduler.StepLR(optimizer, 5))["settings"]
    {'step_size': 5, 'gamma': 0.1}
    """
    if scheduler is None:
        return None
    return {
        **settings_in(state_of(scheduler), type(scheduler).__qualname__),
        "functions": [
            {"is_stateful": _is_stateful(function), "values": _values_of(function)}
            for function in functions_of(scheduler)
        ],
        "schedulers": [settings_of(one) for one in schedulers_inside(scheduler) if hasattr(one, "state_dict")],
    }


def settings_in(state: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """The same from a scheduler's `state_dict`, which says nothing of functions and of the classes inside.

    Args:
        state: of a scheduler.
        name: of its class, if it is known.
    """
    settings = {key.lstrip("_"): simple(value) for key, value in state.items() if not _is_position(key, value)}
    phases = settings.pop("schedule_phases", None)
    if phases:  # OneCycleLR keeps what it derives from these two
        settings["pct_start"] = round((phases[0]["end_step"] + 1) / state["total_steps"], 12)
        settings["three_phase"] = len(phases) == 3
    if isinstance(settings.get("milestones"), Mapping):
        settings["milestones"] = sorted(Counter(settings["milestones"]).elements())
    inner = state.get("_schedulers", ())
    return {
        "class": name,
        "settings": {key: value for key, value in settings.items() if value is not Unknown},
        "functions": [],
        "schedulers": [settings_in(one, None) for one in inner if isinstance(one, Mapping)],
    }


def _is_position(key: str, value: Any) -> bool:
    return key in _POSITION or is_inside(value)


def functions_of(scheduler: Any) -> list[Callable[[int], float]]:
    """The functions that a scheduler was given (not those of the schedulers inside it)."""
    custom = getattr(scheduler, "_scale_fn_custom", None)
    return [*getattr(scheduler, "lr_lambdas", ()), *([] if custom is None else [custom])]


def _is_stateful(function: Any) -> bool:
    """It is an object whose attributes torch saves and restores with the scheduler, unlike a function's values."""
    return not isinstance(function, types.FunctionType | partial)


def length_of(record: Record) -> int | None:
    """Steps that a recorded schedule is made for, if it says so; of a SequentialLR those until its last one ends."""
    values = [record["settings"], *(function["values"] for function in record["functions"])]
    for name, value in (item for one in values for item in one.items()):
        if name in _SAID_LENGTHS and isinstance(value, int):
            return value
    if record["class"] == "SequentialLR" and record["schedulers"]:
        last = length_of(record["schedulers"][-1])
        return None if last is None else last + max(record["settings"]["milestones"], default=0)
    return None


def position_in(state: Mapping[str, Any] | None) -> int | None:
    """Steps that a scheduler has made, by its `state_dict`; None if that does not say: one inside it may count on from there."""
    if not state or any(map(is_inside, state.values())):
        return None
    position = state.get("last_epoch")
    if isinstance(position, int):
        return position
    inner = state.get("_schedulers")
    return position_in(inner[0]) if isinstance(inner, list | tuple) and inner else None


def rates_that_differ(scheduler: Any, state: Mapping[str, Any]) -> Iterator[tuple[float, float, int]]:
    """Where the functions of a scheduler give other rates than those that the saved ones had given.

    LambdaLR: base_lr * lambda(n) for the n-th step; MultiplicativeLR: base_lr * lambda(1) * ... * lambda(n); CyclicLR with a
    scale_fn: by its own formula.

    Args:
        scheduler: the script's.
        state: the saved `state_dict` of one like it.

    Yields:
        (saved rate, the rate by the script's function, n) of each parameter group, if they differ.
    """
    for inner, saved in zip(getattr(scheduler, "_schedulers", ()), state.get("_schedulers", ()), strict=False):
        if not isinstance(inner, MultiplicativeLR):  # among others, its rate is not its own
            yield from rates_that_differ(inner, saved)
    steps, rates = state.get("last_epoch", -1), state.get("_last_lr", ())
    if steps < 0 or not functions_of(scheduler):
        return
    for base, rate, now in zip(state["base_lrs"], rates, _rates_by_functions(scheduler, state, steps), strict=False):
        if not math.isclose(now, float(rate), rel_tol=1e-6, abs_tol=1e-9 * abs(float(base))):
            yield float(rate), now, steps


def _rates_by_functions(scheduler: Any, state: Mapping[str, Any], steps: int) -> Iterator[float]:
    if isinstance(scheduler, CyclicLR):
        probe = copy.copy(scheduler)
        settings = {name: value for name, value in state.items() if not name.startswith("_scale_fn")}
        vars(probe).update(settings, cycle_momentum=False, _get_lr_called_within_step=True)
        yield from map(float, probe.get_lr())
        return
    objects = state.get("lr_lambdas") or [None] * len(scheduler.lr_lambdas)
    for own, kept, base in zip(scheduler.lr_lambdas, objects, state["base_lrs"], strict=False):
        function = _with_attributes(own, kept)
        if isinstance(scheduler, MultiplicativeLR):
            yield float(base) * math.prod(float(function(step)) for step in range(1, steps + 1))
        else:
            yield float(base) * float(function(steps))


def _with_attributes(function: Any, attributes: Mapping[str, Any] | None) -> Any:
    """A callable object as torch restores it; a function as it is."""
    if not attributes:
        return function
    copied = copy.copy(function)
    vars(copied).update(attributes)
    return copied


def _values_of(function: Any) -> dict[str, Any]:
    """The numbers and texts that a function computes with: arguments of a partial, variables around a lambda, attributes."""
    if isinstance(function, partial):
        values = {**{f"args[{i}]": value for i, value in enumerate(function.args)}, **function.keywords}
    elif isinstance(function, types.FunctionType):
        values = dict(_variables_around(function))
    else:
        values = dict(getattr(function, "__dict__", {}))
    plain = {str(name): simple(value) for name, value in values.items() if not isinstance(value, Mapping)}
    return {name: value for name, value in plain.items() if value is not Unknown}


def _variables_around(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield name, function.__globals__[name]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not assigned yet: the trainer itself, say
            yield name, cell.cell_contents


class Unknown:
    """Stands for a value that is not compared: no number, text, or container of them."""


def simple(value: Any) -> Any:
    """A copy, with tensors and numpy's numbers as plain ones; `Unknown` for anything else."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return simple(value.tolist()) if math.prod(value.shape) <= 64 else Unknown
    if isinstance(value, Mapping):
        made = {key: simple(item) for key, item in value.items()}
        return Unknown if Unknown in made.values() else made
    if isinstance(value, list | tuple):
        items = [simple(item) for item in value]
        return Unknown if Unknown in items else items
    return Unknown

"""One optimizer, a list of them or a dict, and learning-rate schedulers in the same form: each under a label.

| given | labels of the optimizers | of their schedules |
|---|---|---|
| one | `optimizer` | `lr_scheduler` |
| a list | `optimizer[0]`, `optimizer[1]`, ... | `lr_scheduler[0]`, ... |
| a dict | `optimizer['g']`, `optimizer['d']`, ... | `lr_scheduler['g']`, ... |

The labels name them in messages and in the state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch.optim import Optimizer

from torch_frame.errors import SettingError

ONLY = "optimizer"
"""The label of an optimizer that is the only one."""


def labelled(optimizer: Any) -> dict[str, Optimizer]:
    """Label -> optimizer.

    Raises:
        TypeError: for what is no optimizer, and no list or dict of them.
        SettingError: for an empty list or dict, or one that holds an optimizer twice.
    """
    found = _labelled(ONLY, optimizer)
    for label, one in found.items():
        if not isinstance(one, Optimizer):
            raise TypeError(
                f"{label} is {_described(one)}; it has to be a torch.optim.Optimizer object, or a list or a dict of them."
            )
    if not found:
        raise SettingError(f"optimizer is an empty {type(optimizer).__name__}; it has to hold one optimizer at least.")
    if len({id(one) for one in found.values()}) < len(found):
        raise SettingError(f"optimizer holds the same {type(_first(found)).__name__} object twice.")
    if isinstance(optimizer, Sequence):
        check_apart(found, "which step together")
    return found


def labelled_schedulers(lr_scheduler: Any, optimizer: Any) -> dict[str, Any]:
    """Label of the optimizer -> its scheduler, or None.

    Raises:
        TypeError: for what is no scheduler.
        SettingError: if its form is not the optimizer's, or a scheduler was made for another optimizer.
    """
    optimizers = _labelled(ONLY, optimizer)
    if lr_scheduler is None:
        return dict.fromkeys(optimizers)
    found = _labelled("lr_scheduler", lr_scheduler)
    wanted = {label: schedule_label(label) for label in optimizers}
    if found.keys() != set(wanted.values()):
        raise SettingError(
            f"lr_scheduler has {_listed(found)}, but optimizer has {_listed(optimizers)}. Give it the optimizer's form, one "
            "scheduler for each; None stands for a constant rate."
        )
    made = {label: found[name] for label, name in wanted.items()}  # in the order of the optimizers
    for label, scheduler in made.items():
        _check_belongs(schedule_label(label), scheduler, label, optimizers)
    return made


def _check_belongs(what: str, scheduler: Any, label: str, optimizers: Mapping[str, Any]) -> None:
    if scheduler is None:
        return
    if not hasattr(scheduler, "optimizer"):
        raise TypeError(f"{what} is {_described(scheduler)}; it has to be a torch scheduler, or None.")
    if scheduler.optimizer is not optimizers[label]:
        others = [other for other, optimizer in optimizers.items() if optimizer is scheduler.optimizer]
        text = f"was made for {others[0]}" if others else "was made for another optimizer than the one given"
        raise SettingError(
            f"{what} {text}: the learning rate of {label} would never change. Make it from the same optimizer object."
        )


def in_form_of(given: Any, by_label: Mapping[str, Any]) -> Any:
    """Values by label in the form that the optimizers were given in: one, a tuple, or a mapping that cannot be changed."""
    values = list(by_label.values())
    if isinstance(given, Mapping):
        return MappingProxyType(dict(zip(given, values, strict=True)))
    return tuple(values) if isinstance(given, Sequence) else values[0]


def schedule_label(label: str) -> str:
    """The label of an optimizer's schedule.

    >>> schedule_label("optimizer['g']")
    "lr_scheduler['g']"
    """
    return f"lr_scheduler{label.removeprefix(ONLY)}"


def _labelled(what: str, given: Any) -> dict[str, Any]:
    if isinstance(given, Mapping):
        for name in given:
            if not isinstance(name, str) or not name:
                raise TypeError(
                    f"{what} is a dict with the key {name!r}; its keys are names, texts that are not empty."
                )
        return {f"{what}[{name!r}]": one for name, one in given.items()}
    if isinstance(given, Sequence) and not isinstance(given, str):
        return {f"{what}[{index}]": one for index, one in enumerate(given)}
    return {what: given}


def check_apart(optimizers: Mapping[str, Optimizer], why: str) -> None:
    """No parameter is in two of them.

    Raises:
        SettingError: naming the two; `why` says why it matters.
    """
    owners: dict[int, str] = {}
    for label, optimizer in optimizers.items():
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            owner = owners.setdefault(id(parameter), label)
            if owner != label:
                raise SettingError(
                    f"A parameter of shape {list(parameter.shape)} is in {owner} and in {label}, {why}. Give it to one of them."
                )


def _first(found: Mapping[str, Any]) -> Any:
    return next(iter(found.values()))


def _listed(labels: Iterable[str]) -> str:
    return ", ".join(labels) or "nothing"


def _described(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")

"""An optimizer's values as they were saved, which torch's `load_state_dict` casts, moves and copies."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def castable(value: Any) -> Any:
    """What torch's `load_state_dict` can copy of an optimizer's state; the rest, strings too, is None for `exact` to fill in."""
    if isinstance(value, Tensor | bool | int | float | None):
        return value
    if isinstance(value, dict):
        return {key: castable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | deque):
        return [castable(item) for item in value]
    return None


def exact(saved: Any, loaded: Any) -> Any:
    """A loaded value of an optimizer's state as it was saved, on the device that torch has put it on.

    torch casts floating tensors to the dtype of their parameter, and makes a string of the text of a generator.
    """
    if isinstance(loaded, Tensor):
        if not isinstance(saved, Tensor) or saved.dtype == loaded.dtype:
            return loaded
        return saved.to(loaded.device) if saved.shape == loaded.shape else loaded.to(saved.dtype)
    if isinstance(saved, Mapping) and isinstance(loaded, dict):
        return _like(saved, {key: exact(saved[key], item) if key in saved else item for key, item in loaded.items()})
    if isinstance(saved, list | tuple | deque) and isinstance(loaded, list) and len(saved) == len(loaded):
        return _like(saved, [exact(*pair) for pair in zip(saved, loaded, strict=True)])
    return saved


def _like(saved: Any, items: Any) -> Any:
    """Items in a container of the kind that was saved: a defaultdict with its factory, a deque with its length, a named tuple."""
    if type(saved) in (list, dict):
        return items
    if isinstance(saved, tuple):
        return saved._make(items) if hasattr(saved, "_make") else tuple(items)
    made = copy.copy(saved)
    made.clear()
    (made.extend if isinstance(made, deque | list) else made.update)(items)
    return made


class SameGroups:
    """Around torch's `load_state_dict`: the groups stay the same dicts in the same list, and the state the same dict.

    Others hold them too: an optimizer inside or around this one, a hook. Not for an optimizer that loads in its own way.

    Args:
        outer: the optimizer around it, which may give it its own groups when it loads (SAM).
    """

    def __init__(self, optimizer: Optimizer, outer: Optimizer | None = None) -> None:
        self._optimizer = optimizer
        self._outer = outer

    def __enter__(self) -> None:
        self._groups, self._state = self._optimizer.param_groups, self._optimizer.state

    def __exit__(self, *error: object) -> None:
        optimizer, outer = self._optimizer, self._outer
        is_torchs = type(optimizer).load_state_dict is Optimizer.load_state_dict
        if error[0] is not None or not is_torchs or optimizer.param_groups is self._groups:
            return
        if outer is not None and optimizer.param_groups is outer.param_groups:
            return
        for group, loaded in zip(self._groups, optimizer.param_groups, strict=True):
            settings = _on_its_device(loaded, group)
            group.clear()
            group.update(settings)
        self._state.clear()
        self._state.update(optimizer.state)
        optimizer.param_groups, optimizer.state = self._groups, self._state


def _on_its_device(loaded: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are tensors (a capturable optimizer's rate) on the device where the optimizer has them."""
    return {
        key: value.to(own[key].device) if isinstance(value, Tensor) and isinstance(own.get(key), Tensor) else value
        for key, value in loaded.items()
    }


def keys_on_host(optimizer: Optimizer) -> list[str]:
    """Keys of tensors that the optimizer keeps on the CPU for parameters that are elsewhere (NAdam's `mu_product`).

    torch moves them to the parameters' device when it loads them, and then waits for the device at each step. Not "step", for
    which torch knows when it has to be where.
    """
    keys = {
        key
        for owner, kept in optimizer.state.items()
        if isinstance(owner, Tensor) and owner.device.type != "cpu" and isinstance(kept, Mapping)
        for key, value in kept.items()
        if isinstance(value, Tensor) and value.device.type == "cpu"
    }
    return sorted(keys - {"step"})


def make_exact(optimizer: Optimizer, saved: Mapping[Any, Any], on_host: Collection[str] = ()) -> None:
    """Put values as they were saved in place of what torch has made of them.

    Args:
        saved: the state by position.
        on_host: keys of tensors that belong on the CPU.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, kept in saved.items():
        owner = parameters[key] if isinstance(key, int) and 0 <= key < len(parameters) else key
        if owner in optimizer.state:
            optimizer.state[owner] = exact(kept, optimizer.state[owner])
            for name in on_host:
                if name in kept:
                    optimizer.state[owner][name] = kept[name].detach().cpu().clone()

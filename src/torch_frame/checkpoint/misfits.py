"""Whether saved weights fit a module; one that loads in its own way is asked, on a copy."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_frame.checkpoint.names import bare_name

_METHODS = ("load_state_dict", "_load_from_state_dict", "set_extra_state", "state_dict", "_save_to_state_dict")
_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_hooks", "_state_dict_pre_hooks")


def misfits(module: nn.Module, own: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Why saved weights cannot be loaded, in words; empty if they can.

    Only a module that loads in its own way is copied: without its values first, with them only if it does not take the state so.

    Args:
        module: the bare model.
        own: its `state_dict`, under bare names.
        saved: the same of the saved run.
    """
    lines = _compared(own, saved)
    if not loads_in_its_own_way(module):
        return lines
    try:
        answer = _answer(module, saved, own, with_values=False)
        return answer and _answer(module, saved, own, with_values=True)
    except _CannotCopy:
        return lines


def own_names(module: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Saved weights under the names that the module has for them, compiled or not."""
    names = {bare_name(name): name for name in _all_names(module)}
    return {names.get(name, name): value for name, value in saved.items()}


def loads_in_its_own_way(module: nn.Module) -> bool:
    """Whether a module, or one inside it, has load hooks or methods that are not torch's own."""
    return any(
        any(getattr(inner, hooks, None) for hooks in _HOOKS) or any(_is_changed(inner, method) for method in _METHODS)
        for inner in module.modules()
    )


def _is_changed(module: nn.Module, method: str) -> bool:
    home: str = getattr(getattr(type(module), method), "__module__", "")
    return method in vars(module) or not home.startswith("torch.")


def _all_names(module: nn.Module) -> Iterator[str]:
    yield from module.state_dict()
    for name, _ in module.named_parameters(remove_duplicate=False):
        yield name
    for name, _ in module.named_buffers(remove_duplicate=False):
        yield name


def _compared(own: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    differences = [f"the model has no {name}" for name in saved if name not in own]
    differences += [f"the checkpoint has no {name}" for name in own if name not in saved]
    for name, value in own.items():
        theirs = saved.get(name)
        if isinstance(value, Tensor) and isinstance(theirs, Tensor) and value.shape != theirs.shape:
            differences.append(f"{name} was {list(theirs.shape)}, now it is {list(value.shape)}")
    return differences


class _CannotCopy(Exception):
    """The module cannot be copied, so it cannot be asked."""


def _answer(module: nn.Module, saved: Mapping[str, Any], own: Mapping[str, Any], *, with_values: bool) -> list[str]:
    """What a copy of the module says of a saved state; without values it is on the meta device and needs no memory."""
    asked = _copied(module, with_values=with_values)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # copying to the meta device does nothing, says torch
            result = asked.load_state_dict(own_names(asked, copy.copy(saved)), strict=False)
    except Exception as error:
        return _compared(own, saved) or [f"the model refuses it: {type(error).__name__}: {error}"]
    lines = [f"the model has no {bare_name(name)}" for name in getattr(result, "unexpected_keys", ())]
    if not _leaves_out(module):
        missing = {bare_name(name) for name in getattr(result, "missing_keys", ())}
        lines += [f"the checkpoint has no {name}" for name in own if name in missing]
    return lines


def _leaves_out(module: nn.Module) -> bool:
    """Its `state_dict` may leave out what it holds, frozen parts say."""
    return any(
        inner._state_dict_hooks or _is_changed(inner, "state_dict") or _is_changed(inner, "_save_to_state_dict")
        for inner in module.modules()
    )


def _copied(module: nn.Module, *, with_values: bool) -> nn.Module:
    memo: dict[int, Any] = {}
    if not with_values:
        for parameter in module.parameters():
            empty = torch.empty_like(parameter, device="meta")
            memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in module.buffers()}
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise _CannotCopy from error

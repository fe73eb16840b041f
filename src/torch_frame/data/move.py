"""Takes a batch of any nesting to a device."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import fields, is_dataclass
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from torch_frame.errors import SettingError
from torch_frame.types import Device

T = TypeVar("T")

# A non-blocking copy to these may still be under way when it returns, with nothing that orders later reads after it.
_ALWAYS_BLOCKING = ("cpu", "mps")


def resolve_device(device: Device) -> torch.device:
    """Returns the device that tensors sent to `device` report, so that the two can be compared.

    "cuda" becomes the current CUDA device ("cuda:0") and "cpu:0" becomes "cpu". It starts CUDA only where `device` is a
    CUDA device. Call it once; `move_to_device` doesn't.

    Raises:
        SettingError: `device` is a CUDA device, but torch sees none.

    >>> resolve_device("cpu:0")
    device(type='cpu')
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingError(
            f"device is '{device}', but torch {torch.__version__} sees no CUDA device. "
            "Pass device='cpu', or install a CUDA build of torch and see that `nvidia-smi` lists a GPU."
        )
    return torch.empty(0, device=device).device


def move_to_device(batch: T, device: torch.device, non_blocking: bool = True) -> T:
    """Returns `batch` with every tensor in it on `device`; the batch that came in is never changed.

    Looks into lists, tuples, namedtuples, mappings and dataclasses, and keeps their types; a mapping that can't be
    made again becomes a dict. Whatever else has a `.to` is sent with `.to(device)`: what that does is up to the
    object, and some change themselves. Everything else stays as it is: numbers, strings, numpy arrays, None.

    Args:
        batch: any nesting of the above, without cycles.
        device: from `resolve_device`; one without an index ("cuda") gives the same result, slower.
        non_blocking: return while copies from pinned memory are still under way; later work on the device waits for
            them. Copies to the CPU and to MPS always block.

    Returns:
        The same object where nothing had to move, otherwise a new one that shares what did not move.

    >>> batch = {"image": torch.zeros(2, 3), "name": ["a", "b"]}
    >>> move_to_device(batch, torch.device("cpu")) is batch
    True
    >>> move_to_device(batch, torch.device("meta"))["image"].device
    device(type='meta')
    """
    kind = type(batch)
    if kind is tuple or kind is list:  # the common case first: a tuple of two tensors that are there costs 0.2 us
        for item in batch:  # type: ignore[attr-defined]
            if type(item) is not Tensor or item.device != device:
                break
        else:
            return batch
    moved: T = _moved(batch, device, non_blocking)
    return moved


def leaves(batch: Any) -> Iterator[Any]:
    """Yields what a batch is made of: all that `move_to_device` doesn't look into, tensors among it.

    An object with a `.to` of its own is a leaf: what it holds can't be known. `PackedSequence` and `UserDict` (on which
    transformers' `BatchEncoding` is built) are looked into all the same.

    >>> list(leaves({"a": [1, "x"], "b": (2.0,)}))
    [1, 'x', 2.0]
    """
    is_opaque = _has_to(batch) and not isinstance(batch, (PackedSequence, UserDict))
    if isinstance(batch, (list, tuple)) and not is_opaque:
        for item in batch:
            yield from leaves(item)
    elif _is_keyed(batch) and not is_opaque:
        for value in _values(batch).values():
            yield from leaves(value)
    else:
        yield batch


def _moved(batch: Any, device: torch.device, non_blocking: bool) -> Any:
    """The common cases stand first, and recursion is direct: a tuple of two tensors that are there costs 0.6 us."""
    if isinstance(batch, Tensor):
        return batch if batch.device == device else _sent(batch, device, non_blocking)
    kind = type(batch)
    if kind is list or kind is tuple:
        for item in batch:
            if type(item) is not Tensor or item.device != device:
                break
        else:
            return batch
        items = [_moved(item, device, non_blocking) for item in batch]
        return batch if all(map(is_, items, batch)) else kind(items)
    if kind is str or kind is int or kind is float or batch is None:
        return batch
    if isinstance(batch, PackedSequence):
        return _sent(batch, device, non_blocking)
    if _has_to(batch):
        return batch.to(device)
    if isinstance(batch, (list, tuple)):
        items = [_moved(item, device, non_blocking) for item in batch]
        return batch if all(map(is_, items, batch)) else _sequence_like(batch, items)
    if _is_keyed(batch):
        old = _values(batch)
        new = {key: _moved(value, device, non_blocking) for key, value in old.items()}
        if all(map(is_, new.values(), old.values())):
            return batch
        return _mapping_like(batch, new) if isinstance(batch, Mapping) else _dataclass_like(batch, new)
    return batch


def _sent(data: Any, device: torch.device, non_blocking: bool) -> Any:
    return data.to(device, non_blocking=non_blocking and device.type not in _ALWAYS_BLOCKING)


def _has_to(batch: Any) -> bool:
    """Whether `batch.to(device)` may be called: never on a class, nor on a field or key that is named "to"."""
    if type(batch) is dict or isinstance(batch, type):
        return False
    # A mapping's attributes may be its keys: `__getattr__ = dict.__getitem__` raises KeyError here.
    owner = type(batch) if isinstance(batch, Mapping) else batch
    return callable(getattr(owner, "to", None))


def _is_keyed(batch: Any) -> bool:
    kind = type(batch)
    return kind is dict or issubclass(kind, Mapping) or is_dataclass(kind)


def _values(batch: Any) -> dict[Any, Any]:
    """The values of a mapping, or the fields of a dataclass that are set: one with init=False may not be yet."""
    if isinstance(batch, dict):
        return batch
    if isinstance(batch, Mapping):
        return dict(batch)
    return {field.name: getattr(batch, field.name) for field in fields(batch) if hasattr(batch, field.name)}


def _mapping_like(batch: Mapping[Any, Any], moved: dict[Any, Any]) -> Mapping[Any, Any]:
    """A mapping of the type of `batch` that holds `moved`, or `moved` itself where there's no making one."""
    if type(batch) is dict:
        return moved
    try:
        new = _copied_dict(batch, moved) if isinstance(batch, (dict, UserDict)) else _constructed(batch, moved)
        is_kept = new.keys() == moved.keys() and all(new[key] is value for key, value in moved.items())
    except Exception:  # a constructor with other arguments, a read-only mapping: whatever it says, a dict will do
        return moved
    return new if is_kept else moved


def _constructed(batch: Any, moved: dict[Any, Any]) -> Any:
    """For mappings that keep their items who knows where: a shallow copy might share them with the user's object."""
    return type(batch)(moved)


def _copied_dict(batch: Any, moved: dict[Any, Any]) -> Any:
    """A copy keeps what a constructor would not: attributes, and defaultdict's factory."""
    new = copy(batch)
    if new is batch:
        return new
    if getattr(batch, "__dict__", None) is batch:  # the attribute dict that says `self.__dict__ = self`
        new.__dict__ = new
    for key, value in moved.items():
        new[key] = value
    return new


def _sequence_like(batch: Any, items: list[Any]) -> Any:
    """A list or tuple of the subclass of `batch`: namedtuples, torch.return_types, people's own."""
    if isinstance(batch, list):
        new = copy(batch)
        new[:] = items
        return new
    kind = type(batch)
    if hasattr(kind, "n_sequence_fields"):  # a C struct sequence, such as torch.return_types.topk
        return kind(items)
    new = tuple.__new__(kind, items)  # a namedtuple's own __new__ takes one argument a field
    if hasattr(batch, "__dict__"):
        new.__dict__.update(batch.__dict__)
    return new


def _dataclass_like(batch: Any, values: dict[str, Any]) -> Any:
    """A new instance without a call of `__init__`, `__post_init__` or a frozen class's `__setattr__`."""
    new = object.__new__(type(batch))
    state = object.__getstate__(batch)  # the __dict__ or None, or a tuple of that and the slots
    for part in state if isinstance(state, tuple) else (state,):
        for name, value in (part or {}).items():
            object.__setattr__(new, name, value)
    for name, value in values.items():
        object.__setattr__(new, name, value)
    return new

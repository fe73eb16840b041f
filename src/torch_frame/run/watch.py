"""Whether something has been changed since a moment, as far as it can be seen at little cost."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from torch_frame.checkpoint.digest import fingerprint
from torch_frame.errors import CheckpointError

_NUM_SAMPLES = 64
_LONG = 256  # elements
_DEEP = 4
_LARGE = 2**24  # bytes


class Watch:
    """Remembers how things stand.

    Of a tensor it compares which object it is, torch's count of writes, `requires_grad`, and up to 64 elements (not of an
    optimizer's); what writes past torch (`.data`) to other elements only is not seen. Of other values it compares all. Reads no
    device before it is asked. Takes 20 ms for 1,000 parameters.

    Args:
        collect: gives the things, today's at each call: tensors, numbers, and others that `fingerprint` takes; modules,
            optimizers, objects with a `state_dict`; in lists, tuples and dicts.
    """

    def __init__(self, collect: Callable[[], Iterable[Any]]) -> None:
        self._collect = collect
        self._marks = _marks(collect())

    def sees_change(self) -> bool:
        """Things stand in another way than when the watch began."""
        return not _same(self._marks, _marks(self._collect()))


def glance(value: Any, depth: int = 0) -> Any:
    """What tells whether a plain value has changed, to be compared by `has_changed`; None for other objects.

    Numbers, texts, tensors, arrays, generators of random numbers, and containers of these; of long containers their length.
    """
    if isinstance(value, Tensor):
        return _mark_of_tensor(value, True)
    if isinstance(value, dict | list | tuple | set | deque):
        if len(value) > _LONG or depth == _DEEP:
            return len(value)
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return [(repr(key), glance(item, depth + 1)) for key, item in pairs]
    if isinstance(value, np.ndarray) and value.nbytes > _LARGE:
        return value.shape
    try:
        return fingerprint(value)
    except CheckpointError:
        return None


def has_changed(was: Any, now: Any) -> bool:
    """Of two glances."""
    return not _same(was, now)


class _TensorMark(NamedTuple):
    tensor: Tensor
    version: int
    requires_grad: bool
    sample: Tensor | None


def _marks(things: Iterable[Any]) -> list[Any]:
    with torch.no_grad():
        return [_mark(thing) for thing in things]


def _mark(thing: Any, *, sampled: bool = True) -> Any:
    if isinstance(thing, Tensor):
        return _mark_of_tensor(thing, sampled)
    if isinstance(thing, nn.Module):
        return [_mark_of_tensor(tensor, True) for tensor in (*thing.parameters(), *thing.buffers())]
    if isinstance(thing, Optimizer):
        state = [(id(owner), _mark(kept, sampled=False)) for owner, kept in thing.state.items()]
        return [state, [_mark_of_group(group) for group in thing.param_groups]]
    if isinstance(thing, Mapping):
        return [(_mark(key), _mark(item, sampled=sampled)) for key, item in thing.items()]
    if isinstance(thing, list | tuple):
        return [_mark(item, sampled=sampled) for item in thing]
    try:
        return fingerprint(thing)
    except CheckpointError:
        return _mark_of_object(thing)


def _mark_of_group(group: Mapping[str, Any]) -> Any:
    settings = {name: value for name, value in group.items() if name != "params"}
    return [[id(parameter) for parameter in group["params"]], _mark(settings)]


def _mark_of_object(thing: Any) -> Any:
    try:
        return _mark(thing.state_dict())
    except Exception:  # it has none, or it is not complete yet
        return id(thing)


def _mark_of_tensor(tensor: Tensor, sampled: bool) -> Any:
    if is_lazy(tensor):  # it has no values yet
        return id(tensor)
    sample = None
    has_bits = tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_quantized)
    if sampled and has_bits:
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _NUM_SAMPLES)][:_NUM_SAMPLES].clone()
    version = 0 if tensor.is_inference() else tensor._version
    return _TensorMark(tensor, version, tensor.requires_grad, sample)


def _same(was: Any, now: Any) -> bool:
    if type(was) is not type(now):
        return False
    if isinstance(was, _TensorMark):
        return _is_untouched(was, now)
    if isinstance(was, list | tuple):
        return len(was) == len(now) and all(_same(*pair) for pair in zip(was, now, strict=True))
    return bool(was == now)


def _is_untouched(was: _TensorMark, now: _TensorMark) -> bool:
    if (was.version, was.requires_grad) != (now.version, now.requires_grad):
        return False
    if was.sample is not None and now.sample is not None and not torch.equal(_bytes(was.sample), _bytes(now.sample)):
        return False
    return was.tensor is now.tensor or fingerprint(was.tensor.detach()) == fingerprint(now.tensor.detach())


def _bytes(sample: Tensor) -> Tensor:
    return sample.resolve_conj().resolve_neg().contiguous().view(torch.uint8)  # NaN equals NaN

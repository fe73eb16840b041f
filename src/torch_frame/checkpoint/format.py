"""What a checkpoint file may contain: tensors and plain types, so that loading it runs no code.

`torch.load(weights_only=True)` accepts built-in scalars and containers, tensors and OrderedDict; what a state holds beyond that
is turned into those here, or refused with its place in the state.
"""

from __future__ import annotations

import functools
import os
from collections import OrderedDict, deque
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_frame.errors import CheckpointError

FORMAT = "torch_frame.state"
VERSION = 3

_SCALARS = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)


def plain(value: Any, place: str = "state", *, copy_tensors: bool = False) -> Any:
    """`value` with everything turned into what `torch.load(weights_only=True)` reads.

    NumPy scalars become Python numbers, arrays tensors, defaultdicts dicts, deques lists,
    namedtuples tuples, paths strings.

    Args:
        value: any nesting of containers.
        place: where it is, for the message.
        copy_tensors: the result shares no memory with `value`.

    Raises:
        CheckpointError: naming the place of what cannot be saved.

    >>> plain({"lr": np.float64(0.5), "window": deque([1, 2])})
    {'lr': 0.5, 'window': [1, 2]}
    """
    kind = type(value)
    if kind in _SCALARS:
        return value
    if isinstance(value, Tensor):
        return value.detach().clone() if copy_tensors else value
    inside = functools.partial(plain, copy_tensors=copy_tensors)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return torch.from_numpy(value.copy())
    if isinstance(value, Mapping):
        made = OrderedDict() if isinstance(value, OrderedDict) else {}
        for key, item in value.items():
            made[plain(key, f"{place} (a key)")] = inside(item, f"{place}[{key!r}]")
        return made
    if isinstance(value, tuple):
        return tuple(inside(item, f"{place}[{i}]") for i, item in enumerate(value))
    if isinstance(value, list | deque):
        return [inside(item, f"{place}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Set):
        return {inside(item, f"{place} (an element)") for item in value}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, int | float | str):  # enums and other subclasses of plain types
        return next(base(value) for base in (int, float, str) if isinstance(value, base))
    raise CheckpointError(
        f"{place} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold: loading it would have to run code. "
        "Turn it into numbers, strings, lists, dicts or tensors in state_dict(), and back in load_state_dict()."
    )


def is_full_state(checkpoint: Any) -> bool:
    """Whether a loaded file is a whole training state rather than weights alone."""
    return isinstance(checkpoint, Mapping) and checkpoint.get("format") == FORMAT

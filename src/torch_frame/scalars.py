"""What may be recorded: a number, as it is at that moment."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
from torch import Tensor

from torch_frame.types import Number


def number_or_copy(value: Any, name: str) -> Tensor | Number:
    """The value as it is now: a number, or of a tensor on a device a copy there, without its graph, which is not read.

    Args:
        value: a number (numpy's and booleans too), or a tensor or array of one element.
        name: for the error.

    Raises:
        TypeError: naming the value, if it is none of these.

    >>> import torch
    >>> number_or_copy(torch.ones(1, requires_grad=True), "loss"), number_or_copy(np.bool_(True), "hit")
    (1.0, True)
    """
    if type(value) is float or type(value) is int:
        return value
    if isinstance(value, Tensor):
        _check_single(value.numel() == 1 and not value.is_complex(), value, f"of shape {tuple(value.shape)}", name)
        return value.item() if value.is_cpu else detached_copy(value)
    if isinstance(value, np.ndarray | np.generic):
        _check_single(is_number(value), value, f"of {value.size} elements", name)
        return number_of(value)
    if not is_number(value) and not _is_buffer(value):
        raise TypeError(
            f"{name!r} was logged as {_described(value)}; it has to be a number, or a tensor of one element. "
            "Log what it is about as a number of its own, or reduce it, for example with .mean()."
        )
    return number_of(value)


def detached_copy(value: Tensor) -> Tensor:
    """A tensor that nothing changes later, without its graph."""
    return value.detach().clone()


def is_number(value: Any) -> bool:
    """A real number, numpy's and arrays of one element among them."""
    if isinstance(value, np.ndarray | np.generic):
        return value.size == 1 and value.dtype.kind in "biuf"
    return isinstance(value, numbers.Real)


def is_whole(value: Any) -> bool:
    """A whole number, numpy's among them, but no boolean."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def number_of(value: Any) -> Number:
    """The Python number of what `is_number` says is one."""
    if isinstance(value, np.ndarray | np.generic):
        number: Number = value.item()
        return number
    return value if isinstance(value, int) else float(value)


def _is_buffer(value: Any) -> bool:
    """A HistoryBuffer: its mean is logged, as in 1.7."""
    return hasattr(value, "global_avg") and hasattr(type(value), "__float__")


def _check_single(is_single: bool, value: Any, described: str, name: str) -> None:
    if not is_single:
        kind = f"{type(value).__name__} {described}, dtype {value.dtype}"
        raise TypeError(
            f"{name!r} was logged as a {kind}; it has to be one real number. Reduce it, for example with .mean(), or log each "
            "element under a name of its own."
        )


def _described(value: Any) -> str:
    if value is None:
        return "None"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"

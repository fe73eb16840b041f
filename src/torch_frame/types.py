"""Names for the types that appear in more than one public signature, and what counts as a number."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Number: TypeAlias = int | float
Values: TypeAlias = Mapping[str, Tensor | Number]
"""Named losses or metrics: one-element tensors or plain numbers."""

StepOutput: TypeAlias = Tensor | Mapping[str, Tensor | Number] | tuple[Any, Mapping[str, Tensor | Number]]
"""What a training step may return; see `torch_frame.training.losses`."""

StepFn: TypeAlias = Callable[[nn.Module, Any], StepOutput]
"""(model, batch) -> what a model may return."""

Device: TypeAlias = str | int | torch.device


def is_flag(value: Any) -> bool:
    """True or False, of Python or NumPy, or 1 or 0."""
    kind = getattr(getattr(value, "dtype", None), "kind", None)
    return (isinstance(value, numbers.Integral) or (kind == "b" and not isinstance(value, Tensor))) and value in (0, 1)

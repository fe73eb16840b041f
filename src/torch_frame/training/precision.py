"""In which number format the forward pass runs: fp32, bf16 or fp16 through `torch.autocast`."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Any, Literal, cast, get_args

import torch

from torch_frame.errors import SettingError

_logger = logging.getLogger("torch_frame")

PrecisionName = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class _Nothing:
    """A context of nothing, as contextlib.nullcontext is, but entered and left in C: without two Python functions a step."""

    __enter__ = __exit__ = "".format  # takes whatever it is given, and returns "": no error is suppressed


NOTHING = cast("AbstractContextManager[Any]", _Nothing())


class Precision:
    """Autocast and, for fp16, the gradient scaler.

    Args:
        name: "fp32", "bf16" or "fp16".
        device: where the model is; autocast is made for this kind of device.
    """

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        self.name = name
        self.is_full = name == "fp32"
        self.scaler = torch.amp.GradScaler(device.type) if name == "fp16" else None
        self._device_type = device.type
        self._dtype = _DTYPES.get(name)

    def autocast(self) -> AbstractContextManager[None]:
        """The context that forward and losses are computed in."""
        if self._dtype is None:
            return NOTHING
        return torch.autocast(self._device_type, dtype=self._dtype)


def choose_precision(precision: PrecisionName | None, enable_amp: bool, device: torch.device) -> PrecisionName:
    """What `precision` and 1.7's `enable_amp` ask for together.

    Raises:
        SettingError: for an unknown name, or where the two contradict each other.
    """
    if precision is not None and precision not in get_args(PrecisionName):
        raise SettingError(f"precision is {precision!r}; it has to be one of 'fp32', 'bf16', 'fp16'.")
    if not enable_amp:
        return precision or "fp32"
    if precision not in (None, "fp16"):
        raise SettingError(
            f"enable_amp=True means precision='fp16', but precision is {precision!r}. Pass only precision."
        )
    if precision is None and device.type != "cuda":
        _logger.warning(
            "enable_amp=True is fp16 on CUDA, but the model is on %s: training in fp32. "
            "For mixed precision here, pass precision='bf16' or precision='fp16'.",
            device.type,
        )
        return "fp32"
    return "fp16"

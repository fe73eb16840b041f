"""A model's buffers (batch-norm statistics, counters, codebooks), found once and read often."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def buffer_slots(model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where each buffer is held: a module may put another tensor there (`self.codes = ...`), so the place is kept."""
    slots: dict[str, tuple[dict[str, Any], str]] = {}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                slots[f"{prefix}.{name}" if prefix else name] = (module._buffers, name)
    return slots


class BufferSnapshot:
    """A copy of a model's buffers, to put back after a forward pass that should not have happened."""

    def __init__(self, model: nn.Module) -> None:
        self._slots = list(buffer_slots(model).values())
        self._copies = [owner[name].detach().clone() for owner, name in self._slots]

    @torch.no_grad()
    def take(self) -> None:
        """Copy the buffers as they are now, into the same memory each time."""
        if self._slots:
            torch._foreach_copy_(self._copies, self._buffers())

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the model's buffers the values that were taken."""
        if self._slots:
            torch._foreach_copy_(self._buffers(), self._copies)

    def _buffers(self) -> list[Tensor]:
        return [owner[name] for owner, name in self._slots]

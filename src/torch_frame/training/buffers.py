"""A model's buffers (batch-norm statistics, counters, codebooks), found once and read often."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def buffer_slots(model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where each buffer is held: a module may put another tensor there (`self.codes = ...`), so the place is kept."""
    slots: dict[str, tuple[dict[str, Any], str]] = {}
    seen: set[int] = set()  # as in named_buffers(), a tensor that several modules share is listed once
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in seen:
                seen.add(id(buffer))
                slots[f"{prefix}.{name}" if prefix else name] = (module._buffers, name)
    return slots


class BufferSnapshot:
    """A copy of a model's buffers, to put back after a forward pass that should not have happened."""

    def __init__(self, model: nn.Module) -> None:
        self._slots = list(buffer_slots(model).values())
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []

    @torch.no_grad()
    def take(self) -> None:
        """Copy the buffers as they are now, into the same memory where they still have the same form."""
        self._tensors = [owner[name] for owner, name in self._slots]
        if not self._tensors:
            return
        forms = [(tensor.shape, tensor.dtype, tensor.device) for tensor in self._tensors]
        if forms == [(copy.shape, copy.dtype, copy.device) for copy in self._copies]:
            torch._foreach_copy_(self._copies, self._tensors)
        else:
            self._copies = [tensor.detach().clone() for tensor in self._tensors]

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the model the buffers that were taken, with the values they had.

        Written to are the tensors of then: what a module holds now may be the batch itself.
        """
        if self._tensors:
            torch._foreach_copy_(self._tensors, self._copies)
        for (owner, name), tensor in zip(self._slots, self._tensors, strict=True):
            if owner[name] is not tensor:
                owner[name] = tensor

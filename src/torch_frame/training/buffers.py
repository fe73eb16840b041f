"""A model's buffers (batch-norm statistics, counters, codebooks), found once and read often."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Slot = tuple[dict[str, Any], str]
"""A module's `_buffers`, and a name in it: the module may put another tensor there (`self.codes = ...`)."""


def buffer_slots(model: nn.Module) -> dict[str, Slot]:
    """Where each buffer is held, by name."""
    slots: dict[str, Slot] = {}
    seen: set[int] = set()  # as in named_buffers(), a tensor that several modules share is listed once
    for name, (owner, own_name) in all_slots(model).items():
        buffer = owner[own_name]
        if buffer is not None and id(buffer) not in seen:
            seen.add(id(buffer))
            slots[name] = (owner, own_name)
    return slots


def empty_slots(model: nn.Module) -> dict[str, Slot]:
    """Where a buffer is registered that is not there yet: a forward pass makes it."""
    return {name: slot for name, slot in all_slots(model).items() if slot[0][slot[1]] is None}


def all_slots(model: nn.Module) -> dict[str, Slot]:
    """Where buffers are registered, whether they are there or not."""
    return {
        f"{prefix}.{name}" if prefix else name: (module._buffers, name)
        for prefix, module in model.named_modules()
        for name in module._buffers
    }


def once(tensor: Tensor) -> Tensor:
    """A view that has each element of memory once: of a tensor made by `expand`, without its repetitions."""
    view = tensor
    if tensor.layout is torch.strided:
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            view = view.narrow(dim, 0, 1) if stride == 0 and size > 1 else view
    return view


def prepare_to_load(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a model buffers that a `state_dict` can be loaded into: not made by `expand`, and there if the state has them.

    A buffer that is registered as None is made by a forward pass, which a resumed run has not made yet.
    """
    for owner, name in buffer_slots(model).values():
        if once(owner[name]) is not owner[name]:
            owner[name] = owner[name].contiguous()
    device = next((p.device for p in model.parameters()), None)
    for full_name, (owner, name) in empty_slots(model).items():
        if isinstance(state.get(full_name), Tensor):
            owner[name] = torch.empty_like(state[full_name], device=device)


def without_empty(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A `state_dict` without the buffers that a forward pass of this model has yet to make."""
    empty = empty_slots(model)
    return {name: value for name, value in state.items() if name not in empty}


class Follower:
    """Values of tensors that are copied again and again: those that slots hold, into others.

    Of a tensor made by `expand` each element is copied once. A tensor that has got another form, and a sparse one, whose number
    of elements changes, is replaced by a copy.

    Args:
        sources: the slots that are followed.
        targets: what the copies are put into, for each source.
    """

    def __init__(self, sources: Iterable[Slot], targets: Iterable[Slot]) -> None:
        self._sources = list(sources)
        self._targets = list(targets)
        self._seen: list[Tensor | None] = []
        self._into: list[Tensor] = []
        self._elements: list[Tensor] = []
        self._always: list[int] = []

    @torch.no_grad()
    def copy(self) -> None:
        """Copy what the sources hold now."""
        now = [owner[name] for owner, name in (*self._sources, *self._targets)]
        if len(now) != len(self._seen) or not all(map(operator.is_, now, self._seen)):
            self._look()
        if self._into:
            torch._foreach_copy_(self._into, self._elements)
        for index in self._always:
            (owner, name), (target, own_name) = self._sources[index], self._targets[index]
            target[own_name] = self._seen[len(self._sources) + index] = owner[name].detach().clone()

    def _look(self) -> None:
        """Sources or targets are other tensors than the last time."""
        self._into, self._elements, self._always = [], [], []
        for index, ((owner, name), (target, own_name)) in enumerate(zip(self._sources, self._targets, strict=True)):
            value, own = owner[name], target[own_name]
            if value is None:
                target[own_name] = None
            elif value.layout is not torch.strided:
                self._always.append(index)
            else:
                if own is None or not _same_form(own, value):
                    target[own_name] = own = once(value).detach().clone().expand(value.shape)
                self._into.append(once(own))
                self._elements.append(once(value))
        self._seen = [owner[name] for owner, name in (*self._sources, *self._targets)]


def _same_form(a: Tensor, b: Tensor) -> bool:
    """One can be copied into the other, element by element of their memory."""
    alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and a.layout is b.layout
    return alike and once(a).shape == once(b).shape


class BufferSnapshot:
    """A copy of a model's buffers, to put back after a forward pass that should not have happened.

    Buffers that a forward pass makes are among them: those that were registered as None, and those that it registers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tensors: list[Tensor | None] = []
        self._look()

    def _look(self) -> None:
        self._names = [(module, set(module._buffers)) for module in self._model.modules()]
        self._owners = [module._buffers for module, _ in self._names]
        self._num = sum(map(len, self._owners))
        self._slots = list({**buffer_slots(self._model), **empty_slots(self._model)}.values())
        self._copies: dict[str, Any] = {str(index): None for index in range(len(self._slots))}
        self._taking = Follower(self._slots, [(self._copies, name) for name in self._copies])

    @torch.no_grad()
    def take(self) -> None:
        """Copy the buffers as they are now, into the same memory where they still have the same form."""
        if sum(map(len, self._owners)) != self._num:
            self._look()
        self._tensors = [owner[name] for owner, name in self._slots]
        self._taking.copy()

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the model the buffers that were taken, with the values they had.

        Written to are the tensors of then: what a module holds now may be the batch itself.
        """
        for (owner, name), tensor, value in zip(self._slots, self._tensors, self._copies.values(), strict=True):
            if tensor is not None and tensor.layout is torch.strided:
                once(tensor).copy_(once(value))
                owner[name] = tensor
            else:
                owner[name] = None if value is None else value.clone()
        for module, names in self._names:
            for name in module._buffers.keys() - names:  # the next forward pass registers it anew
                delattr(module, name)

"""An exponential moving average of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torch_frame.errors import SettingError
from torch_frame.training.buffers import buffer_slots


class EMA:
    """A copy of a model whose parameters follow the trained ones smoothly.

    After the n-th update, ema = d * ema + (1 - d) * weights with d = decay * (1 - exp(-n / 2000)): the ramp lets early epochs
    count. As in torch-frame 1.7 and YOLOv5's `ModelEMA`, but buffers (batch-norm statistics, counters) are copied, not averaged:
    they are averages already.

    Args:
        model: the trained model, bare or wrapped in DDP.
        decay: the limit of d.
        updates: n to begin with.
        shared: parameters of `model` that the average has too, and not a copy of: frozen ones.

    Attributes:
        model: the averaged model, in eval mode, without gradients.
        updates: n.
    """

    def __init__(
        self, model: nn.Module, decay: float = 0.9999, updates: int = 0, *, shared: Iterable[nn.Parameter] = ()
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise SettingError(f"ema_decay is {decay}; it has to be in [0, 1).")
        self.model: nn.Module = (
            copy.deepcopy(_bare(model), {id(one): one for one in shared}).eval().requires_grad_(False)
        )
        self.updates = updates
        self._limit = decay
        self._source: nn.Module | None = None

    @property
    def limit(self) -> float:
        """The decay that it was made with."""
        return self._limit

    def decay(self, updates: int) -> float:
        """d at the n-th update."""
        return self._limit * (1 - math.exp(-updates / 2000))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Follow the weights of `model`, which has just been updated."""
        if model is not self._source:
            self.bind(model)
        self.updates += 1
        if self._averages:
            torch._foreach_lerp_(self._averages, self._weights, 1.0 - self.decay(self.updates))
        for own, weight in self._not_averaged:
            own.copy_(weight)
        if self._copies:
            self._copy_buffers([owner[name] for owner, name in self._buffers])

    def _copy_buffers(self, buffers: list[Tensor]) -> None:
        copies = [owner[name] for owner, name in self._copies]
        if all(copy.shape == buffer.shape for copy, buffer in zip(copies, buffers, strict=True)):
            torch._foreach_copy_(copies, buffers)
            return
        for (owner, name), buffer in zip(
            self._copies, buffers, strict=True
        ):  # one has been replaced by a larger one, say
            owner[name] = buffer.detach().clone()

    def bind(self, model: nn.Module) -> None:
        """Look up the tensors to follow; needed again only where a model's tensors have been replaced by others.

        Raises:
            SettingError: where `model` is built differently, or is on another device than the average.
        """
        bare = _bare(model)
        averages, weights = dict(self.model.named_parameters()), dict(bare.named_parameters())
        copies, buffers = buffer_slots(self.model), buffer_slots(bare)
        differing = sorted((averages.keys() ^ weights.keys()) | (copies.keys() ^ buffers.keys()))
        if differing:
            raise SettingError(
                f"EMA was made of a model with other tensors than the one it is to follow: {', '.join(differing[:5])} "
                f"{'and more ' if len(differing) > 5 else ''}are in one of them alone. "
                "Change the model before the Trainer is made."
            )
        own = {name: average for name, average in averages.items() if average is not weights[name]}  # not shared
        averaged = [name for name, average in own.items() if _can_be_averaged(average)]
        self._averages: list[Tensor] = [own[name] for name in averaged]
        self._weights: list[Tensor] = [weights[name] for name in averaged]
        self._not_averaged = [(own[name], weights[name]) for name in own if not _can_be_averaged(own[name])]
        self._copies, self._buffers = list(copies.values()), [buffers[name] for name in copies]
        self._source = model

    def reset(self, model: nn.Module) -> None:
        """Begin anew from the weights of `model`; n stays."""
        bare = _bare(model)
        self.model.load_state_dict(bare.state_dict(), strict=False)
        with torch.no_grad():  # a state_dict may leave parts out
            for average, weight in zip(self.model.parameters(), bare.parameters(), strict=True):
                average.copy_(weight)

    def unshare(self, parameters: Collection[Tensor]) -> None:
        """Give the average copies of parameters that it has shared until now."""
        shared = {id(parameter) for parameter in parameters}
        made: dict[int, nn.Parameter] = {}
        for module in self.model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and id(parameter) in shared:
                    own = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                    setattr(module, name, made.setdefault(id(parameter), own))
        self._source = None

    def to(self, device: torch.device) -> EMA:
        """Move the average to `device`."""
        self.model.to(device)
        self._source = None
        return self

    def weights(self, model: nn.Module) -> dict[str, Any]:
        """The average's `state_dict`; one that leaves frozen parts out sees those that are frozen in `model`."""
        flags = [(average, average.requires_grad) for average in self.model.parameters()]
        try:
            for (average, _), weight in zip(flags, _bare(model).parameters(), strict=True):
                average.requires_grad_(weight.requires_grad)
            return self.model.state_dict()
        finally:
            for average, flag in flags:
                average.requires_grad_(flag)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = int(state_dict["updates"])
        self.model.load_state_dict(state_dict["model"])


def _can_be_averaged(tensor: Tensor) -> bool:
    """Not integers (quantised weights) and numbers of 8 bits, which torch does not compute with: they are copied."""
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.element_size() > 1


def _bare(model: nn.Module) -> nn.Module:
    """Without the wrappers of DDP, DataParallel and torch.compile, in any order."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    inner: nn.Module | None = model.module if isinstance(model, wrappers) else model._modules.get("_orig_mod")
    return model if inner is None else _bare(inner)

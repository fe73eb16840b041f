"""An exponential moving average of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from torch_frame.errors import SettingError
from torch_frame.training.buffers import Follower, all_slots, buffer_slots, empty_slots, prepare_to_load
from torch_frame.training.modes import follow_modes


class EMA:
    """A copy of a model whose parameters follow the trained ones smoothly.

    After the n-th update, ema = d * ema + (1 - d) * weights with d = decay * (1 - exp(-n / ramp)): the ramp lets early epochs
    count. As in torch-frame 1.7 and YOLOv5's `ModelEMA`, but buffers (batch-norm statistics, counters) are copied, not averaged:
    they are averages already. Parameters of 16 bits are averaged in float32.

    Args:
        model: the trained model, bare or wrapped in DDP.
        decay: the limit of d.
        updates: n to begin with.
        shared: parameters of `model` that the average has too, and not a copy of: frozen ones.
        ramp: updates in which d rises to 63 % of its limit; 0: d is `decay` from the first update on.
        optimizers: gives the optimizers; parameters that one of them has are averaged, whether frozen later or not, and all
            others are copied. None: those are averaged that are trained when the average is made.

    Attributes:
        model: the averaged model, without gradients. Its modules have the modes of the trained ones; put it into eval mode to
            use it, as evaluation hooks do.
        updates: n.

    Raises:
        SettingError: if a setting is out of its range, or the model cannot be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        updates: int = 0,
        *,
        shared: Iterable[nn.Parameter] = (),
        ramp: float = 2000,
        optimizers: Callable[[], Iterable[Optimizer]] | None = None,
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise SettingError(f"ema_decay is {decay}; it has to be in [0, 1).")
        if not 0.0 <= ramp < math.inf:
            raise SettingError(f"ema_ramp is {ramp}; it has to be a number of updates, 0 for none.")
        bare = _bare(model)
        self._with_infinities = _with_infinities(bare)  # here, because later nothing is read from the device
        self._trained_at_first = {name for name, parameter in bare.named_parameters() if parameter.requires_grad}
        self.model: nn.Module = _copied(bare, shared).requires_grad_(False)
        self.updates = updates
        self._limit = float(decay)
        self._ramp = int(ramp) if float(ramp).is_integer() else float(ramp)
        self._optimizers = optimizers
        self._source: nn.Module | None = None
        self._is_new = False
        self._wide: dict[str, Tensor] = {}  # averages in float32 of parameters of 16 bits
        self._writes_at_first = self._writes(bare)

    @property
    def limit(self) -> float:
        """The decay that it was made with."""
        return self._limit

    @property
    def ramp(self) -> float:
        """Updates in which the decay is ramped up; 0: none."""
        return self._ramp

    def decay(self, updates: int) -> float:
        """d at the n-th update."""
        return self._limit * (1 - math.exp(-updates / self._ramp)) if self._ramp else self._limit

    @property
    def row(self) -> str:
        """The settings, in words."""
        ramp = f"ramped up in {self._ramp:g} updates (ema_ramp)" if self._ramp else "no ramp (ema_ramp=0)"
        return f"decay {self._limit:g}, {ramp}"

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Follow the weights of `model`, which has just been updated."""
        if model is not self._source or self._has_changed():
            self.bind(model)
        if self._is_new:  # the first forward pass since `bind` may have registered buffers
            self._is_new = False
            self._bind_buffers(_bare(model))
        self.updates += 1
        weight = 1.0 - self.decay(self.updates)
        if self._averages:
            torch._foreach_lerp_(self._averages, self._weights, weight)
        if self._wide_averages:
            torch._foreach_lerp_(self._wide_averages, [one.to(torch.float32) for one in self._wide_weights], weight)
        for own, trained in self._infinite:
            value = trained.to(own.dtype)
            own.copy_(torch.where(own == value, own, torch.lerp(own, value, weight)))  # inf - inf is NaN
        if self._narrow:
            torch._foreach_copy_(self._narrow, list(self._wide.values()))
        for own, trained in self._not_averaged:
            own.copy_(trained)
        if self._buffers is not None:
            self._buffers.copy()

    @torch.no_grad()
    def begin(self, model: nn.Module) -> None:
        """An epoch begins: `bind`. Before the first update the average begins with the weights that `model` has now.

        They may have been loaded since the average was made. Weights that a script has loaded into the average stay.
        """
        bare = _bare(model)
        if self.updates == 0 and self._writes(bare) == self._writes_at_first:
            weights = dict(bare.named_parameters())
            for name, own in self.model.named_parameters():
                weight = weights.get(name, own)
                if weight is not own and _are_alike(own, weight):  # not shared
                    own.copy_(weight)
            self._forget_wide()
            self._writes_at_first = self._writes(bare)
        self.bind(model)

    def _writes(self, bare: nn.Module) -> int:
        """How often the average's own parameters have been written to."""
        shared = {id(parameter) for parameter in bare.parameters()}
        return sum(own._version for own in self.model.parameters() if id(own) not in shared)

    def _has_changed(self) -> bool:
        """An optimizer has got a group of parameters, or a forward pass has made a buffer that was registered as None."""
        if self._empty and any(owner[name] is not None for owner, name in self._empty):
            return True
        return self._bound_to is not None and _groups(self._bound_to) != self._groups

    def bind(self, model: nn.Module) -> None:
        """Look up the tensors to follow, and the modes; needed again if a model's tensors have been replaced by others.

        Raises:
            SettingError: where `model` is built differently: its parameters have other names, shapes or dtypes.
        """
        bare = _bare(model)
        averages, weights = dict(self.model.named_parameters()), dict(bare.named_parameters())
        differing = sorted(averages.keys() ^ weights.keys())
        if differing:
            raise SettingError(
                f"EMA was made of a model with other parameters than the one it is to follow: {', '.join(differing[:5])} "
                f"{'and more ' if len(differing) > 5 else ''}are only in one of them. "
                "Change the model before the Trainer is made."
            )
        other = [name for name, average in averages.items() if not _are_alike(average, weights[name])]
        if other:
            was, now = averages[other[0]], weights[other[0]]
            raise SettingError(
                f"EMA was made of a model whose {other[0]} was {was.dtype} of shape {list(was.shape)}; now it is {now.dtype} of "
                f"shape {list(now.shape)}. Change the model before the Trainer is made."
            )
        follow_modes(self.model, bare)
        own = {name: average for name, average in averages.items() if average is not weights[name]}  # not shared
        averaged = self._averaged(weights) & own.keys()
        infinite = {name for name in averaged if name in self._with_infinities or not weights[name].requires_grad}
        wide = [name for name in own if name in averaged and own[name].element_size() == 2]
        for name in wide:
            if name not in self._wide:
                self._wide[name] = own[name].detach().float()
        self._wide = {name: self._wide[name] for name in wide}
        self._narrow: list[Tensor] = [own[name] for name in wide]
        self._infinite = [(self._wide.get(name, own[name]), weights[name]) for name in own if name in infinite]
        plain = [name for name in own if name in averaged - infinite and name not in self._wide]
        self._averages: list[Tensor] = [own[name] for name in plain]
        self._weights: list[Tensor] = [weights[name] for name in plain]
        lerped = [name for name in wide if name not in infinite]
        self._wide_averages = [self._wide[name] for name in lerped]
        self._wide_weights = [weights[name] for name in lerped]
        self._not_averaged = [(own[name], weights[name]) for name in own if name not in averaged]
        self._bind_buffers(bare)
        self._bound_to = None if self._optimizers is None else list(self._optimizers())
        self._groups = _groups(self._bound_to or ())
        self._source = model
        self._is_new = True

    def _averaged(self, weights: Mapping[str, Tensor]) -> set[str]:
        """Names of the parameters that are averaged."""
        if self._optimizers is None:
            wanted = self._trained_at_first | {name for name, weight in weights.items() if weight.requires_grad}
        else:
            held = {id(p) for one in self._optimizers() for group in one.param_groups for p in group["params"]}
            wanted = {name for name, weight in weights.items() if id(weight) in held}
        return {name for name in wanted if name in weights and _can_be_averaged(weights[name])}

    def _bind_buffers(self, bare: nn.Module) -> None:
        """The average has the buffers that the model has now; a forward pass may have made some."""
        buffers, slots = buffer_slots(bare), all_slots(self.model)
        places, of_model = dict(self.model.named_modules()), dict(bare.named_modules())
        for name in buffers.keys() - slots.keys():
            prefix, _, own_name = name.rpartition(".")
            is_saved = own_name not in of_model[prefix]._non_persistent_buffers_set
            places[prefix].register_buffer(own_name, None, persistent=is_saved)
        slots = all_slots(self.model)
        for name in slots.keys() - all_slots(bare).keys():
            slots[name][0][slots[name][1]] = None
        self._empty = list(empty_slots(bare).values())
        self._buffers = Follower(buffers.values(), [slots[name] for name in buffers]) if buffers else None

    def equals(self, model: nn.Module) -> bool:
        """The averages are the weights and buffers of `model`, to the bit: nothing has been averaged yet."""
        bare = _bare(model)
        pairs = [(self.model.parameters(), bare.parameters()), (self.model.buffers(), bare.buffers())]
        return not any(map(is_lazy, bare.parameters())) and all(
            _are_equal(own, other) for owns, others in pairs for own, other in zip(owns, others, strict=False)
        )

    def of(self, model: nn.Module, shared: Iterable[nn.Parameter] = ()) -> EMA:
        """A new average with these settings, of another model."""
        return EMA(model, self._limit, shared=shared, ramp=self._ramp, optimizers=self._optimizers)

    def reset(self, model: nn.Module) -> None:
        """Begin anew from the weights of `model`; n stays."""
        bare = _bare(model)
        state = bare.state_dict()
        prepare_to_load(self.model, state)
        self.model.load_state_dict(state, strict=False)
        with torch.no_grad():  # a state_dict may leave parts out
            for average, weight in zip(self.model.parameters(), bare.parameters(), strict=True):
                average.copy_(weight)
        self._forget_wide()
        self._writes_at_first = self._writes(bare)

    def follow_modes(self, model: nn.Module) -> None:
        """Give the average's modules the modes of those of `model`."""
        follow_modes(self.model, _bare(model))

    def wide_state(self) -> dict[str, Tensor]:
        """Name -> average in float32, of the parameters of 16 bits."""
        return dict(self._wide)

    def load_wide_state(self, state: Mapping[str, Tensor]) -> None:
        """Behind the model's own state: take on what `wide_state` returned; what it lacks begins with the model's values."""
        device = {name: parameter.device for name, parameter in self.model.named_parameters()}
        self._wide = {name: value.to(device[name], copy=True) for name, value in state.items() if name in device}
        self._source = None

    def _forget_wide(self) -> None:
        self._wide, self._source = {}, None

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
        self._wide = {name: value.to(device) for name, value in self._wide.items()}
        self._source = None
        return self

    def weights(self, model: nn.Module) -> dict[str, Any]:
        """The average's `state_dict`; one that leaves frozen parts out sees those that are frozen in `model`."""
        if self.updates == 0:
            self.begin(model)
        flags = [(average, average.requires_grad) for average in self.model.parameters()]
        try:
            for (average, _), weight in zip(flags, _bare(model).parameters(), strict=True):
                average.requires_grad_(weight.requires_grad)
            return self.model.state_dict()
        finally:
            for average, flag in flags:
                average.requires_grad_(flag)

    def state_dict(self) -> dict[str, Any]:
        state = {"updates": self.updates, "model": self.model.state_dict()}
        return {**state, "wide": self.wide_state()} if self._wide else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = int(state_dict["updates"])
        prepare_to_load(self.model, state_dict["model"])
        self.model.load_state_dict(state_dict["model"])
        self.load_wide_state(state_dict.get("wide", {}))


def _are_equal(tensor: Tensor, other: Tensor) -> bool:
    """To the bit; torch compares no sparse tensors."""
    if tensor.layout is not other.layout or tensor.shape != other.shape:
        return False
    return torch.equal(*(one if one.layout is torch.strided else one.to_dense() for one in (tensor, other)))


def _with_infinities(model: nn.Module) -> set[str]:
    """Names of the parameters that hold infinities: masks, for instance."""
    named = {name: p.detach() for name, p in model.named_parameters() if _can_be_averaged(p) and not p.is_meta}
    finite = {name: p.isfinite().all() for name, p in named.items()}
    return {name for name, flag in finite.items() if not flag}


def _are_alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _groups(optimizers: Iterable[Optimizer]) -> tuple[tuple[int, int], ...]:
    return tuple((id(one), len(one.param_groups)) for one in optimizers)


def _copied(model: nn.Module, shared: Iterable[nn.Parameter]) -> nn.Module:
    """A deep copy; tensors that the last forward pass left behind (weight_norm's weight, say) are copied without their graph."""
    memo: dict[int, Any] = {id(one): one for one in shared}
    for module in model.modules():
        for value in _values(vars(module)):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo.setdefault(id(value), value.detach().clone())
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise SettingError(
            f"use_ema=True needs a copy of the model, but copy.deepcopy(model) fails: {type(error).__name__}: {error} Keep what "
            "cannot be copied (open files, locks, generators) outside of the model, or give its class a __deepcopy__."
        ) from error


def _values(value: Any, depth: int = 0) -> Iterator[Any]:
    """What containers hold, one inside another."""
    if isinstance(value, Mapping | list | tuple) and depth < 4:
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _values(item, depth + 1)
    else:
        yield value


def _can_be_averaged(tensor: Tensor) -> bool:
    """Not integers (quantised weights) and numbers of 8 bits, which torch does not compute with: they are copied."""
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.element_size() > 1


def _bare(model: nn.Module) -> nn.Module:
    """Without the wrappers of DDP, DataParallel and torch.compile, in any order."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    inner: nn.Module | None = model.module if isinstance(model, wrappers) else model._modules.get("_orig_mod")
    return model if inner is None else _bare(inner)

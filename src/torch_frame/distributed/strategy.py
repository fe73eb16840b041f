"""The seam between the loop and the processes and devices that it runs on.

The loop, its saves, evaluation and data ask a `Strategy` whenever something depends on other processes or on how the model is
spread over them. `SingleProcess` answers for one process; every answer there is the obvious one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

T = TypeVar("T")
Summable = TypeVar("Summable", bound=Tensor | float)

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def wrapper_of(model: nn.Module) -> Any:
    """The DistributedDataParallel or DataParallel that a model is, or that torch.compile was given; None for a bare model."""
    inner = model._modules.get("_orig_mod", model)
    return inner if isinstance(inner, _WRAPPERS) else None


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """torch's `clip_grad_norm_`, for sparse gradients too."""
    parameters = list(parameters)
    try:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    except NotImplementedError:
        sparse = [p for p in parameters if p.grad is not None and p.grad.is_sparse]
        if not sparse:
            raise
    for parameter in sparse:
        assert parameter.grad is not None
        parameter.grad = parameter.grad.coalesce()  # an entry may be there several times
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([gradient.values() if gradient.is_sparse else gradient for gradient in gradients])
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as torch computes it
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device))
    return norm


def shares_gradients(strategy: Strategy) -> bool:
    """Behind `reduce_gradients` all ranks hold the same gradients, and a NaN of one rank is in those of all.

    A strategy says so by an attribute of this name; one that does not is asked for an agreement at each update instead.
    """
    return bool(getattr(strategy, "shares_gradients", False))


def keeps_ranks_alike(strategy: Strategy) -> bool:
    """Each of several ranks holds the whole model, and they train with the same gradients from the same weights.

    A strategy says so by an attribute of this name.
    """
    return bool(getattr(strategy, "keeps_ranks_alike", False))


@runtime_checkable
class Strategy(Protocol):
    """How one training is spread over processes and devices.

    Methods that act on an optimizer or on parameters are given them: a run may have several optimizers. The methods under
    "together" are collective: all ranks call them, in the same order.

    Attributes:
        rank: index of this process; rank 0 writes files and prints.
        world_size: number of processes that train together.
        own_shards: the script's data loader gives each rank a part of its own already.
        short_batch: what happens to an epoch's last samples if they are fewer than the ranks: "wrap" or "drop".

    It may have the attributes `shares_gradients`, which saves an exchange at each update, and `keeps_ranks_alike`, with which
    weights that differ are told or shared (see the functions of these names).
    """

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def own_shards(self) -> bool: ...

    @property
    def short_batch(self) -> str: ...

    # ---------------------------------------------------------------- the model and its step

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model as the loop calls it: wrapped or sharded. Called once, on the model on its device."""
        ...

    def replicate(self, model: nn.Module) -> nn.Module:
        """Instead of `prepare`, for several optimizers with losses of their own: nothing is exchanged in backward, for
        `reduce_gradients` averages, and `share` lets the ranks begin with the same weights."""
        ...

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Give all ranks rank 0's values of these tensors."""
        ...

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The bare model inside a prepared one; a bare model is returned as it is."""
        ...

    def autocast(self, own: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
        """The context of a forward pass; `own` is that of the run's precision."""
        ...

    def accumulating(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Around forward and backward of a batch after which more follow in its window: gradients need no exchange yet."""
        ...

    def backward(self, loss: Tensor, inputs: Sequence[Tensor] | None = None) -> None:
        """Add the gradient of `loss` to `.grad` of all parameters, or of `inputs` only."""
        ...

    def reduce_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Before a window's gradient is used: make `.grad` the mean over the ranks, if `backward` has not done so."""
        ...

    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """Clip the gradient of `parameters` to a 2-norm of `max_norm`; returns its norm before that, one element."""
        ...

    def warm_up(self, step: Callable[[], None]) -> None:
        """On a resumed run's first batch: call `step`, a forward and backward pass that leaves nothing, if bits depend on it."""
        ...

    def step(self, optimizer: Optimizer, scaler: torch.amp.GradScaler | None = None) -> None:
        """One step of an optimizer, through the scaler if there is one (which may leave it out)."""
        ...

    # ---------------------------------------------------------------- together

    def agree(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank: the same answer on all."""
        ...

    def sum(self, value: Summable) -> Summable:
        """The sum of a number or a one-element tensor over the ranks."""
        ...

    def gather(self, value: T) -> list[T]:
        """The ranks' values (plain types and tensors), in the order of the ranks, on all of them."""
        ...

    def collect(self, value: T) -> list[T]:
        """The ranks' values on rank 0, in the order of the ranks; [] on the others."""
        ...

    def broadcast(self, value: T) -> T:
        """Rank 0's value (plain types and tensors), on all ranks."""
        ...

    # ---------------------------------------------------------------- told to ranks that wait

    def alone(self) -> AbstractContextManager[None]:
        """On rank 0: the others wait for it, however long what is inside takes."""
        ...

    def tell_failure(self, what: str) -> None:
        """This rank ends by an error: the others need not wait for it."""
        ...

    def failure(self) -> str | None:
        """What the first rank that failed has told, or None."""
        ...

    # ---------------------------------------------------------------- states

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        """The whole `state_dict` of the bare model, under its own names."""
        ...

    def load_model_state(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Load a whole state; names that are missing in it stay as they are."""
        ...

    def optimizer_state(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """The whole `state_dict` of an optimizer of this model's parameters."""
        ...

    def load_optimizer_state(self, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Load a whole state that `optimizer_state` returned."""
        ...


class SingleProcess:
    """One process, whose model may be wrapped in DistributedDataParallel or DataParallel already.

    >>> strategy = SingleProcess()
    >>> strategy.agree(True), strategy.sum(2.0), strategy.gather("a"), strategy.broadcast("a")
    (True, 2.0, ['a'], 'a')
    """

    rank: int = 0
    world_size: int = 1
    own_shards: bool = False
    short_batch: str = "wrap"

    def prepare(self, model: nn.Module) -> nn.Module:
        return model

    def replicate(self, model: nn.Module) -> nn.Module:
        return model

    def share(self, tensors: Sequence[Tensor]) -> None:
        """There is one rank."""

    def unwrap(self, model: nn.Module) -> nn.Module:
        wrapper = wrapper_of(model)
        inner: nn.Module = model if wrapper is None else wrapper.module
        return inner

    def autocast(self, own: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
        return own

    def accumulating(self, model: nn.Module) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, inputs: Sequence[Tensor] | None = None) -> None:
        loss.backward(inputs=inputs)

    def reduce_gradients(self, parameters: Sequence[Tensor]) -> None:
        """There is one gradient."""

    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        return clip_grad_norm(parameters, max_norm)

    def warm_up(self, step: Callable[[], None]) -> None:
        """One process adds up in one order."""

    def step(self, optimizer: Optimizer, scaler: torch.amp.GradScaler | None = None) -> None:
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)

    def agree(self, flag: bool) -> bool:
        return flag

    def sum(self, value: Summable) -> Summable:
        return value

    def gather(self, value: T) -> list[T]:
        return [value]

    def collect(self, value: T) -> list[T]:
        return [value]

    def broadcast(self, value: T) -> T:
        return value

    def alone(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def tell_failure(self, what: str) -> None:
        """Nobody waits."""

    def failure(self) -> str | None:
        return None

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        return self.unwrap(model).state_dict()

    def load_model_state(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        self.unwrap(model).load_state_dict(state, strict=False)

    def optimizer_state(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def load_optimizer_state(self, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        optimizer.load_state_dict(dict(state))

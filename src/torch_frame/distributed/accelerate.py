"""Hugging Face Accelerate behind the seam: it prepares the model and runs backward; loop, data, windows and states stay ours.

accelerate itself is never imported here: what is needed comes with the `Accelerator` that is handed in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_frame.distributed.ddp import DDP
from torch_frame.distributed.launch import num_processes
from torch_frame.distributed.strategy import SingleProcess

_logger = logging.getLogger("torch_frame")
_RUN_HERE = ("NO", "MULTI_CPU")
"""accelerate's kinds of training that torch-frame's tests run."""
_OWN_EXCHANGE = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA")
"""Those that exchange gradients, and partly step, in a way of their own; all others wrap the model in DistributedDataParallel."""


class AcceleratedOne(SingleProcess):
    """One process that trains through an Accelerator.

    Args:
        accelerator: whose own accumulation is off (gradient_accumulation_steps=1).
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator

    def autocast(self, own: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
        return _autocast(self.accelerator, own)

    def backward(self, loss: Tensor, inputs: Sequence[Tensor] | None = None) -> None:
        _backward(self.accelerator, loss, inputs)

    def adopt(self, model: nn.Module) -> None:
        """The model that was prepared; one process needs to know nothing of it."""

    def unwrap(self, model: nn.Module) -> nn.Module:
        return _without_compiler(super().unwrap(_without_compiler(model)))


class AcceleratedRanks(DDP):
    """One of several processes that train through an Accelerator.

    Args:
        accelerator: whose own accumulation is off (gradient_accumulation_steps=1).
    """

    def __init__(self, accelerator: Any) -> None:
        super().__init__()
        self.accelerator = accelerator
        self._exchanges_itself = _kind(accelerator) in _OWN_EXCHANGE

    def prepare(self, model: nn.Module) -> nn.Module:
        """Nothing yet: `prepare_model` wraps the model when training begins, see `adopt`."""
        return model

    def adopt(self, model: nn.Module) -> None:
        """Use the model that was prepared: wrapped in DistributedDataParallel, or bare (gradients are averaged here then)."""
        wrapped = _without_compiler(model)
        if isinstance(wrapped, DistributedDataParallel) and wrapped is not self._wrapped:
            super().prepare(wrapped)
            self._settings["find_unused_parameters"] = wrapped.find_unused_parameters

    def autocast(self, own: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
        return _autocast(self.accelerator, own)

    def accumulating(self, model: nn.Module) -> AbstractContextManager[Any]:
        if not self._exchanges_itself:
            return super().accumulating(model)
        context: AbstractContextManager[Any] = self.accelerator.no_sync(model)
        return context

    @property
    def shares_gradients(self) -> bool:
        return not self._exchanges_itself and super().shares_gradients

    def run_backward(self, loss: Tensor, inputs: Sequence[Tensor] | None) -> None:
        _backward(self.accelerator, loss, inputs)

    def reduce_gradients(self, parameters: Sequence[Tensor]) -> None:
        if not self._exchanges_itself:
            super().reduce_gradients(parameters)

    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        if not self._exchanges_itself:
            return super().clip_grad_norm(parameters, max_norm)
        norm: Tensor = self.accelerator.clip_grad_norm_(parameters, max_norm)
        return norm

    def unwrap(self, model: nn.Module) -> nn.Module:
        if self._exchanges_itself:
            model = self.accelerator.unwrap_model(model)
        return _without_compiler(super().unwrap(_without_compiler(model)))

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        if not self._exchanges_itself:
            return super().model_state(model)
        state: dict[str, Any] = self.accelerator.get_state_dict(model)
        return state


def accelerated(accelerator: Any) -> AcceleratedOne | AcceleratedRanks:
    """The strategy of an Accelerator, for one process or several; what torch-frame's tests have never run is told.

    Raises:
        ValueError: if there are other processes than the Accelerator knows of.
    """
    if num_processes() != accelerator.num_processes:
        raise ValueError(
            f"The process group has {num_processes()} processes, but the Accelerator sees {accelerator.num_processes}: each "
            "would train alone. Start the script with `accelerate launch` or torchrun, or give each process RANK, LOCAL_RANK and "
            "WORLD_SIZE before it makes the Accelerator; without a GPU set ACCELERATE_USE_CPU=true, too."
        )
    kind = _kind(accelerator)
    if kind not in _RUN_HERE:
        level = logging.WARNING if kind in _OWN_EXCHANGE else logging.INFO
        _logger.log(
            level, "%s through Accelerate has never been run with torch-frame; compare the first run's losses.", kind
        )
    return AcceleratedOne(accelerator) if accelerator.num_processes == 1 else AcceleratedRanks(accelerator)


def bare_optimizer(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper: gradients are scaled, checked and skipped by the run's own update."""
    return optimizer.optimizer if type(optimizer).__name__ == "AcceleratedOptimizer" else optimizer


def bare_scheduler(scheduler: Any) -> Any:
    """The schedule inside accelerate's wrapper, which would step it once for each process; of the bare optimizer."""
    bare = scheduler.scheduler if type(scheduler).__name__ == "AcceleratedScheduler" else scheduler
    if bare_optimizer(getattr(bare, "optimizer", None)) is not getattr(bare, "optimizer", None):
        bare.optimizer = bare_optimizer(bare.optimizer)
    return bare


def is_accelerates_loader(loader: Any) -> bool:
    """A loader that `Accelerator.prepare` gave, which splits the data over the processes by itself."""
    return any(cls.__module__.startswith("accelerate.") for cls in type(loader).__mro__)


def _kind(accelerator: Any) -> str:
    return str(accelerator.distributed_type.value)


def _without_compiler(model: nn.Module) -> nn.Module:
    """The module inside what torch.compile(module) makes, which accelerate calls if it is configured to."""
    inner: nn.Module = model._modules.get("_orig_mod") or model
    return inner


def _autocast(accelerator: Any, own: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
    """The same as the run's own, unless the script gave the Accelerator other settings for it."""
    if accelerator.autocast_handler is None:
        return own
    given: AbstractContextManager[Any] = accelerator.autocast()
    return given


def _backward(accelerator: Any, loss: Tensor, inputs: Sequence[Tensor] | None) -> None:
    """accelerate's backward; with fp16 the loss is scaled already, by the scaler that both share."""
    if accelerator.scaler is not None:
        loss.backward(inputs=inputs)
    elif inputs is None:
        accelerator.backward(loss)
    else:
        accelerator.backward(loss, inputs=inputs)

"""Hugging Face Accelerate behind the seam: it prepares the model and runs backward; loop, data, windows and states stay ours.

accelerate itself is never imported here: what is needed comes with the `Accelerator` that is handed in.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from torch_frame.distributed.ddp import DDP, WithMethods
from torch_frame.distributed.launch import num_processes
from torch_frame.distributed.strategy import SingleProcess

_logger = logging.getLogger("torch_frame")
_RUN_HERE = ("NO", "MULTI_CPU")
"""accelerate's kinds of training that torch-frame's tests run."""
_OWN_EXCHANGE = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA")
"""Those that exchange gradients, and partly step, in a way of their own; all others wrap the model in DistributedDataParallel."""
_windows: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""Batches in an update that an Accelerator was made with, whose own accumulation is off by now."""


class WindowSign:
    """Shows the window under way as `accelerator.sync_gradients`, which hooks read to know whether a batch ends one.

    Args:
        accelerator: of the run.

    Attributes:
        is_used: False for steps of the script's own: accelerate's optimizers do not step while the sign is False.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.is_used = True

    def show(self, syncs: bool) -> None:
        if self.is_used and self._accelerator.sync_gradients is not syncs:
            self._accelerator.gradient_state._set_sync_gradients(syncs)


class AcceleratedOne(SingleProcess):
    """One process that trains through an Accelerator.

    Args:
        accelerator: whose own accumulation is off (gradient_accumulation_steps=1).
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.window_sign = WindowSign(accelerator)

    def autocast(self, own: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
        return _autocast(self.accelerator, own)

    def accumulating(self, model: nn.Module) -> AbstractContextManager[Any]:
        self.window_sign.show(False)
        return super().accumulating(model)

    def backward(self, loss: Tensor, inputs: Sequence[Tensor] | None = None) -> None:
        _backward(self.accelerator, loss, inputs)()

    def reduce_gradients(self, parameters: Sequence[Tensor]) -> None:
        self.window_sign.show(True)

    def adopt(self, model: nn.Module) -> None:
        """The model that was prepared; one process needs to know nothing of it."""

    def begin_alike(self, model: nn.Module) -> None:
        """There is one process."""

    def unwrap(self, model: nn.Module) -> nn.Module:
        return _without_compiler(super().unwrap(_without_compiler(model)))


class AcceleratedRanks(DDP):
    """One of several processes that train through an Accelerator.

    Args:
        accelerator: whose own accumulation is off (gradient_accumulation_steps=1).
        own_shards: the data loader gives each process a part of its own already.

    Attributes:
        exchanges_itself: DeepSpeed, FSDP and the like, whose saves and clipping need all processes.
        is_alone: this process works without the others, which wait for it.
    """

    def __init__(self, accelerator: Any, *, own_shards: bool = False) -> None:
        super().__init__(own_shards=own_shards)
        self.accelerator = accelerator
        self.window_sign = WindowSign(accelerator)
        self.is_alone = False
        self._calls = contextlib.ExitStack()
        self.exchanges_itself = _kind(accelerator) in _OWN_EXCHANGE

    def prepare(self, model: nn.Module) -> nn.Module:
        """Nothing yet: `prepare_model` wraps the model when training begins, see `adopt`."""
        return model

    def adopt(self, model: nn.Module) -> None:
        """Use the model that was prepared: wrapped in DistributedDataParallel, or bare (gradients are averaged here then)."""
        wrapped = _without_compiler(model)
        if isinstance(wrapped, DistributedDataParallel) and wrapped is not self._wrapped:
            super().prepare(wrapped)
            self._settings["find_unused_parameters"] = wrapped.find_unused_parameters
            if type(wrapped) is DistributedDataParallel:  # a step that calls the model's methods runs as under `DDP`
                wrapped.__class__ = WithMethods

    def begin_alike(self, model: nn.Module) -> None:
        """DistributedDataParallel gives all processes the main one's weights; so it is if `prepare_model` left the model bare."""
        if not self.exchanges_itself and not isinstance(_without_compiler(model), DistributedDataParallel):
            for tensor in (*model.parameters(), *model.buffers()):
                self.share([tensor])  # one by one: no second copy of a large model

    def autocast(self, own: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
        return _autocast(self.accelerator, own)

    def accumulating(self, model: nn.Module) -> AbstractContextManager[Any]:
        self.window_sign.show(False)
        if not self.exchanges_itself:
            return super().accumulating(model)
        context: AbstractContextManager[Any] = self.accelerator.no_sync(model)
        return context

    @property
    def shares_gradients(self) -> bool:
        return not self.exchanges_itself and super().shares_gradients

    @property
    def keeps_ranks_alike(self) -> bool:
        return not self.exchanges_itself and super().keeps_ranks_alike

    def backward_of(self, loss: Tensor, inputs: Sequence[Tensor] | None) -> Callable[[], None]:
        return _backward(self.accelerator, loss, inputs)

    def reduce_gradients(self, parameters: Sequence[Tensor]) -> None:
        self.window_sign.show(True)
        if not self.exchanges_itself:
            super().reduce_gradients(parameters)

    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        if not self.exchanges_itself:
            return super().clip_grad_norm(parameters, max_norm)
        norm: Tensor = self.accelerator.clip_grad_norm_(parameters, max_norm)
        return norm

    def unwrap(self, model: nn.Module) -> nn.Module:
        if self.exchanges_itself:
            model = self.accelerator.unwrap_model(model)
        return _without_compiler(super().unwrap(_without_compiler(model)))

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        if not self.exchanges_itself:
            return super().model_state(model)
        state: dict[str, Any] = self.accelerator.get_state_dict(model)
        return state

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """accelerate sees one process meanwhile, too: `wait_for_everyone` and `gather` of a hook would wait for ever."""
        if self.is_alone:  # inside another one
            yield
            return
        self.is_alone = True
        try:
            with super().alone(), self.one_process():
                yield
        finally:
            self.is_alone = False

    def one_process(self) -> AbstractContextManager[None]:
        """accelerate sees one process inside: for what rank 0 does without the others."""
        return contextlib.nullcontext() if self.exchanges_itself else _one_process(self.accelerator)

    def surround(self, stages: Mapping[str, list[Callable[..., Any]]]) -> None:
        """Let accelerate see one process while hooks work in the middle of an epoch, as in `alone`, on rank 0.

        Args:
            stages: name -> calls of the hooks. A call before and one behind them do it, so no frame stands above their errors.
        """
        for name in ("before_iter", "after_iter", "before_update", "after_update"):
            calls = stages[name]
            if calls and calls[0] != self._begin_call:
                calls[:] = [self._begin_call, *calls, self._end_call]
        if self._end_call not in stages["close"]:  # behind an error
            stages["close"].insert(0, self._end_call)

    def _begin_call(self) -> None:
        self._calls.enter_context(self.one_process())

    def _end_call(self) -> None:
        self._calls.close()


def accelerated(accelerator: Any, *, own_shards: bool = False) -> AcceleratedOne | AcceleratedRanks:
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
    if accelerator.num_processes == 1:
        return AcceleratedOne(accelerator)
    return AcceleratedRanks(accelerator, own_shards=own_shards)


def own_window(accelerator: Any) -> int:
    """Batches in an update that the script gave this Accelerator.

    accelerate's own accumulation is off from now on: it would scale what is scaled already. accelerate keeps one number for all
    Accelerators of a process.
    """
    given = int(accelerator.gradient_accumulation_steps)
    if given == 1:
        return _windows.get(accelerator, 1)  # it has been through here, for another trainer
    _windows[accelerator] = given
    accelerator.gradient_accumulation_steps = 1
    return given


def settings_without_effect(accelerator: Any) -> list[str]:
    """What was set in accelerate's accumulation, which torch-frame does itself."""
    plugin = accelerator.gradient_state.plugin_kwargs
    defaults = {"sync_with_dataloader": True, "sync_each_batch": False, "adjust_scheduler": True}
    return [f"{name}={plugin[name]}" for name, usual in defaults.items() if plugin.get(name, usual) != usual]


def splits_loaders(accelerator: Any) -> bool:
    """The script has told accelerate how to split loaders, which its own loaders do."""
    return bool(accelerator.split_batches or accelerator.dispatch_batches)


def bare_optimizer(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper: gradients are scaled, checked and skipped by the run's own update."""
    return optimizer.optimizer if type(optimizer).__name__ == "AcceleratedOptimizer" else optimizer


def bare_scheduler(scheduler: Any) -> Any:
    """The schedule inside accelerate's wrapper, which would step it once for each process; of the bare optimizer."""
    bare = scheduler.scheduler if type(scheduler).__name__ == "AcceleratedScheduler" else scheduler
    for one in (bare, *getattr(bare, "_schedulers", ())):  # SequentialLR and ChainedScheduler have others inside
        given = getattr(one, "optimizer", None)
        if bare_optimizer(given) is not given:
            one.optimizer = bare_optimizer(given)
            _note_steps(one.optimizer)
    return bare


def tell_of_steps(scheduler: Any) -> None:
    """accelerate would step this prepared schedule several times an update, so its length may be made for that."""
    if (
        type(scheduler).__name__ != "AcceleratedScheduler"
        or not scheduler.step_with_optimizer
        or scheduler.split_batches
    ):
        return
    counts_otherwise = isinstance(scheduler.scheduler, ReduceLROnPlateau)
    is_of_run = type(scheduler.scheduler).__name__ == "LRWarmupScheduler"
    if num_processes() > 1 and not counts_otherwise and not is_of_run:
        _logger.warning(
            "lr_scheduler was prepared by accelerate, which would step it %d times an update, once for each process. Here it is "
            "stepped once: count its length in updates, without the number of processes.",
            num_processes(),
        )


def unwrap_inside(model: nn.Module, *, is_own_step: bool) -> None:
    """Parts of a bare model that were prepared by themselves, on several processes: their names have to be the bare ones.

    Without their DistributedDataParallel gradients are averaged behind backward, as those of a bare model are.

    Args:
        is_own_step: the script's own `train_one_iter` may run backward by itself, so it needs them; told.
    """
    inside = [
        (parent, own_name, child, f"{name}.{own_name}".removeprefix("."))
        for name, parent in model.named_modules()
        for own_name, child in parent.named_children()
        if isinstance(child, DistributedDataParallel)
    ]
    for parent, own_name, child, _ in inside:
        if not is_own_step:
            parent._modules[own_name] = child.module
    names = ", ".join(name for *_, name in inside)
    if names and is_own_step:
        _logger.warning(
            "Parts of the model are wrapped in DistributedDataParallel: %s. Their weights have 'module.' in their names in all "
            "files, so that other numbers of processes cannot load them. Prepare the whole model, and use trainer.update(loss).",
            names,
        )
    elif names:
        _logger.info("%s: used without DistributedDataParallel; gradients are averaged behind backward.", names)


def _note_steps(optimizer: Optimizer) -> None:
    """torch looks whether the optimizer has stepped before its schedule; it has marked accelerate's wrapper only."""
    if not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        rates = [group["lr"] for group in optimizer.param_groups]
        LambdaLR(optimizer, lambda step: 1.0)  # marks it, and sets the rates
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


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


@contextlib.contextmanager
def _one_process(accelerator: Any) -> Iterator[None]:
    """accelerate sees one process inside: gathering gives back what it was given, nothing waits."""
    module = sys.modules[type(accelerator.state).__module__]
    states = [vars(accelerator.state), vars(module.PartialState())]  # one of each for the whole process
    before = [(state, state["distributed_type"], state["num_processes"]) for state in states]
    for state, kind, _ in before:
        state.update(distributed_type=type(kind).NO, num_processes=1)
    try:
        yield
    finally:
        for state, kind, number in before:
            state.update(distributed_type=kind, num_processes=number)


def _backward(accelerator: Any, loss: Tensor, inputs: Sequence[Tensor] | None) -> Callable[[], None]:
    """accelerate's backward pass, to be called; with fp16 the loss is scaled already, by the scaler that both share."""
    if accelerator.gradient_accumulation_steps != 1:  # another Accelerator was made meanwhile, and all share the number
        _logger.warning(
            "An Accelerator with gradient_accumulation_steps=%d was made after the trainer. It is not used: the trainer's "
            "gradient_accumulation_steps counts.",
            accelerator.gradient_accumulation_steps,
        )
        accelerator.gradient_accumulation_steps = 1
    given = {} if inputs is None else {"inputs": inputs}
    return (
        partial(loss.backward, **given)
        if accelerator.scaler is not None
        else partial(accelerator.backward, loss, **given)
    )

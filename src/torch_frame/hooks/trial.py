"""An evaluation of one batch before the first step, which finds out the names of the scores and leaves no trace."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any

import numpy as np
from torch import Tensor, nn

from torch_frame.data.rng import loader_generators
from torch_frame.errors import TorchFrameError
from torch_frame.hooks.base import HookTrainer
from torch_frame.training.buffers import BufferSnapshot

_logger = logging.getLogger("torch_frame")
_OF_EACH_MODULE = frozenset(vars(nn.Module()))


def is_late(trainer: HookTrainer, prefixes: Iterable[str], *, in_this_epoch: bool) -> bool:
    """A line of the table will be shown before an evaluation's first scores, and their names are not known from a resumed run.

    Args:
        trainer: of the run.
        prefixes: of the scores' names.
        in_this_epoch: the evaluation is due at the end of the first epoch that is trained.
    """
    if not any(getattr(hook, "shows_columns", False) for hook in trainer.hooks):
        return False
    if prefixes and all(any(name.startswith(f"{p}_") for name in trainer.metric_storage) for p in prefixes):
        return False
    return not in_this_epoch or trainer.length.own_max_iters is not None  # then lines stand inside epochs


def names_if_it_works(trial: Callable[[], Set[str] | None], whose: str) -> Set[str] | None:
    """What `trial` finds out; None if it fails, which is told: the evaluation may need what training has yet to make.

    Raises:
        TorchFrameError: for what no training mends, such as a loader without a batch.
    """
    try:
        return trial()
    except TorchFrameError:
        raise
    except Exception as error:
        _logger.warning(
            "The evaluation %s was tried on one batch before the first step and failed: %s: %s. If it needs something that "
            "training makes first, all is well.",
            whose,
            type(error).__name__,
            error,
        )
        return None


@contextlib.contextmanager
def leaving_no_trace(model: nn.Module, loaders: Iterable[Any], metrics: Iterable[Any] = ()) -> Iterator[None]:
    """Buffers of the model, generators of the loaders, and the attributes of metrics are as before afterwards.

    A metric's `reset` is not enough: what it keeps over evaluations (the best so far, a history, torchmetrics' `MinMaxMetric`)
    would know the trial.
    """
    metrics = list(metrics)
    buffers = [BufferSnapshot(module) for module in (model, *metrics) if isinstance(module, nn.Module)]
    for snapshot in buffers:
        snapshot.take()
    generators = [generator for loader in loaders for generator in loader_generators(loader).values()]
    states = [generator.get_state() for generator in generators]
    kept = [(part, _data_of(part)) for metric in metrics for part in _parts(metric)]
    try:
        yield
    finally:
        for snapshot in buffers:
            snapshot.put_back()
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        for part, data in kept:
            _put_back(part, data)


def _parts(metric: Any) -> list[Any]:
    """The metric; if it is a module, the modules in it as well."""
    parts = list(metric.modules()) if isinstance(metric, nn.Module) else [metric]
    return [part for part in parts if hasattr(part, "__dict__")]


def _data_of(part: Any) -> dict[str, tuple[Any, Any]]:
    """name -> an attribute, and a copy of it if it holds data; without what each module has."""
    return {name: (value, _copied(value)) for name, value in vars(part).items() if name not in _OF_EACH_MODULE}


def _put_back(part: Any, data: Mapping[str, tuple[Any, Any]]) -> None:
    attributes = vars(part)
    for name in attributes.keys() - data.keys() - _OF_EACH_MODULE:
        del attributes[name]
    attributes.update({name: _refilled(value, copied) for name, (value, copied) in data.items()})


def _copied(value: Any) -> Any:
    """Of containers and what they hold; other objects than data are not copied."""
    try:
        if isinstance(value, list | deque):
            return _refilled(copy.copy(value), [_copied(item) for item in value])
        if isinstance(value, dict):
            return _refilled(copy.copy(value), {key: _copied(item) for key, item in value.items()})
        if isinstance(value, set):
            return copy.copy(value)
        return copy.deepcopy(value) if isinstance(value, np.ndarray | Tensor) else value
    except Exception:  # a list that holds itself, a tensor that has a gradient
        return value


def _refilled(value: Any, copied: Any) -> Any:
    """A container itself, with what it held: others may know it too."""
    if isinstance(value, list | deque | dict | set) and copied is not value:
        value.clear()
        value.extend(copied) if isinstance(value, list | deque) else value.update(copied)
        return value
    return copied

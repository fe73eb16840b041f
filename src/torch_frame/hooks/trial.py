"""An evaluation of one batch before the first step, which finds out the names of the scores and leaves no trace."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

import numpy as np
from torch import Tensor, nn

from torch_frame.data.rng import loader_generators
from torch_frame.errors import TorchFrameError
from torch_frame.hooks.base import HookTrainer
from torch_frame.metrics.metric import BaseMetric
from torch_frame.training.buffers import BufferSnapshot

_logger = logging.getLogger("torch_frame")
_HOLD_DATA = (list, dict, set, deque, np.ndarray, Tensor)


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
    """Buffers of the model, generators of the loaders, and metrics that have no `reset`, are as before afterwards."""
    buffers = BufferSnapshot(model)
    buffers.take()
    generators = [generator for loader in loaders for generator in loader_generators(loader).values()]
    states = [generator.get_state() for generator in generators]
    kept = [(metric, _data_of(metric)) for metric in metrics if _cannot_forget(metric)]
    try:
        yield
    finally:
        buffers.put_back()
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        for metric, data in kept:
            vars(metric).clear()
            vars(metric).update(data)


def _cannot_forget(metric: Any) -> bool:
    return getattr(type(metric), "reset", BaseMetric.reset) is BaseMetric.reset and hasattr(metric, "__dict__")


def _data_of(metric: Any) -> dict[str, Any]:
    return {name: _copied(value) for name, value in vars(metric).items()}


def _copied(value: Any) -> Any:
    if not isinstance(value, _HOLD_DATA):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # it holds something that cannot be copied
        return copy.copy(value)

"""A wrapper of the model that is new in a resumed run is brought to where the run had it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

from torch import nn

from torch_frame.data.rng import preserved_rng
from torch_frame.distributed.strategy import Strategy
from torch_frame.training.buffers import BufferSnapshot
from torch_frame.training.losses import read_losses
from torch_frame.training.precision import Precision
from torch_frame.types import StepFn

Placed = tuple[Any, int]
"""A batch on the device, and the data's position behind it."""


def warmed_up(
    batches: Iterator[Placed], model: nn.Module, step_fn: StepFn | None, strategy: Strategy, precision: Precision
) -> Iterator[Placed]:
    """The same batches, after a step that leaves no trace with the first of them.

    DDP orders its buckets anew after its first backward pass, which changes the last bits of the sums over ranks. The run had
    that pass behind it when it was saved; a new wrapper has not.
    """
    first = next(batches, None)
    if first is None:
        return batches
    strategy.warm_up(functools.partial(_step_without_trace, first[0], model, step_fn, strategy, precision))
    return itertools.chain([first], batches)


def _step_without_trace(
    batch: Any, model: nn.Module, step_fn: StepFn | None, strategy: Strategy, precision: Precision
) -> None:
    """A forward and backward pass after which everything is as before."""
    buffers = BufferSnapshot(strategy.unwrap(model))
    buffers.take()
    with preserved_rng(), strategy.autocast(precision.autocast()):
        output = model(batch) if step_fn is None else step_fn(model, batch)
        strategy.backward(read_losses(output)[0])
    buffers.put_back()
    model.zero_grad()

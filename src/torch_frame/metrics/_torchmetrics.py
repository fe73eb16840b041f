"""The states of torchmetrics' metrics on several ranks, put together however the batches were dealt out.

At `compute()` torchmetrics exchanges each entry of a list by itself. An evaluation's batches are not padded, so ranks have
updated a different number of times: they would wait for each other for ever (Lightning-AI/torchmetrics#3336), and a rank without
a batch has lists whose type and form it does not know. Here each rank's states travel as a whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

States = list[dict[str, Any]]
"""For each metric in a metric (a collection, a wrapper): its states by name, and how often it was updated."""

_NUM_UPDATES = "_update_count"


def has_states(module: nn.Module) -> bool:
    """Whether it is a metric of torchmetrics, or holds some: they know how their states are put together."""
    return next(_parts(module), None) is not None


def states_of(metric: nn.Module) -> States:
    """What this rank has seen."""
    for module in metric.modules():
        if isinstance(module, nn.ModuleDict) and hasattr(module, "compute_groups"):
            module.items(keep_base=True, copy_state=False)  # type: ignore[call-arg]  # a group's metrics get their leader's states
    return [
        {name: getattr(part, name) for name in part._reductions} | {_NUM_UPDATES: getattr(part, _NUM_UPDATES, 0)}
        for part in _parts(metric)
    ]


def put_together(metric: nn.Module, of_ranks: Sequence[States]) -> None:
    """Give the metric the states of all ranks, its own among them."""
    for part, states in zip(_parts(metric), zip(*of_ranks, strict=True), strict=True):
        device = torch.device("cpu") if getattr(part, "compute_on_cpu", False) else part.device
        for name, reduce in part._reductions.items():
            setattr(part, name, _joined([state[name] for state in states], reduce, device))
        setattr(part, _NUM_UPDATES, sum(state[_NUM_UPDATES] for state in states))
        part._computed = None


@contextlib.contextmanager
def alone(metrics: Iterable[Any]) -> Iterator[None]:
    """Inside, `compute()` does not ask the other ranks, which are not there: rank 0 has their states."""
    modules = [module for metric in metrics if isinstance(metric, nn.Module) for module in metric.modules()]
    parts: list[Any] = [module for module in modules if hasattr(module, "distributed_available_fn")]
    before = [part.distributed_available_fn for part in parts]
    for part in parts:
        part.distributed_available_fn = lambda: False
    try:
        yield
    finally:
        for part, function in zip(parts, before, strict=True):
            part.distributed_available_fn = function


def _parts(metric: nn.Module) -> Iterator[Any]:
    return (module for module in metric.modules() if hasattr(module, "_reductions") and hasattr(module, "_defaults"))


def _joined(of_ranks: Sequence[Any], reduce: Any, device: torch.device) -> Any:
    """One state of all ranks: a list as if one process had filled it, tensors reduced as the metric says (None: stacked)."""
    if all(isinstance(value, Tensor) for value in of_ranks):
        stacked = torch.stack([value.to(device) for value in of_ranks])
        return stacked if reduce is None else reduce(stacked)
    entries = [entry for value in of_ranks for entry in (value if isinstance(value, list) else [value])]
    return [entry.to(device) if isinstance(entry, Tensor) else entry for entry in entries]

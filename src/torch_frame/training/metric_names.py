"""Names of a run's values that clash: each value is kept, under a name of its own, and that is told once."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from torch_frame.scalars import number_or_copy
from torch_frame.types import Number

_logger = logging.getLogger("torch_frame")
RESERVED = frozenset({"iter", "epoch", "time", "lr", "data_time", "iter_time"})
"""Names of the run's own counters, rates and times."""


class MetricNames:
    """The names under which the values of one run are recorded.

    A value that has a name of the run's own, or a metric that has the name of a loss of the same step, is recorded as
    `<name>_metric`.

    Args:
        norms: names of the gradients' norms, which are the run's own too while it clips.
    """

    def __init__(self, *, norms: Collection[str] = ()) -> None:
        self._of_step = RESERVED
        self._of_hooks = RESERVED.union(norms)
        self._told: set[str] = set()
        self._last_names: tuple[Any, ...] = ()
        self._renames: dict[Any, str] = {}  # of the step's names that are recorded under another one

    def logged(self, name: str) -> str:
        """The name under which a value is recorded that a hook has logged."""
        return self._apart(name, self._of_hooks) if name in self._of_hooks else name

    def beside(self, name: Any, losses: Collection[Any]) -> Any:
        """The name of a metric beside the losses (and other metrics) of the same step."""
        return self._apart(name, losses) if name in losses else name

    def reserve(self, norms: Collection[str]) -> None:
        """From now on these are the run's own as well."""
        self._of_hooks |= frozenset(norms)

    def put(self, values: MutableMapping[str, Any], name: str, value: Any) -> None:
        """Add a value of the run's own to those of a step; one of the step's that has its name makes room."""
        if name in values:
            values[self._apart(name, values)] = values[name]
        values[name] = value

    def step_row(self, values: Any) -> dict[str, Tensor | Number]:
        """A step's values as they are now, under their names: numbers, and copies of what is on a device, which are not read.

        Raises:
            TypeError: if `values` is not a dict, or one of them is not a number; with its name.
        """
        if type(values) is not dict and not isinstance(values, Mapping):
            raise TypeError(
                f"train_one_iter returned {type(values).__name__}; it has to return a dict of the values to record, "
                "for example {'total_loss': loss}."
            )
        row: dict[str, Tensor | Number] = {**values}
        for name, value in values.items():
            if isinstance(value, Tensor):
                row[name] = value.item() if value.is_cpu and value.numel() == 1 else _as_now(value, name)
            elif type(value) is not float:
                row[name] = number_or_copy(value, name)
        if tuple(values) != self._last_names:  # most steps have the names of the step before
            self._learn(values)
        return {self._renames.get(name, name): value for name, value in row.items()} if self._renames else row

    def _learn(self, values: Mapping[Any, Any]) -> None:
        """Which of a step's names are recorded under others; asked again only when a step has other names."""
        self._last_names = tuple(values)
        texts = {name: str(name) for name in values}
        self._renames = {name: text for name, text in texts.items() if type(name) is not str}
        for name, text in texts.items():
            clashes = text in self._of_step or (name in self._renames and text in values)
            if clashes:
                self._renames[name] = self._apart(text, self._of_step | set(values))

    def _apart(self, name: Any, taken: Collection[Any]) -> str:
        other = f"{name}_metric"
        while other in taken:
            other += "_metric"
        if other not in self._told:
            self._told.add(other)
            why = "the run records a value of its own" if name in self._of_hooks else "a loss has this name"
            _logger.warning("The metric %r is recorded as %r: %s. Give it another name.", name, other, why)
        return other

    @contextmanager
    def own_values(self) -> Iterator[None]:
        """Inside, what is logged is the run's own: an override of 1.7's `_update_iter_metrics` logs lr and times itself."""
        before, self._of_hooks = self._of_hooks, self._of_hooks - {"lr", "data_time", "iter_time"}
        try:
            yield
        finally:
            self._of_hooks = before


def _as_now(value: Tensor, name: Any) -> Tensor | Number:
    if value.numel() != 1:
        return number_or_copy(value, name)
    # A result of the step's own needs no copy; a parameter, or a part of one, is changed by the next step.
    return value.detach() if value.grad_fn is not None and not value._is_view() else value.detach().clone()

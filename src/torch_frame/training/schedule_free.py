"""Schedule-free optimizers, which train at one point and are evaluated at another: when their weights are which.

Such an optimizer (`schedulefree.AdamWScheduleFree`; Defazio et al., "The Road Less Scheduled", 2024) keeps an average x of what
it has seen, and puts another point y into the parameters while it trains. Its `eval()` puts x there, its `train()` y. Scores and
weights to use are of x; a whole state holds y and the optimizer's own state.

y is kept while x is shown, because `train()` computes it anew and rounds: so a run has the same bits whether it is evaluated and
saved or not, and a resumed run those of the one that was not interrupted. The price is a copy of the parameters for so long.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_frame.errors import SettingError

_logger = logging.getLogger("torch_frame")


def is_schedule_free(optimizer: Optimizer) -> bool:
    """It has `train()` and `eval()`, as no optimizer of torch's has."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def holds_training(optimizers: Mapping[str, Any]) -> bool:
    """The optimizers of a whole state are schedule-free, so its weights are those of training.

    Args:
        optimizers: label -> saved state.
    """
    groups = (group for saved in optimizers.values() for group in saved["param_groups"])
    return any(group.get("train_mode") is True for group in groups)


class _Kept(NamedTuple):
    """A parameter as it was trained, and how to see that nothing has written to it since `eval()`."""

    parameter: Tensor
    value: Tensor
    version: int
    place: int

    @property
    def is_untouched(self) -> bool:
        return self.parameter._version == self.version and self.parameter.data_ptr() == self.place


class ScheduleFree:
    """Switches the schedule-free ones of a run's optimizers; without any it does nothing.

    Args:
        optimizers: gives those of the run, today's at each call.
    """

    def __init__(self, optimizers: Callable[[], Iterable[Optimizer]]) -> None:
        self._optimizers = optimizers
        self._kept: dict[int, list[_Kept]] = {}  # id of the optimizer -> of its parameters, while x is shown
        self._told = False

    def check(self, *, has_ema: bool) -> None:
        """Before the first step.

        Raises:
            SettingError: for EMA, whose average would be evaluated and saved in place of the optimizer's.
        """
        names = [type(one).__name__ for one in self._all()]
        if names and has_ema:
            raise SettingError(
                f"use_ema is True, but {names[0]} keeps an average of the weights itself, which is what has to be evaluated and "
                "saved. Remove use_ema."
            )

    def tell(self, model: nn.Module) -> None:
        """Before the first step: what `eval()` does not cover."""
        names = [type(one).__name__ for one in self._all()]
        norms = [name for name, _ in model.named_buffers() if name.rpartition(".")[2] == "running_mean"]
        if names and norms and not self._told:
            self._told = True
            _logger.warning(
                "%s evaluates other weights than it trains with, but the running statistics of %d normalisation layers are of "
                "training's. Compute them anew before an evaluation: see torch.optim.swa_utils.update_bn and docs/optimizers.md.",
                names[0],
                len(norms),
            )

    def train(self) -> None:
        """The weights are those of training from here on: as they were, if nothing has changed them meanwhile."""
        for optimizer in self._all():
            if not self._trains(optimizer):
                self._to_training(optimizer)

    def show(self) -> None:
        """The weights are those to evaluate and to use from here on."""
        for optimizer in self._all():
            if self._trains(optimizer):
                self._to_evaluation(optimizer)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """The weights to evaluate and to use inside."""
        changed = [one for one in self._all() if self._trains(one)]
        for optimizer in changed:
            self._to_evaluation(optimizer)
        try:
            yield
        finally:
            for optimizer in changed:
                self._to_training(optimizer)

    @contextlib.contextmanager
    def trained(self) -> Iterator[None]:
        """The weights of training inside, such as a whole state holds."""
        changed = [one for one in self._all() if id(one) in self._kept]
        for optimizer in changed:
            self._to_training(optimizer)
        try:
            yield
        finally:
            for optimizer in changed:
                self._to_evaluation(optimizer)

    def for_file(self, *, weights_only: bool) -> contextlib.AbstractContextManager[None]:
        """Around the writing of a file: of weights to use, or of a whole state."""
        return self.shown() if weights_only else self.trained()

    def _all(self) -> list[Any]:
        return [one for one in self._optimizers() if is_schedule_free(one)]

    def _trains(self, optimizer: Optimizer) -> bool:
        flags = [group["train_mode"] for group in optimizer.param_groups if "train_mode" in group]
        return any(flags) if flags else id(optimizer) not in self._kept

    def _to_evaluation(self, optimizer: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if optimizer.state.get(p)]
        values = [p.detach().clone() for p in parameters]
        optimizer.eval()
        self._kept[id(optimizer)] = [
            _Kept(p, value, p._version, p.data_ptr()) for p, value in zip(parameters, values, strict=True)
        ]

    def _to_training(self, optimizer: Any) -> None:
        kept = self._kept.pop(id(optimizer), [])
        untouched = [one for one in kept if one.is_untouched]  # a hook may have changed weights, or called train()
        optimizer.train()
        with torch.no_grad():
            for one in untouched:
                one.parameter.copy_(one.value)

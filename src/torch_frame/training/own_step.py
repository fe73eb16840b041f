"""A `train_one_iter` of the user's: what it asks of the trainer, what is left to do behind it, what it does not go through."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_frame.distributed.strategy import Strategy, keeps_ranks_alike
from torch_frame.distributed.weights import are_same_on_all_ranks
from torch_frame.errors import SettingError, StepOutputError
from torch_frame.training.losses import read_losses
from torch_frame.training.optimization import Calls, Optimization, Unit
from torch_frame.training.precision import Precision
from torch_frame.training.update import check_weight

_logger = logging.getLogger("torch_frame")


class OwnStep:
    """The other side of `Trainer.autocast` and `Trainer.update`.

    Args:
        optimization: makes the updates.
        precision, strategy: of the forward pass.
        device: that trains.
        hooks: gives the names of those with something to do before or after an update.

    Attributes:
        function: the override; None: the trainer's own step trains.
        batch: the one under way.
        values: that are recorded with the step's: norms of gradients.
        casting: modules that compute their forward pass in the run's precision by themselves.
        ranks_differ: the ranks were seen to train different models.
    """

    def __init__(
        self,
        optimization: Optimization,
        precision: Precision,
        strategy: Strategy,
        device: torch.device,
        hooks: Callable[[], Sequence[str]],
    ) -> None:
        self.function: Callable[..., Any] | None = None
        self.values: dict[str, Any] = {}
        self.casting: Sequence[nn.Module] = ()
        self._optimization = optimization
        self._precision = precision
        self._strategy = strategy
        self._hooks = hooks
        self.batch: Any = None
        self._reads_late = device.type != "cpu" and precision.scaler is None
        self._all_finite: Tensor | None = None  # the losses since they were last looked at, on the device
        self._look: Look | None = None
        self._seen: Callable[..., Any] | None = None
        self.ranks_differ = False
        self._num_compared = 0  # times that the ranks' weights were compared
        self._goes_through_update = True  # as far as is known

    def begin_epoch(self, step: Callable[..., Any], standard: Callable[..., Any]) -> None:
        """See whether the trainer's method, which may be an attribute of the object, is the standard one."""
        function = getattr(step, "__func__", step)
        self.function = None if function is standard else function
        if self.function is not None and self.function is not self._seen:
            self._seen = self.function
            self._look = Look(self._optimization, _names_in(step, standard), self.casting)

    def beginning(self, placed: Iterator[tuple[Any, int]]) -> Iterator[tuple[Any, int]]:
        """The same batches; each begins here."""
        for batch, position in placed:
            self.batch = batch
            self._optimization.begin_batch()
            if self._look is not None:
                self._look.begin_batch()
            yield batch, position
        self.batch = None

    def autocast(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """See `Trainer.autocast`; `is_last`: the batch ends its window."""
        if self._look is not None:
            self._look.used_autocast = True
        own = self._strategy.autocast(self._precision.autocast())
        accumulating = self._optimization.accumulating(is_last=is_last)
        return own if accumulating is None else _both(accumulating, own)

    def update(self, loss: Any, name: str | None, weight: Any, *, is_last: bool) -> Calls:
        """See `Trainer.update`."""
        if self._look is not None:
            self._look.used_update = True
        optimization = self._optimization
        unit = self._unit(name)
        if not isinstance(loss, Tensor):
            raise StepOutputError(f"update() got a {type(loss).__name__}; it takes the loss, a tensor of one element.")
        loss, _ = read_losses(loss)
        self._note(loss)
        weight = None if weight is None else check_weight(weight, "update() got the weight")
        unit.num_calls += 1
        if unit.num_calls > 1 and optimization.window_len > 1:
            raise SettingError(
                f"update({'' if name is None else repr(name)}) was called twice in one batch with gradient_accumulation_steps="
                f"{optimization.window_len}: a window holds one loss of each batch. Add the losses into one."
            )
        optimization.begin_update(unit)
        backward = partial(optimization.backward, unit, loss, weight, self.values)
        accumulating = optimization.accumulating(is_last=is_last)
        if accumulating is not None:
            with accumulating:
                yield backward
            return
        yield backward
        yield from optimization.end_window(unit, self.values)

    def _note(self, loss: Tensor) -> None:
        """On a device other than the CPU whether a loss is finite is read with the values of the steps."""
        if self._reads_late and self._optimization.on_nonfinite == "raise":
            finite = loss.detach().isfinite().all()
            self._all_finite = finite if self._all_finite is None else self._all_finite & finite

    def check_losses(self) -> None:
        """The host reads values of the device now: the losses too.

        Raises:
            NonFiniteError: if one since the last time is not finite.
        """
        finite, self._all_finite = self._all_finite, None
        if finite is not None and not finite.item():
            raise self._optimization.nonfinite("a loss given to update() is not finite", {})

    def _unit(self, name: str | None) -> Unit:
        units = self._optimization.units
        if name is not None and not isinstance(name, str):
            raise TypeError(
                f"update() got a {type(name).__name__} for optimizer; it takes the optimizer's name in the dict, and a weight by "
                "its name: update(loss, weight=...)."
            )
        unit = units.get(name)
        if unit is not None:
            return unit
        if None in units:
            raise SettingError(
                f"update(..., {name!r}) names an optimizer, but the trainer has no dict of them: call update(loss)."
            )
        names = ", ".join(map(repr, units))
        raise SettingError(f"update(loss, {name!r}): the optimizers are {names}. Name the one that the loss is for.")

    def end_batch(self, is_last: Callable[[], bool]) -> Calls:
        """Behind the user's step; `is_last`: whether the batch ends its window."""
        if self._optimization.by_name:
            yield from self._optimization.end_batch(self.values, is_last=is_last())
        if self._look is not None and self._look.is_sure:
            self.end_look()

    def end_look(self) -> None:
        """Behind the first batch, or the epoch: what was not called by now is not called."""
        if self._look is not None and self.function is not None:
            self._look.tell(self._optimization.in_words(self._hooks()))
            self._look.end()
            self._goes_through_update = self._look.has_updated
            self._look = None
        bypasses = self.function is not None and not self._goes_through_update
        if bypasses and self._num_compared < 2 and not self.ranks_differ and keeps_ranks_alike(self._strategy):
            self._compare()

    def _compare(self) -> None:
        """Behind the first batch, which may have made no update, and the first epoch: do the ranks train the same model?"""
        self._num_compared += 1
        self.ranks_differ = not are_same_on_all_ranks(self._strategy, self._optimization.model)
        if self.ranks_differ:
            _logger.warning(
                "The ranks have other weights by now: train_one_iter is overridden, and nothing averages its gradients. "
                "DistributedDataParallel does so only if the step calls the model itself, not parts or methods of it. Call "
                "self.update(loss) instead of zero_grad, backward and step (docs/optimizers.md)."
            )

    def take_values(self) -> dict[str, Any]:
        values, self.values = self.values, {}
        return values


class Look:
    """What a user's step does, looked at in its first batch.

    Args:
        names: what its code refers to.
        casting: modules that cast by themselves: a step that calls one of them, or another library's autocast, needs no other.

    Attributes:
        used_autocast, used_update: it has called them.
    """

    def __init__(self, optimization: Optimization, names: Collection[str], casting: Sequence[nn.Module] = ()) -> None:
        self.used_update = False
        self.used_autocast = bool(casting) and "autocast" in names
        self._optimization = optimization
        self._names = names
        self._counts_before: Mapping[str, Any] = {}

        def note(module: nn.Module, inputs: Any) -> None:  # no method: a copy of the model would copy this object
            self.used_autocast = True

        self._handles = [module.register_forward_pre_hook(note) for module in casting]

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()

    def begin_batch(self) -> None:
        if not self._counts_before:
            self._counts_before = self._counts()

    def _counts(self) -> dict[str, Any]:
        optimization = self._optimization
        schedules = list(optimization.schedules.values())
        updaters = [unit.updater for unit in optimization.units.values()]
        return {
            "updates": [(updater.num_micro_batches, updater.num_skipped) for updater in updaters]
            + [optimization.num_updates],
            "warm-up": [schedule.num_updates for schedule in schedules],
            "schedule": [getattr(schedule.scheduler, "last_epoch", None) for schedule in schedules],
            "ema": None if optimization.ema is None else optimization.ema.updates,
        }

    @property
    def is_sure(self) -> bool:
        """It has called `update`, or its code does not: some steps call it in some batches only."""
        return self.used_update or "update" not in self._names

    @property
    def has_updated(self) -> bool:
        """By `update`, or by the standard step."""
        return self.used_update or self._counts()["updates"] != self._counts_before.get("updates")

    def tell(self, settings: Mapping[str, str]) -> None:
        """Name the settings without effect, in one warning.

        Args:
            settings: kind -> text; the kinds "precision", "scaler", "warm-up", "schedule" and "ema" may be gone through in other
                ways than by `update`.
        """
        now = self._counts()
        left = dict(settings)
        if self.used_autocast:
            left.pop("precision", None)
        if self.has_updated:
            whole_step = not self.used_update  # the standard one, called by super()
            left = {} if whole_step else {kind: text for kind, text in left.items() if kind == "precision"}
        for kind in ("warm-up", "schedule", "ema"):
            if now[kind] != self._counts_before.get(kind):
                left.pop(kind, None)
        if not left:
            return
        calls = "self.autocast()" if self.used_update else "self.update()"
        _logger.warning(
            "train_one_iter is overridden and does not call %s, so these settings have no effect: %s. Compute the loss inside "
            "self.autocast() and call self.update(loss) instead of zero_grad, backward and step (docs/optimizers.md), or leave "
            "them out.",
            calls,
            ", ".join(left.values()),
        )


def _names_in(step: Callable[..., Any], standard: Callable[..., Any]) -> set[str]:
    """The names that a step refers to, and those that the other methods of its trainer's class do."""
    functions = [getattr(step, "__func__", step)]
    for kind in type(getattr(step, "__self__", None)).__mro__:
        if standard in vars(kind).values():
            break
        functions += vars(kind).values()
    return {name for function in functions for name in getattr(getattr(function, "__code__", None), "co_names", ())}


@contextmanager
def _both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> Iterator[None]:
    with first, second:
        yield

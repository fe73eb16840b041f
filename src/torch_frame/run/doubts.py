"""What is probably not meant, and told before the first step: parameters that nothing trains, a schedule in the wrong unit."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import Tensor, nn

from torch_frame.checkpoint.names import bare_name
from torch_frame.run.length import RunLength
from torch_frame.run.optimizers import some
from torch_frame.training.schedule_settings import settings_of
from torch_frame.training.schedules import LRWarmupScheduler

_logger = logging.getLogger("torch_frame")
_WHOLE_RUN = (
    *("T_max", "total_steps", "num_training_steps", "max_steps", "max_epochs", "max_iters", "num_steps", "num_epochs"),
    *("t_initial", "t_max"),
)
"""Settings of a schedule, of torch and of people's own, that are as a rule the length of the run."""


def tell(
    model: nn.Module,
    optimized: Iterable[Tensor],
    schedules: Iterable[LRWarmupScheduler],
    interval: str,
    length: RunLength,
    window: int,
    *,
    is_new: bool,
) -> None:
    """All of it; behind `before_train`, in which hooks may unfreeze layers and give them to an optimizer."""
    if not length.is_over():
        tell_of_untrained(model, optimized)
        for schedule in schedules:
            tell_of_unit(schedule, interval, length, window, is_new=is_new)


def tell_of_untrained(model: nn.Module, optimized: Iterable[Tensor]) -> None:
    """Name the parameters that require a gradient and that no optimizer has.

    Args:
        model: bare.
        optimized: what the optimizers have.
    """
    held = {id(parameter) for parameter in optimized}
    names = [bare_name(name) for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if names:
        _logger.warning(
            "No optimizer has these trainable parameters, so they stay as they are: %s. If they are to be trained, make the "
            "optimizer when the model is complete; if not, freeze them: requires_grad_(False).",
            some(names, most=10),
        )


def tell_of_unit(
    schedule: LRWarmupScheduler, interval: str, length: RunLength, window: int, *, is_new: bool = True
) -> None:
    """Say if a schedule seems to be made for updates and steps by epochs, or the other way round.

    Args:
        schedule, interval: of the run.
        length, window: of the run, and the batches in an update.
        is_new: the run begins; later a rate of 0 is where the schedule has come to.
    """
    scheduler, per_epoch = schedule.scheduler, length.updates_per_epoch(window, limited=False)
    if scheduler is None or schedule.needs_metric or per_epoch == 1:
        return
    if interval == "epoch" and is_new and all(rate == 0 for rate in schedule.get_last_lr()):
        _logger.warning(
            "The schedule (%s) begins with a learning rate of 0, and with lr_scheduler_interval='epoch' that is the rate of the "
            "whole epoch that comes. If it counts updates, as those of transformers do, pass lr_scheduler_interval='iter'.",
            type(scheduler).__name__,
        )
        return
    updates, epochs = length.num_updates(window, limited=False), length.max_epochs
    own, other = (epochs, updates) if interval == "epoch" else (updates, epochs)
    name, steps = _length_of(scheduler)
    if None not in (own, other, steps) and own != other == steps:
        units = {"epoch": ("epochs", "updates", "iter"), "iter": ("updates", "epochs", "epoch")}[interval]
        _logger.warning(
            "The schedule (%s) has %s=%d, the number of %s in the run, but with lr_scheduler_interval=%r it counts %s, of which "
            "there are %d. Pass lr_scheduler_interval=%r, or make it for %d steps.",
            *(type(scheduler).__name__, name, steps, units[1], interval, units[0], own, units[2], own),
        )


def _length_of(scheduler: object) -> tuple[str, int | None]:
    """The setting that says how long a schedule is, and its value; None if none does."""
    record = settings_of(scheduler)
    assert record is not None
    values = [record["settings"], *(function["values"] for function in record["functions"])]
    found = [(name, value) for one in values for name, value in one.items() if name in _WHOLE_RUN]
    return found[0] if found and isinstance(found[0][1], int) else ("", None)

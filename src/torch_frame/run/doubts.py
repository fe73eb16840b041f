"""What is probably not meant, and told before the first step: parameters that nothing trains, a schedule in the wrong unit."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

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
    counts = {
        "epochs": length.max_epochs,
        "updates": length.num_updates(window, limited=False),
        "batches": length.num_updates(1, limited=False),
    }
    unit = "epochs" if interval == "epoch" else "updates"
    own, lengths = counts[unit], list(_lengths(settings_of(scheduler) or {}, counts[unit]))
    if own is None or own in [steps for _, steps in lengths]:
        return
    for name, steps in lengths:
        other = next((kind for kind, count in counts.items() if count == steps), None)
        if other is not None:
            cure = {
                "epochs": "Pass lr_scheduler_interval='epoch', or m",
                "updates": "Pass lr_scheduler_interval='iter', or m",
            }
            _logger.warning(
                "The schedule (%s) has %s=%d, the number of %s in the run, but with lr_scheduler_interval=%r it counts %s, "
                "of which there are %d. %sake it for %d steps.",
                *(type(scheduler).__name__, name, steps, other, interval, unit, own, cure.get(other, "M"), own),
            )
            return


def _lengths(record: Mapping[str, Any], own: int | None) -> Iterator[tuple[str, int]]:
    """The settings of a schedule, and of those inside it, that say how long it is: name and value.

    Args:
        record: of the schedule.
        own: steps that it makes. They may be computed from a number of epochs and one of batches, which is no function's value.
    """
    names = (*_WHOLE_RUN, "total_iters") if _comes_down(record) else _WHOLE_RUN
    settings = {name: value for name, value in record["settings"].items() if isinstance(value, int)}
    yield from (
        (name, value) for name, value in settings.items() if name in names and not _is_factor(value, settings, own)
    )
    for function in record["functions"]:
        yield from (
            (name, value)
            for name, value in function["values"].items()
            if name in names and isinstance(value, int) and "epoch" not in name
        )
    inner = [item for one in record["schedulers"] for item in _lengths(one, own)]
    if record["class"] == "SequentialLR" and record["schedulers"]:
        begin = max(record["settings"]["milestones"], default=0)
        yield from (
            (f"milestones[-1] + {name}", begin + steps) for name, steps in _lengths(record["schedulers"][-1], own)
        )
    yield from inner


def _is_factor(value: int, settings: Mapping[str, int], own: int | None) -> bool:
    return value > 0 and own is not None and any(value * other == own != value for other in settings.values())


def _comes_down(record: Mapping[str, Any]) -> bool:
    """One with `total_iters` that ends the run; others of that setting are warm-ups."""
    settings = record["settings"]
    goes_down: bool = settings.get("end_factor", 1) < settings.get("start_factor", 0)
    return goes_down or record["class"] == "PolynomialLR"

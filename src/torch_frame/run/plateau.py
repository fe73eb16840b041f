"""ReduceLROnPlateau: a step for each new value of the metric that it follows."""

from __future__ import annotations

import logging

from torch_frame.distributed.strategy import Strategy
from torch_frame.run.checks import unknown_metric_message
from torch_frame.tracking.storage import MetricStorage
from torch_frame.training.optimization import Optimization

_logger = logging.getLogger("torch_frame")


def step_by_metric(
    optimization: Optimization, name: str | None, storage: MetricStorage, strategy: Strategy, *, is_last: bool
) -> None:
    """Step the schedules that follow the metric, on all ranks by rank 0's value.

    Args:
        name: of the metric; None: no schedule follows one.
        is_last: the epoch is the run's last; a metric that nothing has logged by then is told.
    """
    if name is None:
        return
    found = (storage.value(name), storage.latest_iters()[name]) if name in storage else None
    found = strategy.broadcast(found)
    if found is not None:
        optimization.step_by_metric(*found)
    elif is_last:
        _logger.warning(unknown_metric_message("lr_scheduler_metric", name, storage))

"""What a run's values decide in the loop: the schedule of a plateau, and whether a run goes on."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch.optim.lr_scheduler import ReduceLROnPlateau

from torch_frame.errors import SettingError
from torch_frame.tracking.storage import MetricStorage
from torch_frame.training.finite import Columns
from torch_frame.training.metric_names import MetricNames
from torch_frame.training.optimization import Optimization


def run_storage(names: MetricNames, on_read: weakref.WeakMethod[Callable[[Columns], None]]) -> MetricStorage:
    """The storage of a run.

    Args:
        names: under which values are recorded.
        on_read: see `MetricStorage.on_read`; as long as its object is there.
    """

    def check(columns: Columns) -> None:
        method = on_read()
        if method is not None:
            method(columns)

    storage = MetricStorage()
    storage.declare("lr", smooth=False)
    storage.renamed = names.logged
    storage.on_read = check
    return storage


class _Knows(Protocol):
    def higher_is_better(self, name: str) -> bool | None: ...


def check_plateaus(optimization: Optimization, metric: str | None, hooks: Sequence[_Knows]) -> None:
    """ReduceLROnPlateau follows its metric in the direction that the metric has, if a hook knows it.

    Raises:
        SettingError: naming the metric.
    """
    schedulers: list[Any] = [schedule.scheduler for schedule in optimization.schedules.values()]
    plateaus = [one for one in schedulers if isinstance(one, ReduceLROnPlateau)]
    for lr_scheduler, hook in itertools.product(plateaus, hooks if metric is not None else ()):
        higher = hook.higher_is_better(metric or "")
        if higher is not None and higher is not (lr_scheduler.mode == "max"):
            right = "max" if higher else "min"
            raise SettingError(
                f"lr_scheduler_metric is {metric!r}, of which {'higher' if higher else 'lower'} is better, but the scheduler's "
                f"mode is {lr_scheduler.mode!r}: it would lower the rate while the metric gets better. "
                f"Make it with mode={right!r}."
            )


def hyper_parameters(
    optimization: Optimization, settings: Mapping[str, Any], logged: Mapping[str, Any]
) -> dict[str, Any]:
    """The run's settings as writers show them: name -> number, text or boolean.

    Args:
        optimization: of several optimizers the names begin with their labels.
        settings: of the trainer; None is left out.
        logged: what the script gave to `log_param` by name.
    """
    found: dict[str, Any] = {}
    for label, optimizer in optimization.optimizers.items():
        group = {
            name: value for name, value in optimizer.param_groups[0].items() if name not in ("params", "param_names")
        }
        scheduler = optimization.schedules[label].scheduler if label in optimization.schedules else None
        own = {"optimizer": type(optimizer).__name__, **group}
        own |= {} if scheduler is None else {"lr_scheduler": type(scheduler).__name__}
        found |= {
            name if len(optimization.optimizers) == 1 else f"{label}.{name}": value for name, value in own.items()
        }
    found |= {**settings, **logged}
    return {str(name): _shown(value) for name, value in found.items() if value is not None}


def _shown(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)

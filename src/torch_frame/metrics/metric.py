"""What a metric is: updated batch by batch, merged by its state, computed once all data has been seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor, nn

from torch_frame.scalars import is_number


@runtime_checkable
class Metric(Protocol):
    """The protocol of metrics. torchmetrics' metrics and collections, and those of 1.7, are taken as they are beside it.

    A metric keeps a *state*, not results: results of parts can't be averaged into the result of the whole, states can be merged
    into the state of the whole. `merge` is exact: whatever the split and its order, `compute` gives what one process gives.
    `update` does not read from the device more than it must: it is called for each batch.

    A metric may have `result_names() -> list[str]` beside these, the names of its results that are one number, whatever the data:
    the run's table has their columns from the first line on, without an evaluation of one batch that finds them out.

    >>> class Accuracy:
    ...     def __init__(self):
    ...         self.reset()
    ...
    ...     def update(self, logits, labels):
    ...         self.right += int((logits.argmax(1) == labels).sum())
    ...         self.total += len(labels)
    ...
    ...     def merge(self, other):
    ...         self.right, self.total = self.right + other.right, self.total + other.total
    ...
    ...     def compute(self):
    ...         return {"accuracy": self.right / self.total}
    ...
    ...     def reset(self):
    ...         self.right = self.total = 0
    ...
    ...     def state_dict(self):
    ...         return {"right": self.right, "total": self.total}
    ...
    ...     def load_state_dict(self, state):
    ...         self.right, self.total = state["right"], state["total"]
    >>> isinstance(Accuracy(), Metric)
    True
    """

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take in a batch; what the arguments are is the metric's to say."""

    def merge(self, other: Self) -> None:
        """Take in the state of another metric of the same settings, which has seen other data."""

    def compute(self) -> Mapping[str, Any]:
        """The results of all data seen since `reset`, by name. Changes nothing."""

    def reset(self) -> None:
        """Forget all data."""

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain types."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on a state that `state_dict` of a metric of the same settings returned."""


def is_torchmetrics(metric: Any) -> bool:
    """Whether this is used as a torchmetrics metric or collection is: a module with `update`, `compute` and `reset`.

    >>> is_torchmetrics(object())
    False
    """
    has = [callable(getattr(metric, name, None)) for name in ("update", "compute", "reset")]
    return isinstance(metric, nn.Module) and all(has)


def results_of(metric: Any) -> dict[str, Any]:
    """A metric's results by name: of `compute()`, or of 1.7's `evaluate()` where there is no `compute`.

    A single result, as most torchmetrics metrics return, gets the name of the metric's class, as in a torchmetrics collection.

    Raises:
        TypeError: where it has neither method, or returns something else.

    >>> class Old:
    ...     def evaluate(self):
    ...         return {"acc": 0.5}
    >>> results_of(Old())
    {'acc': 0.5}
    """
    compute = getattr(metric, "compute", None)
    method = compute or getattr(metric, "evaluate", None)
    if not callable(method):
        raise TypeError(f"{type(metric).__name__} has neither compute() nor evaluate(). A metric needs one of them.")
    results = method()
    if isinstance(results, Mapping):
        return dict(results)
    if results is None and compute is None:
        return {}  # 1.7's metrics may have nothing to say
    if isinstance(results, Tensor) or is_number(results):
        return {type(metric).__name__: results}
    raise TypeError(
        f"{type(metric).__name__}.{method.__name__}() returned {type(results).__name__}; it has to return a dict: name -> value."
    )


class BaseMetric:
    """The metric of 1.7: subclasses write `update`, `evaluate` and, if something is to be forgotten, `reset`.

    The methods here do nothing, as in 1.7.
    """

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take in a batch: (model, batch)."""

    def evaluate(self) -> Mapping[str, Any] | None:
        """The results of all data by name; None: none."""
        return None

    def reset(self) -> None:
        """Forget all data."""


class ModelMetric(BaseMetric):
    """A metric of 1.7 that runs the model: subclasses write `inference`, `collection`, `evaluate` and, if need be, `reset`."""

    def update(self, model: Any, inputs: Any) -> None:
        """Run the model on a batch and take in what it gave."""
        self.collection(self.inference(model, inputs))

    def inference(self, model: Any, inputs: Any) -> Any:
        """(model, batch) -> what `collection` takes."""
        return None

    def collection(self, item: Any) -> None:
        """Take in what `inference` returned."""

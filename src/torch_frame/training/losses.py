"""What a training step returned, read into one total loss and named values.

A step returns one of

* a one-element tensor: the total loss;
* a dict of losses: one-element tensors that are summed into `total_loss`; plain numbers may stand beside them
  (YOLOX returns `l1_loss = 0.0`) and count in the sum without a gradient;
* a pair `(loss or losses, metrics)`: metrics is a dict of one-element tensors or numbers that are only recorded;
* transformers' `ModelOutput`: its `.loss` is the total.
"""

from __future__ import annotations

import functools
import logging
import numbers
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor

from torch_frame.errors import StepOutputError
from torch_frame.scalars import is_number, number_of
from torch_frame.training.metric_names import MetricNames
from torch_frame.types import Number

_logger = logging.getLogger("torch_frame")
_FORMS = (
    "A step returns a one-element tensor (the total loss), a dict of losses (summed into total_loss), "
    "or a pair (loss or dict of losses, dict of metrics)."
)


Losses: TypeAlias = tuple[Tensor, dict[str, Tensor | Number]]
"""A step's outcome: the total (one element, with its graph), and every named value, `total_loss` first."""


def read_losses(output: Any, names: MetricNames | None = None) -> Losses:
    """Read what a training step returned; see the module's text for the forms.

    Args:
        output: of the step.
        names: of the run; a metric that has the name of a loss is recorded under another one.

    Raises:
        StepOutputError: with what came and what is expected, for anything else.

    >>> import torch
    >>> total, values = read_losses({"cls": torch.ones((), requires_grad=True), "l1": 0.5})
    >>> total.item(), list(values)
    (1.5, ['total_loss', 'cls', 'l1'])
    """
    if isinstance(output, Tensor):
        total = _checked_total(output, "the loss")
        return total, {"total_loss": total}
    if type(output) is not dict and isinstance(output, Mapping) and is_model_output(output):
        return read_losses(_loss_of(output))
    if isinstance(output, Mapping):
        return _from_dict(output)
    if isinstance(output, tuple):
        return _from_pair(output, MetricNames() if names is None else names)
    raise StepOutputError(f"The step returned {_what(output)}. {_FORMS}{_hint(output)}")


def check_counted_once(output: Any) -> None:
    """No loss of a dict is computed from another one of it: that one would count twice in the sum.

    A walk over the graphs, for the first step.

    Args:
        output: what the step returned.

    Raises:
        StepOutputError: naming the losses.
    """
    losses = output[0] if isinstance(output, tuple) else output
    if not isinstance(losses, Mapping) or (type(losses) is not dict and is_model_output(losses)):
        return
    nodes = {
        name: _node_of(loss) for name, loss in losses.items() if isinstance(loss, Tensor) and loss.grad_fn is not None
    }
    names: dict[Any, list[str]] = {}
    for name, node in nodes.items():
        names.setdefault(node, []).append(name)
    for name, node in nodes.items():
        inside = [other for other in names[node] if other != name] + _found_below(node, names)
        if inside:
            parts = ", ".join(map(repr, inside))
            are = "is a loss" if len(inside) == 1 else "are losses"
            raise StepOutputError(
                f"Loss {name!r} is computed from {parts}, which {are} of the same dict, so {parts} would count twice in the sum. "
                "Return the total as a tensor and its parts as metrics: "
                f"(total, {{{inside[0]!r}: ...}}); or return the parts only."
            )


def _node_of(tensor: Tensor) -> Any:
    return tensor.grad_fn, tensor.output_nr


def _found_below(node: Any, names: Mapping[Any, list[str]]) -> list[str]:
    """The names of the nodes of a graph that can be reached from one of them."""
    if len(names) < 2:
        return []
    seen, left, found = {node}, [node], []
    while left:
        for below in left.pop()[0].next_functions:
            if below not in seen and below[0] is not None:
                seen.add(below)
                left.append(below)
                found += names.get(below, [])
    return found


def is_model_output(output: Mapping[str, Any]) -> bool:
    """A mapping whose entries are attributes as well, of a loss and what it was computed from: transformers' ModelOutput.

    A dict of losses of such a kind (addict's Dict, say) is none.
    """
    if any(kind.__name__ == "ModelOutput" for kind in type(output).__mro__):
        return True
    loss: Any = output.get("loss")
    is_attribute = isinstance(loss, Tensor) and getattr(output, "loss", None) is loss
    if not is_attribute or loss.numel() != 1 or loss.grad_fn is None:
        return False
    others = [value for name, value in output.items() if name != "loss"]
    tensors = [value for value in others if isinstance(value, Tensor)]
    if any(tensor.numel() != 1 for tensor in tensors):
        return True
    if any(not isinstance(value, Tensor | numbers.Real) for value in others):
        return True
    names = {_node_of(tensor): [""] for tensor in tensors if tensor.grad_fn is not None}
    return bool(_found_below(_node_of(loss), {_node_of(loss): ["loss"], **names}))


def _loss_of(output: Mapping[str, Any]) -> Tensor:
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise StepOutputError(
            f"The step returned {_what(output)} without a loss: a model of transformers computes one if the batch has 'labels'."
        )
    return loss


def _from_dict(named: Mapping[str, Any]) -> Losses:
    if "total_loss" in named:
        raise StepOutputError(
            "The step's dict of losses contains 'total_loss', which is the name of the sum that torch-frame computes. "
            "Return the parts alone, or return the total as a tensor and the parts as metrics: (total, {...})."
        )
    if not named:
        raise StepOutputError(f"The step returned an empty dict of losses. {_FORMS}")
    total: Any = None
    values: dict[str, Tensor | Number] = {}
    for name, loss in named.items():
        if not isinstance(loss, Tensor):
            loss = _number(name, loss, "loss")
        elif loss.numel() != 1:
            raise StepOutputError(
                f"Loss {name!r} has shape {tuple(loss.shape)}; a loss has one element. Reduce it, for example with .mean()."
            )
        elif not loss.requires_grad:
            _warn_of_no_graph(name)
        values[name] = loss
        total = loss if total is None else total + loss
    if not isinstance(total, Tensor):
        raise StepOutputError(
            f"The step's dict of losses holds plain numbers only ({', '.join(map(repr, named))}); "
            "nothing can be trained on them. At least one loss has to be a tensor with a graph."
        )
    total = _checked_total(total, f"the sum of the losses {', '.join(map(repr, named))}")
    return total, {"total_loss": total, **values}


def _from_pair(output: tuple[Any, ...], names: MetricNames) -> Losses:
    if len(output) != 2:
        raise StepOutputError(f"The step returned a tuple of {len(output)} elements. {_FORMS}")
    losses, metrics = output
    if not isinstance(losses, Tensor | Mapping):
        raise StepOutputError(f"The step returned a pair whose first element is {_what(losses)}. {_FORMS}")
    if not isinstance(metrics, Mapping):
        raise StepOutputError(f"The step returned a pair whose second element is {_what(metrics)}. {_FORMS}")
    total, values = read_losses(losses)
    for name, metric in metrics.items():
        if not isinstance(metric, Tensor):
            metric = _number(name, metric, "metric")
        elif metric.numel() != 1:
            raise StepOutputError(
                f"Metric {name!r} has shape {tuple(metric.shape)}; a metric of a step has one element. "
                "Reduce it, for example with .mean()."
            )
        values[names.beside(name, values)] = metric
    return total, values


def _checked_total(loss: Tensor, name: str) -> Tensor:
    if loss.numel() != 1:
        raise StepOutputError(
            f"The step returned a loss of shape {tuple(loss.shape)}; a loss has one element. "
            "Reduce it, for example with .mean()."
        )
    if not loss.requires_grad:
        raise StepOutputError(
            f"Nothing can be trained: {name} has no graph (requires_grad is False). It was detached, computed under "
            "torch.no_grad(), rebuilt with torch.tensor(...), or no parameter that requires a gradient takes part in it."
        )
    if not loss.is_floating_point():
        raise StepOutputError(f"A loss is a floating-point tensor, but {name} is {loss.dtype}.")
    return loss


@functools.cache
def _warn_of_no_graph(name: str) -> None:
    """Once for each name: a term that is sometimes constant (no object in the picture) is no mistake."""
    _logger.warning(
        "Loss %r has no graph in this step: it counts in total_loss, but nothing is trained by it. "
        "If it is a metric, return it beside the losses: (losses, {%r: ...}).",
        name,
        name,
    )


def _number(name: str, value: Any, kind: str) -> Number:
    if type(value) is float or type(value) is int:
        return value
    if not is_number(value):
        raise StepOutputError(
            f"{kind.capitalize()} {name!r} is {_what(value)}; it has to be a one-element tensor or a number."
        )
    return number_of(value)


def _what(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)} elements"
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _hint(output: Any) -> str:
    if output is None:
        return " Is the return statement missing?"
    if isinstance(output, numbers.Real):
        return " Was .item() called on the loss? Return the tensor itself."
    if isinstance(getattr(output, "loss", None), Tensor):
        return " To train on its .loss, pass step_fn=lambda model, batch: model(**batch).loss to the Trainer."
    return ""


def arguments_of_17(row: Mapping[str, Tensor | Number]) -> tuple[dict[str, float], float, float, float]:
    """A recorded row as 1.7's `_update_iter_metrics` takes it: numbers, then data_time, iter_time, lr (reads the device)."""
    numbers = {name: float(value) for name, value in row.items()}
    data_time, iter_time, lr = (numbers.pop(name, 0.0) for name in ("data_time", "iter_time", "lr"))
    return numbers, data_time, iter_time, lr


def describe(values: Mapping[str, Tensor | Number]) -> str:
    """The values as text, for messages (reads them from the device).

    >>> import torch
    >>> describe({"total_loss": torch.tensor(float("nan")), "l1": 0.25})
    'total_loss=nan, l1=0.25'
    """
    return ", ".join(
        f"{name}={float(value.detach() if isinstance(value, Tensor) else value):g}" for name, value in values.items()
    )

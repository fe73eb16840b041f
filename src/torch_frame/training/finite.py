"""Is it finite? Gradients before a step, values when they are read, weights before they are written."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_frame.distributed.strategy import Strategy
from torch_frame.errors import NonFiniteError

Columns = Mapping[str, tuple[list[int], list[float]]]
"""name -> (iterations, values): what `MetricStorage` has read from the device."""


class FiniteCheck:
    """Whether gradients are finite, in one pass over them: the check of torch's GradScaler, at a scale of 1.

    x * 1.0 leaves every bit as it is. A call waits for the device once.

    Args:
        parameters: whose gradients will be asked about.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        kinds = {(p.device, p.dtype) for p in parameters}
        self._uniform = len(kinds) == 1 and not any(p.is_complex() for p in parameters)
        device = parameters[0].device if parameters else torch.device("cpu")
        # float32 as the function wants, whatever the default dtype
        self._found = torch.zeros(1, device=device, dtype=torch.float32)
        self._one = torch.ones(1, device=device, dtype=torch.float32)

    def __call__(self, gradients: list[Tensor]) -> bool:
        if not gradients:
            return True
        if not self._uniform:
            return all(map(_is_finite, gradients))
        try:
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, self._found, self._one)
        except (NotImplementedError, AttributeError):  # a sparse gradient, or a torch without this function
            return all(map(_is_finite, gradients))
        if self._found.item() == 0.0:
            return True
        self._found.zero_()
        return False


def _is_finite(gradient: Tensor) -> bool:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return bool(values.isfinite().all())


@contextlib.contextmanager
def spoiled_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Backward inside leaves NaN in the gradients of these parameters, and so, where ranks exchange them, on all ranks.

    That is how a rank tells the others of a loss that is not finite, at no cost in all other steps. The loss itself cannot
    carry it: its NaN reaches no gradient behind a ReLU that is off, for instance.
    """
    handles = [p.register_hook(lambda gradient: gradient * math.nan) for p in parameters if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def what_is_not_finite(strategy: Strategy, *, losses: bool, gradient: bool) -> str:
    """What is wrong with a window that all ranks have found not to be finite, and where; called by all of them.

    Args:
        losses, gradient: those of this rank are finite.
    """
    found = strategy.gather("gradient" if losses and not gradient else "" if losses else "loss")
    what = next((kind for kind in ("loss", "gradient") if kind in found), "gradient")
    of_ranks = [rank for rank, kind in enumerate(found) if kind == what]
    here = strategy.rank in of_ranks or not of_ranks
    return f"the {what} is not finite" + ("" if here else f" on rank {of_ranks[0]}")


class NonFiniteStep(NamedTuple):
    """A step whose recorded loss or gradient norm is NaN or infinite."""

    name: str
    iteration: int
    """Index in the run."""
    values: dict[str, float]
    """All that was recorded in that iteration."""


def first_nonfinite(columns: Columns, names: Sequence[str] = ("total_loss", "grad_norm")) -> NonFiniteStep | None:
    """The first iteration in which one of `names` is not finite, or None.

    Args:
        columns: values that have just been read from the device.
        names: which of them have to be finite.
    """
    for name in names:
        iterations, values = columns.get(name, ([], []))
        if math.isfinite(sum(values)):
            continue
        bad = next((i for i, value in zip(iterations, values, strict=True) if not math.isfinite(value)), None)
        if bad is not None:
            row = {n: column[i.index(bad)] for n, (i, column) in columns.items() if bad in i}
            return NonFiniteStep(name, bad, row)
    return None


def nonfinite_message(what: str, values: str, epoch: int, iteration: int) -> str:
    """The sentence that a run ends with.

    Args:
        what: such as "the loss is not finite".
        values: the step's losses and metrics, in words.
        epoch, iteration: indices in the run.
    """
    return (
        f"Training stopped: {what}, in epoch {epoch + 1}, iteration {iteration} of the run: {values}. "
        "Look at the learning rate, the data of this batch and the precision; on_nonfinite='skip' leaves such updates out."
    )


_STATISTICS = ("running_mean", "running_var")


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that have to be finite, or no weights are written: trained parameters, and statistics of normalisations.

    A normalisation is a module with the buffers `running_mean` and `running_var`, torch's or a user's. Other buffers may hold
    infinities on purpose, a mask for instance.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    statistics = {n: b for n, b in model.named_buffers() if n.rpartition(".")[2] in _STATISTICS}
    owners = [{n.rpartition(".")[0] for n in statistics if n.endswith(kind)} for kind in _STATISTICS]
    norms = set.intersection(*owners)
    return {**trained, **{n: b for n, b in statistics.items() if n.rpartition(".")[0] in norms}}


def check_weights(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse to write weights that are NaN or infinite over a good checkpoint.

    Args:
        tensors: as `trained_tensors` gives them.
        where: the moment, in words.

    Raises:
        NonFiniteError: naming the first such tensor.
    """
    for name, tensor in tensors.items():
        wide = torch.float32 if tensor.element_size() < 4 else None
        if not math.isfinite(tensor.sum(dtype=wide).item()) and not bool(tensor.isfinite().all()):
            raise NonFiniteError(
                f"{name} holds NaN or infinite values, so no checkpoint is written; the last one is untouched ({where})."
            )

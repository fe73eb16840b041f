"""Weights only: loading them into a model that may differ, and saying how it differed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from torch_frame.checkpoint.misfits import loads_in_its_own_way, misfits, own_names
from torch_frame.checkpoint.names import bare_name, bare_names
from torch_frame.errors import CheckpointError


@dataclass(frozen=True)
class WeightsReport:
    """What `load_weights` did.

    Attributes:
        loaded: names taken over.
        missing_keys: names that the model has and the weights have not; the model keeps its own values there.
        unexpected_keys: names that the weights have and the model has not.
        mismatched_shapes: name -> (shape in the weights, shape in the model); the model keeps its own values there.
    """

    loaded: list[str] = field(default_factory=list)
    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    mismatched_shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Every tensor of the model was loaded, and nothing was left over."""
        return not (self.missing_keys or self.unexpected_keys or self.mismatched_shapes)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        if self.missing_keys:
            parts.append(f"{len(self.missing_keys)} missing (kept as they were): {_first_few(self.missing_keys)}")
        if self.unexpected_keys:
            parts.append(f"{len(self.unexpected_keys)} unexpected (left out): {_first_few(self.unexpected_keys)}")
        if self.mismatched_shapes:
            shapes = [f"{name} {list(got)} -> {list(own)}" for name, (got, own) in self.mismatched_shapes.items()]
            parts.append(f"{len(shapes)} of another shape (kept as they were): {_first_few(shapes)}")
        return "; ".join(parts)


def _matched(weights: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The weights under the model's own names, as far as it knows them."""
    names = {bare_name(name): name for name in own}
    given = {bare_name(name): value for name, value in weights.items()}
    if not given.keys() & names.keys():  # wrapped in DDP when they were saved
        given = {name.removeprefix("module."): value for name, value in given.items()}
    return {names.get(name, name): value for name, value in given.items()}


def load_weights(model: nn.Module, weights: Any) -> WeightsReport:
    """Load what fits into `model` and report the rest.

    Args:
        model: the bare model.
        weights: a `state_dict`, with or without wrappers' prefixes.

    Raises:
        CheckpointError: if nothing fits, or `weights` is no `state_dict`.
    """
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise CheckpointError(
            f"checkpoint is a {type(weights).__name__}; it has to be a state_dict (name -> tensor), as best.pth holds one."
        )
    own = model.state_dict()
    given = _matched(weights, own)
    shapes = {
        name: (tuple(value.shape), tuple(own[name].shape))
        for name, value in given.items()
        if isinstance(value, Tensor) and isinstance(own.get(name), Tensor) and value.shape != own[name].shape
    }
    fitting = {name: value for name, value in given.items() if name in own and name not in shapes}
    report = WeightsReport(
        loaded=list(fitting),
        missing_keys=[name for name in own if name not in given],
        unexpected_keys=[name for name in given if name not in own],
        mismatched_shapes=shapes,
    )
    if (
        given
        and loads_in_its_own_way(model)
        and not report.complete
        and not misfits(model, bare_names(own), bare_names(given))
    ):
        model.load_state_dict(own_names(model, bare_names(given)), strict=False)  # it renames, or resizes
        return WeightsReport(loaded=list(given))
    if own and not fitting:
        inside = [name for name, value in weights.items() if isinstance(value, Mapping)]
        if inside:
            raise CheckpointError(
                f"None of the weights fits this model; the dict holds others under {', '.join(map(repr, inside))}. "
                f"Pass one of them: load_checkpoint(checkpoint=weights[{inside[0]!r}])."
            )
        raise CheckpointError(
            f"None of the {len(given)} weights fits this model ({report}). Is it the checkpoint of another model?"
        )
    model.load_state_dict(fitting, strict=False)
    return report


def _first_few(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

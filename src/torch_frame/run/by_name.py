"""An optimizer's state by the names of its parameters: what is saved, what fits, and what the optimizer is given back.

torch keeps it by position, so parameters in another order would get each other's state. Names are those of the bare model. A
parameter that the model does not have (a loss's own weights) is called "(optimizer) 0", "(optimizer) 1", ... in the order of the
optimizer, or by the name that the optimizer was given with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_frame.checkpoint.weights import bare_name

Groups = Sequence[Sequence[str]]
"""Names of the parameters, group by group."""


class Names:
    """What the parameters of an optimizer are called.

    Args:
        model: the bare model.
        optimizer: may hold parameters that the model does not have.
        label: of the optimizer.

    Attributes:
        groups: names, group by group, in the order of the optimizer.
        outside: name -> parameter, of those that the model does not have.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, label: str = "optimizer") -> None:
        self._first: dict[str, str] = {}  # every name of a tied parameter -> its first one
        known: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._first[bare_name(name)] = known.setdefault(id(parameter), bare_name(name))
        self.outside: dict[str, Tensor] = {}
        self.groups: list[list[str]] = []
        for group in optimizer.param_groups:
            names = []
            for parameter, given in zip(group["params"], _given_names(group), strict=True):
                name = known.get(id(parameter), "")
                if not name:
                    name = f"({label}) {len(self.outside) if given is None else given}"
                    self.outside[name] = parameter
                names.append(name)
            self.groups.append(names)

    def here(self, saved: Groups) -> list[list[str]]:
        """Saved names as they are here: a tied parameter may have been called by another of its names."""
        return [[self.of(name) for name in group] for group in saved]

    def of(self, name: str) -> str:
        """A saved name as it is here."""
        return self._first.get(name, name)

    def __iter__(self) -> Iterator[str]:
        for group in self.groups:
            yield from group


def _given_names(group: Mapping[str, Any]) -> Sequence[str | None]:
    given: Sequence[str | None] = group.get("param_names") or [None] * len(group["params"])
    return given


def by_name(state: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """What is saved of an optimizer.

    Args:
        state: of the optimizer, in torch's layout.
        names: of its parameters.
    """
    flat = list(names)
    groups = [
        {**{k: v for k, v in group.items() if k != "param_names"}, "params": own}
        for group, own in zip(state["param_groups"], names.groups, strict=True)
    ]
    return {"param_groups": groups, "state": {flat[index]: kept for index, kept in state["state"].items()}}


def by_position(saved: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Torch's layout of what `by_name` made, for an optimizer whose parameters have these names."""
    groups = saved["param_groups"]
    if is_by_position(saved):
        return dict(saved)
    positions = {name: position for position, name in enumerate(names)}
    settings = [
        {**group, "params": [positions[name] for name in own]} for group, own in zip(groups, names.groups, strict=True)
    ]
    return {
        "param_groups": settings,
        "state": {positions[names.of(name)]: kept for name, kept in saved["state"].items()},
    }


def is_by_position(saved: Mapping[str, Any]) -> bool:
    """Whether a saved state goes by position: one of format 2 or of 1.7."""
    return any(isinstance(name, int) for group in saved["param_groups"] for name in group["params"])

"""An optimizer's state by the names of its parameters: what is saved, and the same as another run's optimizer takes it.

torch keeps it by position, so parameters in another order would get each other's state. Names are those of the bare model. A
parameter that the model does not have (a loss's own weights) is called "(optimizer) 0", "(optimizer) 1", ... in the order of the
optimizer, or by the name that the optimizer was given with it (`named_parameters()`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_frame.checkpoint.names import bare_name

Groups = Sequence[Sequence[str]]
"""Names of the parameters, group by group."""

_BY_GROUP = (
    "base_lrs",
    "max_lrs",
    "min_lrs",
    "_last_lr",
    "regular_lrs",
    "in_force",
    "base_momentums",
    "max_momentums",
    "lr_lambdas",
)
"""Entries of a schedule's state that have one element for each parameter group."""


class Names:
    """What the parameters of an optimizer are called.

    Args:
        model: the bare model.
        optimizer: may hold parameters that the model does not have.
        label: of the optimizer.
        inner: optimizers that it works with (SAM's base), for parameters that only they hold.

    Attributes:
        groups: names, group by group, in the order of the optimizer.
        outside: name -> parameter, of those that the model does not have.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, label: str = "optimizer", inner: Iterable[Optimizer] = ()
    ) -> None:
        self._first: dict[str, str] = {}  # every name of a tied parameter -> its first one
        self._known: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            bare = bare_name(name)
            self._first[bare] = self._known.setdefault(id(parameter), bare)
        self.outside: dict[str, Tensor] = {}
        for group in (group for each in (optimizer, *inner) for group in each.param_groups):
            self._name_others(group, label)
        self.groups: list[list[str]] = self.of_groups(optimizer)

    def _name_others(self, group: Mapping[str, Any], label: str) -> None:
        """Name the parameters of a group that the model does not have."""
        given = group.get("param_names")
        for place, parameter in enumerate(group["params"]):
            if id(parameter) not in self._known:
                name = f"({label}) {given[place] if given else len(self.outside)}"
                self._known[id(parameter)] = name
                self.outside[name] = parameter

    def of_groups(self, optimizer: Optimizer) -> list[list[str]]:
        """Names of the parameters of this optimizer, or of one that it works with, group by group."""
        return [[self._known[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]

    def of(self, name: str) -> str:
        """A saved name as it is here: a tied parameter may have been called by another of its names."""
        return self._first.get(name, name)

    def in_model(self, name: str) -> bool:
        """The model has a parameter of this saved name."""
        return name in self._first

    def __iter__(self) -> Iterator[str]:
        for group in self.groups:
            yield from group


# ---------------------------------------------------------------- torch's layout


def has_torchs_layout(state: Mapping[str, Any], groups: Groups) -> bool:
    """Whether an optimizer's `state_dict` goes by the positions of its parameters, as torch's own do."""
    own = state.get("param_groups")
    if not isinstance(own, list) or not isinstance(state.get("state"), Mapping):
        return False
    params = [group.get("params") if isinstance(group, Mapping) else None for group in own]
    return params == _numbered(groups)


def by_name(state: Mapping[str, Any], groups: Groups) -> dict[str, Any]:
    """An optimizer's state by the names of its parameters.

    Args:
        state: in torch's layout.
        groups: names of the parameters.

    Returns:
        "param_groups" and "state" by name; "state_of_all" if there is state that belongs to no parameter; "more" if the
        optimizer adds entries of its own.
    """
    flat = _flat(groups)
    made: dict[str, Any] = {
        "param_groups": named_groups(state["param_groups"], groups),
        "state": {flat[key]: kept for key, kept in state["state"].items() if _is_position(key, flat)},
    }
    of_all = {key: kept for key, kept in state["state"].items() if not _is_position(key, flat)}
    more = {key: value for key, value in state.items() if key not in ("param_groups", "state")}
    return made | ({"state_of_all": of_all} if of_all else {}) | ({"more": more} if more else {})


def named_groups(param_groups: Sequence[Mapping[str, Any]], groups: Groups) -> list[dict[str, Any]]:
    """Parameter groups with the names of their parameters."""
    return [
        {**{key: value for key, value in group.items() if key != "param_names"}, "params": list(own)}
        for group, own in zip(param_groups, groups, strict=True)
    ]


def by_position(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What `by_name` made, in torch's layout; a state that goes by position already (of format 2, of 1.7) as it is."""
    if goes_by_position(saved):
        return dict(saved)
    groups = groups_of(saved)
    positions = {name: position for position, name in enumerate(_flat(groups))}
    state = {positions[name]: kept for name, kept in saved["state"].items()}
    return {
        "state": {**state, **saved.get("state_of_all", {})},
        "param_groups": [
            {**group, "params": numbers}
            for group, numbers in zip(saved["param_groups"], _numbered(groups), strict=True)
        ],
        **saved.get("more", {}),
    }


def goes_by_position(saved: Mapping[str, Any]) -> bool:
    """Whether a saved state goes by position: one of format 2 or of 1.7."""
    return any(isinstance(name, int) for group in saved["param_groups"] for name in group["params"])


def groups_of(saved: Mapping[str, Any]) -> list[list[str]]:
    """The parameters of a saved state, group by group."""
    return [list(group["params"]) for group in saved["param_groups"]]


def _flat(groups: Groups) -> list[str]:
    return [name for group in groups for name in group]


def _numbered(groups: Groups) -> list[list[int]]:
    numbers = iter(range(sum(map(len, groups))))
    return [[next(numbers) for _ in group] for group in groups]


def _is_position(key: Any, flat: Sequence[str]) -> bool:
    return isinstance(key, int) and 0 <= key < len(flat)


# ---------------------------------------------------------------- another order, other groups


def origins(saved: Mapping[str, Any], now: Groups) -> list[int] | None:
    """Which saved group each of today's groups continues; None if that cannot be told.

    As many groups as then: each continues the one that it has most parameters in common with. Another number: a group's
    parameters have to come from one saved group, or from several with the same settings.

    Args:
        saved: by name, of the same parameters.
        now: names as they are today.
    """
    was = groups_of(saved)
    if [set(group) for group in was] == [set(group) for group in now]:
        return list(range(len(now)))
    place = {name: index for index, group in enumerate(was) for name in group}
    if len(was) == len(now):
        found = [_most_common(group, place, index) if group else -1 for index, group in enumerate(now)]
        left = iter(sorted(set(range(len(was))) - set(found)))  # for groups without parameters, in their order
        found = [next(left, -1) if of < 0 else of for of in found]
        return found if len(set(found)) == len(found) else None
    found = []
    for index, group in enumerate(now):
        settings = [_settings(saved["param_groups"][place[name]]) for name in group]
        if any(other != settings[0] for other in settings) or not group:
            return None
        found.append(_most_common(group, place, index))
    return found


def _most_common(group: Sequence[str], place: Mapping[str, int], index: int) -> int:
    """The saved group that most of these parameters were in; of several the one at the same place, else the first."""
    counts: dict[int, int] = {}
    for name in group:
        counts[place[name]] = counts.get(place[name], 0) + 1
    return max(counts, key=lambda other: (counts[other], other == index, -other))


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def renamed(saved: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """A saved state with the names that tied parameters have here."""
    groups = [{**group, "params": [names.of(name) for name in group["params"]]} for group in saved["param_groups"]]
    return {**saved, "param_groups": groups, "state": {names.of(name): kept for name, kept in saved["state"].items()}}


def regrouped(saved: Mapping[str, Any], now: Groups, origin: Sequence[int]) -> dict[str, Any]:
    """A saved state with today's groups; each has the settings of the saved one that it continues."""
    groups = [{**saved["param_groups"][of], "params": list(names)} for of, names in zip(origin, now, strict=True)]
    return {**saved, "param_groups": groups}


def regrouped_schedule(saved: Any, num_groups: int, origin: Sequence[int]) -> Any:
    """A schedule's saved state with its rates in today's order of the groups.

    Args:
        saved: any nesting, as schedules that hold others have it.
        num_groups: in the saved optimizer.
        origin: which saved group each of today's continues.
    """
    if isinstance(saved, Mapping):
        return {
            key: [value[of] for of in origin]
            if key in _BY_GROUP and isinstance(value, list) and len(value) == num_groups
            else regrouped_schedule(value, num_groups, origin)
            for key, value in saved.items()
        }
    if type(saved) in (list, tuple):
        return type(saved)(regrouped_schedule(value, num_groups, origin) for value in saved)
    return saved


def moved(was: Groups, now: Groups, origin: Sequence[int]) -> list[str]:
    """Names of the parameters whose group does not continue the one that they were in."""
    place = {name: index for index, group in enumerate(was) for name in group}
    return [name for of, group in zip(origin, now, strict=True) for name in group if place[name] != of]

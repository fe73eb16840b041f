"""The optimizers' part of a checkpoint, by the names of their parameters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from torch_frame.checkpoint.values import decode, encode_most
from torch_frame.distributed.strategy import Strategy
from torch_frame.run import by_name
from torch_frame.run.by_name import Names
from torch_frame.run.exact import SameGroups, castable, keys_on_host, make_exact
from torch_frame.run.setting_differences import BY_SCHEDULE
from torch_frame.run.state import Line, State
from torch_frame.training.several import schedule_label


class OptimizersPart:
    """The state of each optimizer and the settings of its groups, each under a label.

    Args:
        optimizers: label -> optimizer.
        model: as the loop calls it.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer], model: nn.Module, strategy: Strategy) -> None:
        self._optimizers = optimizers
        self._model = model
        self._strategy = strategy
        self._parts = {
            label: OptimizerPart(optimizer, model, strategy, label) for label, optimizer in optimizers.items()
        }

    def state_dict(self) -> dict[str, Any]:
        state = {}
        for (
            label,
            part,
        ) in self._parts.items():  # asked here: one frame less above an error in an optimizer's state_dict
            state[label] = part.saved(self._strategy.optimizer_state(self._model, self._optimizers[label]))
        return state

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        for label, part in self._parts.items():
            part.load_state_dict(states[label])

    def differences(self, saved: Mapping[str, Any], unknown: Collection[str]) -> list[str]:
        if saved.keys() != self._parts.keys():
            return [f"the optimizers were {', '.join(saved)}, now they are {', '.join(self._parts)}"]
        return [line for label, part in self._parts.items() for line in part.differences(saved[label], unknown)]

    def refusals(self, saved: Mapping[str, Any]) -> list[str]:
        return [line for label, part in self._in_both(saved) for line in part.refusals(saved[label])]

    def holds_the_same(self, other: Any) -> bool:
        """The other part is of the same optimizers."""
        mine, others = self._optimizers, other._optimizers
        return mine.keys() == others.keys() and all(mine[label] is others[label] for label in mine)

    def _in_both(self, saved: Mapping[str, Any]) -> list[tuple[str, OptimizerPart]]:
        return [(label, part) for label, part in self._parts.items() if label in saved]

    def waits(self, saved: Mapping[str, Any]) -> str | None:
        """Why the part can be restored only after `before_train`, in words: a hook may add the layers that it unfreezes there."""
        missing = [name for label, part in self._in_both(saved) for name in part.missing_groups(saved[label])]
        if not missing:
            return None
        return (
            f"The optimizer lacks {some(missing)}, which it trained when the run was saved. Its state is restored after "
            "before_train, where a hook may add them."
        )

    def in_present_order(self, state: State) -> tuple[State, list[Line]]:
        """A whole state whose optimizers, and their schedules, have today's groups and order; and what to say of it."""
        lines: list[Line] = []
        optimizers, schedules = dict(state["optimizers"]), dict(state["lr_schedulers"])
        for label, part in self._in_both(optimizers):
            found = part.in_present_order(optimizers[label])
            if found is None:
                continue
            num_groups = len(optimizers[label]["param_groups"])
            optimizers[label], origin, said = found
            lines += said
            schedule = schedule_label(label)
            schedules[schedule] = by_name.regrouped_schedule(schedules[schedule], num_groups, origin)
        return {**state, "optimizers": optimizers, "lr_schedulers": schedules}, lines

    def keep(self) -> Callable[[], None]:
        kept = [part.keep() for part in self._parts.values()]

        def put_back() -> None:
            for part in kept:
                part()

        return put_back


class OptimizerPart:
    """One optimizer's state and the settings of its groups, by the names of its parameters.

    Parameters that the model does not have are saved with their values. An optimizer whose `state_dict` has a layout of its own
    is asked for that and given it back, as long as its parameters come in the same order. State of optimizers inside it (SAM's
    base) is saved too.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, strategy: Strategy, label: str = "optimizer") -> None:
        self._optimizer = optimizer
        self._model = model
        self._strategy = strategy
        self._label = label

    def state_dict(self) -> dict[str, Any]:
        return self.saved(self._strategy.optimizer_state(self._model, self._optimizer))

    def saved(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """What is saved of the optimizer, whose own `state_dict` is given."""
        names = self._names()
        inner: dict[str, Any] = {}
        for place, optimizer in self._inner():
            state, groups = optimizer.state_dict(), names.of_groups(optimizer)
            if by_name.has_torchs_layout(state, groups):
                inner[place] = by_name.by_name(state, groups)
        if by_name.has_torchs_layout(own, names.groups):
            made: dict[str, Any] = by_name.by_name(own, names.groups)
        else:
            made = {
                "param_groups": by_name.named_groups(_without_params(self._optimizer), names.groups),
                "state": {},
                "own": own,
            }
        made = encode_most({**made, "inner": inner})
        more = {"values": dict(names.outside), "inner": made.pop("inner"), "on_host": keys_on_host(self._optimizer)}
        return {**made, **{key: value for key, value in more.items() if value}}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        names = self._names()
        saved = self._present(saved)
        with torch.no_grad():
            for name, value in saved.get("values", {}).items():
                names.outside[name].copy_(value)
        self._load(saved)

    def _load(self, saved: Mapping[str, Any]) -> None:
        saved = decode(saved)
        if "own" in saved:
            with self._same_groups():
                self._strategy.load_optimizer_state(self._model, self._optimizer, saved["own"])
            for place, optimizer in self._inner():
                if place in saved.get("inner", {}):
                    make_exact(optimizer, by_name.by_position(saved["inner"][place])["state"])
            return
        state = by_name.by_position(saved)
        with self._same_groups():
            given = {**state, "state": castable(state["state"])}
            self._strategy.load_optimizer_state(self._model, self._optimizer, given)
        make_exact(self._optimizer, state["state"], saved.get("on_host", ()))
        for place, optimizer in self._inner():
            if place in saved.get("inner", {}) and type(self._optimizer).state_dict is Optimizer.state_dict:
                self._load_inner(optimizer, saved["inner"][place])

    def _same_groups(self) -> ExitStack:
        """Around a load: neither the optimizer nor those inside it get other groups, which the two may share (LARC)."""
        stack = ExitStack()
        stack.enter_context(SameGroups(self._optimizer))
        for _, inner in _optimizers_of(self._optimizer):
            stack.enter_context(SameGroups(inner, outer=self._optimizer))
        return stack

    def _load_inner(self, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
        names = self._names()
        saved, now = by_name.renamed(saved, names), names.of_groups(optimizer)
        origin = by_name.origins(saved, now)
        assert origin is not None, "the groups of the outer optimizer fit"
        state = by_name.by_position(by_name.regrouped(saved, now, origin))
        with SameGroups(optimizer):
            optimizer.load_state_dict({**state, "state": castable(state["state"])})
        make_exact(optimizer, state["state"])

    def differences(self, saved: Mapping[str, Any], unknown: Collection[str]) -> list[str]:
        names = self._names()
        saved = self._present(saved)
        if by_name.goes_by_position(saved):
            return _sizes_differ(saved, names) or self._settings_differ(saved, older="classes" in unknown)
        return (
            self._sets_differ(saved, names)
            or self._orders_differ(saved, names)
            or self._settings_differ(saved, older=False)
        )

    def missing_groups(self, saved: Mapping[str, Any]) -> list[str]:
        """Names of the model's parameters whose groups the optimizer lacks altogether, if nothing else is in the way."""
        if by_name.goes_by_position(saved):
            return []
        names = self._names()
        own = set(names)
        groups = [[names.of(name) for name in group] for group in by_name.groups_of(saved)]
        missing = [group for group in groups if group and not own & set(group)]
        names_missing = [name for group in missing for name in group]
        fits = own | set(names_missing) == {name for group in groups for name in group}
        return names_missing if fits and all(map(names.in_model, names_missing)) else []

    def in_present_order(self, saved: Mapping[str, Any]) -> tuple[dict[str, Any], list[int], list[Line]] | None:
        """The saved state with today's groups, which saved group each continues, and what to say; None if it is no use."""
        names = self._names()
        if by_name.goes_by_position(saved) or self._goes_by_order(saved) or self._sets_differ(saved, names):
            return None
        saved = by_name.renamed(saved, names)
        was = by_name.groups_of(saved)
        origin = by_name.origins(saved, names.groups)
        if origin is None or was == names.groups:
            return None
        moved = by_name.moved(was, names.groups, origin)
        lines: list[Line] = [
            (logging.INFO, "The optimizer's parameters come in another order than in the checkpoint: matched by name.")
        ]
        if moved:
            text = (
                f"These parameters are in another group of the optimizer, whose saved settings they get: {some(moved)}."
            )
            lines = [(logging.WARNING, text)]
        return by_name.regrouped(saved, names.groups, origin), origin, lines

    def _present(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        found = self.in_present_order(saved)
        return saved if found is None else found[0]

    def keep(self) -> Callable[[], None]:
        """What puts the optimizer, and parameters that the model does not have, back as they are now."""
        optimizers = [self._optimizer, *(inner for _, inner in _optimizers_of(self._optimizer))]
        kept = [(optimizer, dict(vars(optimizer)), dict(optimizer.state)) for optimizer in optimizers]
        groups = [(group, dict(group)) for optimizer in optimizers for group in optimizer.param_groups]
        lists = [(optimizer.param_groups, list(optimizer.param_groups)) for optimizer in optimizers]
        outside = [(tensor, tensor.detach().clone()) for tensor in self._names().outside.values()]

        def put_back() -> None:
            for optimizer, attributes, state in kept:
                vars(optimizer).clear()
                vars(optimizer).update(attributes)
                optimizer.state.clear()
                optimizer.state.update(state)
            for list_of_groups, then in lists:
                list_of_groups[:] = then
            for group, settings in groups:
                group.clear()
                group.update(settings)
            with torch.no_grad():
                for tensor, value in outside:
                    tensor.copy_(value)

        return put_back

    def _names(self) -> Names:
        inner = [optimizer for _, optimizer in _optimizers_of(self._optimizer)]
        return Names(self._strategy.unwrap(self._model), self._optimizer, self._label, inner)

    def _inner(self) -> Iterator[tuple[str, Optimizer]]:
        """The optimizers inside this one that have state of their own."""
        for place, optimizer in _optimizers_of(self._optimizer):
            if optimizer.state is not self._optimizer.state:
                yield place, optimizer

    # ---------------------------------------------------------------- does it fit?

    def _sets_differ(self, saved: Mapping[str, Any], names: Names) -> list[str]:
        was = dict.fromkeys(names.of(name) for group in by_name.groups_of(saved) for name in group)
        now = dict.fromkeys(names)
        gone, new = [name for name in was if name not in now], [name for name in now if name not in was]
        hint = "; a hook that unfreezes layers adds them in load_state_dict or before_train"
        lines = [f"the {self._label} had {some(gone)}, now it has not{hint}"] if gone else []
        lines += [f"the {self._label} has {some(new)}, which it had not"] if new else []
        for name, value in saved.get("values", {}).items():
            own = names.outside.get(name)
            if own is not None and own.shape != value.shape:
                lines.append(f"{name} was {list(value.shape)}, now it is {list(own.shape)}")
        return lines

    def _orders_differ(self, saved: Mapping[str, Any], names: Names) -> list[str]:
        was = [[names.of(name) for name in group] for group in by_name.groups_of(saved)]
        if was == names.groups:
            return []
        if self._goes_by_order(saved):
            kind = type(self._optimizer).__qualname__
            return [f"the parameters of the {self._label} come in another order, and the state of {kind} goes by order"]
        return [f"the groups of the {self._label} held {_groups(was)}, now they hold {_groups(names.groups)}"]

    def _goes_by_order(self, saved: Mapping[str, Any]) -> bool:
        """There is state whose parts belong to parameters by their order: LBFGS has one vector for all."""
        return "own" in saved or "more" in saved or isinstance(self._optimizer, LBFGS)

    def _settings_differ(self, saved: Mapping[str, Any], *, older: bool) -> list[str]:
        """The optimizer has settings that the saved one had not; or, of a state that does not say its class, the other way round.

        What is in the saved groups only is what steps have put there (a count, sums of weights), for the classes are the same.
        """
        made = set(self._optimizer.defaults)
        settings: list[set[str]] = [
            set(other) - set(group) if older else made & set(group) - set(other)
            for group, other in zip(self._optimizer.param_groups, saved["param_groups"], strict=True)
        ]
        names = sorted(set().union(*settings) - {"param_names"} - BY_SCHEDULE)  # schedules are compared apart
        return [f"the {self._label} is another one: only one of the two has {', '.join(names)}"] if names else []

    def refusals(self, saved: Mapping[str, Any]) -> list[str]:
        """What an optimizer with its own way of loading says of a saved state; it is left as it was."""
        if type(self._optimizer).load_state_dict is Optimizer.load_state_dict:
            return []
        put_back = self.keep()
        try:
            self._load(saved)
        except Exception as error:
            return [f"{type(self._optimizer).__qualname__}.load_state_dict refuses it: {type(error).__name__}: {error}"]
        finally:
            put_back()
        return []


def _optimizers_of(outer: Optimizer) -> Iterator[tuple[str, Optimizer]]:
    """The optimizers that are attributes of another one, or in a list that is."""
    for name, value in vars(outer).items():
        items = enumerate(value) if isinstance(value, list | tuple) else [(None, value)]
        for index, item in items:
            if isinstance(item, Optimizer) and item is not outer:
                yield (name if index is None else f"{name}[{index}]"), item


def _without_params(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _sizes_differ(saved: Mapping[str, Any], names: Names) -> list[str]:
    was, now = ([len(group) for group in groups] for groups in (by_name.groups_of(saved), names.groups))
    return [] if was == now else [f"the optimizer's parameter groups held {was} tensors, now they hold {now}"]


def _groups(groups: by_name.Groups) -> str:
    return " | ".join(some(group, most=3) for group in groups)


def some(names: Collection[str], most: int = 5) -> str:
    """The first few of some names, in words."""
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")

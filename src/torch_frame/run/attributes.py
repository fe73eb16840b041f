"""What a script has put on its trainer: optimizers, schedules, scalers, modules, and what it has registered.

An attribute of the trainer (of a subclass or set from outside; also in lists, tuples, deques and dicts of up to 256 elements,
in namespaces and dataclasses) is in the state if its class has `state_dict` and `load_state_dict`, unless it is the trainer's
own or a part of its model. Others (numbers, tensors, arrays) are not; those that have changed are told at a save. A module that
no optimizer trains (a teacher, a perceptual network) is written only if its weights have changed since the run began, which
their digest tells at each save; else that digest, so that other weights at a resume are told. What is only on one side at a
resume is told, and begins anew.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torch_frame.checkpoint.digest import tensor_digest
from torch_frame.checkpoint.names import bare_name
from torch_frame.checkpoint.values import MARK, decode, encode
from torch_frame.errors import CheckpointError, SettingError
from torch_frame.run.optimizers import OptimizerPart
from torch_frame.run.stateful import bare, has_state, ids_of_own, optimizers_in, restoring_rank, things_in
from torch_frame.run.watch import glance, has_changed
from torch_frame.training.schedule_state import load_state, state_of

_logger = logging.getLogger("torch_frame")
UNCHANGED = "unchanged_module"
"""The kind of a value that stands for a module whose weights are not written."""


class Attributes:
    """The part of the state that holds them, by name: `opt_d`, `heads[0]`, `optimizers['g']`, or as registered.

    Args:
        trainer: whose attributes they are.
        own: names of the trainer's own.
    """

    def __init__(self, trainer: Any, own: Collection[str]) -> None:
        self._trainer = weakref.ref(trainer)
        self._own = frozenset(own)
        self._registered: dict[str, Any] = {}
        self._saved: Mapping[str, Any] | None = None  # of the run that is resumed
        self._restored: set[str] = set()
        self._digests: dict[str, list[int] | None] = {}  # of modules that no optimizer trains, when the run began
        self._changed: set[str] = set()
        self._left_out: set[str] = set()
        self._begun = False
        self._glances: dict[str, Any] = {}  # of attributes without a state, when the run began
        self._told: set[str] = set()

    def register(self, name: str, thing: Any) -> None:
        """See `Trainer.register`."""
        if not isinstance(name, str) or not name:
            raise TypeError(f"register's name is {name!r}; it has to be a text that is not empty.")
        missing = [method for method in ("state_dict", "load_state_dict") if not callable(getattr(thing, method, None))]
        if missing or isinstance(thing, type):
            what = f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"
            raise TypeError(
                f"register({name!r}, ...) got {what}{f' without {missing[0]}()' if missing else ''}; it has to be an object with "
                "state_dict() and load_state_dict()."
            )
        if self._begun:
            raise SettingError(
                f"register({name!r}, ...) came after training had begun. Call it before, or in before_train."
            )
        if name in self._registered:
            raise SettingError(f"register({name!r}, ...): this name is taken. Each object needs its own.")
        self._registered[name] = thing
        if self._saved is not None:
            self.load_state_dict(self._saved, again=True)

    # ------------------------------------------------------------ what there is

    def _found(self) -> dict[str, Any]:
        """Name -> object, in the order of restoring: a schedule is behind its optimizer, which is behind the modules."""
        trainer = self._trainer()
        assert trainer is not None
        known = {id(thing) for thing in self._registered.values()} | ids_of_own(trainer)
        found = dict(self._registered)
        for attribute, value in list(vars(trainer).items()):
            for name, thing in things_in(attribute, value) if attribute not in self._own else ():
                thing = bare(thing)
                if id(thing) in known or not has_state(thing):
                    continue
                if name in self._registered:
                    raise SettingError(
                        f"register({name!r}, ...) and the attribute trainer.{name} are two objects with one name. Rename one."
                    )
                known.add(id(thing))
                found[name] = thing
        return dict(sorted(found.items(), key=lambda pair: restoring_rank(pair[1])))

    def modules(self) -> dict[str, nn.Module]:
        """Those that are modules, by name."""
        return {name: thing for name, thing in self._found().items() if isinstance(thing, nn.Module)}

    def optimizers(self) -> list[Optimizer]:
        """All optimizers: the trainer's own, and those that are attributes or registered."""
        trainer = self._trainer()
        assert trainer is not None
        return [
            *trainer.optimization.optimizers.values(),
            *(thing for thing in self._found().values() if isinstance(thing, Optimizer)),
        ]

    def parameters(self) -> Iterator[Tensor]:
        """What the optimizers have."""
        for optimizer in self.optimizers():
            for group in optimizer.param_groups:
                yield from group["params"]

    def things(self) -> list[Any]:
        """All objects whose state is kept."""
        return list(self._found().values())

    def _part_of(self, name: str, thing: Any) -> Any:
        """The object, or what stands for it in a state."""
        trainer = self._trainer()
        assert trainer is not None
        if isinstance(thing, Optimizer):
            return OptimizerPart(thing, trainer.model, trainer.strategy, name)
        if isinstance(thing, nn.Module):
            return _Module(thing)
        return _Schedule(thing) if isinstance(thing, LRScheduler) else thing

    def _untrained(self, found: Mapping[str, Any]) -> dict[str, nn.Module]:
        """The modules that no optimizer trains, without those that are registered."""
        trainer = self._trainer()
        assert trainer is not None
        own = trainer.optimization.optimizers.values()
        optimizers = [*own, *(thing for thing in found.values() if isinstance(thing, Optimizer))]
        trained = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        return {
            name: thing
            for name, thing in found.items()
            if isinstance(thing, nn.Module)
            and name not in self._registered
            and not any(id(parameter) in trained for parameter in thing.parameters())
        }

    # ------------------------------------------------------------ the state

    def state_dict(self) -> dict[str, Any]:
        found = self._found()
        self._tell_of_changed()
        unchanged = self._unchanged(self._untrained(found))
        states: dict[str, Any] = {}
        for name, thing in found.items():
            if name in unchanged:
                states[name] = {MARK: UNCHANGED, "digest": unchanged[name]}
                continue
            state = self._part_of(name, thing).state_dict()
            if isinstance(thing, Optimizer):  # plain already
                states[name] = state
                continue
            try:
                states[name] = encode(state, f"the state of {_called(name, self._registered)}")
            except CheckpointError as error:
                if name in self._registered:
                    raise
                self._leave_out(name, error)
        return states

    def _unchanged(self, modules: Mapping[str, nn.Module]) -> dict[str, list[int]]:
        unchanged: dict[str, list[int]] = {}
        for name, module in modules.items():
            if name in self._digests and name not in self._changed:
                digest = _digest(module)
                if digest is not None and digest == self._digests[name]:
                    unchanged[name] = digest
                else:
                    self._changed.add(name)
        return unchanged

    def _leave_out(self, name: str, error: CheckpointError) -> None:
        if name not in self._left_out:
            self._left_out.add(name)
            _logger.warning("trainer.%s is not in the checkpoint: %s", name, error)

    def differences(self, saved: Mapping[str, Any] | None, unknown: Collection[str]) -> list[str]:
        """Why saved states of what is there already cannot be restored."""
        problems: list[str] = []
        for name, thing in self._found().items():
            state = (saved or {}).get(name)
            if state is not None and not _is_unchanged(state):
                problems += [
                    f"{_called(name, self._registered)}: {line}" for line in self._differences(name, thing, state)
                ]
        return problems

    def _differences(self, name: str, thing: Any, state: Any) -> list[str]:
        try:
            if isinstance(thing, Optimizer):
                return list(self._part_of(name, thing).differences(state, ()))
            if isinstance(thing, nn.Module):
                return _module_differences(thing, state)
            decode(state)
        except CheckpointError as error:
            return [str(error)]
        except (KeyError, TypeError, AttributeError):
            return ["the checkpoint holds the state of something else under this name"]
        return []

    def load_state_dict(self, states: Mapping[str, Any] | None, *, again: bool = False) -> None:
        """Restore what is there; the rest waits for attributes that are made later, before the first batch at the latest.

        Args:
            states: None if the checkpoint is older than this part.
            again: what has been restored stays as it is.
        """
        self._saved = states or {}
        if not again:
            self._restored = set()
        for name, thing in self._found().items():
            if name not in self._saved or name in self._restored:
                continue
            self._restored.add(name)
            state = self._saved[name]
            if not _is_unchanged(state):
                self._part_of(name, thing).load_state_dict(state if isinstance(thing, Optimizer) else decode(state))
                self._changed.add(name)  # from now on its weights are those of the run

    # ------------------------------------------------------------ the run begins

    def begin(self) -> None:
        """After before_train: restore what has been made since, tell what is on one side only, take the digests.

        Raises:
            CheckpointError: if the state of an object that was registered cannot be saved.
        """
        if self._saved is not None:
            self.load_state_dict(self._saved, again=True)
        found = self._found()
        untrained = self._untrained(found)
        digests = {name: _digest(module) for name, module in untrained.items() if name not in self._digests}
        self._digests |= digests
        if self._saved is not None:
            self._tell(found, untrained, self._saved)
            self._saved = None
        self._begun = True
        self._tell_of_hidden(found)
        self._glances = {name: glance(value) for name, value in self._others().items()}
        for name, thing in found.items():
            if not isinstance(thing, nn.Module | Optimizer):
                self._check(name, thing)

    def _others(self) -> dict[str, Any]:
        """The attributes that are neither the trainer's own nor objects with a state."""
        trainer = self._trainer()
        assert trainer is not None
        registered = {id(thing) for thing in self._registered.values()}
        return {
            name: value
            for name, value in vars(trainer).items()
            if name not in self._own and not has_state(value) and id(value) not in registered
        }

    def _tell_of_changed(self) -> None:
        if not self._begun:
            return
        others = {name: value for name, value in self._others().items() if name not in self._told}
        changed = [name for name, value in others.items() if has_changed(self._glances.get(name), glance(value))]
        self._told |= set(changed)
        if changed:
            _logger.warning(
                "Not in the checkpoints, although changed since the run began: %s. If the training depends on them, make them "
                "buffers of the model, or parts of an object with state_dict() and load_state_dict().",
                ", ".join(f"trainer.{name}" for name in changed),
            )

    def _tell_of_hidden(self, found: Mapping[str, Any]) -> None:
        trainer = self._trainer()
        assert trainer is not None
        known = {id(thing) for thing in found.values()} | ids_of_own(trainer)
        for attribute, value in self._others().items():
            for name, thing in things_in(attribute, value):
                hidden = [f"trainer.{name}.{key}" for key in optimizers_in(thing, known)]
                if hidden:
                    _logger.warning(
                        "Not in the checkpoints: %s, because %s has no state_dict() and load_state_dict(). Give it these, or "
                        "make such optimizers attributes of the trainer.",
                        ", ".join(hidden),
                        type(thing).__name__,
                    )

    def _check(self, name: str, thing: Any) -> None:
        try:
            encode(self._part_of(name, thing).state_dict(), f"the state of {_called(name, self._registered)}")
        except CheckpointError as error:
            if name in self._registered:
                raise
            self._leave_out(name, error)
        except Exception:  # it needs a step to be complete; the first save asks again
            return

    def _tell(self, found: Mapping[str, Any], untrained: Collection[str], saved: Mapping[str, Any]) -> None:
        lost = [name for name in saved if name not in found]
        if lost:
            _logger.warning(
                "The checkpoint holds the state of %s, which this trainer has neither as attributes nor registered: it is lost.",
                ", ".join(lost),
            )
        new = [_called(name, self._registered) for name in found if name not in saved and name not in untrained]
        if new:
            _logger.warning("The checkpoint holds no state of %s: begun anew.", ", ".join(new))
        for name, state in saved.items():
            if _is_unchanged(state) and name in untrained and state["digest"] != self._digests[name]:
                _logger.warning(
                    "trainer.%s has other weights than in the run that is resumed, which did not change them and so did not save "
                    "them. The script's count.",
                    name,
                )


class _Module:
    """A module under the names that its tensors have without torch.compile, which may have compiled parts of it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def state_dict(self) -> Any:
        return _bare_state(self._module.state_dict())

    def load_state_dict(self, state: Any) -> None:
        state = _bare_state(state)
        names = {bare_name(name): name for name in self._module.state_dict() if _is_compiled(name)}
        self._module.load_state_dict(
            {names.get(name, name): value for name, value in state.items()} if names else state
        )


def _is_compiled(name: Any) -> bool:
    return isinstance(name, str) and bare_name(name) != name


def _bare_state(state: Any) -> Any:
    if not isinstance(state, Mapping) or not any(map(_is_compiled, state)):
        return state
    return {bare_name(name) if isinstance(name, str) else name: value for name, value in state.items()}


class _Schedule:
    """A scheduler without what is the script's, its functions say."""

    def __init__(self, scheduler: LRScheduler) -> None:
        self._scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        return state_of(self._scheduler)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load_state(self._scheduler, state)


def _called(name: str, registered: Collection[str]) -> str:
    return repr(name) if name in registered else f"trainer.{name}"


def _is_unchanged(state: Any) -> bool:
    return isinstance(state, dict) and state.get(MARK) == UNCHANGED


def _digest(module: nn.Module) -> list[int] | None:
    """A number for each tensor of a module's state; None if it holds more than tensors with values."""
    values = list(module.state_dict().values())
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) < len(values):
        return None
    try:
        return tensor_digest(tensors)
    except (RuntimeError, ValueError):  # a lazy layer that has not been called, the device meta, a layout without bits
        return None


def _module_differences(module: nn.Module, saved: Mapping[str, Any]) -> list[str]:
    """Names and shapes that differ; a module that saves or loads in a way of its own is not judged."""
    if (
        type(module).state_dict is not nn.Module.state_dict
        or type(module).load_state_dict is not nn.Module.load_state_dict
    ):
        return []
    own, saved = _bare_state(module.state_dict()), _bare_state(saved)
    problems = [f"{name} is in one of the two only" for name in sorted(own.keys() ^ saved.keys())]
    for name in own.keys() & saved.keys():
        if is_lazy(own[name]):  # it takes on the saved shape
            continue
        was, now = getattr(saved[name], "shape", None), getattr(own[name], "shape", None)
        if was != now:
            problems.append(f"{name} was {list(was or ())}, now it is {list(now or ())}")
    return problems

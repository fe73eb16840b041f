"""Which modules are in training and which in eval mode: judged when an epoch begins, kept if a run is resumed inside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from torch_frame.progress import Progress
from torch_frame.run.attributes import Attributes
from torch_frame.run.optimizers import some
from torch_frame.training.modes import does_work, set_modes

_logger = logging.getLogger("torch_frame")


class Modes:
    """The modes of the model's modules, and the part of the state that keeps them.

    When an epoch begins, each module that is in eval mode, and in none that is, is judged as a whole. If it has parameters, and
    none of them is trained, it was frozen on purpose, and stays. Else all of it is put into training, which is told. What hooks
    put into eval mode in `before_epoch` stays for that epoch, unless that is the whole model.

    The state says which modules are in eval mode, if it is of inside an epoch: the names.

    A class with a train() of its own decides over what is inside it: a backbone that keeps its norms in eval mode does.

    Args:
        model: that trains, bare.
        progress: where the run stands.
        attributes: of the trainer: modules (a GAN's discriminator, a teacher), and what the optimizers have.
        wrapper: the model as the loop calls it.
    """

    def __init__(
        self,
        model: nn.Module,
        progress: Progress,
        attributes: Attributes,
        wrapper: nn.Module,
    ) -> None:
        self._model = model
        self._progress = progress
        self._attributes = attributes
        self._wrapper = wrapper
        self._saved: Mapping[str, Any] = {}
        self._of_weights: list[str] | None = None
        self._frozen: dict[str, nn.Module] = {}  # that stay in eval mode
        self._untold: dict[str, nn.Module] = {}  # that have been put into training
        self._told: set[str] = set()

    def row(self) -> str | None:
        """The modules that stay in eval mode because they are frozen, for the first lines; None if there is none."""
        self._frozen.update(self._judged()[0])
        return some(list(self._frozen)) if self._frozen else None

    def begin_epoch(self) -> None:
        """Before `before_epoch`: put into training what is not frozen on purpose."""
        known = set(self._frozen)
        self._put_into_training()
        new = [name for name in self._frozen if name not in known]
        if new:
            _logger.info("Frozen modules stay in eval mode: %s.", some(new))
        for name, module in self._untold.items():
            self._tell(name, module)
        self._untold = {}

    def _put_into_training(self) -> None:
        for module in self._wrapper.modules():  # the wrapper's own flags
            if module is self._model:
                break
            module.training = True
        frozen, others = self._judged()
        self._frozen.update(frozen)
        for _, outer in others.values():
            outer.train()
        self._put_back_frozen()
        self._untold |= {name: module for name, (module, _) in others.items()}

    def after_before_epoch(self) -> None:
        """What the hooks have put into eval mode stays, unless that is the whole model."""
        if not any(module.training for module in self._model.modules()):
            self._model.train()
            self._put_back_frozen()

    def _judged(self) -> tuple[dict[str, nn.Module], dict[str, tuple[nn.Module, nn.Module]]]:
        """The topmost modules in eval mode, by name: those that are frozen on purpose; the others, with the one to call."""
        frozen, others = {}, {}
        is_frozen = self._frozen_or_not()
        for name, module, outer in _topmost_in_eval(self._model):
            if is_frozen(module):
                frozen[name or type(module).__name__] = module
            else:
                others[name or type(module).__name__] = (module, outer)
        return frozen, others

    def _frozen_or_not(self) -> Callable[[nn.Module], bool]:
        held = {id(parameter) for parameter in self._attributes.parameters()}

        def is_frozen(module: nn.Module) -> bool:
            parameters = list(module.parameters())
            return bool(parameters) and not any(p.requires_grad and id(p) in held for p in parameters)

        return is_frozen

    def _put_back_frozen(self) -> None:
        """What has been frozen in this run stays so, though a hook has put the whole model into eval mode meanwhile."""
        is_frozen = self._frozen_or_not()
        for module in self._frozen.values():
            if is_frozen(module):
                module.eval()

    def _tell(self, name: str, module: nn.Module) -> None:
        if name in self._told or not module.training:
            return
        self._told.add(name)
        has_parameters = any(True for _ in module.parameters())
        _logger.log(
            logging.WARNING if self._progress.epoch == 0 else logging.INFO,
            "%s was in eval mode when epoch %d began, and is put into training mode: it has %s. To keep a part of the model in "
            "eval mode, freeze it (requires_grad_(False)), or call its eval() in a hook's before_epoch.",
            name,
            self._progress.epoch + 1,
            "parameters that are trained" if has_parameters else "no parameters that could be frozen",
        )

    def state_dict(self) -> dict[str, Any]:
        if not self._progress.is_epoch_begun or self._progress.epoch_trained:
            return {"eval": []}
        others = {name: _in_eval(module) for name, module in self._attributes.modules().items()}
        return {"eval": _in_eval(self._model), **({"attributes": others} if others else {})}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._saved = state or {}

    def compare(self, state: Mapping[str, Any]) -> None:
        """Before anything is restored: note the modes that the weights of a whole state were saved in."""
        saved = state["progress"]
        inside = (saved["position"] > 0 or saved.get("epoch_begun", False)) and not saved["epoch_trained"]
        self._of_weights = (state.get("modes") or {}).get("eval") if inside else None

    def before_load(self) -> None:
        """Bring the model into the modes that the weights were saved in: a layer that merges in eval mode has others there."""
        if self._of_weights is None:
            self._put_into_training()
        else:
            _set(self._model, self._of_weights)

    def restore(self) -> None:
        """Called when a run continues inside an epoch: after a resume, as the state says."""
        saved, self._saved = self._saved, {}
        if "eval" in saved:
            _set(self._model, saved["eval"])
        else:
            self.begin_epoch()
        of_others = saved.get("attributes", {})
        for name, module in self._attributes.modules().items() if of_others else ():
            if name in of_others:
                _set(module, of_others[name])


def _in_eval(model: nn.Module) -> list[str]:
    return [name for name, module in _modules(model) if not module.training]


def _set(model: nn.Module, in_eval: Iterable[str]) -> None:
    names = set(in_eval)
    set_modes({module: name not in names for name, module in _modules(model)})


def _topmost_in_eval(
    module: nn.Module, name: str = "", outer: nn.Module | None = None
) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Name, module, and the outermost one around it, or itself, that decides over modes."""
    outer = module if outer is None and does_work(module) else outer
    if not module.training:
        yield name, module, module if outer is None else outer
        return
    for own_name, child in module.named_children():
        yield from _topmost_in_eval(child, f"{name}.{own_name}" if name else own_name, outer)


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names as those of the weights are: the same for a compiled model."""
    return [
        (name.replace("_orig_mod.", "").removesuffix("_orig_mod"), module) for name, module in model.named_modules()
    ]

"""Which modules are in training and which in eval mode: what a hook sets in an epoch stays where a run is resumed inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from torch_frame.progress import Progress


class Modes:
    """The part of the state that keeps them: the names of the modules in eval mode, if the state is of inside an epoch.

    Args:
        model: that trains, bare.
        progress: where the run stands.
        others: name -> module, of those that are attributes of the trainer or registered: a GAN's discriminator, a teacher.
    """

    def __init__(
        self, model: nn.Module, progress: Progress, others: Callable[[], Mapping[str, nn.Module]] = dict
    ) -> None:
        self._model = model
        self._progress = progress
        self._others = others
        self._saved: Mapping[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        if not self._progress.is_inside_epoch or self._progress.epoch_trained:
            return {"eval": []}
        others = {name: _in_eval(module) for name, module in self._others().items()}
        return {"eval": _in_eval(self._model), **({"attributes": others} if others else {})}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._saved = state or {}

    def restore(self) -> None:
        """Called where a run continues inside an epoch, behind `model.train()`: once after a resume."""
        saved, self._saved = self._saved, {}
        if saved.get("eval"):
            _set(self._model, saved["eval"])
        of_others = saved.get("attributes", {})
        for name, module in self._others().items() if of_others else ():
            if name in of_others:
                _set(module, of_others[name])


def _in_eval(model: nn.Module) -> list[str]:
    return [name for name, module in _modules(model) if not module.training]


def _set(model: nn.Module, in_eval: Iterable[str]) -> None:
    names = set(in_eval)
    for name, module in _modules(model):  # a module comes before those inside it
        if module.training is (name in names):
            module.train(name not in names)  # not assigned: some do work in it


def train_unless_set(model: nn.Module) -> None:
    """Behind before_epoch: what it has put into eval mode stays, unless that is the whole model."""
    if not any(module.training for module in model.modules()):
        model.train()


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names as those of the weights are: the same for a compiled model."""
    return [
        (name.replace("_orig_mod.", "").removesuffix("_orig_mod"), module) for name, module in model.named_modules()
    ]

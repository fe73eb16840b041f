"""Which modules are in training and which in eval mode: what a hook sets in an epoch stays where a run is resumed inside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from torch_frame.progress import Progress


class Modes:
    """The part of the state that keeps them: the names of the modules in eval mode, if the state is of inside an epoch."""

    def __init__(self, model: nn.Module, progress: Progress) -> None:
        self._model = model
        self._progress = progress
        self._saved: Sequence[str] = ()

    def state_dict(self) -> dict[str, Any]:
        inside = self._progress.inner_iter > 0 and not self._progress.epoch_trained
        return {"eval": [name for name, module in _modules(self._model) if inside and not module.training]}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._saved = tuple((state or {}).get("eval", ()))

    def restore(self) -> None:
        """Called where a run continues inside an epoch, behind `model.train()`: once after a resume."""
        saved, self._saved = set(self._saved), ()
        for name, module in _modules(self._model) if saved else ():  # a module comes before those inside it
            if module.training is (name in saved):
                module.train(name not in saved)  # not assigned: some do work in it


def train_unless_set(model: nn.Module) -> None:
    """Behind before_epoch: what it has put into eval mode stays, unless that is the whole model."""
    if not any(module.training for module in model.modules()):
        model.train()


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names as those of the weights are: the same for a compiled model."""
    return [
        (name.replace("_orig_mod.", "").removesuffix("_orig_mod"), module) for name, module in model.named_modules()
    ]

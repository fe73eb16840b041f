"""Training and eval mode, module by module, for layers whose train() does work: LoRA's merging, a norm that stays frozen."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

Modes = Mapping[nn.Module, bool]
"""module -> whether it is in training mode."""


def modes_of(model: nn.Module) -> dict[nn.Module, bool]:
    """The modes of a model's modules, itself first."""
    return {module: module.training for module in model.modules()}


def set_modes(modes: Modes) -> None:
    """Bring modules into the given modes.

    A module is called (`module.train(mode)`) if its class does work there, and only if its mode changes; else its flag is set, so
    that layers inside it whose mode stays see nothing.

    Args:
        modes: of modules, each before those inside it, for a train() may change those as well.
    """
    for module, mode in modes.items():
        if module.training is mode:
            continue
        if does_work(module):
            module.train(mode)
        else:
            module.training = mode


def does_work(module: nn.Module) -> bool:
    """The class has a train() of its own."""
    return type(module).train is not nn.Module.train


def follow_modes(copy: nn.Module, model: nn.Module) -> None:
    """Give a copy of a model the model's modes."""
    set_modes({own: module.training for own, module in zip(copy.modules(), model.modules(), strict=True)})

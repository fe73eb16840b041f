"""Ranks train alike when only rank 0 has hooks: what these change at an epoch's border is taken over by the others.

A hook that sets a learning rate, loads weights or freezes a layer would otherwise do so on one rank, and the ranks would train
different models from then on, without an error.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from torch_frame.distributed.strategy import Strategy
from torch_frame.errors import SettingError

_logger = logging.getLogger("torch_frame")


def share_changes(strategy: Strategy, model: nn.Module, optimizers: Mapping[str, Optimizer]) -> None:
    """Before an epoch's first batch, on all ranks: rank 0's settings of the optimizers, its weights and what it trains.

    Args:
        strategy: of the run.
        model: bare.
        optimizers: by name.

    Raises:
        SettingError: if rank 0 has another model, or other groups of parameters.
    """
    trained = [parameter.requires_grad for parameter in model.parameters()]
    settings = {name: [_settings(group) for group in one.param_groups] for name, one in optimizers.items()}
    sizes = [(name, [len(group["params"]) for group in one.param_groups]) for name, one in optimizers.items()]
    of_ranks = strategy.gather([len(trained), sizes])
    if any(one != of_ranks[0] for one in of_ranks):
        raise SettingError(
            "A hook that only rank 0 has changed the model or the groups of the optimizer, which the other ranks have not. Give "
            "the hook to all of them (AccelerateTrainer: hook_only_main_gpu=False)."
        )
    trained, settings = strategy.broadcast((trained, settings))
    if strategy.rank != 0:
        for parameter, is_trained in zip(model.parameters(), trained, strict=True):
            if parameter.requires_grad is not is_trained:
                parameter.requires_grad_(is_trained)
        for name, one in optimizers.items():
            for group, of_main in zip(one.param_groups, settings[name], strict=True):
                _take_over(group, of_main)
    if not _same_weights(strategy, model):
        for tensor in (*model.parameters(), *model.buffers()):
            strategy.share([tensor])


def tell_of_differences(strategy: Strategy, model: nn.Module) -> bool:
    """Behind an epoch's last batch, on all ranks: have they trained the same model? Told if not.

    Returns:
        Whether they have.
    """
    same = _same_weights(strategy, model)
    if not same:
        _logger.warning(
            "The ranks have other weights by the end of this epoch: a hook that only rank 0 has changes the weights, a learning "
            "rate or the gradients in the middle of it. Give it to all ranks (AccelerateTrainer: hook_only_main_gpu=False)."
        )
    return same


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """What can be sent of a group's settings."""
    return {name: value for name, value in group.items() if name != "params" and _is_plain(value)}


def _take_over(group: dict[str, Any], of_main: Mapping[str, Any]) -> None:
    for name, value in of_main.items():
        if isinstance(value, torch.Tensor) and isinstance(group[name], torch.Tensor):
            group[name].copy_(value)  # a rate on the device stays there
        else:
            group[name] = value


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str) or isinstance(value, torch.Tensor)


@torch.no_grad()
def _same_weights(strategy: Strategy, model: nn.Module) -> bool:
    """By their sums in float64: ranks that get the same gradients have the same bits."""
    there = [parameter.detach() for parameter in model.parameters() if not is_lazy(parameter)]
    sums = [(torch.view_as_real(one) if one.is_complex() else one).sum(dtype=torch.float64) for one in there]
    numbers = torch.stack([one.to(sums[0].device) for one in sums]).tolist() if sums else []  # one wait for the device
    of_ranks = strategy.gather([repr(number) for number in numbers])  # NaN is like NaN
    return all(one == of_ranks[0] for one in of_ranks)

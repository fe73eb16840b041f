"""Ranks train alike: what only rank 0 was given, or what hooks that only it has have changed, is taken over by the others.

A hook that sets a learning rate, loads weights or freezes a layer would otherwise do so on one rank, and the ranks would train
different models from then on, without an error.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from torch_frame.distributed.strategy import Strategy, keeps_ranks_alike
from torch_frame.distributed.weights import are_same_on_all_ranks, as_numbers
from torch_frame.errors import SettingError
from torch_frame.run.run import Run
from torch_frame.training.buffers import once
from torch_frame.training.modes import modes_of, set_modes

_logger = logging.getLogger("torch_frame")
_CURE = "Give the hook to all of them (AccelerateTrainer: hook_only_main_gpu=False)."


def begin_alike(run: Run) -> None:
    """Before a new run's first step, on all ranks: rank 0's weights, if a script has loaded some on rank 0 only. Told."""
    if (
        run.progress.iter > 0
        or not keeps_ranks_alike(run.strategy)
        or are_same_on_all_ranks(run.strategy, run.bare_model)
    ):
        return
    if run.ranks.hooks_on_all:
        _logger.warning(
            "The ranks have different weights before the first step: weights were loaded or set on some of them only. All "
            "have rank 0's now. Do it on all ranks."
        )
    _share_weights(run.strategy, run.bare_model)
    if run.ema is not None:
        _share_weights(run.strategy, run.ema.model)


def follow_main(run: Run) -> None:
    """Before an epoch's first batch, on all ranks: wait for the hooks that only rank 0 has, and take over what they have changed.

    Raises:
        SettingError: if they have changed what the other ranks cannot take over.
    """
    if run.ranks.hooks_on_all:
        return
    _check_loaders(run)
    run.optimization.window_len = run.strategy.broadcast(run.optimization.window_len)
    if keeps_ranks_alike(run.strategy):
        share_changes(run.strategy, run.bare_model, run.optimization.optimizers)


def follow_length(run: Run) -> None:
    """Behind `before_train` and `after_epoch` of hooks that only rank 0 has: the run is as long as it is there.

    Raises:
        SettingError: if they have set another loader.
    """
    if not run.ranks.hooks_on_all:
        _check_loaders(run)
        length = run.length
        length.max_epochs, length.own_max_iters = run.strategy.broadcast((length.max_epochs, length.own_max_iters))


def _check_loaders(run: Run) -> None:
    is_other = run.strategy.gather(run.feed.next_loader is not run.feed.loader)
    if len(set(is_other)) > 1:
        raise SettingError(
            f"A hook that only rank 0 has set another data_loader, which the other ranks have not. {_CURE}"
        )


def share_changes(strategy: Strategy, model: nn.Module, optimizers: Mapping[str, Optimizer]) -> None:
    """On all ranks: rank 0's settings of the optimizers, its weights, what it trains, and its modules' modes.

    Args:
        strategy: of the run.
        model: bare.
        optimizers: by name.

    Raises:
        SettingError: if rank 0 has another model, or other groups of parameters.
    """
    trained = [parameter.requires_grad for parameter in model.parameters()]
    modes = list(modes_of(model).values())
    settings = {name: [_settings(group) for group in one.param_groups] for name, one in optimizers.items()}
    sizes = [(name, [len(group["params"]) for group in one.param_groups]) for name, one in optimizers.items()]
    of_ranks = strategy.gather([len(trained), len(modes), sizes])
    if any(one != of_ranks[0] for one in of_ranks):
        raise SettingError(
            "A hook that only rank 0 has changed the model or the groups of the optimizer, which the other ranks have not. "
            f"{_CURE}"
        )
    trained, modes, settings = strategy.broadcast((trained, modes, settings))
    if strategy.rank != 0:
        set_modes(dict(zip(model.modules(), modes, strict=True)))
        for parameter, is_trained in zip(model.parameters(), trained, strict=True):
            if parameter.requires_grad is not is_trained:
                parameter.requires_grad_(is_trained)
        for name, one in optimizers.items():
            for group, of_main in zip(one.param_groups, settings[name], strict=True):
                _take_over(group, of_main)
    if not are_same_on_all_ranks(strategy, model):
        _share_weights(strategy, model)


def tell_if_apart(run: Run) -> None:
    """Behind an epoch's last batch, if only rank 0 has hooks: that the ranks have trained different models is told, once."""
    if not run.ranks.hooks_on_all and not run.ranks.told_apart and keeps_ranks_alike(run.strategy):
        run.ranks.told_apart = not tell_of_differences(run.strategy, run.bare_model)


def tell_of_differences(strategy: Strategy, model: nn.Module) -> bool:
    """Behind an epoch's last batch, on all ranks: have they trained the same model? Told if not.

    Returns:
        Whether they have.
    """
    same = are_same_on_all_ranks(strategy, model)
    if not same:
        _logger.warning(
            "The ranks have other weights by the end of this epoch: a hook that only rank 0 has changes the weights, a learning "
            f"rate or the gradients in the middle of it. {_CURE}"
        )
    return same


def _share_weights(strategy: Strategy, model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        numbers = as_numbers(tensor)
        if numbers is not None:
            strategy.share([once(numbers)])  # one by one: no second copy of a large model


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

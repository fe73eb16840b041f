"""DDPTrainer: a Trainer that is given a dataset, and splits it over the ranks that there are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler

from torch_frame.distributed.comm import get_rank, get_world_size
from torch_frame.distributed.launch import num_processes
from torch_frame.distributed.strategy import SingleProcess, Strategy
from torch_frame.errors import SettingError
from torch_frame.hooks.base import HookBase
from torch_frame.trainer import CreateNewDir, Trainer
from torch_frame.training.schedules import WarmupMethod


class DDPTrainer(Trainer):
    """Trains on several processes, one for each GPU, with DistributedDataParallel; on one process as `Trainer` does.

    It makes the DataLoader: shuffled, each rank with a part of its own, in an order that is a function of the seed and the
    epoch. The model may be wrapped in DistributedDataParallel already. Hooks are the same on all ranks, or on rank 0 alone.

    Args:
        model, optimizer, lr_scheduler, max_epochs, ..., create_new_dir: as in `Trainer`.
        dataset: map-style.
        dataset_params: what a DataLoader takes beside the dataset; `batch_size` is for each rank.
        use_dist: True: there has to be a process group, or torchrun's environment; False: train alone; None: find out.
        settings: keyword arguments of `Trainer`.

    Raises:
        SettingError: for `shuffle` in `dataset_params`, or `use_dist=True` without a process group.

    >>> import torch
    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> loss = lambda model, batch: model(batch).square().mean()
    >>> params = dict(batch_size=2)
    >>> trainer = DDPTrainer(model, optimizer, None, torch.ones(4, 2), params, max_epochs=2, hooks=[], step_fn=loss)
    >>> trainer.epoch_len
    2
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer],
        lr_scheduler: Any,
        dataset: Any,
        dataset_params: Mapping[str, Any],
        max_epochs: int | None = None,
        work_dir: str | os.PathLike[str] = "work_dir",
        clip_grad_norm: float = 0.0,
        enable_amp: bool = False,
        warmup_method: WarmupMethod | None = None,
        warmup_iters: int = 1000,
        warmup_factor: float = 0.001,
        hooks: Iterable[HookBase | None] | None = None,
        use_ema: bool = False,
        ema_decay: float = 0.9999,
        create_new_dir: CreateNewDir | None = "time_s",
        *,
        use_dist: bool | None = None,
        **settings: Any,
    ) -> None:
        settings.setdefault("strategy", _strategy(use_dist))
        self.use_dist = not isinstance(settings["strategy"], SingleProcess) and num_processes() > 1
        super().__init__(
            model,
            optimizer,
            lr_scheduler,
            _loader(dataset, dataset_params, split_here=self.use_dist and not settings.get("take_over", True)),
            max_epochs,
            work_dir,
            clip_grad_norm,
            enable_amp,
            warmup_method,
            warmup_iters,
            warmup_factor,
            hooks,
            use_ema,
            ema_decay,
            create_new_dir,
            **settings,
        )


def _strategy(use_dist: bool | None) -> Strategy | str | None:
    if use_dist not in (None, True, False):
        raise TypeError(f"use_dist is {use_dist!r}; it has to be True, False or None.")
    if use_dist is None:
        return None
    return "ddp" if use_dist else SingleProcess()


def _loader(dataset: Any, params: Mapping[str, Any], *, split_here: bool) -> DataLoader[Any]:
    """A shuffled loader. The trainer splits it over the ranks; where it leaves loaders alone, a DistributedSampler does."""
    if not isinstance(params, Mapping):
        raise TypeError(
            f"dataset_params is {params!r}; it has to be a dict of a DataLoader's arguments: dict(batch_size=32)."
        )
    if "shuffle" in params:
        raise SettingError(
            f"dataset_params has 'shuffle' ({params['shuffle']!r}), but DDPTrainer always shuffles, in an order that all ranks "
            "know. Remove 'shuffle'; for another order give a 'sampler', or pass a loader of your own to Trainer."
        )
    if "dataset" in params:
        raise SettingError("dataset_params has 'dataset', which is an argument of its own. Remove it.")
    if not params.keys().isdisjoint(("sampler", "batch_sampler")):
        return DataLoader(dataset, **params)
    if split_here:
        sampler: Any = DistributedSampler(dataset, get_world_size(), get_rank())
        return DataLoader(dataset, sampler=sampler, **params)
    return DataLoader(dataset, shuffle=True, **params)

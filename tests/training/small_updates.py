"""Batches, loaders, steps by hand and batches that are not finite, which the tests of updates share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, IterableDataset

from tests.small_runs import make_batches

Batch = Any
SGD_MOMENTUM = lambda parameters: SGD(parameters, lr=0.05, momentum=0.9)  # noqa: E731


def doubled(batches: list[Batch]) -> list[Batch]:
    return [tuple(part.double() for part in batch) for batch in batches]


def joined(batches: list[Batch]) -> Batch:
    return tuple(torch.cat(part) for part in zip(*batches, strict=True))


def assert_close(expected: nn.Module, model: nn.Module) -> None:
    """Equal to 1e-12, in fp64."""
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-12, atol=1e-12)


def step_by_hand(model: nn.Module, optimizer: Any, batch: Batch) -> None:
    model.train()
    optimizer.zero_grad()
    model(batch).backward()
    optimizer.step()


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd_momentum": SGD_MOMENTUM,
    "adamw": lambda parameters: AdamW(parameters, lr=0.01, weight_decay=0.1),
    "adamw_fused": lambda parameters: AdamW(parameters, lr=0.01, weight_decay=0.1, fused=True),
}


class Sized:
    """Batches from an object that claims a length: the true one, another one, or none."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


class ClaimsMore(Sized):
    def __len__(self) -> int:
        return len(self.batches) + 4


class ClaimsFewer(Sized):
    def __len__(self) -> int:
        return len(self.batches) - 2


class Stream(IterableDataset[Any]):
    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


LOADERS: dict[str, Callable[[list[Batch]], Any]] = {
    "list": list,
    "no_length": Sized,
    "iterable_dataset": lambda batches: DataLoader(Stream(batches), batch_size=None),
    "claims_more": ClaimsMore,
    "claims_fewer": ClaimsFewer,
}


def poisoned(num: int, at: set[int], kind: str) -> list[Batch]:
    """Batches of which some make the loss or only the gradient non-finite."""
    return [(*batch, kind if i in at else "good") for i, batch in enumerate(make_batches(num))]


def poisoned_step(model: Any, batch: Batch) -> Any:
    x, y, kind = batch
    if kind == "nan_input":
        x = x * float("nan")
    losses = {"mse": model((x, y))}
    if kind == "nan_loss":
        losses["extra"] = model.layers[0].weight.square().sum() * float("nan")
    elif kind == "inf_loss":
        losses["extra"] = model.layers[0].weight.square().sum() * float("inf")
    elif kind == "nan_number":
        losses["extra"] = float("nan")
    elif kind == "nan_gradient":
        losses["extra"] = (model.layers[0].weight.sum() * 0).sqrt()  # 0, and its derivative is inf * 0
    elif kind == "inf_gradient":
        losses["extra"] = (model.layers[0].bias - model.layers[0].bias.detach()).sqrt().sum()
    return losses


KINDS = ["nan_input", "nan_loss", "inf_loss", "nan_number", "nan_gradient", "inf_gradient"]

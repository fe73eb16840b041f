"""With loss_weight the gradient is that of the large batch, however it is split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.small_runs import Net, differences, make_batches, make_trainer, raised_by, weights_of
from tests.training.small_updates import LOADERS, SGD_MOMENTUM, Batch, assert_close, doubled, joined, step_by_hand

SPLITS = {
    "16": [16],
    "8x2": [8, 8],
    "4x4": [4, 4, 4, 4],
    "1x16": [1] * 16,
    "ragged": [5, 1, 7, 3],
    "first_is_small": [1, 15],
    "first_is_large": [13, 2, 1],
}


class TokenNet(nn.Module):
    """The loss is a mean over the tokens that count, as in language models: batch = (x (N, T, 3), mask (N, T))."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 1)

    def forward(self, batch: Batch) -> Tensor:
        x, mask = batch
        return (self.layer(x).squeeze(-1).square() * mask).sum() / mask.sum()


WEIGHTS: dict[str, tuple[type[nn.Module], Callable[[Batch], Any]]] = {
    "items": (Net, lambda batch: len(batch[0])),
    "items_as_float": (Net, lambda batch: float(len(batch[0]))),
    "items_as_fractions": (Net, lambda batch: len(batch[0]) / 1000),
    "items_as_whole_tensor": (Net, lambda batch: torch.tensor(len(batch[0]))),
    "items_as_tensor_of_one": (Net, lambda batch: torch.tensor([float(len(batch[0]))])),
    "items_with_a_graph": (Net, lambda batch: torch.tensor(float(len(batch[0])), requires_grad=True) * 1),
    "tokens": (TokenNet, lambda batch: batch[1].sum()),
    "tokens_as_number": (TokenNet, lambda batch: int(batch[1].sum())),
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_weighted_batches_are_the_large_batch_however_it_is_split(
    weight: Any, split: list[int], tmp_path: Path
) -> None:
    make_model, loss_weight = weight
    generator = torch.Generator().manual_seed(3)
    if make_model is Net:
        whole = doubled(make_batches(1, 16))[0]
    else:
        mask = torch.rand(16, 6, generator=generator) < 0.5
        mask[:, 0] = True
        whole = (torch.randn(16, 6, 3, generator=generator).double(), mask)
    batches = list(zip(*(part.split(split) for part in whole), strict=True))
    model, expected = make_model().double(), make_model().double()
    optimizer = SGD_MOMENTUM(expected.parameters())
    for _ in range(3):
        step_by_hand(expected, optimizer, whole)
    make_trainer(
        tmp_path,
        model,
        SGD_MOMENTUM(model.parameters()),
        data=batches,
        max_epochs=3,
        gradient_accumulation_steps=max(len(split), 2),
        loss_weight=loss_weight,
    ).train()
    assert_close(expected, model)


@pytest.mark.parametrize("loader", ["list", "no_length", "claims_more"])
def test_a_ragged_last_window_is_weighted_too(loader: str, tmp_path: Path) -> None:
    batches = doubled([make_batches(1, size, seed=size)[0] for size in (5, 1, 7, 3, 2)])
    model, expected = Net().double(), Net().double()
    optimizer = SGD_MOMENTUM(expected.parameters())
    for window in [batches[:3], batches[3:]] * 2:
        step_by_hand(expected, optimizer, joined(window))
    make_trainer(
        tmp_path,
        model,
        SGD_MOMENTUM(model.parameters()),
        data=LOADERS[loader](batches),
        gradient_accumulation_steps=3,
        loss_weight=lambda batch: len(batch[0]),
    ).train()
    assert_close(expected, model)


BAD_WEIGHTS = {
    "zero": 0,
    "negative": -1.0,
    "nan": float("nan"),
    "infinite": float("inf"),
    "none": None,
    "text": "8",
    "vector": torch.ones(4),
    "zero_tensor": torch.tensor(0),
    "negative_tensor": torch.tensor(-1.0),
    "nan_tensor": torch.tensor(float("nan")),
    "infinite_tensor": torch.tensor(float("inf")),
}


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("weight", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_a_weight_that_is_no_positive_number_is_told(weight: Any, steps: int, at: int, tmp_path: Path) -> None:
    weights = iter([weight] if at == 0 else [4, weight])
    model = Net()
    before = weights_of(model)
    trainer = make_trainer(tmp_path, model, gradient_accumulation_steps=steps, loss_weight=lambda batch: next(weights))
    error = raised_by(trainer.train, Exception)
    assert isinstance(error, ValueError | TypeError)
    assert "loss_weight" in str(error)
    if at < steps:
        assert differences(before, weights_of(model)) == []

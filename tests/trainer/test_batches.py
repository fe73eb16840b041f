"""Batches of any nesting and any iterable of them train; an empty one is named."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, IterableDataset

from tests.small_runs import Net, Unsized, differences, make_batches, make_trainer, train_by_hand, weights_of
from torch_frame import SettingError

Pair = namedtuple("Pair", "x y")


@dataclass
class Record:
    x: Tensor
    y: Tensor
    name: str = "record"


class Movable:
    """Knows how to move itself."""

    moved_to: torch.device | None = None

    def __init__(self, pair: tuple[Tensor, Tensor]) -> None:
        self.pair = pair

    def to(self, device: torch.device) -> Movable:
        self.moved_to = device
        return self


NESTINGS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "tuple": (lambda pair: pair, lambda batch: batch),
    "list": (list, lambda batch: batch),
    "dict": (lambda pair: {"x": pair[0], "y": pair[1], "id": "a"}, lambda batch: (batch["x"], batch["y"])),
    "nested": (
        lambda pair: {"in": [pair[0], {"y": (pair[1], None)}]},
        lambda batch: (batch["in"][0], batch["in"][1]["y"][0]),
    ),
    "dataclass": (lambda pair: Record(*pair), lambda batch: (batch.x, batch.y)),
    "namedtuple": (lambda pair: Pair(*pair), lambda batch: (batch.x, batch.y)),
    "has_to": (Movable, lambda batch: batch.pair),
    "tensor": (lambda pair: torch.cat(pair, 1), lambda batch: (batch[:, :3], batch[:, 3:])),
}


@pytest.mark.parametrize(("pack", "unpack"), NESTINGS.values(), ids=NESTINGS)
def test_batches_of_any_nesting_train(pack: Any, unpack: Any, tmp_path: Path) -> None:
    plain, nested = Net(), Net()
    make_trainer(tmp_path / "a", plain).train()
    seen: list[Any] = []

    def step(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        return model(unpack(batch))

    data = [pack(batch) for batch in make_batches()]
    make_trainer(tmp_path / "b", nested, data=data, step_fn=step).train()
    assert differences(weights_of(plain), weights_of(nested)) == []
    assert {type(batch) for batch in seen} == {type(data[0])}
    if isinstance(data[0], Movable):
        assert seen[0].moved_to == torch.device("cpu")


class Stream(IterableDataset[Any]):
    """Has no length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in make_batches():
            yield from zip(x, y, strict=True)


LOADERS = {
    "list": make_batches,
    "tuple": lambda: tuple(make_batches()),
    "iterable_dataset": lambda: DataLoader(Stream(), batch_size=4),
    "iterable_object": Unsized,
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_any_iterable_of_batches_trains(make: Any, tmp_path: Path) -> None:
    expected, model = Net(), Net()
    train_by_hand(expected, SGD(expected.parameters(), lr=0.05), make_batches(), 2)
    trainer = make_trainer(tmp_path / "run", model, data=make(), hooks=None)
    trainer.train()
    assert differences(weights_of(expected), weights_of(model)) == []
    assert (trainer.progress.epoch, trainer.progress.iter) == (2, 10)


def test_a_generator_trains_one_epoch(tmp_path: Path) -> None:
    expected, model = Net(), Net()
    train_by_hand(expected, SGD(expected.parameters(), lr=0.05), make_batches(), 1)
    make_trainer(tmp_path, model, data=(batch for batch in make_batches()), max_epochs=1).train()
    assert differences(weights_of(expected), weights_of(model)) == []


def test_a_generator_for_more_epochs_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", data=(batch for batch in make_batches()))
    with pytest.raises(SettingError, match="iterator"):
        trainer.train()
    assert list(tmp_path.iterdir()) == []


class EmptyLater:
    """Yields batches in the first epoch only."""

    count = 0

    def __iter__(self) -> Iterator[Any]:
        self.count += 1
        return iter(make_batches() if self.count == 1 else [])


EMPTY = {
    "list": list,
    "dataset": lambda: DataLoader([], batch_size=2),  # type: ignore[arg-type]
    "drop_last": lambda: DataLoader(range(3), batch_size=4, drop_last=True),  # type: ignore[arg-type]
    "no_length": lambda: (batch for batch in ()),
    "second_epoch": EmptyLater,
}


@pytest.mark.parametrize("make", EMPTY.values(), ids=EMPTY)
def test_an_empty_loader_is_an_error_that_says_so(make: Any, tmp_path: Path) -> None:
    loader = make()
    trainer = make_trainer(tmp_path, data=loader, max_epochs=1 if isinstance(loader, Iterator) else 2)
    with pytest.raises(SettingError, match="no batch"):
        trainer.train()


@pytest.mark.parametrize("data", [[], make_batches()], ids=["empty_loader", "loader"])
def test_no_epochs_train_nothing_and_say_so(data: Any, tmp_path: Path) -> None:
    model = Net()
    before = weights_of(model)
    trainer = make_trainer(tmp_path / "run", model, data=data, max_epochs=0, hooks=None)
    trainer.train()
    assert differences(before, weights_of(model)) == []
    assert "othing to train" in Path(trainer.log_file).read_text(encoding="utf-8")
    assert trainer.progress.iter == 0


def test_a_finished_run_trains_no_further_and_keeps_its_weights(tmp_path: Path) -> None:
    model = Net()
    trainer = make_trainer(tmp_path / "run", model)
    trainer.train()
    before = weights_of(model)
    trainer.train()
    assert differences(before, weights_of(model)) == []

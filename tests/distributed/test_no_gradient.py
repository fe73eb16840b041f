"""A batch without targets on one of two processes: its loss depends on no parameter, and its gradients are zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from tests.distributed.processes import Failed, on_processes, outcomes
from tests.small_runs import Net, differences, make_batches, make_trainer
from torch_frame.distributed.ddp import DDP

NUM, AT = 6, 3


def nothing(call: int) -> bool:
    return dist.get_rank() == 1 and call == AT


class Step:
    def __init__(self, calls_model: bool = True) -> None:
        self.calls = -1
        self.calls_model = calls_model

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        if nothing(self.calls) and not self.calls_model:
            return torch.tensor(0.0, requires_grad=True)
        loss: Tensor = model(batch)
        return torch.tensor([0.0], requires_grad=True) if nothing(self.calls) else loss


class WithinTheModel(Net):
    """It returns the loss, and a constant for a batch without targets."""

    calls = -1

    def forward(self, batch: Any) -> Tensor:
        self.calls += 1
        loss: Tensor = super().forward(batch)
        return torch.tensor(0.0, requires_grad=True) if nothing(self.calls) else loss


def parts() -> list[Any]:
    return [[part[dist.get_rank() :: 2] for part in batch] for batch in make_batches(NUM, 8)]


def train(folder: Path, model: nn.Module | None = None, step: Any = None, strategy: Any = None, **settings: Any) -> Any:
    model = Net() if model is None else model
    strategy = DDP(own_shards=True) if strategy is None else strategy
    optimizer = SGD(model.parameters(), 0.1)
    make_trainer(folder, model, optimizer, None, parts(), 1, strategy=strategy, step_fn=step, **settings).train(5, 5)
    return {name: value.detach() for name, value in model.named_parameters()}


def by_hand(accumulate: int = 1) -> dict[str, Tensor]:
    """torch's wrapper, whose loss is multiplied by 0 instead."""
    model = Net()
    wrapped = DistributedDataParallel(model)
    optimizer = SGD(model.parameters(), 0.1)
    for call, batch in enumerate(parts()):
        loss = wrapped(batch) * (0.0 if nothing(call) else 1.0) / accumulate
        loss.backward()
        if (call + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return {name: value.detach() for name, value in model.named_parameters()}


def all_runs(folder: Path) -> dict[str, Any]:
    return {
        "by hand": by_hand(),
        "by hand, accumulated": by_hand(2),
        "step": train(folder / "step", None, Step()),
        "model": train(folder / "model", WithinTheModel()),
        "static": train(folder / "static", None, Step(), DDP(own_shards=True, static_graph=True)),
        "accumulated": train(folder / "accumulated", None, Step(), gradient_accumulation_steps=2),
    }


def test_its_gradients_are_zero(tmp_path: Path) -> None:
    first, second = on_processes(all_runs, tmp_path, 2, tmp_path)
    for name in ("step", "model", "static", "accumulated"):
        assert differences(first[name], second[name]) == [], name
        expected = first["by hand, accumulated" if name == "accumulated" else "by hand"]
        assert max(float((first[name][key] - value).abs().max()) for key, value in expected.items()) < 1e-6, name


def not_called(folder: Path) -> None:
    train(folder, None, Step(calls_model=False))


def test_a_step_that_does_not_call_the_model_then_is_told(tmp_path: Path) -> None:
    first, second = outcomes(not_called, tmp_path, 2, tmp_path)
    assert isinstance(first, Failed)
    assert second.kind == "ValueError"
    assert "on rank 1 returned a loss that depends on no parameter, and has not called the model" in second.message
    assert "rank 1: ValueError" in "".join([first.message, *first.notes])

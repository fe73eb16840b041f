"""What a loader holds on each rank is saved and restored for each, where it differs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset

from tests.distributed.processes import on_processes
from tests.small_runs import make_trainer, weights_of
from torch_frame import CheckpointerHook
from torch_frame.distributed.ddp import DDP
from torch_frame.distributed.strategy import SingleProcess
from torch_frame.run.of_ranks import OfRanks


class Shard(IterableDataset[Any]):
    """The samples of this rank; its state knows whose they are."""

    def __init__(self) -> None:
        self.shard, self.index = dist.get_rank(), 0
        self.is_resumed = False

    def __iter__(self) -> Iterator[Any]:
        self.index = self.index if self.is_resumed else 0
        self.is_resumed = False
        while self.index < 8:
            self.index += 1
            yield torch.full((3,), 100.0 * self.shard + self.index), torch.ones(1)

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index, "shard": self.shard}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.index, self.shard, self.is_resumed = state["index"], state["shard"], True


class Turning(Sampler[int]):
    """This rank's indices, which begin with another one in each epoch."""

    def __init__(self) -> None:
        self.rank, self.num_replicas = dist.get_rank(), dist.get_world_size()
        self.indices = list(range(16))[self.rank :: self.num_replicas]

    def __iter__(self) -> Iterator[int]:
        self.indices = self.indices[1:] + self.indices[:1]
        return iter(list(self.indices))

    def __len__(self) -> int:
        return len(self.indices)


def stream() -> Any:
    return pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader(Shard(), 2)


def turning() -> Any:
    return DataLoader(TensorDataset(torch.arange(16.0)[:, None].expand(16, 3), torch.ones(16, 1)), 2, sampler=Turning())


def generators() -> Any:
    generator = torch.Generator().manual_seed(100 + dist.get_rank())
    data = TensorDataset(torch.arange(16.0)[:, None].expand(16, 3), torch.ones(16, 1))
    return DataLoader(data, 4, shuffle=True, generator=generator)


def train(folder: Path, data: Any, max_iters: int, seen: list[Any], **settings: Any) -> dict[str, Tensor]:
    def step(model: Any, batch: Any) -> Any:
        seen.append(batch[0][:, 0].tolist())
        return model(batch)

    trainer = make_trainer(
        folder,
        data=data,
        hooks=[CheckpointerHook()],
        step_fn=step,
        max_iters=max_iters,
        create_new_dir=None,
        strategy=DDP(own_shards=True),
        **settings,
    )
    trainer.train(5, 5)
    return weights_of(trainer.model_or_module)


def resume_all(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    cases: list[tuple[Any, int, dict[str, Any]]] = [
        (stream, 3, {}),
        (turning, 3, {}),
        (generators, 4, {"take_over": False}),  # whose order is torch's: resumed where an epoch ends
    ]
    for make, cut, settings in cases:
        whole, parts = [], []  # type: ignore[var-annotated]
        name = make.__name__
        expected = train(folder / f"{name} 1", make(), 8, whole, **settings)
        train(folder / name, make(), cut, parts, **settings)
        weights = train(folder / name, make(), 8, parts, resume="auto", **settings)
        found[name] = whole, parts, all(torch.equal(weights[key], expected[key]) for key in expected)
    return found


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_resumed_rank_goes_on_with_its_own_part(tmp_path: Path) -> None:
    first, second = on_processes(resume_all, tmp_path, 2, tmp_path)
    for name in ("stream", "turning", "generators"):
        for whole, parts, is_same in (first[name], second[name]):
            assert parts == whole, name
            assert is_same
        assert first[name][0] != second[name][0]


class Numbers(SingleProcess):
    """A rank whose others are known."""

    def __init__(self, rank: int, numbers: list[int]) -> None:
        self.rank, self.world_size, self._numbers = rank, len(numbers), numbers

    def gather(self, value: Any) -> Any:
        return [{"number": number} for number in self._numbers]


class NumberPart:
    def __init__(self, number: int) -> None:
        self.number = number

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: Any) -> None:
        self.number = state["number"]


def test_a_state_that_all_ranks_have_is_saved_once_and_fits_any_number_of_them(caplog: Any) -> None:
    same = OfRanks(NumberPart(3), "loader", Numbers(0, [3, 3])).state_dict()
    assert same == {"number": 3}
    other = OfRanks(NumberPart(3), "loader", Numbers(0, [3, 4])).state_dict()
    part = NumberPart(0)
    OfRanks(part, "loader", Numbers(1, [0, 0])).load_state_dict(other)
    assert part.number == 4
    assert not caplog.records
    OfRanks(part, "loader", Numbers(2, [0, 0, 0])).load_state_dict(other)
    assert part.number == 3
    assert "saved by 2 ranks, and there are 3" in caplog.text
    OfRanks(part, "loader", Numbers(2, [0, 0, 0])).load_state_dict({"number": 7})
    assert part.number == 7

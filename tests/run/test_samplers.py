"""A sampler that changes as the run goes is, in a resumed run, as it was when the epoch began."""

from __future__ import annotations

import itertools
import logging
import pathlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from tests.small_hooks import On, at_iter
from tests.small_runs import make_trainer
from torch_frame import CheckpointerHook, InfiniteDataLoader, Trainer

SIZE = 12
EPOCHS = 4


class Growing(Sampler[int]):
    """Grows harder each time it is iterated, and keeps what it has given in several kinds of attributes."""

    def __init__(self, step: int = 1) -> None:
        self.step = step
        self.level = 0
        self.seen: set[int] = set()
        self.counts = np.zeros(SIZE, dtype=np.int64)
        self.weights = torch.zeros(SIZE)
        self.where = pathlib.Path("a")

    def __iter__(self) -> Iterator[int]:
        self.level += self.step
        for i in range(SIZE):
            index = (i * (1 + 2 * self.level) + len(self.seen) + int(self.counts[0])) % SIZE
            self.seen.add(index)
            self.counts += index
            self.weights[index] += 1
            yield index

    def __len__(self) -> int:
        return SIZE


class WithState(Growing):
    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level, "seen": self.seen, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.level, self.seen, self.counts = state["level"], state["seen"], state["counts"]


class Batches:
    """A batch sampler of the user's own around another sampler."""

    def __init__(self) -> None:
        self.sampler = Growing()
        self.epochs: list[int] = []

    def __iter__(self) -> Iterator[list[int]]:
        self.epochs.append(len(self.epochs))
        indices = list(self.sampler)
        shift = len(self.epochs) % 3
        yield from (
            indices[first : first + 3][shift:] + indices[first : first + 3][:shift] for first in range(0, SIZE, 3)
        )

    def __len__(self) -> int:
        return SIZE // 3


class Slots:
    """Keeps what changes in slots."""

    __slots__ = ("level", "weights")

    def __init__(self) -> None:
        self.level = 0
        self.weights = torch.zeros(SIZE)

    def __iter__(self) -> Iterator[int]:
        self.level += 1
        for i in range(SIZE):
            index = (i * (1 + 2 * self.level) + int(self.weights[0])) % SIZE
            self.weights[index] += 1
            yield index

    def __len__(self) -> int:
        return SIZE


class Drawing:
    """Draws from generators of its own, under names of its own."""

    def __init__(self, inner: Any = ()) -> None:
        self.inner = inner
        self.torch_draws = torch.Generator().manual_seed(0)
        self.numpy_draws = np.random.default_rng(0)
        self.python_draws = random.Random(0)

    def __iter__(self) -> Iterator[int]:
        for index in torch.randperm(SIZE, generator=self.torch_draws).tolist():
            yield (index + self.numpy_draws.integers(SIZE) + self.python_draws.randrange(SIZE) + sum(self.inner)) % SIZE

    def __len__(self) -> int:
        return SIZE


class Concatenated(Sampler[int]):
    """Half of what each of two samplers draws, and both draw from one generator."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts
        self.draws = random.Random(0)
        self.parts[0].draws = self.draws

    def __iter__(self) -> Iterator[int]:
        for pair in zip(*self.parts, strict=True):
            yield (pair[self.draws.randrange(2)] + self.parts[0].draws.randrange(SIZE)) % SIZE

    def __len__(self) -> int:
        return SIZE


def weighted() -> WeightedRandomSampler:
    return WeightedRandomSampler(torch.ones(SIZE), SIZE)


def reweight(trainer: Any) -> None:
    sampler = trainer.data_loader.sampler
    if isinstance(sampler, WeightedRandomSampler):  # in before_epoch, which is not repeated
        sampler.weights = torch.eye(SIZE)[trainer.epoch].double() + 0.01


SAMPLERS: dict[str, dict[str, Any]] = {
    "attributes": {"batch_size": 3, "sampler": Growing},
    "a state of its own": {"batch_size": 3, "sampler": WithState},
    "reweighted": {"batch_size": 3, "sampler": weighted},
    "a batch sampler": {"batch_sampler": Batches},
    "slots": {"batch_size": 3, "sampler": Slots},
    "own generators": {"batch_size": 3, "sampler": Drawing},
    "some in a list": {"batch_size": 3, "sampler": lambda: Concatenated([Growing(), Growing(2)])},
    "one inside another": {"batch_size": 3, "sampler": lambda: Drawing(Growing())},
    "a subclass of torch's": {"batch_sampler": lambda: type("Own", (BatchSampler,), {})(Growing(), 3, False)},
}


def build(folder: Path, settings: dict[str, Any], epochs: int, kind: type = DataLoader, **more: Any) -> Trainer:
    made = {name: value() if callable(value) else value for name, value in settings.items()}
    hooks = [On(before_epoch=reweight), CheckpointerHook(every_n_iters=1), *more.pop("hooks", [])]
    return make_trainer(
        folder,
        torch.nn.Linear(1, 1),
        data=kind(torch.arange(float(SIZE)).view(-1, 1), **made),
        max_epochs=epochs,
        hooks=hooks,
        step_fn=lambda model, batch: model(batch).mean() * 0,
        create_new_dir=None,
        seed=0,
        **more,
    )


def indices_of(trainer: Trainer) -> list[tuple[int, list[float]]]:
    """(epoch, samples) of each batch that is trained."""
    found: list[tuple[int, list[float]]] = []
    step = trainer.step_fn
    assert step is not None
    trainer.step_fn = lambda model, batch: (
        found.append((trainer.epoch, batch.flatten().tolist())),
        step(model, batch),
    )[1]
    try:
        trainer.train()
    except Stopped:
        pass
    return found


class Stopped(Exception):
    pass


def stop(trainer: Any) -> None:
    raise Stopped


@pytest.mark.parametrize("iter", [2, 4, 6, 9])
@pytest.mark.parametrize("kind", [DataLoader, InfiniteDataLoader])
@pytest.mark.parametrize("settings", SAMPLERS.values(), ids=SAMPLERS)
def test_a_resumed_run_draws_what_the_whole_one_does(settings: Any, kind: type, iter: int, tmp_path: Path) -> None:
    whole = indices_of(build(tmp_path / "whole", settings, EPOCHS, kind))
    first = indices_of(build(tmp_path / "run", settings, EPOCHS, kind, hooks=[On(before_iter=at_iter(iter, stop))]))
    second = indices_of(build(tmp_path / "run", settings, EPOCHS, kind, resume="auto"))
    assert len(first) == iter
    assert first + second == whole


@pytest.mark.parametrize("settings", SAMPLERS.values(), ids=SAMPLERS)
def test_so_it_is_after_an_epoch(settings: Any, tmp_path: Path) -> None:
    whole = indices_of(build(tmp_path / "whole", settings, EPOCHS))
    parts = [indices_of(build(tmp_path / "run", settings, epochs, resume="auto")) for epochs in (1, 2, EPOCHS)]
    assert [*itertools.chain(*parts)] == whole


def test_a_loader_that_is_left_alone_resumes_its_sampler_too(tmp_path: Path) -> None:
    settings = SAMPLERS["attributes"]
    whole = indices_of(build(tmp_path / "whole", settings, EPOCHS, take_over=False))
    stopping = [On(before_iter=at_iter(6, stop))]
    first = indices_of(build(tmp_path / "run", settings, EPOCHS, take_over=False, hooks=stopping))
    second = indices_of(build(tmp_path / "run", settings, EPOCHS, take_over=False, resume="auto"))
    assert first + second == whole


def saved(trainer: Trainer) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(f"{trainer.ckpt_dir}/latest.pth", weights_only=True)
    samplers: dict[str, Any] = state["data"].get("samplers", {})
    return samplers


def test_an_attribute_that_has_not_changed_is_the_scripts(tmp_path: Path) -> None:
    trainer = build(tmp_path / "run", {"batch_size": 3, "sampler": Growing}, 1)
    trainer.train()
    assert set(saved(trainer)["sampler"]["attributes"]) == {"level", "seen", "counts", "weights"}
    trainer = build(tmp_path / "run", {"batch_size": 3, "sampler": lambda: Growing(step=5)}, 2, resume="auto")
    trainer.train()
    sampler: Any = trainer.data_loader.sampler  # type: ignore[attr-defined]
    assert (sampler.step, sampler.level) == (5, 6)


TORCHS: dict[str, Callable[[], dict[str, Any]]] = {
    "shuffled": lambda: {"batch_size": 3, "shuffle": True},
    "in order": lambda: {"batch_size": 3},
    "a generator": lambda: {"batch_size": 3, "shuffle": True, "generator": torch.Generator()},
    "a batch sampler": lambda: {"batch_sampler": BatchSampler(SequentialSampler(range(SIZE)), 3, False)},
    "no batches": lambda: {"batch_size": None},
}


@pytest.mark.parametrize("settings", TORCHS.values(), ids=TORCHS)
def test_nothing_is_kept_of_torchs_own(settings: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    trainer = build(tmp_path / "run", settings(), 1)
    trainer.train()
    assert saved(trainer) == {}


def test_a_distributed_sampler_goes_by_its_epoch(tmp_path: Path) -> None:
    settings = {"batch_size": 3, "sampler": lambda: DistributedSampler(range(SIZE), 1, 0)}
    whole = indices_of(build(tmp_path / "whole", settings, EPOCHS))
    parts = [indices_of(build(tmp_path / "run", settings, epochs, resume="auto")) for epochs in (1, EPOCHS)]
    assert [*itertools.chain(*parts)] == whole


def test_the_dataset_inside_a_sampler_is_not_looked_at(tmp_path: Path) -> None:
    class Watched(list[Any]):
        looked = 0

        def __reduce_ex__(self, protocol: Any) -> Any:
            Watched.looked += 1
            return super().__reduce_ex__(protocol)

    class Over(Growing):
        def __init__(self, dataset: Any) -> None:
            super().__init__()
            self.dataset = dataset

    data = Watched([torch.tensor([float(index)]) for index in range(SIZE)])
    loader = DataLoader(data, 3, sampler=Over(data))
    step = lambda model, batch: model(batch).mean() * 0  # noqa: E731
    make_trainer(tmp_path, torch.nn.Linear(1, 1), data=loader, hooks=[CheckpointerHook()], step_fn=step).train()
    assert Watched.looked == 0


def test_a_sampler_that_is_gone_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build(tmp_path / "run", {"batch_size": 3, "sampler": Growing}, 1).train()
    build(tmp_path / "run", {"batch_size": 3}, 2, resume="auto").train()
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert any("the state of the loader's sampler, which this loader has not" in text for text in warned)

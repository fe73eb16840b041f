"""A taken-over loader is torch's own in everything but order and seeds: which samples come, and when a user's code is called.

Each case is iterated by a loop over torch's loader and by a Trainer; then the Trainer is stopped inside an epoch and resumed,
which is bitwise, or says in a sentence why not.
"""

from __future__ import annotations

import logging
import multiprocessing
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.data
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data.datapipes.iter import IterableWrapper

from tests.small_hooks import On
from tests.small_runs import seed_everything
from torch_frame import CheckpointError, InfiniteDataLoader, Trainer
from torch_frame.data.order import FromSampler
from torch_frame.data.source import source_of

EPOCHS = 3
Event = str


@dataclass
class Script:
    """What a user's script has: a loader, and what it does between epochs and in a step.

    Attributes:
        events: calls of the user's objects in this process, in their order.
        steps: the batches of each epoch.
    """

    loader: Any = None
    before_train: Callable[[int], None] = lambda epoch: None
    before_epoch: Callable[[int], None] = lambda epoch: None
    after_epoch: Callable[[int], None] = lambda epoch: None
    after_step: Callable[[float], None] = lambda loss: None
    events: list[Event] = field(default_factory=list)
    steps: list[list[list[float]]] = field(default_factory=list)

    def note(self, event: Event) -> None:
        self.events.append(event)

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        values = batch[0] if isinstance(batch, list | tuple) else batch
        values = values.reshape(-1, 1).float()
        self.steps[-1].append(values.flatten().tolist())
        self.note("step")
        loss = model(values).square().mean()
        self.after_step(float(loss.detach()))
        return loss


# ---------------------------------------------------------------- a user's objects


class Numbers(Dataset[Tensor]):
    """The numbers in a list; what is asked for is noted."""

    def __init__(self, script: Script, size: int = 11) -> None:
        self.script = script
        self.values = [float(i) for i in range(size)]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Tensor:
        self.script.note("get")
        return torch.tensor([self.values[index]])


class Noisy(Numbers):
    """Augmented by all three generators."""

    def __getitem__(self, index: int) -> Tensor:
        return super().__getitem__(index) + 0.01 * (torch.rand(1) + float(np.random.rand()) + random.random())


class AtOnce(Numbers):
    """Is asked for a batch, as datasets of Hugging Face are."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        self.script.note("get all")
        return [torch.tensor([self.values[index]]) for index in indices]


class Switched(Dataset[Tensor]):
    """Looks at a switch in shared memory, which the script turns between epochs."""

    def __init__(self) -> None:
        self.switch = multiprocessing.get_context("fork").Value("i", 0)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([100.0 * self.switch.value + index])


class Sampler:
    """Notes when it is begun, and each index that it is asked for."""

    def __init__(self, script: Script, indices: Callable[[], Iterator[Any]]) -> None:
        self.script = script
        self.indices = indices

    def __iter__(self) -> Iterator[Any]:
        self.script.note("begin")
        for index in self.indices():
            self.script.note("draw")
            yield index


class SamplerWithLen(Sampler):
    def __init__(self, script: Script, indices: Callable[[], Iterator[Any]], size: int) -> None:
        super().__init__(script, indices)
        self.size = size

    def __len__(self) -> int:
        return self.size


class Stream(IterableDataset[Tensor]):
    def __init__(self, script: Script, size: int = 11) -> None:
        self.script = script
        self.size = size

    def __iter__(self) -> Iterator[Tensor]:
        self.script.note("begin")
        for value in range(self.size):
            self.script.note("get")
            yield torch.tensor([float(value)])


class Pairs(Stream):
    def __iter__(self) -> Iterator[Any]:
        return ((value, 1) for value in super().__iter__())


class Generating:
    """A loader that is no DataLoader: its __iter__ is a generator function."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def __iter__(self) -> Iterator[Tensor]:
        self.script.note("begin")
        for value in range(4):
            self.script.note("yield")
            yield torch.full((3, 1), float(value))


def noted_collate(script: Script) -> Callable[[Any], Any]:
    def collate(samples: Any) -> Any:
        script.note("collate")
        return default_collate(samples)

    return collate


# ---------------------------------------------------------------- the table

Make = Callable[[Script], None]
CASES: dict[str, tuple[Make, str | None]] = {}
"""name -> (what makes the script's loader, what is said when it is resumed inside an epoch; None: it is bitwise)."""


def case(name: str, told: str | None = None) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        CASES[name] = make, told
        return make

    return add


def plain(dataset: Callable[[Script], Any] = Numbers, **settings: Any) -> Make:
    def make(script: Script) -> None:
        script.loader = DataLoader(dataset(script), collate_fn=noted_collate(script), **settings)

    return make


CASES |= {
    "in order": (plain(batch_size=3), None),
    "shuffled": (plain(batch_size=3, shuffle=True), None),
    "shuffled, the rest dropped": (plain(batch_size=3, shuffle=True, drop_last=True), None),
    "augmented": (plain(Noisy, batch_size=3, shuffle=True), None),
    "a batch at once": (plain(AtOnce, batch_size=3, shuffle=True), None),
    "two workers": (plain(batch_size=2, shuffle=True, num_workers=2), None),
    "persistent workers": (plain(batch_size=2, shuffle=True, num_workers=2, persistent_workers=True), None),
    "augmented in persistent workers": (
        plain(Noisy, batch_size=2, shuffle=True, num_workers=2, persistent_workers=True),
        None,
    ),
    "a stream": (plain(Stream, batch_size=3), None),
    "a stream with a worker": (plain(Stream, batch_size=3, num_workers=1), None),
}


@case("a TensorDataset")
def _(script: Script) -> None:
    script.loader = DataLoader(TensorDataset(torch.arange(11.0).reshape(11, 1), torch.arange(11)), 3, shuffle=True)


@case("with replacement")
def _(script: Script) -> None:
    dataset = Numbers(script)
    script.loader = DataLoader(dataset, 3, sampler=RandomSampler(dataset, replacement=True, num_samples=7))


@case("weighted")
def _(script: Script) -> None:
    script.loader = DataLoader(Numbers(script), 3, sampler=WeightedRandomSampler([0.0] * 6 + [1.0] * 5, 8))


@case("a random subset")
def _(script: Script) -> None:
    script.loader = DataLoader(Numbers(script), 2, sampler=SubsetRandomSampler([1, 3, 5, 7, 9]))


@case("a user's sampler")
def _(script: Script) -> None:
    script.loader = DataLoader(Numbers(script), 3, sampler=SamplerWithLen(script, lambda: iter(range(10)), 10))


@case("a user's sampler that draws as it goes")
def _(script: Script) -> None:
    def indices() -> Iterator[int]:
        left = list(range(10))
        while left:
            yield left.pop(random.randrange(len(left)))

    script.loader = DataLoader(Numbers(script), 3, sampler=SamplerWithLen(script, indices, 10))


@case("a sampler without a length")
def _(script: Script) -> None:
    script.loader = DataLoader(Numbers(script), 3, sampler=Sampler(script, lambda: iter(range(10))))


@case("a sampler under workers")
def _(script: Script) -> None:
    sampler = SamplerWithLen(script, lambda: iter(range(11)), 11)
    script.loader = DataLoader(Numbers(script), 2, sampler=sampler, num_workers=1, prefetch_factor=2)


@case("a sampler under persistent workers")
def _(script: Script) -> None:
    sampler = SamplerWithLen(script, lambda: iter(range(11)), 11)
    script.loader = DataLoader(
        Numbers(script), 2, sampler=sampler, num_workers=1, prefetch_factor=2, persistent_workers=True
    )


@case("a batch sampler")
def _(script: Script) -> None:
    batches = [[0, 1], [2], [3, 4, 5], [6, 7]]
    script.loader = DataLoader(Numbers(script), batch_sampler=SamplerWithLen(script, lambda: iter(batches), 4))


@case("a batch sampler without a length")
def _(script: Script) -> None:
    batches = [[0, 1], [2], [3, 4, 5], [6, 7]]
    script.loader = DataLoader(Numbers(script), batch_sampler=Sampler(script, lambda: iter(batches)))


@case("torch's batch sampler, given")
def _(script: Script) -> None:
    sampler = SamplerWithLen(script, lambda: iter(range(10)), 10)
    script.loader = DataLoader(Numbers(script), batch_sampler=BatchSampler(sampler, 3, drop_last=True))


@case("no batches of the loader's")
def _(script: Script) -> None:
    sampler = SamplerWithLen(script, lambda: iter([4, 2, 0, 1]), 4)
    script.loader = DataLoader(Numbers(script), batch_size=None, sampler=sampler)


@case("a sampler that counts its epochs", told="has drawn other indices")
def _(script: Script) -> None:
    epochs = iter(range(100))
    script.loader = DataLoader(
        Numbers(script), 2, sampler=Sampler(script, lambda: iter(range(next(epochs) % 2, 10, 2)))
    )


@case("a sampler that follows the losses", told="has drawn other indices")
def _(script: Script) -> None:
    seen: list[float] = []
    script.after_step = lambda loss: seen.append(loss)

    def indices() -> Iterator[int]:
        for _ in range(8):
            yield len(seen) % 11

    script.loader = DataLoader(Numbers(script), 2, sampler=SamplerWithLen(script, indices, 8))


@case("reweighted between epochs")
def _(script: Script) -> None:
    sampler = WeightedRandomSampler(torch.eye(11)[0].double(), 6)
    script.loader = DataLoader(Numbers(script), 2, sampler=sampler)

    def reweight(epoch: int) -> None:
        sampler.weights = torch.eye(11)[epoch + 1].double()

    script.after_epoch = reweight


@case("reweighted under persistent workers")
def _(script: Script) -> None:
    sampler = WeightedRandomSampler(torch.eye(11)[0].double(), 6)
    script.loader = DataLoader(Numbers(script), 2, sampler=sampler, num_workers=1, persistent_workers=True)

    def reweight(epoch: int) -> None:
        sampler.weights = torch.eye(11)[epoch + 1].double()

    script.after_epoch = reweight


@case("a dataset that grows", told="an epoch's data was 13 samples, now it is 11 samples")
def _(script: Script) -> None:
    dataset = Numbers(script)
    script.loader = DataLoader(dataset, 3, shuffle=True)
    script.after_epoch = lambda epoch: dataset.values.extend([100.0 + epoch, 200.0 + epoch])


@case("a dataset that shrinks", told="an epoch's data was 10 samples, now it is 11 samples")
def _(script: Script) -> None:
    dataset = Numbers(script)
    script.loader = DataLoader(dataset, 3, shuffle=True)
    script.after_epoch = lambda epoch: dataset.values.pop()  # type: ignore[assignment, return-value]


@case("a larger batch from the second epoch on", told="batch_size was 4, now it is 2")
def _(script: Script) -> None:
    script.loader = DataLoader(Numbers(script), 2, shuffle=True)

    def enlarge(epoch: int) -> None:
        script.loader.batch_sampler.batch_size = 2 if epoch == 0 else 4

    script.before_epoch = enlarge


@case("a switch in shared memory")
def _(script: Script) -> None:
    dataset = Switched()
    script.loader = DataLoader(dataset, 3, shuffle=True, num_workers=1, persistent_workers=True)

    def turn(epoch: int) -> None:
        dataset.switch.value = epoch

    script.before_epoch = script.before_train = turn  # what a script keeps outside of the run it puts back by itself


@case("another loader from the second epoch on", told="a loader that was set during the run")
def _(script: Script) -> None:
    script.loader = DataLoader(Numbers(script), 3, shuffle=True)

    def replace(epoch: int) -> None:
        if epoch == 0:
            script.loader = DataLoader(torch.full((8, 1), 50.0), 2)

    script.after_epoch = replace


@case("a data pipe with workers", told="batches are loaded again and skipped")
def _(script: Script) -> None:
    pipe = IterableWrapper(range(8)).sharding_filter().map(float)
    script.loader = DataLoader(pipe, batch_size=2, num_workers=2)


@case("a generator function", told="batches are loaded again and skipped")
def _(script: Script) -> None:
    script.loader = Generating(script)


@case("a list")
def _(script: Script) -> None:
    script.loader = [torch.full((2, 1), float(i)) for i in range(5)]


@case("accelerate's shard", told="batches are loaded again and skipped")
def _(script: Script) -> None:
    accelerate = pytest.importorskip("accelerate")
    script.loader = accelerate.Accelerator(cpu=True).prepare_data_loader(
        DataLoader(torch.arange(8.0), 2, shuffle=False)
    )


@case("webdataset's loader", told="batches are loaded again and skipped")
def _(script: Script) -> None:
    webdataset = pytest.importorskip("webdataset")
    script.loader = webdataset.WebLoader(Stream(script, 9), batch_size=3)


@case("webdataset's loader with stages", told="batches are loaded again and skipped")
def _(script: Script) -> None:
    webdataset = pytest.importorskip("webdataset")
    script.loader = webdataset.WebLoader(Pairs(script, 9), batch_size=3).unbatched().batched(2)


@case("a dataset of Hugging Face")
def _(script: Script) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"value": [[float(i)] for i in range(11)]}).with_format("torch")

    def collate(samples: Any) -> Any:
        return torch.stack([sample["value"] for sample in samples])

    script.loader = DataLoader(rows, 3, shuffle=True, collate_fn=collate)


@case("a stream of Hugging Face", told="batches are loaded again and skipped")
def _(script: Script) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"value": [[float(i)] for i in range(11)]})

    def collate(samples: Any) -> Any:
        return torch.tensor([sample["value"] for sample in samples])

    script.loader = DataLoader(rows.to_iterable_dataset(num_shards=2), 3, collate_fn=collate)


# ---------------------------------------------------------------- side by side

each_case = pytest.mark.parametrize("name", CASES)


def by_torch(name: str) -> Script:
    script = Script()
    CASES[name][0](script)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    for epoch in range(EPOCHS):
        script.steps.append([])
        script.before_epoch(epoch)
        script.note("epoch")
        for batch in script.loader:
            optimizer.zero_grad()
            script.step(model, batch).backward()
            optimizer.step()
        script.after_epoch(epoch)
    return script


def trainer_of(name: str, work_dir: Path, *, stop_at: int | None = None, **settings: Any) -> tuple[Script, Trainer]:
    script = Script()
    CASES[name][0](script)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Linear(1, 1)

    def begin(trainer: Trainer) -> None:
        script.before_epoch(trainer.epoch)
        script.note("epoch")

    def end(trainer: Trainer) -> None:
        before = script.loader
        script.after_epoch(trainer.epoch)
        if script.loader is not before:
            trainer.data_loader = script.loader

    def stop(trainer: Trainer) -> None:
        if trainer.cur_iter == stop_at:
            trainer.save_checkpoint("latest.pth", save_single_model=False)
            raise ZeroDivisionError

    before_train = lambda trainer: script.before_train(trainer.progress.epoch)  # noqa: E731
    hook = On(before_train=before_train, before_epoch=begin, after_epoch=end, after_iter=stop)
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.001),
        None,
        script.loader,
        EPOCHS,
        work_dir,
        hooks=[hook],
        step_fn=lambda model, batch: script.step(model, batch),
        create_new_dir=None,
        seed=5,
        **settings,
    )
    trainer.register_hooks([On(before_iter=lambda trainer: _open_epoch(script, trainer.epoch))])
    return script, trainer


def _open_epoch(script: Script, epoch: int) -> None:
    while len(script.steps) <= epoch:
        script.steps.append([])


def by_trainer(name: str, work_dir: Path, **settings: Any) -> tuple[Script, Trainer]:
    script, trainer = trainer_of(name, work_dir, **settings)
    trainer.train(5, 5)
    return script, trainer


def rounded(script: Script) -> list[Counter[float]]:
    """The samples of each epoch, without their augmentation."""
    return [Counter(round(value) for batch in epoch for value in batch) for epoch in script.steps]


RANDOM_CHOICE = ("with replacement", "weighted", "shuffled, the rest dropped")


@each_case
def test_the_samples_of_each_epoch_are_those_that_torch_gives(name: str, tmp_path: Path) -> None:
    seed_everything(1)
    torchs, (ours, _) = by_torch(name), by_trainer(name, tmp_path)
    assert [[len(batch) for batch in epoch] for epoch in ours.steps] == [
        [len(batch) for batch in epoch] for epoch in torchs.steps
    ]
    if name in RANDOM_CHOICE:
        assert all(set(epoch) <= set(range(11)) for epoch in rounded(ours))
        assert name != "weighted" or all(min(epoch) >= 6 for epoch in rounded(ours))
    else:
        assert rounded(ours) == rounded(torchs)


@each_case
def test_a_users_objects_are_called_when_torch_calls_them(name: str, tmp_path: Path) -> None:
    """In this process; what is called in workers is seen by the samples."""
    torchs, (ours, _) = by_torch(name), by_trainer(name, tmp_path)
    assert ours.events == torchs.events


@pytest.mark.parametrize("name", ["in order", "shuffled", "a stream", "a list", "a generator function", "augmented"])
def test_without_prefetching_nothing_differs(name: str, tmp_path: Path) -> None:
    expected, _ = by_trainer(name, tmp_path / "a")
    ours, _ = by_trainer(name, tmp_path / "b", prefetch=False)
    assert (ours.events, ours.steps) == (expected.events, expected.steps)


def test_without_prefetching_workers_are_refused(tmp_path: Path) -> None:
    _, trainer = trainer_of("two workers", tmp_path, prefetch=False)
    with pytest.raises(ValueError, match="prefetch=False, but data_loader has 2 workers"):
        trainer.train(5, 5)


# ---------------------------------------------------------------- resumed


@each_case
@pytest.mark.parametrize("batch", [0, 1], ids=["after one batch", "after two"])
def test_a_run_resumed_inside_an_epoch_is_bitwise_or_says_why_not(
    name: str, batch: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = CASES[name][1]
    whole, reference = by_trainer(name, tmp_path / "whole")
    stop_at = len(whole.steps[0]) + batch
    _, stopped = trainer_of(name, tmp_path / "parts", stop_at=stop_at)
    with pytest.raises(ZeroDivisionError):
        stopped.train(5, 5)
    refused: list[str] = []
    with caplog.at_level(logging.WARNING, "torch_frame"):
        try:
            rest, resumed = by_trainer(name, tmp_path / "parts", resume="auto")
        except CheckpointError as error:
            refused.append(str(error))
    if refused:
        assert told is not None
        assert told in refused[0]
        return
    if told is not None:
        assert told in caplog.text
    else:
        assert "drawn other" not in caplog.text
        assert "again" not in caplog.text or "stream" in name
        assert rest.steps[1:] == [whole.steps[1][batch + 1 :], *whole.steps[2:]]
        weights = [trainer.model.state_dict() for trainer in (resumed, reference)]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_loader_that_was_set_is_resumed_if_it_is_set_in_before_train(tmp_path: Path) -> None:
    name = "another loader from the second epoch on"
    whole, _ = by_trainer(name, tmp_path / "whole")
    _, stopped = trainer_of(name, tmp_path / "parts", stop_at=len(whole.steps[0]) + 1)
    with pytest.raises(ZeroDivisionError):
        stopped.train(5, 5)
    script, resumed = trainer_of(name, tmp_path / "parts", resume="auto")

    def set_it(trainer: Trainer) -> None:
        trainer.data_loader = DataLoader(torch.full((8, 1), 50.0), 2)

    resumed.register_hooks([On(before_train=set_it)])
    resumed.train(5, 5)
    assert script.steps[1:] == [whole.steps[1][2:], whole.steps[2]]


def test_an_iterator_begins_anew_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def run(stop: bool, resume: str | None = None) -> list[float]:
        seen: list[float] = []
        model = nn.Linear(1, 1)

        def after_iter(trainer: Trainer) -> None:
            if stop and trainer.cur_iter == 1:
                trainer.save_checkpoint("latest.pth", save_single_model=False)
                raise ZeroDivisionError

        def step(model: nn.Module, batch: Tensor) -> Tensor:
            seen.append(float(batch[0, 0]))
            return model(batch).square().mean()

        batches = (torch.full((2, 1), float(i)) for i in range(4))
        settings: dict[str, Any] = {"hooks": [On(after_iter=after_iter)], "step_fn": step, "resume": resume}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        try:
            Trainer(model, optimizer, None, batches, 1, tmp_path / "run", create_new_dir=None, **settings).train(5, 5)
        except ZeroDivisionError:
            pass
        return seen

    assert run(stop=True) == [0, 1]
    with caplog.at_level(logging.WARNING, "torch_frame"):
        assert run(stop=False, resume="auto") == [0, 1, 2, 3]
    assert "cannot be put back" in caplog.text


# ---------------------------------------------------------------- what a hunt has found


class Seeds(Dataset[Tensor]):
    """Draws from a generator that a worker_init_fn has made of its seed, as torch's documentation has it."""

    def __init__(self) -> None:
        self.own = 0

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(self.own)])


def own_of_worker(worker_id: int) -> None:
    info = torch.utils.data.get_worker_info()
    assert info is not None
    info.dataset.own = info.seed % 1000 + int(np.random.randint(1000))  # type: ignore[attr-defined]


def epochs_of(loader: Any, num: int = 3) -> list[list[float]]:
    source = source_of(loader, seed=5)
    return [[float(value) for batch, _ in source.epoch(epoch) for value in batch.flatten()] for epoch in range(num)]


def test_workers_have_other_seeds_in_each_epoch_and_each_its_own() -> None:
    loader = DataLoader(Seeds(), 1, num_workers=2, worker_init_fn=own_of_worker)
    values = epochs_of(loader)
    assert len({value for epoch in values for value in epoch}) == 6
    assert epochs_of(loader) == values


class SetEpochDraws(Numbers):
    def set_epoch(self, epoch: int) -> None:
        self.values = [random.random() + float(np.random.rand()) + float(torch.rand(()))] * 4


def test_set_epoch_may_draw_and_leaves_the_trainings_numbers_alone() -> None:
    seed_everything(3)
    expected = (random.Random(3).random(), np.random.RandomState(3).rand())
    values = epochs_of(DataLoader(SetEpochDraws(Script(), 4), 2))
    assert (random.random(), np.random.rand()) == expected
    assert len({value for epoch in values for value in epoch}) == 3
    assert values == epochs_of(DataLoader(SetEpochDraws(Script(), 4), 2, num_workers=1))


class StopsEarly(Numbers):
    def __getitem__(self, index: int) -> Tensor:
        if index == 4:
            raise StopIteration
        return super().__getitem__(index)


def test_a_stop_iteration_in_a_dataset_does_not_make_a_short_batch() -> None:
    source = source_of(DataLoader(StopsEarly(Script()), 3), seed=0)
    with pytest.raises(RuntimeError, match="StopIteration, which would have ended the epoch"):
        list(source.epoch(0))


class ReadsOnly(Dataset[Tensor]):
    """Reads generators without moving them."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            drawn = torch.rand(())
        state = np.random.get_state()
        value = np.random.rand()
        np.random.set_state(state)
        return torch.tensor([float(drawn), float(value), float(torch.initial_seed() % 1000)])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_who_reads_a_generator_without_moving_it_has_numbers_of_each_batch(num_workers: int) -> None:
    def loader() -> Any:
        return DataLoader(ReadsOnly(), 2, num_workers=num_workers)

    values = epochs_of(loader())
    assert values == epochs_of(loader())
    assert len({value for epoch in values for value in epoch[::3]}) >= 12, "4 batches in each of 3 epochs"


@pytest.mark.parametrize("stop_at", [3, 7])
def test_no_false_warning_after_a_save_on_an_epochs_last_batch(
    stop_at: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "a user's sampler"
    whole, _ = by_trainer(name, tmp_path / "whole")
    _, stopped = trainer_of(name, tmp_path / "parts", stop_at=stop_at)
    with pytest.raises(ZeroDivisionError):
        stopped.train(5, 5)
    with caplog.at_level(logging.WARNING, "torch_frame"):
        rest, _ = by_trainer(name, tmp_path / "parts", resume="auto")
    assert "drawn other" not in caplog.text
    assert [epoch for epoch in rest.steps if epoch] == whole.steps[(stop_at + 1) // 4 :]


def test_the_hash_belongs_to_the_position_and_not_to_what_was_fetched_ahead() -> None:
    """As on CUDA, where the next batch is fetched before this one is trained."""

    def loader() -> Any:
        return DataLoader(torch.arange(8.0), 2, sampler=SamplerWithLen(Script(), lambda: iter(range(8)), 8))

    source, plain = source_of(loader(), seed=0), source_of(loader(), seed=0)
    ahead, batches = source.epoch(0), plain.epoch(0)
    next(ahead), next(ahead), next(batches)
    assert source.state_dict(2) == plain.state_dict(2)
    assert "order_hash" in source.state_dict(2)


@pytest.mark.parametrize(("first", "second"), [({"shuffle": True}, {}), ({}, {"shuffle": True})])
def test_another_kind_of_order_is_told(
    first: Any, second: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = source_of(DataLoader(torch.arange(8.0), 2, **first), seed=0)
    batches = source.epoch(0)
    next(batches)
    other = source_of(DataLoader(torch.arange(8.0), 2, **second), seed=0)
    with caplog.at_level(logging.WARNING, "torch_frame"):
        other.load_state_dict(source.state_dict(2), 2)
    assert "drawn other indices" in caplog.text


def test_indices_of_any_kind_have_a_hash_of_what_they_hold() -> None:
    class Key:
        def __init__(self, name: str) -> None:
            self.name = name

    def value(indices: list[Any]) -> int:
        return next(iter(FromSampler(indices, seed=0).chunks(0, 0, 99)))[1][1]

    assert value([Key("a")]) == value([Key("a")])
    assert value([torch.arange(2000)]) != value([torch.arange(2000).flip(0)])
    assert value([np.arange(2000)]) != value([np.arange(2000)[::-1]])
    assert value(list(torch.arange(3))) == value([0, 1, 2])


def test_labels_that_are_set_during_an_epoch_count_at_once() -> None:
    dataset = TensorDataset(torch.zeros(8, 1))
    source = source_of(DataLoader(dataset, 2), seed=0)
    batches = source.epoch(0)
    assert next(batches)[0][0].sum() == 0
    dataset.tensors = (torch.ones(8, 1),)
    assert next(batches)[0][0].sum() == 2


def test_an_infinite_loader_begins_a_sampler_once_an_epoch_and_is_read_anew() -> None:
    script = Script()
    dataset = Numbers(script, 6)
    size = [6]
    sampler = Sampler(script, lambda: iter(range(size[0])))
    loader = InfiniteDataLoader(dataset, 2, sampler=sampler)
    assert [len(list(loader)) for _ in range(2)] == [3, 3]
    assert script.events.count("begin") <= 3, "of the epoch that is fetched next, too"
    size[0] = 4
    list(loader)
    assert len(list(loader)) == 2


def test_max_epochs_may_be_raised_in_a_hook_over_an_infinite_loader(tmp_path: Path) -> None:
    def raise_it(trainer: Trainer) -> None:
        trainer.max_epochs = 4

    model = nn.Linear(1, 1)
    loader = InfiniteDataLoader(torch.arange(8.0).reshape(8, 1), 2)
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01),
        None,
        loader,
        2,
        tmp_path,
        hooks=[On(after_epoch=raise_it)],
        step_fn=lambda model, batch: model(batch).square().mean(),
    )
    trainer.train(5, 5)
    assert trainer.progress.iter == 16


def test_a_loader_that_is_set_inside_an_epoch_leaves_its_windows_alone(tmp_path: Path) -> None:
    updates: list[int] = []
    model = nn.Linear(1, 1)

    def replace(trainer: Trainer) -> None:
        if trainer.cur_iter == 0:
            trainer.data_loader = DataLoader(torch.zeros(4, 1), 4)

    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01),
        None,
        DataLoader(torch.arange(10.0).reshape(10, 1), 2),
        1,
        tmp_path,
        hooks=[On(after_iter=replace, after_update=lambda trainer: updates.append(trainer.cur_iter))],
        step_fn=lambda model, batch: model(batch).square().mean(),
        gradient_accumulation_steps=2,
    )
    trainer.train(5, 5)
    assert updates == [1, 3, 4]


@pytest.mark.parametrize(
    "other", [None, 5, DataLoader(torch.zeros(4, 1), num_workers=1)], ids=["none", "number", "workers"]
)
def test_a_loader_that_is_set_is_checked(other: Any, tmp_path: Path) -> None:
    model = nn.Linear(1, 1)

    def replace(trainer: Trainer) -> None:
        trainer.data_loader = other

    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01),
        None,
        DataLoader(torch.zeros(4, 1), 2),
        2,
        tmp_path,
        hooks=[On(after_epoch=replace)],
        step_fn=lambda model, batch: model(batch).square().mean(),
        prefetch=False,
    )
    with pytest.raises((TypeError, ValueError), match=r"data_loader (is|has)|but data_loader has"):
        trainer.train(5, 5)

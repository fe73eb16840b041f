"""The Trainer's data: taken over, the same for every number of workers, and resumed inside an epoch bitwise."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
)

from tests.small_data import KINDS, descendants, make_loader, processes_gone
from tests.small_hooks import On, Recorder, at_iter
from tests.small_runs import (
    Net,
    copied,
    differences,
    make_batches,
    make_trainer,
    seed_everything,
    train_by_hand,
    weights_of,
)
from torch_frame import CheckpointerHook, CheckpointError, HookBase, InfiniteDataLoader, Trainer
from torch_frame.data.source import source_of

SIZE, EPOCHS, BATCHES = 18, 3, 5


class Samples(Dataset[Any]):
    """18 samples, augmented by all three generators; counts what this process loads."""

    def __init__(self) -> None:
        batches = make_batches(1, SIZE)
        self.x, self.y = batches[0]
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.loaded.append(index)
        return self.x[index] + torch.randn(3) + float(np.random.randn()) + random.random(), self.y[index]


class Stream(IterableDataset[Any]):
    """The same samples as a stream; no length."""

    def __iter__(self) -> Iterator[Any]:
        samples = Samples()
        return (samples[index] for index in range(SIZE))


class SaveEverywhere(HookBase):
    """A whole state after each iteration at which a window is complete, each under a name of its own."""

    def after_iter(self) -> None:
        if not self.trainer.updater.window_open:
            self.trainer.save_checkpoint(f"after_{self.trainer.progress.iter}.pth", False)


class SaveLatest(HookBase):
    """`latest.pth` after one iteration, then the run is killed."""

    def __init__(self, iters: int) -> None:
        self.iters = iters

    def after_iter(self) -> None:
        if self.trainer.progress.iter == self.iters:
            self.trainer.save_checkpoint("latest.pth", False)
            raise KeyboardInterrupt


def noisy(samples: Any) -> Any:
    x, y = zip(*samples, strict=True)
    return torch.stack(x) + torch.randn(1, 3), torch.stack(y)


def loader_of(kind: str, num_workers: int = 0, **kwargs: Any) -> Any:
    return make_loader(kind, Samples(), num_workers, **{"batch_size": 4, "shuffle": True, **kwargs})


def trainer_of(folder: Path, data: Any, **kwargs: Any) -> Trainer:
    """A run in which everything that can go wrong in a resume is on."""
    model = Net(dropout=True, norm=True)
    optimizer = AdamW(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    settings = {"use_ema": True, "ema_decay": 0.9, "lr_scheduler_interval": "iter", "clip_grad_norm": 1.0}
    return make_trainer(folder, model, optimizer, schedule, data, EPOCHS, **{**settings, **kwargs})


def end_of(trainer: Trainer) -> dict[str, Any]:
    """What has to be equal at the end, random numbers included."""
    trainer.train()
    assert trainer.model_ema is not None
    return {
        "model": weights_of(trainer.model),
        "ema": weights_of(trainer.model_ema.model),
        "optimizer": copied(trainer.optimizer.state_dict()),
        "progress": trainer.progress.state_dict(),
        "torch": torch.get_rng_state(),
        "numpy": float(np.random.rand()),
        "python": random.random(),
    }


# ---------------------------------------------------------------- taken over


@pytest.mark.parametrize(("kind", "num_workers"), [("plain", 0), ("plain", 2), ("persistent", 2), ("infinite", 2)])
def test_training_equals_a_hand_written_loop_fed_the_same_batches(tmp_path: Path, kind: str, num_workers: int) -> None:
    source = source_of(loader_of("plain"), seed=7)
    epochs = [[batch for batch, _ in source.epoch(epoch)] for epoch in range(EPOCHS)]
    by_hand = Net(norm=True)
    optimizer = SGD(by_hand.parameters(), lr=0.05)
    for batches in epochs:
        train_by_hand(by_hand, optimizer, batches, 1)
    model = Net(norm=True)
    make_trainer(tmp_path, model, data=loader_of(kind, num_workers), max_epochs=EPOCHS, seed=7).train()
    assert not differences(weights_of(model), weights_of(by_hand))


def test_the_run_does_not_depend_on_workers_nor_on_their_kind(tmp_path: Path) -> None:
    ends = []
    for kind, num_workers in product(KINDS, (0, 2)):
        seed_everything(1)
        ends.append(end_of(trainer_of(tmp_path, loader_of(kind, num_workers), seed=7)))
    for end in ends[1:]:
        assert not differences(end, ends[0])


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


@pytest.mark.parametrize("kind", ["plain", "infinite"])
def test_one_line_says_that_a_loader_is_taken_over(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "torch_frame"):
        make_trainer(tmp_path, data=loader_of(kind), seed=41).train()
    lines = [line for line in messages(caplog, logging.INFO) if "order and augmentation" in line]
    assert len(lines) == 1
    assert "seed 41" in lines[0]


def test_the_line_names_the_seed_that_an_infinite_loader_was_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "torch_frame"):
        make_trainer(tmp_path, data=loader_of("infinite", seed=99), seed=41).train()
    lines = [line for line in messages(caplog, logging.INFO) if "order and augmentation" in line]
    assert len(lines) == 1
    assert "seed 99" in lines[0]


@pytest.mark.parametrize("data", ["list", "take_over=False"])
def test_no_line_says_so_where_nothing_is_taken_over(
    tmp_path: Path, data: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "torch_frame"):
        loader = make_batches() if data == "list" else loader_of("plain")
        make_trainer(tmp_path, data=loader, take_over=data == "list").train()
    assert not [line for line in messages(caplog, logging.INFO) if "order and augmentation" in line]


def test_take_over_false_trains_as_a_hand_written_loop_over_the_loader_does(tmp_path: Path) -> None:
    seed_everything(3)
    by_hand = Net(dropout=True)
    train_by_hand(by_hand, SGD(by_hand.parameters(), lr=0.05), loader_of("plain"), 2)
    seed_everything(3)
    model = Net(dropout=True)
    make_trainer(tmp_path, model, data=loader_of("plain"), take_over=False).train()
    assert not differences(weights_of(model), weights_of(by_hand))


# ---------------------------------------------------------------- the seed


def test_no_seed_is_torchs_initial_one_and_draws_no_random_number(tmp_path: Path) -> None:
    torch.manual_seed(77)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    trainer = make_trainer(tmp_path, data=loader_of("plain"))
    assert trainer.seed == 77
    trainer.train()
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    assert not differences(list(before), list(after))


def in_batch_sampler(dataset: Any, generator: torch.Generator) -> DataLoader[Any]:
    sampler = BatchSampler(RandomSampler(dataset), 4, drop_last=False)
    sampler.generator = generator  # type: ignore[attr-defined]
    return DataLoader(dataset, batch_sampler=sampler)


WITH_GENERATOR: dict[str, Any] = {
    "loader": lambda dataset, own: DataLoader(dataset, 4, shuffle=True, generator=own),
    "sampler": lambda dataset, own: DataLoader(dataset, 4, sampler=RandomSampler(dataset, generator=own)),
    "batch_sampler": in_batch_sampler,
    "sampler in the batch sampler": lambda dataset, own: DataLoader(
        dataset, batch_sampler=BatchSampler(RandomSampler(dataset, generator=own), 4, drop_last=False)
    ),
}


@pytest.mark.parametrize("place", WITH_GENERATOR)
def test_without_a_seed_the_loaders_own_generator_gives_it(place: str, tmp_path: Path) -> None:
    dataset = loader_of("plain").dataset
    orders = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(orders))
        dataset.loaded.clear()
        loader = WITH_GENERATOR[place](dataset, torch.Generator().manual_seed(seed))
        make_trainer(tmp_path, data=loader, max_epochs=1).train()
        orders.append(list(dataset.loaded))
    assert orders[0] == orders[1] != orders[2]


def test_another_seed_is_another_order(tmp_path: Path) -> None:
    orders = []
    for seed in (0, 0, 1):
        loader = loader_of("plain")
        make_trainer(tmp_path, data=loader, max_epochs=1, seed=seed).train()
        orders.append(loader.dataset.loaded)
    assert orders[0] == orders[1] != orders[2]


def test_the_seed_is_the_checkpoints_in_a_resumed_run(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, loader_of("plain"), seed=7, hooks=[SaveLatest(7)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = trainer_of(tmp_path, loader_of("plain"))
    resumed.load_checkpoint(f"{trainer.ckpt_dir}/latest.pth")
    resumed.train()
    whole = trainer_of(tmp_path, loader_of("plain"), seed=7)
    whole.train()
    assert resumed.seed == 7
    loaded = [trainer.data_loader.dataset.loaded for trainer in (resumed, whole)]  # type: ignore[attr-defined]
    assert loaded[0] == loaded[1][SIZE + 2 * 4 :]


def test_another_seed_than_the_checkpoints_is_an_error(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, loader_of("plain"), seed=7, hooks=[SaveLatest(7)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = trainer_of(tmp_path, loader_of("plain"), seed=8)
    with pytest.raises(CheckpointError, match="seed was 7, now it is 8"):
        resumed.load_checkpoint(f"{trainer.ckpt_dir}/latest.pth")


# ---------------------------------------------------------------- resumed inside an epoch

LOADERS: dict[str, Any] = {
    "plain": lambda workers: loader_of("plain", workers, collate_fn=noisy),
    "persistent": lambda workers: loader_of("persistent", workers, collate_fn=noisy),
    "infinite": lambda workers: loader_of("infinite", workers, collate_fn=noisy),
    "weighted": lambda workers: loader_of(
        "plain", workers, shuffle=None, sampler=WeightedRandomSampler([1.0, 2.0, 9.0] * 6, SIZE)
    ),
    "own generator": lambda workers: loader_of(
        "infinite", workers, shuffle=None, sampler=RandomSampler(range(SIZE), True, generator=torch.Generator())
    ),
    "stream": lambda workers: make_loader("plain", Stream(), workers, batch_size=4),
    "stream, collate_fn": lambda workers: make_loader("plain", Stream(), workers, batch_size=4, collate_fn=noisy),
}


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize(
    ("kind", "num_workers"),
    [
        *(("plain", 0), ("plain", 2), ("persistent", 2), ("infinite", 0), ("infinite", 2)),
        *(("weighted", 0), ("own generator", 0), ("stream", 0), ("stream, collate_fn", 0)),
    ],
)
def test_a_state_saved_inside_an_epoch_resumes_bitwise(
    tmp_path: Path, kind: str, num_workers: int, window: int
) -> None:
    def build(hooks: list[HookBase]) -> Trainer:
        data = LOADERS[kind](num_workers)
        return trainer_of(tmp_path, data, seed=7, gradient_accumulation_steps=window, hooks=hooks)

    before = descendants()
    seed_everything(1)
    undisturbed = end_of(build([]))
    seed_everything(1)
    saving = build([SaveEverywhere()])
    expected = end_of(saving)
    assert not differences(expected, undisturbed)
    borders = sorted(int(path.stem.removeprefix("after_")) for path in Path(saving.ckpt_dir).iterdir())
    windows = (
        BATCHES // window if kind.startswith("stream") else -(-BATCHES // window)
    )  # without len: not known as the last
    assert len(borders) == EPOCHS * windows
    for iters in borders if num_workers == 0 else borders[:: 4 // window]:
        seed_everything(iters + 50)
        resumed = build([])
        resumed.load_checkpoint(f"{saving.ckpt_dir}/after_{iters}.pth")
        assert not differences(end_of(resumed), expected, f"after {iters}")
    assert processes_gone(before)


@pytest.mark.parametrize(("kind", "workers_then"), [("plain", 2), ("infinite", 0), ("infinite", 2)])
def test_a_run_goes_on_with_another_number_of_workers(tmp_path: Path, kind: str, workers_then: int) -> None:
    seed_everything(1)
    expected = end_of(trainer_of(tmp_path, LOADERS["plain"](0), seed=7))
    seed_everything(1)
    first = trainer_of(tmp_path, LOADERS["plain"](0), seed=7, hooks=[SaveLatest(8)])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    resumed = trainer_of(tmp_path, LOADERS[kind](workers_then))
    resumed.load_checkpoint(f"{first.ckpt_dir}/latest.pth")
    assert not differences(end_of(resumed), expected)


@pytest.mark.parametrize("kind", ["plain", "infinite"])
@pytest.mark.parametrize("iters", [1, 3, 4, 5, 6, 14, 15])
def test_nothing_that_was_consumed_is_loaded_again(tmp_path: Path, kind: str, iters: int) -> None:
    whole = trainer_of(tmp_path, loader_of(kind), seed=7)
    whole.train()
    first = trainer_of(tmp_path, loader_of(kind), seed=7, hooks=[SaveLatest(iters)])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    resumed = trainer_of(tmp_path, loader_of(kind), seed=7)
    resumed.load_checkpoint(f"{first.ckpt_dir}/latest.pth")
    resumed.train()
    loaded = [trainer.data_loader.dataset.loaded for trainer in (first, resumed, whole)]  # type: ignore[attr-defined]
    assert loaded[0] + loaded[1] == loaded[2]
    assert len(loaded[2]) == EPOCHS * SIZE


def test_a_stream_resumed_with_batches_of_another_size_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Batches are skipped, so that samples are lost, or trained on twice."""
    first = trainer_of(tmp_path, make_loader("plain", Stream(), batch_size=4), seed=7, hooks=[SaveLatest(2)])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    for size, told in ((4, False), (2, True)):
        caplog.clear()
        resumed = trainer_of(tmp_path, make_loader("plain", Stream(), batch_size=size), seed=7, max_iters=3)
        resumed.load_checkpoint(f"{first.ckpt_dir}/latest.pth")
        resumed.train()
        assert (
            "is resumed with batches of 2, and began with batches of 4: 2 of today's are skipped" in caplog.text
        ) is told


def test_a_position_counts_samples_of_the_global_order(tmp_path: Path) -> None:
    hook = Recorder(lambda trainer: trainer.progress.position)
    make_trainer(tmp_path, data=loader_of("infinite", 2), hooks=[hook]).train()
    assert hook.values == [4, 8, 12, 16, 18] * 2


def test_a_foreign_iterable_is_replayed_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Foreign:
        def __iter__(self) -> Iterator[Any]:
            return iter(make_batches(5))

    def build(hooks: list[HookBase]) -> Trainer:
        return trainer_of(tmp_path, Foreign(), hooks=hooks)

    seed_everything(1)
    expected = end_of(build([]))
    seed_everything(1)
    first = build([SaveLatest(8)])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    resumed = build([])
    resumed.load_checkpoint(f"{first.ckpt_dir}/latest.pth")
    with caplog.at_level(logging.WARNING, "torch_frame"):
        assert not differences(end_of(resumed), expected)
    assert len([line for line in messages(caplog, logging.WARNING) if "3 batches are loaded again" in line]) == 1


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("iters", [3, 5, 8])
def test_a_stateful_data_loader_resumes_inside_an_epoch(tmp_path: Path, num_workers: int, iters: int) -> None:
    """Without random augmentation, of which its state knows nothing, but with dropout."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    x, y = make_batches(1, SIZE)[0]
    dataset = list(zip(x, y, strict=True))

    def build(hooks: list[HookBase]) -> Trainer:
        data = stateful(dataset, batch_size=4, shuffle=True, num_workers=num_workers)
        return trainer_of(tmp_path, data, hooks=hooks)

    seed_everything(1)
    expected = end_of(build([]))
    seed_everything(1)
    first = build([SaveLatest(iters)])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    seed_everything(2)
    resumed = build([])
    resumed.load_checkpoint(f"{first.ckpt_dir}/latest.pth")
    assert not differences(end_of(resumed), expected)


class Growing(Sampler[int]):
    """4 samples in the first epoch, 8 in the second, and so on; of batches: so many of them."""

    def __init__(self, *, in_batches: bool) -> None:
        self.in_batches = in_batches
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 4 * (self.epoch + 1)

    def __iter__(self) -> Iterator[Any]:
        indices = torch.randint(SIZE, (len(self), 2)).tolist()
        return iter(indices if self.in_batches else [first for first, _ in indices])


@pytest.mark.parametrize("in_batches", [False, True])
@pytest.mark.parametrize("at", [5, 7])
def test_a_sampler_whose_length_is_of_the_epoch_can_be_resumed(
    in_batches: bool, at: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Batch samplers that fill batches by length have another number of them in each epoch."""

    def build(hooks: list[HookBase]) -> Trainer:
        sampler = Growing(in_batches=in_batches)
        which = {"batch_sampler": sampler} if in_batches else {"sampler": sampler, "batch_size": 2}
        return trainer_of(tmp_path, DataLoader(Samples(), **which), seed=7, hooks=hooks)

    seed_everything(1)
    expected = end_of(build([]))
    seed_everything(1)
    first = build([SaveLatest(at)])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    resumed = build([])
    resumed.load_checkpoint(f"{first.ckpt_dir}/latest.pth")
    assert not differences(end_of(resumed), expected)
    assert "By the sampler, an epoch's data was" in caplog.text


@pytest.mark.parametrize("kind", [RandomSampler, WeightedRandomSampler, DistributedSampler])
def test_another_length_of_torchs_own_samplers_is_refused(kind: Any, tmp_path: Path) -> None:
    make: dict[Any, Any] = {
        RandomSampler: lambda size: RandomSampler(range(SIZE), replacement=True, num_samples=size),
        WeightedRandomSampler: lambda size: WeightedRandomSampler([1.0] * SIZE, size),
        DistributedSampler: lambda size: DistributedSampler(range(size), 1, 0),  # type: ignore[arg-type]
    }
    first = trainer_of(tmp_path, DataLoader(Samples(), 4, sampler=make[kind](12)), seed=7, hooks=[SaveLatest(2)])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    resumed = trainer_of(tmp_path, DataLoader(Samples(), 4, sampler=make[kind](16)), seed=7)
    with pytest.raises(CheckpointError, match="an epoch's data was 12 samples, now it is 16 samples"):
        resumed.load_checkpoint(f"{first.ckpt_dir}/latest.pth")


def stateful_trainer(folder: Path, kind: str, seen: list[Any], **settings: Any) -> Trainer:
    """16 samples in batches of 2, of a map or a stream; `seen` gets those that are trained on."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    samples = [(torch.full((3,), float(index)), torch.zeros(1)) for index in range(16)]
    data = Repeated(samples) if kind == "stream" else samples
    seed_everything(1)
    loader = stateful(data, batch_size=2, shuffle=None if kind == "stream" else True)

    def step(model: Any, batch: Any) -> Any:
        seen.extend(batch[0][:, 0].int().tolist())
        return model(batch)

    trainer = make_trainer(folder, data=loader, max_epochs=3, step_fn=step, create_new_dir=None, **settings)
    trainer.optimizer.param_groups[0]["lr"] = 1e-4
    return trainer


class Repeated(IterableDataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("at", [3, 6, 8])
def test_a_stateful_loader_goes_on_where_the_run_was_cut(
    kind: str, resumed: bool, limit: int | None, at: int, tmp_path: Path
) -> None:
    """In the same trainer or in a new one; inside an epoch, or at the end of one that limit_batches has ended early."""
    whole: list[Any] = []
    stateful_trainer(tmp_path / "whole", kind, whole, limit_batches=limit, max_iters=20).train()
    seen: list[Any] = []
    settings: dict[str, Any] = {"limit_batches": limit}
    first = stateful_trainer(tmp_path / "a", kind, seen, max_iters=at, hooks=[CheckpointerHook()], **settings)
    first.train()
    if resumed:
        settings |= {"hooks": [CheckpointerHook()], "resume": "auto"}
        stateful_trainer(tmp_path / "a", kind, seen, max_iters=20, **settings).train()
    else:
        first.max_iters = 20
        first.train()
    assert seen == whole


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("limit", [None, 3])
def test_a_stateful_loader_goes_on_behind_a_state_of_after_epoch(limit: int | None, tmp_path: Path) -> None:
    whole: list[Any] = []
    stateful_trainer(tmp_path / "whole", "map", whole, limit_batches=limit).train()
    seen: list[Any] = []

    def stop(trainer: Trainer) -> None:
        trainer.save_checkpoint("latest.pth", save_single_model=False)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stateful_trainer(tmp_path / "a", "map", seen, limit_batches=limit, hooks=[On(after_epoch=stop)]).train()
    stateful_trainer(tmp_path / "a", "map", seen, limit_batches=limit, resume="auto").train()
    assert seen == whole


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_the_batch_of_a_stateful_loader_whose_step_failed_is_trained_by_another_train(tmp_path: Path) -> None:
    errors = [ZeroDivisionError]

    def fail(trainer: Trainer) -> None:
        if errors:
            raise errors.pop()

    seen: list[Any] = []
    trainer = stateful_trainer(tmp_path, "map", seen, max_iters=8, hooks=[On(before_iter=at_iter(4, fail))])
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    trainer.train()
    assert sorted(seen) == list(range(16))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize(("stage", "told"), [("before_iter", True), ("after_iter", False), ("after_epoch", False)])
def test_a_state_that_would_lose_the_batch_of_a_stateful_loader_is_told(
    stage: str, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save = On(**{stage: at_iter(7, lambda trainer: trainer.save_checkpoint("latest.pth", False))})
    stateful_trainer(tmp_path, "map", [], max_iters=9, hooks=[save, CheckpointerHook()]).train()
    assert ("leaves the batch out" in caplog.text) is told


# ---------------------------------------------------------------- what is left behind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_no_process_is_left_when_a_run_ends_by_an_exception(
    tmp_path: Path, kind: str, error: type[BaseException]
) -> None:
    def fail(trainer: Trainer) -> None:
        raise error

    before = descendants()
    trainer = make_trainer(tmp_path, data=loader_of(kind, 2), hooks=[On(after_iter=at_iter(1, fail))])
    with pytest.raises(error) as caught:
        trainer.train()
    assert processes_gone(before)  # though the traceback is still there, as in a notebook
    del caught


def test_an_infinite_loader_can_be_used_before_and_after_a_run(tmp_path: Path) -> None:
    before = descendants()
    with loader_of("infinite", 2, seed=3) as loader:
        assert isinstance(loader, InfiniteDataLoader)
        first = list(loader)
        make_trainer(tmp_path, data=loader).train()
        loader.set_epoch(0)
        assert not differences(list(loader), first)
    assert processes_gone(before)


def test_a_trainer_can_train_on_when_max_epochs_grows(tmp_path: Path) -> None:
    results = []
    for epochs in ([2, 4], [4]):
        seed_everything(1)
        trainer = make_trainer(tmp_path, data=loader_of("infinite", 2), seed=7)
        for trainer.max_epochs in epochs:
            trainer.train()
        results.append(weights_of(trainer.model))
    assert not differences(*results)


def test_a_plain_data_loader_of_torch_is_still_usable_afterwards(tmp_path: Path) -> None:
    loader = DataLoader(Samples(), batch_size=4, shuffle=True)
    make_trainer(tmp_path, data=loader).train()
    assert sum(len(y) for _, y in loader) == SIZE

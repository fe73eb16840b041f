"""A run that is interrupted and resumed ends bitwise where the uninterrupted one does, random numbers included."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

from tests.small_hooks import Stages
from tests.small_runs import (
    CountingHook,
    Net,
    copied,
    differences,
    make_batches,
    make_trainer,
    run_python,
    seed_everything,
)
from torch_frame import CheckpointerHook, CheckpointError, EvalHook, HookBase, LoggerHook, Trainer

EPOCHS, BATCHES = 4, 5


class Stopped(Exception):
    """The interruption."""


class StopBefore(HookBase):
    """Interrupts the run before an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def before_epoch(self) -> None:
        if self.trainer.epoch == self.epoch:
            raise Stopped


class Samples(Dataset[Any]):
    """20 samples, augmented by all three generators where asked for."""

    def __init__(self, augmented: bool = False) -> None:
        batches = make_batches(BATCHES)
        self.x, self.y = (torch.cat(part) for part in zip(*batches, strict=True))
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = self.x[index]
        if self.augmented:
            x = x + torch.randn(3) + float(np.random.randn()) + random.random()
        return x, self.y[index]


class Stream(IterableDataset[Any]):
    """Draws its samples from the global generator; no length."""

    def __iter__(self) -> Iterator[Any]:
        for _ in range(12):
            yield torch.randn(3), torch.randn(1)


def loader(**kwargs: Any) -> Callable[[], Any]:
    augmented = kwargs.pop("augmented", False)
    seed = kwargs.pop("generator_seed", None)

    def make() -> Any:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return DataLoader(Samples(augmented), batch_size=4, generator=generator, **kwargs)

    return make


def weighted_loader() -> Any:
    sampler = WeightedRandomSampler([1.0] * 10 + [3.0] * 10, 20, generator=torch.Generator().manual_seed(3))
    return DataLoader(Samples(), batch_size=4, sampler=sampler)


@dataclass
class Run:
    """One way to train."""

    data: Callable[[], Any] = make_batches
    dropout: bool = False
    norm: bool = False
    optimizer: Callable[[Any], Any] = lambda parameters: SGD(parameters, lr=0.05, momentum=0.9)
    scheduler: Callable[[Any], Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def trainer(self, work_dir: Path, *more_hooks: HookBase, max_epochs: int = EPOCHS, model_seed: int = 0) -> Trainer:
        model = Net(dropout=self.dropout, norm=self.norm, seed=model_seed)
        optimizer = self.optimizer(model.parameters())
        scheduler = None if self.scheduler is None else self.scheduler(optimizer)
        evaluation = EvalHook(make_batches(2, seed=1), squared_errors, save_metric="error", max_first=False)
        hooks = [evaluation, CheckpointerHook(max_to_keep=2, save_last=False), *more_hooks]
        return make_trainer(
            work_dir, model, optimizer, scheduler, self.data(), max_epochs, hooks=hooks, **self.settings
        )


def squared_errors(model: Any, batch: Any) -> dict[str, Tensor]:
    x, y = batch
    torch.rand(3)  # an evaluation that draws random numbers
    return {"error": (model.predict(x) - y).square().flatten()}


def one_cycle(optimizer: Any) -> OneCycleLR:
    return OneCycleLR(optimizer, 0.1, total_steps=EPOCHS * BATCHES)


PER_ITER = {"lr_scheduler_interval": "iter"}
RUNS = {
    "plain": Run(),
    "dropout": Run(dropout=True),
    "batch_norm": Run(norm=True),
    "adamw": Run(optimizer=lambda parameters: AdamW(parameters, lr=0.01, amsgrad=True)),
    "ema": Run(norm=True, settings={"use_ema": True, "ema_decay": 0.9}),
    "clip": Run(settings={"clip_grad_norm": 0.1}),
    "accumulation": Run(settings={"gradient_accumulation_steps": 2}),
    "fp16": Run(settings={"precision": "fp16"}),
    "bf16": Run(settings={"precision": "bf16"}),
    "warm_up_ends": Run(settings={"warmup_method": "linear", "warmup_iters": 7}),
    "warm_up_lasts": Run(settings={"warmup_method": "exp", "warmup_iters": 100}),
    "warm_up_and_step_lr": Run(
        scheduler=lambda o: StepLR(o, 1, gamma=0.5), settings={"warmup_method": "linear", "warmup_iters": 12}
    ),
    "warm_up_per_iter": Run(
        scheduler=lambda o: ExponentialLR(o, 0.9),
        settings={"warmup_method": "linear", "warmup_iters": 8, **PER_ITER},
    ),
    "step_lr": Run(scheduler=lambda o: StepLR(o, 2, gamma=0.1)),
    "step_lr_per_iter": Run(scheduler=lambda o: StepLR(o, 3, gamma=0.5), settings=PER_ITER),
    "one_cycle_per_iter": Run(scheduler=one_cycle, settings=PER_ITER),
    "cosine": Run(scheduler=lambda o: CosineAnnealingLR(o, EPOCHS)),
    "sequential": Run(scheduler=lambda o: SequentialLR(o, [LambdaLR(o, lambda n: 0.5**n), ExponentialLR(o, 0.5)], [2])),
    "plateau": Run(
        scheduler=lambda o: ReduceLROnPlateau(o, patience=0, threshold=0.5),
        settings={"lr_scheduler_metric": "eval_error"},
    ),
    "shuffle": Run(data=loader(shuffle=True)),
    "shuffle_and_dropout": Run(data=loader(shuffle=True), dropout=True),
    "augmentation": Run(data=loader(shuffle=True, augmented=True), dropout=True),
    "workers": Run(data=loader(shuffle=True, num_workers=2), dropout=True),
    "workers_and_augmentation": Run(data=loader(shuffle=True, augmented=True, num_workers=2), dropout=True),
    "persistent_workers": Run(data=loader(shuffle=True, num_workers=2, persistent_workers=True), dropout=True),
    "generator": Run(data=loader(shuffle=True, generator_seed=3), dropout=True),
    "generator_and_workers": Run(data=loader(shuffle=True, generator_seed=3, num_workers=2, augmented=True)),
    "weighted_sampler": Run(data=weighted_loader, dropout=True),
    "iterable_dataset": Run(data=lambda: DataLoader(Stream(), batch_size=4), dropout=True),
    "everything": Run(
        data=loader(shuffle=True, augmented=True, num_workers=2, generator_seed=3),
        dropout=True,
        norm=True,
        optimizer=lambda parameters: AdamW(parameters, lr=0.01),
        scheduler=one_cycle,
        settings={"use_ema": True, "clip_grad_norm": 0.5, "warmup_method": "linear", "warmup_iters": 9, **PER_ITER},
    ),
}


def outcome(trainer: Trainer) -> dict[str, Any]:
    """All that a run ends with; times, which differ from run to run, left out."""
    metrics = {k: v for k, v in trainer.metric_storage.state_dict().items() if not k.endswith("_time")}
    return copied(
        {
            "model": trainer.model.state_dict(),
            "ema": {} if trainer.model_ema is None else trainer.model_ema.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": trainer.lr_scheduler.state_dict(),
            "lr": trainer.lr,
            "progress": trainer.progress.state_dict(),
            "metrics": metrics,
            "hooks": [hook.state_dict() for hook in trainer.hooks if hook.checkpointable],
            "torch": torch.get_rng_state(),
            "next": [random.random(), float(np.random.rand())],
        }
    )


def uninterrupted(run: Run, work_dir: Path) -> dict[str, Any]:
    trainer = run.trainer(work_dir)
    seed_everything(7)
    trainer.train()
    return outcome(trainer)


def interrupted(run: Run, work_dir: Path, *stops: int) -> dict[str, Any]:
    """Stopped before each of these epochs; each next trainer begins with other weights and other random numbers."""
    for number, stop in enumerate(stops):
        trainer = run.trainer(work_dir, StopBefore(stop), model_seed=number)
        seed_everything(7 if number == 0 else 100 + number)
        if number > 0:
            trainer.load_checkpoint("latest.pth")
        with pytest.raises(Stopped):
            trainer.train()
    trainer = run.trainer(work_dir, model_seed=50)
    seed_everything(99)
    trainer.load_checkpoint("latest.pth")
    assert trainer.progress.epoch == stops[-1]
    trainer.train()
    return outcome(trainer)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_resume_at_an_epoch_border_is_bitwise(run: Run, tmp_path: Path) -> None:
    expected = uninterrupted(run, tmp_path / "whole")
    assert differences(expected, interrupted(run, tmp_path / "parts", 2)) == []


@pytest.mark.parametrize("stops", [(1,), (3,), (1, 2), (1, 2, 3)], ids=str)
def test_resume_is_bitwise_at_every_epoch_and_again_and_again(stops: tuple[int, ...], tmp_path: Path) -> None:
    run = Run(data=loader(shuffle=True, augmented=True), dropout=True, norm=True, settings={"use_ema": True})
    expected = uninterrupted(run, tmp_path / "whole")
    assert differences(expected, interrupted(run, tmp_path / "parts", *stops)) == []


def test_a_finished_run_goes_on_with_more_epochs(tmp_path: Path) -> None:
    run = Run(data=loader(shuffle=True), dropout=True, norm=True)
    expected = uninterrupted(run, tmp_path / "whole")
    short = run.trainer(tmp_path / "parts", max_epochs=2)
    seed_everything(7)
    short.train()
    longer = run.trainer(tmp_path / "parts", model_seed=5)
    longer.load_checkpoint("latest.pth")
    longer.train()
    assert differences(expected["model"], outcome(longer)["model"]) == []


def test_random_numbers_drawn_between_load_and_train_do_not_matter(tmp_path: Path) -> None:
    run = Run(data=loader(shuffle=True, augmented=True), dropout=True)
    expected = uninterrupted(run, tmp_path / "whole")
    trainer = run.trainer(tmp_path / "parts", StopBefore(2))
    seed_everything(7)
    with pytest.raises(Stopped):
        trainer.train()
    trainer = run.trainer(tmp_path / "parts", model_seed=1)
    trainer.load_checkpoint("latest.pth")
    torch.rand(100), np.random.rand(5), random.random()
    trainer.train()
    assert differences(expected, outcome(trainer)) == []


def test_a_hook_registered_after_loading_gets_its_state(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", hooks=[CountingHook(), CheckpointerHook()]).train()
    trainer = make_trainer(tmp_path / "run", hooks=[CheckpointerHook()], max_epochs=3)
    trainer.load_checkpoint("latest.pth")
    counter = CountingHook()
    trainer.register_hooks([counter])
    trainer.train()
    assert counter.count == 3


def test_two_hooks_of_one_class_keep_their_own_state(tmp_path: Path) -> None:
    def hooks() -> list[EvalHook]:
        return [
            EvalHook(
                make_batches(1), lambda model, batch: {"a": [float(model.predict(batch[0]).sum())]}, save_metric="a"
            ),
            EvalHook(make_batches(1), lambda model, batch: {"b": [1.0]}, max_to_keep=1, save_last=False),
        ]

    first = make_trainer(tmp_path / "run", hooks=hooks())
    first.train()
    second = make_trainer(tmp_path / "run", hooks=hooks())
    second.load_checkpoint("latest.pth")
    assert [hook.state_dict() for hook in second.hooks] == [hook.state_dict() for hook in first.hooks]


# ---------------------------------------------------------------- saved at other moments


class SaveAt(HookBase):
    """Saves the whole state there and then, at one stage of one iteration, and ends the run."""

    def __init__(self, stage: str, iter: int) -> None:
        self.iter = iter
        setattr(self, stage, self.save)

    def save(self) -> None:
        if self.trainer.cur_iter == self.iter:
            self.trainer.save_checkpoint("latest.pth", save_single_model=False)
            raise Stopped


def place_of(stage: str, trainer: Trainer) -> tuple[str, int]:
    return stage, trainer.epoch if stage.endswith("epoch") else trainer.cur_iter


@pytest.mark.parametrize(
    ("stage", "iter", "begins_with"),
    [
        ("after_iter", 7, [("before_iter", 8), ("before_iter", 9), ("after_epoch", 1), ("before_epoch", 2)]),
        ("after_iter", 9, [("after_epoch", 1), ("before_epoch", 2)]),
        ("after_epoch", 9, [("after_epoch", 1), ("before_epoch", 2)]),
    ],
)
def test_a_state_saved_inside_an_epoch_goes_on_where_it_was(
    stage: str, iter: int, begins_with: list[Any], tmp_path: Path
) -> None:
    run = Run(dropout=True, norm=True, optimizer=lambda parameters: AdamW(parameters, lr=0.01))
    expected = uninterrupted(run, tmp_path / "whole")
    trainer = run.trainer(tmp_path / "parts", SaveAt(stage, iter))
    seed_everything(7)
    with pytest.raises(Stopped):
        trainer.train()
    stages = Stages("before_epoch", "before_iter", "after_epoch", note=place_of)
    trainer = run.trainer(tmp_path / "parts", stages, model_seed=1)
    trainer.load_checkpoint("latest.pth")
    trainer.train()
    assert stages.calls[: len(begins_with)] == begins_with
    assert differences(expected["model"], outcome(trainer)["model"]) == []
    assert differences(expected["torch"], outcome(trainer)["torch"]) == []


def test_a_state_is_never_saved_inside_a_window(tmp_path: Path) -> None:
    trainer = Run(settings={"gradient_accumulation_steps": 3}).trainer(tmp_path, SaveAt("after_iter", 1))
    with pytest.raises(ValueError, match="window"):
        trainer.train()


# ---------------------------------------------------------------- the file


def test_a_state_loads_without_running_code(tmp_path: Path) -> None:
    run = RUNS["everything"]
    trainer = run.trainer(tmp_path / "run", LoggerHook())
    trainer.train()
    state = torch.load(tmp_path / "run" / "checkpoints" / "latest.pth", weights_only=True)
    assert differences(dict(trainer.model.state_dict()), dict(state["model"])) == []


def test_a_numpy_learning_rate_can_be_saved_and_resumed(tmp_path: Path) -> None:
    run = Run(optimizer=lambda parameters: SGD(parameters, lr=np.float64(0.05)), scheduler=lambda o: StepLR(o, 1))
    expected = uninterrupted(run, tmp_path / "whole")
    assert differences(expected["model"], interrupted(run, tmp_path / "parts", 2)["model"]) == []


def test_a_tensor_learning_rate_can_be_saved_and_resumed(tmp_path: Path) -> None:
    run = Run(optimizer=lambda parameters: AdamW(parameters, lr=torch.tensor(0.05)), scheduler=lambda o: StepLR(o, 1))
    expected = uninterrupted(run, tmp_path / "whole")
    assert differences(expected["model"], interrupted(run, tmp_path / "parts", 2)["model"]) == []


def test_a_hook_state_that_cannot_be_loaded_safely_is_refused_before_the_first_step(tmp_path: Path) -> None:
    class Odd(HookBase):
        def state_dict(self) -> dict[str, Any]:
            return {"object": object()}

    trainer = make_trainer(tmp_path / "run", hooks=[Odd(), CheckpointerHook()], max_epochs=1)
    with pytest.raises(CheckpointError, match="object"):
        trainer.train()
    assert trainer.progress.iter == 0
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_resumed_run_takes_the_work_dir_of_its_file(tmp_path: Path) -> None:
    for _ in range(2):
        make_trainer(tmp_path / "run", hooks=[CheckpointerHook()]).train()
    sibling = next(path for path in tmp_path.iterdir() if path.name != "run")
    moved = sibling.rename(tmp_path / "moved")
    trainer = make_trainer(tmp_path / "run", hooks=[CheckpointerHook()], max_epochs=3)
    trainer.load_checkpoint(moved / "checkpoints" / "latest.pth")
    trainer.train()
    assert Path(trainer.work_dir) == moved
    assert {path.name for path in tmp_path.iterdir()} == {"run", "moved"}


# ---------------------------------------------------------------- killed

KILLED = """
import os, random, signal, sys, time
import torch
from pathlib import Path
torch.set_num_threads(1)
from tests.promises.test_state import Run, loader
from tests.small_runs import differences, seed_everything
from torch_frame import LoggerHook

RUN = Run(data=loader(shuffle=True, augmented=True), dropout=True, norm=True, settings={"use_ema": True})
ROOT = Path.cwd()
# What training imports on its way is imported once, before the forks. No backward here: its threads would not survive them.
from torch.utils.tensorboard import SummaryWriter
weight = torch.nn.Parameter(torch.ones(1))
weight.grad = torch.ones(1)
torch.optim.SGD([weight], lr=0.1, momentum=0.9).step()

def child(work):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid

def train(work_dir):
    sys.stdout = None
    seed_everything(7)
    trainer = RUN.trainer(work_dir, LoggerHook(), max_epochs=15)
    for name in ("latest.pth", "previous.pth"):
        if (work_dir / "checkpoints" / name).exists():
            trainer.load_checkpoint(name)
            break
    trainer.train()
    trainer.save_checkpoint(str(work_dir / "last.pth"))

assert os.waitpid(child(lambda: train(ROOT / "whole")), 0)[1] == 0
delays = random.Random(0)
kills = 0
for attempt in range(30):
    pid = child(lambda: train(ROOT / "parts"))
    latest = ROOT / "parts" / "checkpoints" / "latest.pth"
    before = latest.stat().st_mtime_ns if latest.exists() else None
    while not latest.exists() or latest.stat().st_mtime_ns == before:
        if os.waitpid(pid, os.WNOHANG)[0]:
            pid = None
            break
        time.sleep(0.001)
    if pid is None:
        break
    time.sleep(delays.random() * 0.06)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    kills += 1
    for name in ("latest.pth", "previous.pth"):
        path = ROOT / "parts" / "checkpoints" / name
        if path.exists():
            assert torch.load(path, weights_only=True)["progress"]["epoch"] >= 1
whole, parts = (torch.load(ROOT / name / "last.pth", weights_only=True) for name in ("whole", "parts"))
print("differences:", differences(whole, parts))
print("kills:", kills)
print("folders:", sorted(path.name for path in ROOT.iterdir()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has loaded torch")
def test_a_run_killed_again_and_again_ends_with_the_same_weights(tmp_path: Path) -> None:
    result = run_python(KILLED, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "differences: []" in result.stdout
    assert "folders: ['parts', 'whole']" in result.stdout
    assert int(result.stdout.split("kills: ")[1].split()[0]) >= 3

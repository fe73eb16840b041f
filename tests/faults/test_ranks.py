"""Runs on several ranks that are killed, stopped, and resumed: bitwise the weights of the run that was never interrupted."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset

from tests.distributed.processes import Failed, on_processes, outcomes, results_in, start, wait
from tests.small_runs import differences, make_trainer, weights_of
from torch_frame import CheckpointerHook, EvalHook, HookBase, LoggerHook

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL"),
    pytest.mark.timeout(180),
]
EPOCHS = 3
KILLED_AT = 11
STATE = Path("run") / "checkpoints" / "latest.pth"


class Noisy(Dataset[Any]):
    """70 samples with random augmentation; the last batch is ragged on 2, 3 and 4 ranks."""

    def __len__(self) -> int:
        return 70

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(12, generator=generator)
        return x + 0.1 * torch.randn(12) + 0.01 * random.random(), x.sum(), index


class DeepNet(nn.Module):
    """Several layers, so that DDP's buckets can be filled in more than one order."""

    def __init__(self, noise: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            norm: Any = nn.BatchNorm1d if noise else nn.Identity
            self.layers = nn.Sequential(
                *(
                    nn.Sequential(nn.Linear(n, m), norm(m), nn.ReLU(), nn.Dropout(0.2 * noise))
                    for n, m in [(12, 37), (37, 23)]
                ),
                nn.Linear(23, 1),
            )

    def forward(self, batch: Any) -> Tensor:
        x, y, _ = batch
        return F.mse_loss(self.layers(x).squeeze(1), y)


class Fault(HookBase):
    """Kills this process after an iteration, or tells the test that it is there and waits for a signal."""

    def __init__(self, folder: Path, ranks: tuple[int, ...], what: str) -> None:
        self.folder = folder
        self.ranks = ranks
        self.what = what

    def after_iter(self) -> None:
        if self.trainer.cur_iter + 1 == KILLED_AT and self.trainer.strategy.rank in self.ranks:
            if self.what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "stop":
                self.trainer.should_stop = True
                return
            (self.folder / f"waits_{self.trainer.strategy.rank}").touch()
            trainer: Any = self.trainer
            while trainer.stop_signals.received is None:
                time.sleep(0.01)


class Seen(HookBase):
    """Writes down which samples were trained on, when."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.batch: list[int] = []

    def after_iter(self) -> None:
        with self.path.open("a") as file:
            file.write(f"{self.trainer.epoch} {' '.join(map(str, self.batch))}\n")


def score(model: Any, batch: Any) -> dict[str, Tensor]:
    return {"loss": model(batch).reshape(1)}


def train(
    folder: Path,
    *,
    batch_size: int = 3,
    noise: bool = True,
    hooks_on_all: bool = True,
    fault: tuple[tuple[int, ...], str] | None = None,
    resume: bool = False,
    num_workers: int = 0,
    note: str | None = None,
    epochs: int = EPOCHS,
) -> dict[str, Tensor]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(100 + rank)
    model = DeepNet(noise)
    loader = DataLoader(Noisy(), batch_size, shuffle=True, num_workers=num_workers)
    seen = Seen(folder / f"{note}_{rank}") if note else None
    killed = fault[0] if fault is not None and fault[1] == "kill" else ()

    def step(model: nn.Module, batch: Any) -> Tensor:
        if seen is not None:
            seen.batch = batch[2].tolist()
        if not hooks_on_all and rank in killed and trainer.cur_iter + 1 == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        loss: Tensor = model(batch)
        return loss

    evaluation = EvalHook(DataLoader(Noisy(), 16), score, save_metric="loss", max_first=False, progress_bar=False)
    hooks: list[Any] = [evaluation, CheckpointerHook(every_n_iters=4), LoggerHook(progress_bar=False)]
    hooks = hooks if hooks_on_all or rank == 0 else []
    if hooks_on_all:
        hooks += [None if fault is None else Fault(folder, *fault), seen]
    elif fault is not None and rank == 0:
        hooks.append(Fault(folder, *fault))
    trainer = make_trainer(
        folder / "run",
        model,
        AdamW(model.parameters(), lr=0.01),
        None,
        loader,
        epochs,
        hooks=hooks,
        step_fn=step,
        loss_weight=None if noise else lambda batch: len(batch[2]),  # the last batch is split unevenly over 4 ranks
        seed=5,
        use_ema=noise,
        ema_decay=0.9,
        gradient_accumulation_steps=2 if noise else 1,
        resume="auto" if resume else None,
        create_new_dir=None,
    )
    trainer.train(5, 2)
    return {**weights_of(model), **{f"ema.{k}": v for k, v in weights_of(trainer.model_evaluate).items()}}


def parameters(result: dict[str, Tensor]) -> dict[str, Tensor]:
    """Buffers of ranks other than 0 are their own until the next forward pass."""
    return {name: value for name, value in result.items() if "running" not in name and "batches" not in name}


def check_equal(results: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert differences(results[0], expected[0]) == []
    for result in results[1:]:
        assert differences(parameters(result), parameters(expected[0])) == []


def check_no_half_written_file(folder: Path) -> None:
    state = torch.load(folder / STATE, weights_only=True)
    assert 0 < state["progress"]["iter"] <= KILLED_AT


@pytest.mark.parametrize("hooks_on_all", [True, False])
@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_stopped_run_resumes_bitwise(world_size: int, hooks_on_all: bool, tmp_path: Path) -> None:
    settings: Any = {"hooks_on_all": hooks_on_all}
    expected = on_processes(train, tmp_path / "whole", world_size, tmp_path / "whole", **settings)
    folder = tmp_path / "cut"
    wait(start(train, folder, world_size, folder, fault=((0,), "stop"), **settings))
    stopped_at = torch.load(folder / STATE, weights_only=True)["progress"]["iter"]
    assert stopped_at == KILLED_AT + 1  # where its window of two batches ends
    check_equal(on_processes(train, folder, world_size, folder, resume=True, **settings), expected)


@pytest.mark.parametrize(
    ("world_size", "killed", "hooks_on_all"),
    [
        (3, (1,), True),
        pytest.param(2, (0,), True, marks=pytest.mark.slow),
        pytest.param(2, (0, 1), True, marks=pytest.mark.slow),
        pytest.param(4, (2,), True, marks=pytest.mark.slow),
        pytest.param(4, (0, 1, 2, 3), True, marks=pytest.mark.slow),
        pytest.param(2, (0,), False, marks=pytest.mark.slow),
        pytest.param(2, (1,), False, marks=pytest.mark.slow),
        pytest.param(4, (0, 1, 2, 3), False, marks=pytest.mark.slow),
    ],
)
def test_a_killed_rank_ends_the_others_and_the_run_resumes_bitwise(
    world_size: int, killed: tuple[int, ...], hooks_on_all: bool, tmp_path: Path
) -> None:
    settings: Any = {"hooks_on_all": hooks_on_all}
    expected = on_processes(train, tmp_path / "whole", world_size, tmp_path / "whole", **settings)
    folder = tmp_path / "cut"
    context = start(train, folder, world_size, folder, fault=(killed, "kill"), **settings)
    codes = wait(context)
    assert all(codes[rank] == -signal.SIGKILL for rank in killed)
    for rank, result in enumerate(results_in(folder, world_size)):
        assert rank in killed or isinstance(result, Failed)
    check_no_half_written_file(folder)
    check_equal(on_processes(train, folder, world_size, folder, resume=True, **settings), expected)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_sigterm_with_workers_ends_all_ranks_after_a_save_and_resumes_bitwise(world_size: int, tmp_path: Path) -> None:
    """As torchrun and a scheduler send it: to every rank."""
    settings: Any = {"num_workers": 1, "epochs": 2}
    expected = on_processes(train, tmp_path / "whole", world_size, tmp_path / "whole", **settings)
    folder = tmp_path / "cut"
    context = start(train, folder, world_size, folder, fault=((0,), "wait"), **settings)
    while not (folder / "waits_0").exists():
        assert all(process.is_alive() for process in context.processes)
        time.sleep(0.05)
    for process in context.processes:
        os.kill(process.pid, signal.SIGTERM)
    assert wait(context) == [143] * world_size
    saved = torch.load(folder / STATE, weights_only=True)["progress"]["iter"]
    assert saved in (KILLED_AT, KILLED_AT + 1), "at the window's end"
    check_equal(on_processes(train, folder, world_size, folder, resume=True, **settings), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2), (2, 4)])
def test_another_number_of_ranks_trains_on_every_sample_once(before: int, after: int, tmp_path: Path) -> None:
    """The global batch of 8 is kept, so the weights are those of the uninterrupted run up to rounding."""
    expected = on_processes(train, tmp_path / "whole", before, tmp_path / "whole", batch_size=8 // before, noise=False)
    folder = tmp_path / "cut"
    settings: Any = {"noise": False, "note": "before", "fault": (tuple(range(before)), "kill")}
    wait(start(train, folder, before, folder, batch_size=8 // before, **settings))
    saved = torch.load(folder / STATE, weights_only=True)["progress"]
    results = outcomes(train, folder, after, folder, batch_size=8 // after, noise=False, note="after", resume=True)
    for result in results:
        assert not isinstance(result, Failed), result
        distance = max(float((result[name] - value).abs().max()) for name, value in expected[0].items())
        assert distance < 1e-5
    first = [
        line.split() for path in folder.glob("before_*") for line in path.read_text().splitlines()[: saved["iter"]]
    ]
    second = [line.split() for path in folder.glob("after_*") for line in path.read_text().splitlines()]
    for epoch in range(EPOCHS):
        indices = [int(i) for row in (*first, *second) if int(row[0]) == epoch for i in row[1:]]
        assert sorted(indices) == list(range(70)), f"epoch {epoch}"
    log = (folder / "run" / "log.txt").read_text()
    assert f"world_size was {before}, now it is {after}" in log
    assert "An update is made of" not in log


def test_another_global_batch_is_told(tmp_path: Path) -> None:
    train(tmp_path, batch_size=4, noise=False, epochs=1)
    on_processes(train, tmp_path, 2, tmp_path, batch_size=4, noise=False, epochs=2, resume=True)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "An update is made of 8 samples, and was of 4" in log
    assert "batch_size is for each rank, and there are 2 instead of 1" in log

"""How the files in this folder were made: one run, ended by a signal in several places, and trained without a break.

    .venv/bin/python tests/checkpoint/golden_2/make.py      # at the commit that added this file

For each of PLACES there is NAME.pth, the `latest.pth` in format 2 that the signal has left. `finished.pth` holds what the
uninterrupted run ended with, and on what machine. The tests resume each file with the present Trainer. The files stay as they
are: made with a later Trainer, they would be in its format.
"""

from __future__ import annotations

import contextlib
import json
import platform
import random
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils.data import DataLoader, Dataset

from torch_frame import CheckpointerHook, EarlyStoppingHook, EvalHook, HookBase, LoggerHook, Trainer

HERE = Path(__file__).parent
SIZE, BATCH_SIZE = 22, 4  # five batches of 4 samples, one of 2
MAX_EPOCHS = 6  # early stopping ends the run before
WARMUP_ITERS, WARMUP_FACTOR = 20, 0.05  # to the second batch of epoch 3
EMA_DECAY, EMA_UPDATES = 0.95, 2000
"""The average begins as if it had followed 2000 updates: else it would hardly differ from the weights."""
TIMES = ("time", "data_time", "iter_time")
"""What differs from run to run."""


class Net(nn.Module):
    """(N, 3) -> (N, 1), with batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        # No bias before batch norm: its gradient would be rounding noise, which Adam makes as large as any other.
        self.body = nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.25))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        predicted: Tensor = self.head(self.body(x))
        return predicted


class Samples(Dataset[Any]):
    """(x, y, index): x (3,) augmented by the generators of python, numpy and torch, y (1,)."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        x = torch.cos(torch.arange(3.0) + 3 * index)
        y = x.sum(0, keepdim=True) ** 2
        if random.random() < 0.5:
            x = -x
        return x * float(np.random.uniform(0.8, 1.2)) + 0.1 * torch.rand(3), y, index


HELD_OUT = [(torch.sin(torch.arange(3.0 * n)).reshape(n, 3), -torch.arange(1.0, n + 1)[:, None]) for n in (5, 5, 3)]
"""The more is learned, the worse the error on it: the first epoch stays the best one."""


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """A step's loss; it draws from each generator, as dropout does from torch's."""
    x, y, _ = batch
    x = x + 0.1 * random.random() + 0.1 * float(np.random.randn()) + 0.1 * torch.rand(())
    return F.mse_loss(model(x), y)


def squared_errors(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    x, y = batch
    return {"error": (model(x) - y).square().flatten()}


def make_optimizer(model: Net) -> Optimizer:
    """Two groups: without weight decay, and with it."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0, "lr": 0.05},
        {"params": [p for p in model.parameters() if p.ndim > 1]},
    ]
    return AdamW(groups, lr=0.02, weight_decay=0.1)


def make_scheduler(optimizer: Optimizer) -> LRScheduler:
    return CosineAnnealingLR(optimizer, T_max=MAX_EPOCHS)


class History(HookBase):
    """A user's hook with a state: what each step was made with, a row for each, in the whole run."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        """The trainer's `step_fn`."""
        self.indices = batch[2].tolist()
        self.lrs = [group["lr"] for group in self.trainer.optimizer.param_groups]
        return loss_of(model, batch)

    def after_iter(self) -> None:
        loss = self.metric_storage["total_loss"].latest
        self.rows.append({"indices": self.indices, "lrs": self.lrs, "loss": loss})

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])


@dataclass
class Run:
    """A trainer, and those of its hooks that have a state to look at."""

    trainer: Trainer
    history: History
    saving: CheckpointerHook
    evaluation: EvalHook
    stopping: EarlyStoppingHook

    def hook_states(self) -> dict[str, Any]:
        return {
            "history": self.history.rows,
            "kept": self.saving.state_dict()["recent_checkpoints"],
            "best": self.evaluation.cur_best,
            "stopping": [self.stopping.best, self.stopping.num_bad_epochs],
        }


def make_run(
    work_dir: Path, seed: int, *, before: Sequence[HookBase] = (), behind: Sequence[HookBase] = (), **settings: Any
) -> Run:
    """The run's parts.

    Args:
        seed: of the first weights and all random numbers.
        before, behind: more hooks, before and behind the evaluation.
        settings: more arguments for Trainer.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model = Net()
    optimizer = make_optimizer(model)
    history, saving = History(), CheckpointerHook(max_to_keep=4)
    evaluation = EvalHook(HELD_OUT, squared_errors, save_metric="error", max_first=False, progress_bar=False)
    stopping = EarlyStoppingHook("eval_error", patience=4, max_first=False)
    logger = LoggerHook(period=4, progress_bar=False)
    trainer = Trainer(
        model,
        optimizer,
        make_scheduler(optimizer),
        DataLoader(Samples(), BATCH_SIZE, shuffle=True),
        MAX_EPOCHS,
        work_dir,
        warmup_method="linear",
        warmup_iters=WARMUP_ITERS,
        warmup_factor=WARMUP_FACTOR,
        hooks=[history, saving, *before, evaluation, stopping, *behind, logger],
        use_ema=True,
        ema_decay=EMA_DECAY,
        create_new_dir=None,
        step_fn=history.step,
        device="cpu",
        precision="fp32",
        **settings,
    )
    return Run(trainer, history, saving, evaluation, stopping)


# ---------------------------------------------------------------- what is in this folder


class InterruptAfterIter(HookBase):
    """Ends the run behind a batch of epoch 2."""

    def __init__(self, inner_iter: int) -> None:
        self.at = inner_iter

    def after_iter(self) -> None:
        if (self.trainer.epoch, self.trainer.inner_iter) == (2, self.at):
            signal.raise_signal(signal.SIGTERM)


class InterruptAfterEpoch(HookBase):
    """Ends the run in `after_epoch` of epoch 2: the evaluation behind it is interrupted, and a resume repeats `after_epoch`."""

    def after_epoch(self) -> None:
        if self.trainer.epoch == 2:
            signal.raise_signal(signal.SIGTERM)


@dataclass(frozen=True)
class Place:
    """Where the run stands in a file.

    Attributes:
        progress: epoch, iter, inner_iter, position, num_updates, epoch_trained.
        num_logged: rows in metrics.jsonl by then.
        interrupted_by: more arguments for `make_run`.
    """

    progress: tuple[int, int, int, int, int, bool]
    num_logged: int
    interrupted_by: Callable[[], dict[str, list[HookBase]]]


PLACES = {
    "inside": Place((2, 15, 3, 12, 15, False), 4, lambda: {"before": [InterruptAfterIter(2)]}),
    "last_batch": Place((2, 18, 6, 22, 18, False), 5, lambda: {"before": [InterruptAfterIter(5)]}),
    "before_after_epoch": Place((2, 18, 6, 22, 18, True), 5, lambda: {"before": [InterruptAfterEpoch()]}),
    "border": Place((3, 18, 0, 0, 18, False), 6, lambda: {"behind": [InterruptAfterEpoch()]}),
}


def environment() -> dict[str, Any]:
    """What the last bits depend on: where it is equal, so are the bits."""
    return {
        "torch": str(torch.__version__),
        "cpu": cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
    }


def cpu() -> list[str]:
    """Maker, family, model and name, as far as they are told."""
    told = Path("/proc/cpuinfo")
    if not told.exists():
        return [platform.processor()]
    wanted = ("vendor_id", "cpu family", "model", "model name")
    fields = (line.partition(":") for line in told.read_text().split("\n\n")[0].splitlines())
    return [value.strip() for name, _, value in fields if name.strip() in wanted]


def trained(work_dir: Path, **interrupted_by: Any) -> Run:
    run = make_run(work_dir, seed=0, **interrupted_by)
    assert run.trainer.model_ema is not None
    run.trainer.model_ema.updates = EMA_UPDATES
    run.trainer.train()
    return run


def finished(run: Run) -> dict[str, Any]:
    """What a run ended with, in plain types."""
    trainer = run.trainer
    assert trainer.model_ema is not None
    return {
        "environment": environment(),
        "model": trainer.model.state_dict(),
        "ema": trainer.model_ema.model.state_dict(),
        "ema_updates": trainer.model_ema.updates,
        "optimizer": trainer.optimizer.state_dict(),
        "hooks": run.hook_states(),
        "progress": [trainer.progress.epoch, trainer.progress.iter, trainer.progress.num_updates],
        "metrics": {n: [m.latest, m.avg, m.global_avg] for n, m in trainer.metric_storage.items() if n not in TIMES},
        "logged": [{n: v for n, v in json.loads(line).items() if n not in TIMES} for line in log_lines(trainer)],
    }


def log_lines(trainer: Trainer) -> list[str]:
    return Path(trainer.work_dir, "metrics.jsonl").read_text().splitlines()


def make(folder: Path) -> None:
    for name, place in PLACES.items():
        with contextlib.suppress(SystemExit):  # by the signal
            trained(folder / name, **place.interrupted_by())
        shutil.copyfile(folder / name / "checkpoints" / "latest.pth", HERE / f"{name}.pth")
    torch.save(finished(trained(folder / "uninterrupted")), HERE / "finished.pth")


if __name__ == "__main__":
    torch.set_num_threads(1)
    socket.gethostname = lambda: "host"  # TensorBoard names its files by it, and a state holds their names
    with tempfile.TemporaryDirectory() as temporary:
        make(Path(temporary))

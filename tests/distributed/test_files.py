"""On several ranks: one lock, one folder, weights and states written once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.processes import Failed, on_processes
from tests.run.test_lock import Other
from tests.small_hooks import On
from tests.small_runs import Net, differences, weights_of
from torch_frame import CheckpointerHook, EvalHook, LoggerHook, Trainer

FILES = ["checkpoints", "log.txt", "metrics.jsonl", "run.json", "table.jsonl", "tb_logs"]

pytestmark = [pytest.mark.skipif(sys.platform == "win32", reason="gloo"), pytest.mark.timeout(180)]


def make(folder: Path, hooks: list[Any], **settings: Any) -> Trainer:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(16, 3, generator=generator), torch.randn(16, 1, generator=generator))
    settings = {"create_new_dir": None, **settings}
    return Trainer(model, optimizer, None, DataLoader(data, 4), 3, folder / "run", hooks=hooks, seed=0, **settings)


def train_and_count(folder: Path, alone: bool) -> dict[str, Any]:
    """Which files this rank has renamed, and what a later hook has seen."""
    renamed: list[str] = []

    def audit(event: str, arguments: Any) -> None:
        if event == "os.rename" and "checkpoints" in str(arguments[1]):
            renamed.append(Path(str(arguments[1])).name)

    sys.addaudithook(audit)
    scores = [0.1, 0.9, 0.5]
    seen: dict[str, Any] = {"complete": []}

    def look(trainer: Trainer) -> None:
        path = os.path.join(trainer.ckpt_dir, "latest.pth")
        seen["complete"].append(torch.load(path)["progress"]["epoch"])
        report = trainer.load_best() if not alone else None
        seen["best"] = None if report is None else weights_of(trainer.model_or_module)

    evaluation = EvalHook([0, 0], lambda model, batch: {"acc": [scores[evaluation.trainer.epoch]]}, save_metric="acc")

    def save_alone(trainer: Trainer) -> None:
        if dist.get_rank() == 0:
            trainer.save_checkpoint("alone.pth")

    hooks = [evaluation, CheckpointerHook(max_to_keep=1), LoggerHook(progress_bar=False)]
    hooks += [On(after_epoch=save_alone, after_train=look)]
    trainer = make(folder, [] if alone and dist.get_rank() else hooks)
    trainer.train()
    return {**seen, "renamed": renamed, "folder": trainer.work_dir}


@pytest.mark.parametrize("alone", [False, True])
def test_weights_and_states_are_written_once_in_one_folder(alone: bool, tmp_path: Path) -> None:
    first, second = on_processes(train_and_count, tmp_path, 2, tmp_path, alone)
    counts = {
        name: first["renamed"].count(name)
        for name in ("best.pth", "latest.pth", "epoch_0.pth", "epoch_2.pth", "alone.pth")
    }
    assert counts == {"best.pth": 2, "latest.pth": 3, "epoch_0.pth": 1, "epoch_2.pth": 1, "alone.pth": 3}
    assert second["renamed"] == []
    assert first["folder"] == second["folder"] == str(tmp_path / "run")
    assert sorted(os.listdir(tmp_path / "run")) == FILES
    assert first["complete"] == [3]
    if not alone:
        assert second["complete"] == [3]
        assert differences(first["best"], second["best"]) == []


def train_in(folder: Path, **settings: Any) -> int:
    trainer = make(folder, [CheckpointerHook()], **settings)
    trainer.train()
    return trainer.start_epoch


def train_in_folders_of_their_own(folder: Path) -> list[str]:
    """The work dir of this rank before and after the training, and what is in its own folder."""
    own = folder / str(dist.get_rank())
    own.mkdir()
    os.chdir(own)
    trainer = make(Path(), [CheckpointerHook()])
    before = trainer.work_dir
    trainer.train()
    return [before, trainer.work_dir, *os.listdir(own)]


def test_all_ranks_have_rank_0s_folder_from_the_constructor_on(tmp_path: Path) -> None:
    """Hydra gives each process a working directory of its own, named by its time."""
    run = str(tmp_path / "0" / "run")
    assert on_processes(train_in_folders_of_their_own, tmp_path / "results", 2, tmp_path) == [
        [run, run, "run"],
        [run, run],
    ]


@pytest.mark.slow
def test_a_folder_that_another_process_holds_is_refused_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with Other(tmp_path / "run"), pytest.raises(Failed, match="is in use: process"):
        on_processes(train_in, tmp_path / "first", 2, tmp_path)
    assert on_processes(train_in, tmp_path / "second", 2, tmp_path) == [0, 0]
    assert on_processes(train_in, tmp_path / "third", 2, tmp_path, resume="auto") == [3, 3]
    assert on_processes(train_in, tmp_path / "fourth", 2, tmp_path) == [0, 0]
    assert (tmp_path / "run" / "checkpoints.1" / "latest.pth").exists()

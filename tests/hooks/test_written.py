"""Checkpoints that a trainer's own save_checkpoint writes are kept and removed by the hook's rule; nothing else is removed."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD

from tests.small_hooks import On
from tests.small_runs import Net, make_batches, raised_by
from torch_frame import CheckpointerHook, HookBase, Trainer


class Folders(Trainer):
    """As diffusers' scripts save: a folder for each name."""

    def save_checkpoint(self, file_name: str, save_single_model: bool = True, print_info: bool = False) -> None:
        if not save_single_model:
            super().save_checkpoint(file_name, save_single_model)
            return
        for path in self.paths(Path(self.ckpt_dir), file_name.removesuffix(".pth")):
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.model.state_dict(), path)

    def paths(self, folder: Path, stem: str) -> list[Path]:
        return [folder / stem / "model.bin", folder / stem / "deep" / "extra.bin"]


class BesideEachOther(Folders):
    def paths(self, folder: Path, stem: str) -> list[Path]:
        return [folder / f"{stem}.safetensors", folder / f"{stem}-ema.bin", folder / f"{stem}.pth" / "shard_0.bin"]


class Elsewhere(Folders):
    def paths(self, folder: Path, stem: str) -> list[Path]:
        return [folder.parent / "mine" / stem / "model.bin"]


def run(kind: type[Folders], folder: Path, *hooks: HookBase, epochs: int = 4, **settings: Any) -> set[str]:
    model = Net()
    settings = {"create_new_dir": None, **settings}
    trainer = kind(
        model, SGD(model.parameters(), lr=0.05), None, make_batches(3), epochs, folder, hooks=hooks, **settings
    )
    trainer.train()
    return {name for name in os.listdir(trainer.ckpt_dir) if not name.startswith(("latest", "previous", "best"))}


@pytest.mark.parametrize("most", [1, 2])
def test_old_folders_are_removed(most: int, tmp_path: Path) -> None:
    found = run(Folders, tmp_path, CheckpointerHook(max_to_keep=most))
    assert found == {f"epoch_{n}" for n in range(4 - most, 4)}


def test_all_that_was_written_for_a_name_is_removed(tmp_path: Path) -> None:
    found = run(BesideEachOther, tmp_path, CheckpointerHook(max_to_keep=1))
    assert found == {"epoch_3.safetensors", "epoch_3-ema.bin", "epoch_3.pth"}


def test_steps_go_by_the_same_rule(tmp_path: Path) -> None:
    assert run(Folders, tmp_path, CheckpointerHook(every_n_iters=2, keep_steps=2)) == {"step_10", "step_12"}


def test_nothing_else_is_removed(tmp_path: Path) -> None:
    def write_others(trainer: Trainer) -> None:
        for name in ("epoch_0_pictures", "epoch_00", "notes", "epoch_1x"):
            os.makedirs(os.path.join(trainer.ckpt_dir, name), exist_ok=True)

    found = run(Folders, tmp_path, On(before_epoch=write_others), CheckpointerHook(max_to_keep=1))
    assert found == {"epoch_3", "epoch_0_pictures", "epoch_00", "notes", "epoch_1x"}


def test_a_folder_of_an_outdated_name_that_the_save_has_not_written_stays(tmp_path: Path) -> None:
    def write_mine(trainer: Trainer) -> None:
        os.makedirs(os.path.join(trainer.ckpt_dir, "epoch_0"), exist_ok=True)

    found = run(Elsewhere, tmp_path, CheckpointerHook(max_to_keep=1), On(after_epoch=write_mine))
    assert "epoch_0" in found


def test_a_link_is_removed_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    class Linked(Folders):
        def save_checkpoint(self, file_name: str, save_single_model: bool = True, print_info: bool = False) -> None:
            target = tmp_path / "store" / file_name
            target.mkdir(parents=True, exist_ok=True)
            link = Path(self.ckpt_dir, file_name.removesuffix(".pth"))
            link.unlink(missing_ok=True)
            os.symlink(target, link)

    assert run(Linked, tmp_path / "run", CheckpointerHook(max_to_keep=1)) == {"epoch_3"}
    assert (tmp_path / "store" / "epoch_0.pth").is_dir()


def test_the_new_one_is_complete_before_an_old_one_goes(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    class Watched(Folders):
        def save_checkpoint(self, file_name: str, save_single_model: bool = True, print_info: bool = False) -> None:
            self.wait_for_saves()  # old ones go in a thread
            super().save_checkpoint(file_name, save_single_model, print_info)
            if file_name.startswith("epoch"):
                seen.append(sorted(name for name in os.listdir(self.ckpt_dir) if name.startswith("epoch")))

    run(Watched, tmp_path, CheckpointerHook(max_to_keep=1))
    assert seen == [["epoch_0"], ["epoch_0", "epoch_1"], ["epoch_1", "epoch_2"], ["epoch_2", "epoch_3"]]


def test_a_save_that_fails_removes_nothing(tmp_path: Path) -> None:
    class Fails(Folders):
        def save_checkpoint(self, file_name: str, save_single_model: bool = True, print_info: bool = False) -> None:
            if file_name == "epoch_2.pth":
                raise OSError("disk full")
            super().save_checkpoint(file_name, save_single_model, print_info)

    raised_by(lambda: run(Fails, tmp_path, CheckpointerHook(max_to_keep=1)), OSError)
    assert "epoch_1" in os.listdir(tmp_path / "checkpoints")


def test_a_resumed_run_removes_what_the_run_before_has_written(tmp_path: Path) -> None:
    assert run(Folders, tmp_path, CheckpointerHook(max_to_keep=2), epochs=2) == {"epoch_0", "epoch_1"}
    assert run(Folders, tmp_path, CheckpointerHook(max_to_keep=2), epochs=4, resume="auto") == {"epoch_2", "epoch_3"}


def test_two_hooks_keep_what_one_of_them_keeps(tmp_path: Path) -> None:
    hooks = CheckpointerHook(max_to_keep=1), CheckpointerHook(period=2, max_to_keep=2, save_last=False)
    assert run(Folders, tmp_path, *hooks) == {"epoch_1", "epoch_3"}


def test_a_save_that_writes_elsewhere_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(Elsewhere, tmp_path, CheckpointerHook(max_to_keep=1))
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "has written nothing" in r.msg]
    assert len(lines) == 1
    assert "CheckpointerHook asked for epoch_0.pth, but save_checkpoint of Elsewhere has written nothing" in lines[0]
    assert len(os.listdir(tmp_path / "mine")) == 5  # four epochs and the best


def test_files_of_an_override_that_calls_ours_are_removed_as_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Calls(Folders):
        def save_checkpoint(self, file_name: str, save_single_model: bool = True, print_info: bool = False) -> None:
            Trainer.save_checkpoint(self, file_name, save_single_model, print_info)

    assert run(Calls, tmp_path, CheckpointerHook(max_to_keep=1)) == {"epoch_3.pth"}
    assert "has written nothing" not in caplog.text

"""A disk that is full, or may not be written to: the error comes soon and says so, and nothing that was saved is lost."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from tests.faults.kit import is_whole, saved_iter
from tests.small_hooks import On, at_iter
from tests.small_runs import differences, make_batches, weights_of
from torch_frame import CheckpointerHook, CheckpointError, HookBase, LoggerHook, Trainer

EPOCHS, BATCHES = 4, 5


class Wide(nn.Module):
    """13,000 weights: its state takes 160 kB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 2600), nn.ReLU(), nn.Dropout(0.2), nn.Linear(2600, 1))

    def forward(self, batch: Any) -> Any:
        return (self.layers(batch[0]) - batch[1]).square().mean()


def make(work_dir: Path, *hooks: HookBase, every_n_iters: int | None = 2, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    model = Wide()
    saving = CheckpointerHook(every_n_iters=every_n_iters)
    optimizer = AdamW(model.parameters(), lr=0.01)
    return Trainer(
        model, optimizer, None, make_batches(BATCHES), EPOCHS, work_dir, hooks=[*hooks, saving], create_new_dir=None,
        **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The weights of the run on a disk with enough room."""
    trainer = make(tmp_path_factory.mktemp("roomy"))
    trainer.train()
    return weights_of(trainer.model)


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")


@contextlib.contextmanager
def mounted(*arguments: str) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    mount(*arguments)
    try:
        yield
    finally:
        subprocess.run(["umount", arguments[-1]], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """1.5 MB: room for a run's latest, previous, best and temporary file."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=1536k", "tmpfs", str(folder)):
        yield folder


def fill(folder: Path, leave: int) -> None:
    """Write until that many bytes are left."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    (folder / "filler").write_bytes(bytes(free - leave))


def check_what_is_left(work_dir: Path, saved: int) -> None:
    checkpoints = work_dir / "checkpoints"
    assert saved_iter(checkpoints / "latest.pth") == saved
    assert all(is_whole(path) for path in checkpoints.glob("*.pth"))
    assert not list(work_dir.rglob("*.tmp"))


@pytest.mark.parametrize("leave", [0, 4096, 65536])
def test_a_full_disk_is_told_at_the_next_safe_point_and_the_state_before_is_kept(
    small_disk: Path, leave: int, expected: Any
) -> None:
    work_dir = small_disk / "run"

    def fill_when_saved(trainer: Trainer) -> None:
        trainer.wait_for_saves()  # the save of iteration 10
        fill(small_disk, leave)

    trainer = make(work_dir, On(after_iter=at_iter(10, fill_when_saved)))
    with pytest.raises(CheckpointError, match="No space left on device") as raised:
        trainer.train()
    assert str(work_dir / "checkpoints" / "latest.pth") in str(raised.value)
    assert trainer.progress.iter <= 14  # asked for after 12, looked at after 13, or by the save after 14
    check_what_is_left(work_dir, 10)
    (small_disk / "filler").unlink()
    resumed = make(work_dir, resume="auto")
    resumed.train()
    assert resumed.start_epoch == 2
    assert not differences(weights_of(resumed.model), expected)


def test_a_disk_that_is_full_at_the_last_save_is_told_before_train_returns(small_disk: Path) -> None:
    work_dir = small_disk / "run"

    def fill_when_saved(trainer: Trainer) -> None:
        trainer.wait_for_saves()  # the save of iteration 15
        fill(small_disk, 4096)

    trainer = make(work_dir, On(after_iter=at_iter(18, fill_when_saved)), every_n_iters=None)
    with pytest.raises(CheckpointError, match="No space left on device"):
        trainer.train()
    assert trainer.progress.epoch == EPOCHS
    check_what_is_left(work_dir, 15)


def test_a_full_disk_is_told_by_save_checkpoint(small_disk: Path) -> None:
    trainer = make(small_disk / "run")
    trainer.save_checkpoint("mine.pth")
    before = (small_disk / "run" / "checkpoints" / "mine.pth").read_bytes()
    fill(small_disk, 4096)
    with pytest.raises(CheckpointError, match="No space left on device"):
        trainer.save_checkpoint("mine.pth")
    assert (small_disk / "run" / "checkpoints" / "mine.pth").read_bytes() == before
    assert not list(small_disk.rglob("*.tmp"))


def test_a_disk_that_fills_by_the_run_itself_keeps_a_whole_state(small_disk: Path) -> None:
    """Every epoch's weights are kept, with a log beside them, until there is no room; whoever meets it first says so."""
    work_dir = small_disk / "run"
    keeping = CheckpointerHook(max_to_keep=1000, save_last=False)
    trainer = make(work_dir, keeping, LoggerHook(period=1))
    trainer.max_epochs = 50
    with pytest.raises((CheckpointError, OSError), match="No space left on device"):
        trainer.train()
    checkpoints = work_dir / "checkpoints"
    assert saved_iter(checkpoints / "latest.pth") > 0
    assert all(is_whole(path) for path in checkpoints.glob("*.pth"))
    assert not list(work_dir.rglob("*.tmp"))


@contextlib.contextmanager
def unwritable(folder: Path) -> Iterator[Callable[[], None]]:
    """Yields a function that makes the folder so."""
    with contextlib.ExitStack() as stack:

        def forbid() -> None:
            if os.geteuid() != 0:
                folder.chmod(0o555)
                stack.callback(folder.chmod, 0o755)
                return
            # root may write whatever the permissions are
            stack.enter_context(mounted("--bind", str(folder), str(folder)))
            mount("-o", "remount,ro,bind", str(folder))

        yield forbid


def test_a_folder_that_may_not_be_written_is_told_at_the_next_safe_point(tmp_path: Path, expected: Any) -> None:
    work_dir = tmp_path / "run"
    checkpoints = work_dir / "checkpoints"
    with unwritable(checkpoints) as forbid:

        def forbid_when_saved(trainer: Trainer) -> None:
            trainer.wait_for_saves()
            forbid()

        trainer = make(work_dir, On(after_iter=at_iter(10, forbid_when_saved)))
        with pytest.raises(CheckpointError, match=r"Read-only file system|Permission denied") as raised:
            trainer.train()
        assert str(checkpoints) in str(raised.value)
        assert trainer.progress.iter <= 14
        check_what_is_left(work_dir, 10)
    resumed = make(work_dir, resume="auto")
    resumed.train()
    assert not differences(weights_of(resumed.model), expected)

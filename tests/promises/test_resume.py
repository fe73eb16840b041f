"""resume=: what is taken up, what is refused with a list of differences, what is warned of."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

from tests.small_hooks import On
from tests.small_runs import CountingHook, Net, differences, make_batches, make_trainer, raised_by, weights_of
from torch_frame import CheckpointerHook, CheckpointError, HookBase, InfiniteDataLoader, LoggerHook, Trainer
from torch_frame.signals.interruption import INTERRUPTION


class StopAfter(HookBase):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def after_epoch(self) -> None:
        self.trainer.should_stop = self.trainer.epoch + 1 >= self.epochs


def loader(size: int = 20, **settings: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(size, 3, generator=generator), torch.randn(size, 1, generator=generator))
    return DataLoader(data, batch_size=4, shuffle=True, **settings)


def run(work_dir: Path, *hooks: HookBase, data: Any = None, model: Any = None, **settings: Any) -> Trainer:
    settings = {"max_epochs": 4, "seed": 5, "resume": "auto", **settings}
    return make_trainer(
        work_dir, model, data=loader() if data is None else data, hooks=[CheckpointerHook(), *hooks], **settings
    )


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A work dir in which two of four epochs are trained."""
    run(tmp_path / "run", StopAfter(2)).train()
    return tmp_path / "run"


def test_auto_begins_anew_where_there_is_nothing_and_goes_on_where_there_is(half: Path, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    whole.train()
    assert whole.work_dir == str(tmp_path / "whole")
    resumed = run(half)
    resumed.train()
    assert resumed.work_dir == str(half), "no new folder"
    assert resumed.start_epoch == 2
    assert differences(weights_of(whole.model), weights_of(resumed.model)) == []
    assert differences(whole.optimizer.state_dict(), resumed.optimizer.state_dict()) == []


@pytest.mark.parametrize("name", ["latest.pth", "previous.pth"])
def test_a_path_is_taken_up_in_its_own_folder(name: str, half: Path, tmp_path: Path) -> None:
    resumed = run(tmp_path / "elsewhere", resume=half / "checkpoints" / name)
    resumed.train()
    assert resumed.work_dir == str(half)
    assert resumed.start_epoch == (2 if name == "latest.pth" else 1)
    assert not (tmp_path / "elsewhere").exists()


def test_nothing_is_read_before_train_begins_so_later_hooks_get_their_state(tmp_path: Path) -> None:
    run(tmp_path / "run", CountingHook(), StopAfter(3)).train()
    hook = CountingHook()
    trainer = run(tmp_path / "run")
    assert trainer.progress.epoch == 0
    trainer.register_hooks([hook])
    trainer.train()
    assert hook.count == 4


def test_a_second_train_goes_on_and_does_not_resume_again(half: Path) -> None:
    trainer = run(half)
    trainer.train()
    trainer.max_epochs = 6
    trainer.train()
    assert trainer.progress.epoch == 6


def test_an_explicit_load_goes_before_resume(half: Path) -> None:
    trainer = run(half)
    trainer.load_checkpoint(half / "checkpoints" / "previous.pth")
    assert trainer.progress.epoch == 1
    trainer.train()
    assert trainer.start_epoch == 1


def test_the_log_says_from_where(half: Path) -> None:
    run(half, LoggerHook()).train()
    text = (half / "log.txt").read_text()
    assert "epoch 3, after 0 of its batches; 10 iterations and 10 updates in all" in text


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_auto_takes_the_older_one_where_the_newest_is_damaged_and_says_why(damage: str, half: Path) -> None:
    latest = half / "checkpoints" / "latest.pth"
    content = bytearray(latest.read_bytes())
    if damage == "flip":
        content[200] ^= 2
    latest.write_bytes(content[: {"flip": len(content), "cut": 900, "empty": 0}[damage]])
    trainer = run(half)
    trainer.train()
    assert trainer.start_epoch == 1
    text = (half / "log.txt").read_text()
    assert "Not resumed from" in text
    assert "latest.pth is damaged" in text


def test_what_a_kill_inside_a_save_has_left_is_gone_when_the_run_goes_on(half: Path) -> None:
    left = half / "checkpoints" / ".epoch_7.pth.tmp"
    left.write_bytes(b"half")
    trainer = run(half, resume="auto")
    assert left.exists()
    trainer.train()
    assert not list(half.rglob("*.tmp"))


def test_auto_refuses_where_all_are_damaged_and_touches_nothing(half: Path) -> None:
    for name in ("latest.pth", "previous.pth"):
        (half / "checkpoints" / name).write_bytes(b"PK not really")
    trainer = run(half)
    error = raised_by(trainer.train, CheckpointError)
    assert "latest.pth" in str(error)
    assert "previous.pth" in str(error)
    assert "move them away" in str(error)
    assert (half / "checkpoints" / "latest.pth").read_bytes() == b"PK not really"


@pytest.mark.parametrize("resume", [3, "", True])
def test_a_wrong_resume_is_told(resume: Any, tmp_path: Path) -> None:
    assert "resume is" in str(raised_by(lambda: run(tmp_path, resume=resume), TypeError))


def test_a_missing_file_is_told_with_the_places_looked_at(tmp_path: Path) -> None:
    error = raised_by(run(tmp_path / "run", resume="latest.pth").train, FileNotFoundError)
    assert str(tmp_path / "run") in str(error)


def wider() -> Net:
    model = Net()
    model.layers[2] = torch.nn.Linear(8, 2)
    return model


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": wider()}, "layers.2.weight was [1, 8], now it is [2, 8]"),
    "precision": ({"precision": "bf16"}, "precision was fp32, now it is bf16"),
    "ema": ({"use_ema": True}, "use_ema was False, now it is True"),
    "seed": ({"seed": 6}, "seed was 5, now it is 6"),
    "data length": ({"data": loader(24)}, "an epoch's data was 20 samples, now it is 24 samples"),
    "list of data": ({"data": make_batches(3)}, "an epoch's data was 20 samples, now it is 3 batches"),
    "loader's seed": (
        {"data": InfiniteDataLoader(loader().dataset, 4, shuffle=True, seed=9)},
        "the loader's seed was None, now it is 9",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("how", ["auto", "path"])
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_differences(name: str, how: str, half: Path) -> None:
    settings, words = OTHERS[name]
    trainer = run(half, **settings, **({} if how == "auto" else {"resume": half / "checkpoints" / "latest.pth"}))
    before = weights_of(trainer.model)
    assert words in str(raised_by(trainer.train, CheckpointError))
    assert differences(before, weights_of(trainer.model)) == [], "nothing has been changed"


def test_another_optimizer_is_refused(half: Path) -> None:
    model = Net()
    trainer = run(half, model=model, optimizer=Adam(model.parameters()))
    assert "the optimizer was SGD, now it is Adam" in str(raised_by(trainer.train, CheckpointError))


def test_another_environment_is_warned_of_by_name(half: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, threads = Net(), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with caplog.at_level(logging.WARNING):
            run(half, model=model, optimizer=SGD(model.parameters(), lr=0.05), gradient_accumulation_steps=2).train()
    finally:
        torch.set_num_threads(threads)
    assert f"num_threads was {threads}, now it is {threads + 1}" in caplog.text
    assert "gradient_accumulation_steps was 1, now it is 2" in caplog.text


def test_after_a_fetch_that_failed_no_wait_is_broken_off(tmp_path: Path) -> None:
    """What training waits for at its end (a file that is being written) is no wait for data."""

    class Source:
        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Any:
            yield make_batches(1)[0]
            raise OSError("the disk of the data is gone")

    trainer = make_trainer(tmp_path / "run", data=Source())
    raised_by(trainer.train, OSError)
    assert not INTERRUPTION.allowed


def test_outside_the_main_thread_training_works_and_no_handler_is_installed(tmp_path: Path) -> None:
    import signal

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    seen: list[Any] = []

    def look(trainer: Any) -> None:
        seen.append({number: signal.getsignal(number) for number in before})

    trainer = run(tmp_path / "run", On(before_epoch=look))
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join(60)
    assert trainer.progress.epoch == 4
    assert seen == [before] * 4
    run(tmp_path / "other", On(before_epoch=look)).train()
    assert seen[-1] != before
    assert {number: signal.getsignal(number) for number in before} == before

"""Files that were damaged, cut, continued or made to run code: each is refused with a sentence, and the other state is taken."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from tests.small_runs import Net, differences, make_batches, make_trainer, weights_of
from torch_frame import CheckpointerHook, CheckpointError, EvalHook, Trainer
from torch_frame.checkpoint import io
from torch_frame.checkpoint.seal import SealingFile

EPOCHS = 3
slow = pytest.mark.slow, pytest.mark.timeout(3600)


class Tiny(nn.Module):
    """One weight: its state is as small as one gets."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, batch: Any) -> Any:
        return (self.w * batch).square().mean()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run of one weight."""
    model = Tiny()
    hooks = [CheckpointerHook(max_to_keep=1)]
    trainer = make_trainer(
        tmp_path_factory.mktemp("tiny"), model, SGD(model.parameters(), lr=0.1), data=[torch.ones(1)], hooks=hooks
    )
    trainer.train()
    return Path(trainer.ckpt_dir)


def trainer_in(work_dir: Path, **settings: Any) -> Trainer:
    """A run that writes every kind of file; always from the same weights and random numbers."""
    torch.manual_seed(0)
    model = Net(dropout=True, norm=True)

    def errors(model: Any, batch: Any) -> Any:
        return {"error": (model.predict(batch[0]) - batch[1]).square().flatten()}

    hooks = [
        EvalHook(make_batches(2, seed=1), errors, save_metric="error", max_first=False, max_to_keep=2),
        CheckpointerHook(every_n_iters=2),
    ]
    return make_trainer(work_dir, model, max_epochs=EPOCHS, hooks=hooks, use_ema=True, create_new_dir=None, **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run that has come to its end, with all its files."""
    trainer = trainer_in(tmp_path_factory.mktemp("finished"))
    trainer.train()
    return trainer


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """The work dir of a run with a `latest.pth` of iteration 8 and a `previous.pth` of iteration 7."""
    trainer = trainer_in(tmp_path / "run")
    trainer.register_hooks([_StopAt(8)])
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    return tmp_path / "run"


class _StopAt(CheckpointerHook):
    """Saves a state at each of the last two iterations, and ends the run by an error."""

    def __init__(self, iter: int) -> None:
        super().__init__(period=1000, every_n_iters=1)
        self.iter = iter

    def after_epoch(self) -> None:
        """Nothing."""

    def after_iter(self) -> None:
        if self.trainer.cur_iter == self.iter:
            raise ZeroDivisionError
        if self.trainer.cur_iter >= self.iter - 2:
            super().after_iter()


# ---------------------------------------------------------------- bits


def refused(path: Path) -> bool:
    try:
        io.read(path)
    except CheckpointError as error:
        return str(path) in str(error)
    return False


def flips_not_refused(path: Path, bits: Iterable[int]) -> list[int]:
    """Those of a file's bits whose flip goes unseen."""
    unseen = []
    with open(path, "r+b", buffering=0) as file:
        for bit in bits:
            place, mask = bit // 8, 1 << bit % 8
            byte = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([byte[0] ^ mask]), place)
            if not refused(path):
                unseen.append(bit)
            os.pwrite(file.fileno(), byte, place)
    return unseen


def copy_of(path: Path, folder: Path) -> Path:
    copy = folder / path.name
    shutil.copyfile(path, copy)
    return copy


@pytest.mark.parametrize("name", ["best.pth", "epoch_1.pth", "latest.pth"])
def test_every_flipped_bit_is_refused(tiny: Path, tmp_path: Path, name: str) -> None:
    path = copy_of(tiny / name, tmp_path)
    assert flips_not_refused(path, range(8 * path.stat().st_size)) == []
    io.read(path)  # all bits are back


@pytest.mark.parametrize(
    ("name", "stride"), [("best.pth", 1), ("latest.pth", 17), pytest.param("latest.pth", 1, marks=slow)]
)
def test_a_file_cut_at_any_length_is_refused(tiny: Path, tmp_path: Path, name: str, stride: int) -> None:
    path = copy_of(tiny / name, tmp_path)
    size = path.stat().st_size
    lengths = sorted({*range(0, size, stride), *range(size - 200, size)}, reverse=True)
    unseen = []
    for length in lengths:
        os.truncate(path, length)
        if not refused(path):
            unseen.append(length)
    assert unseen == []


@pytest.mark.parametrize("name", ["best.pth", "latest.pth"])
@pytest.mark.parametrize("tail", [b"\0", b"\n", bytes(64), bytes(200), b"PK\x05\x06" + bytes(18)])
def test_a_file_with_bytes_appended_is_refused(tiny: Path, tmp_path: Path, name: str, tail: bytes) -> None:
    path = copy_of(tiny / name, tmp_path)
    with open(path, "ab") as file:
        file.write(tail)
    assert refused(path)


def test_a_file_behind_which_another_whole_one_is_appended_is_refused(tiny: Path, tmp_path: Path) -> None:
    path = copy_of(tiny / "latest.pth", tmp_path)
    with open(path, "ab") as file:
        file.write((tiny / "previous.pth").read_bytes())
    assert refused(path)


def test_a_state_whose_digest_was_taken_off_is_refused(tiny: Path, tmp_path: Path) -> None:
    """A valid archive again, as a program leaves it that drops the comment."""
    path = copy_of(tiny / "latest.pth", tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b""
    torch.load(path, weights_only=True)
    assert refused(path)


@pytest.mark.parametrize("mmap", [False, True])
def test_plain_torch_load_reads_every_file(finished: Trainer, mmap: bool) -> None:
    names = {path.name for path in Path(finished.ckpt_dir).iterdir()}
    assert {"latest.pth", "previous.pth", "best.pth"} < names
    assert any(name.startswith("epoch_") for name in names)
    for name in names:
        path = Path(finished.ckpt_dir) / name
        assert not differences(torch.load(path, weights_only=True, mmap=mmap), io.read(path))


# ---------------------------------------------------------------- the other state


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 16
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "first byte": lambda path: flip(path, 0),
    "middle": lambda path: flip(path, 0.5),
    "last byte": lambda path: flip(path, 1),
    "half of it": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "text": lambda path: path.write_text("no checkpoint"),
    "weights": lambda path: shutil.copyfile(path.with_name("best.pth"), path),
}


def resume(work_dir: Path) -> Trainer:
    torch.manual_seed(99)
    trainer = trainer_in(work_dir, resume="auto")
    trainer.train()
    return trainer


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_latest_is_told_of_and_previous_is_taken(
    interrupted: Path, finished: Trainer, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    latest = interrupted / "checkpoints" / "latest.pth"
    DAMAGES[damage](latest)
    before = torch.load(latest.with_name("previous.pth"), weights_only=True)
    with caplog.at_level(logging.INFO, "torch_frame"):
        resumed = resume(interrupted)
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "Not resumed from" in r.message]
    assert len(told) == 1
    assert str(latest) in told[0]
    assert f"{before['progress']['iter']} iterations" in caplog.text
    assert not differences(weights_of(resumed.model), weights_of(finished.model))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_previous_is_no_matter(interrupted: Path, finished: Trainer, damage: str) -> None:
    DAMAGES[damage](interrupted / "checkpoints" / "previous.pth")
    resumed = resume(interrupted)
    assert not differences(weights_of(resumed.model), weights_of(finished.model))
    for name in ("latest.pth", "previous.pth"):
        io.read(interrupted / "checkpoints" / name)


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_both_are_damaged_the_error_names_both_and_nothing_is_touched(interrupted: Path, damage: str) -> None:
    paths = [interrupted / "checkpoints" / name for name in ("latest.pth", "previous.pth")]
    for path in paths:
        DAMAGES[damage](path)
    before = [path.read_bytes() for path in paths]
    with pytest.raises(CheckpointError) as raised:
        resume(interrupted)
    assert all(str(path) in str(raised.value) for path in paths)
    assert [path.read_bytes() for path in paths] == before


def test_a_damaged_latest_does_not_become_previous(interrupted: Path) -> None:
    """The run goes on from previous.pth, whose only whole state must not give way to the damaged one."""
    flip(interrupted / "checkpoints" / "latest.pth", 0.5)
    trainer = trainer_in(interrupted, resume="auto")
    seen = []

    class Look(CheckpointerHook):
        def after_iter(self) -> None:
            self.trainer.save_checkpoint("latest.pth", save_single_model=False)
            paths = [interrupted / "checkpoints" / name for name in ("latest.pth", "previous.pth")]
            seen.append([io.read(path)["progress"]["iter"] for path in paths])

    trainer.register_hooks([Look(period=1000)])
    trainer.train()
    assert seen[0] == [8, 7]  # the first save keeps what it went on from


# ---------------------------------------------------------------- hostile


class Hostile:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


class HostileByEval(Hostile):
    def __reduce__(self) -> Any:
        return eval, (f"__import__('os').mkdir({str(self.folder)!r})",)


def sealed(path: Path, content: Any, **settings: Any) -> None:
    with open(path, "wb") as file:
        sealing = SealingFile(file)
        torch.save(content, sealing, **settings)  # type: ignore[arg-type]  # write and flush are all it calls
        sealing.seal()


HOSTILE: dict[str, Callable[[Path, Any, Path], None]] = {
    "mkdir": lambda path, state, made: sealed(path, {**state, "hooks": {"mine": Hostile(made)}}),
    "eval": lambda path, state, made: sealed(path, {**state, "progress": HostileByEval(made)}),
    "whole": lambda path, state, made: sealed(path, Hostile(made)),
    "without a digest": lambda path, state, made: torch.save({**state, "rng": Hostile(made)}, path),
    "legacy": lambda path, state, made: torch.save(
        {**state, "rng": Hostile(made)}, path, _use_new_zipfile_serialization=False
    ),
    "bare pickle": lambda path, state, made: path.write_bytes(pickle.dumps(Hostile(made), protocol=2)),
}


@pytest.fixture(params=HOSTILE)
def hostile(request: pytest.FixtureRequest, interrupted: Path) -> Iterator[Path]:
    """A `latest.pth` that would make a folder, with all that a state has; whole and with a right digest where it can have one."""
    latest, made = interrupted / "checkpoints" / "latest.pth", interrupted / "made"
    state = torch.load(latest, weights_only=True)
    HOSTILE[request.param](latest, state, made)
    torch_would = latest.with_name("copy.pth")
    shutil.copyfile(latest, torch_would)
    yield latest
    assert not made.exists(), "it has run"
    if request.param != "bare pickle":
        torch.load(torch_would, weights_only=False)
        assert made.exists(), "it would not have run in any case"


def test_a_hostile_file_is_refused_by_load_checkpoint(hostile: Path) -> None:
    trainer = trainer_in(hostile.parents[1])
    before = weights_of(trainer.model)
    with pytest.raises(CheckpointError, match=r"latest\.pth"):
        trainer.load_checkpoint(hostile)
    assert not differences(weights_of(trainer.model), before)


def test_a_hostile_file_is_refused_by_resume_with_its_path(hostile: Path) -> None:
    with pytest.raises(CheckpointError, match=r"latest\.pth"):
        trainer_in(hostile.parents[1], resume=hostile).train()


def test_resume_auto_takes_the_other_one(hostile: Path, finished: Trainer, caplog: pytest.LogCaptureFixture) -> None:
    resumed = resume(hostile.parents[1])
    assert "Not resumed from" in caplog.text
    assert not differences(weights_of(resumed.model), weights_of(finished.model))


def test_resume_auto_refuses_a_hostile_file_that_is_alone(hostile: Path) -> None:
    hostile.with_name("previous.pth").unlink()
    with pytest.raises(CheckpointError, match=r"latest\.pth"):
        resume(hostile.parents[1])

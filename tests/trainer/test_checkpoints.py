"""load_checkpoint finds a file and refuses what does not fit; save_checkpoint keeps what is good."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR

from tests.small_hooks import On
from tests.small_runs import Net, copied, differences, make_trainer, weights_of
from torch_frame import CheckpointerHook, CheckpointError, NonFiniteError, SettingError, Trainer

# ---------------------------------------------------------------- load_checkpoint


def finished_run(work_dir: Path, **kwargs: Any) -> Trainer:
    trainer = make_trainer(work_dir, hooks=[CheckpointerHook()], **kwargs)
    trainer.train()
    return trainer


def test_a_checkpoint_is_found_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished_run(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "other/checkpoints/latest.pth", "other/checkpoints/latest.pth"):
        trainer = make_trainer(tmp_path / "run")
        trainer.load_checkpoint(path)
        assert trainer.progress.epoch == 2
        assert Path(trainer.work_dir).resolve() == tmp_path / "other"


def test_a_checkpoint_is_found_in_the_work_dir(tmp_path: Path) -> None:
    finished_run(tmp_path / "run")
    trainer = make_trainer(tmp_path / "run", max_epochs=3)
    trainer.load_checkpoint("latest.pth")
    trainer.train()
    assert trainer.work_dir == str(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_is_found_in_the_newest_sibling(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for epochs, mtime in ((1, 2000), (2, 3000), (3, 1000)):
        trainer = finished_run(tmp_path / "run", create_new_dir="count", max_epochs=epochs)
        os.utime(Path(trainer.ckpt_dir, "latest.pth"), (mtime, mtime))
    trainer = make_trainer(tmp_path / "run", create_new_dir="count", max_epochs=4)
    trainer.load_checkpoint("latest.pth")
    assert trainer.progress.epoch == 2
    trainer.train()
    assert Path(trainer.work_dir).name == "run_1"
    assert len(list(tmp_path.iterdir())) == 4


def test_the_work_dir_itself_comes_before_its_siblings(tmp_path: Path) -> None:
    finished_run(tmp_path / "run", max_epochs=1)
    finished_run(tmp_path / "run", max_epochs=2)
    trainer = make_trainer(tmp_path / "run")
    trainer.load_checkpoint("latest.pth")
    assert trainer.progress.epoch == 1


def test_a_checkpoint_that_is_not_there_is_named_with_the_places(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"(?s)nowhere\.pth.*checkpoints"):
        make_trainer(tmp_path / "run").load_checkpoint("nowhere.pth")


@pytest.mark.parametrize("arguments", [{}, {"path": "latest.pth", "checkpoint": {}}])
def test_load_checkpoint_takes_one_of_the_two(arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="one of the two"):
        make_trainer(tmp_path).load_checkpoint(**arguments)


def test_weights_are_no_state_to_resume_from(tmp_path: Path) -> None:
    trainer = finished_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="checkpoint="):
        make_trainer(tmp_path / "run").load_checkpoint(Path(trainer.ckpt_dir, "best.pth"))


UNFIT = {
    "another_model": {"model": Net(norm=True)},
    "ema_added": {"use_ema": True},
    "precision": {"precision": "bf16"},
}


@pytest.mark.parametrize("other", UNFIT.values(), ids=UNFIT)
def test_a_state_of_another_run_is_refused_and_changes_nothing(other: dict[str, Any], tmp_path: Path) -> None:
    finished_run(tmp_path / "run")
    trainer = make_trainer(tmp_path / "run", **{"model": Net(seed=1), **other})
    before = weights_of(trainer.model)
    with pytest.raises(CheckpointError):
        trainer.load_checkpoint("latest.pth")
    assert differences(before, weights_of(trainer.model)) == []
    assert trainer.progress.epoch == 0


def test_a_state_with_another_optimizer_or_scheduler_is_refused(tmp_path: Path) -> None:
    finished_run(tmp_path / "run")
    model = Net(seed=1)
    before = weights_of(model)
    adam = make_trainer(tmp_path / "run", model, AdamW(model.parameters(), lr=0.1))
    sgd = SGD(model.parameters(), lr=0.1)
    for trainer in (adam, make_trainer(tmp_path / "run", model, sgd, StepLR(sgd, 1))):
        with pytest.raises(CheckpointError):
            trainer.load_checkpoint("latest.pth")
    assert differences(before, weights_of(model)) == []


def test_a_shape_that_differs_is_named_with_both_shapes(tmp_path: Path) -> None:
    model = Net()
    finished_run(tmp_path / "run", model=model)
    wider = Net()
    wider.layers[2] = nn.Linear(8, 2)
    with pytest.raises(CheckpointError, match=r"layers\.2\.weight.*\[1, 8\].*\[2, 8\]"):
        make_trainer(tmp_path / "run", wider).load_checkpoint("latest.pth")


def test_weights_only_begins_a_new_run_with_them(tmp_path: Path) -> None:
    first = finished_run(tmp_path / "run")
    weights = torch.load(os.path.join(first.ckpt_dir, "best.pth"), weights_only=True)
    model = Net(seed=1)
    trainer = make_trainer(tmp_path / "run", model, use_ema=True)
    report = trainer.load_checkpoint(checkpoint=weights)
    assert report.complete
    assert differences(weights_of(first.model), weights_of(model)) == []
    assert differences(weights_of(first.model), weights_of(trainer.model_evaluate)) == []
    assert trainer.progress.epoch == 0
    trainer.train(1, 1)
    assert trainer.work_dir != first.work_dir


def test_weights_are_reported_where_they_do_not_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = copied(Net().state_dict())
    weights["extra"] = torch.ones(1)
    weights["layers.2.weight"] = torch.ones(5, 8)
    del weights["layers.0.bias"]
    model = Net(seed=1)
    before = weights_of(model)
    report = make_trainer(tmp_path, model).load_checkpoint(checkpoint=weights)
    assert report.missing_keys == ["layers.0.bias"]
    assert report.unexpected_keys == ["extra"]
    assert report.mismatched_shapes == {"layers.2.weight": ((5, 8), (1, 8))}
    assert not report.complete
    for text in ("layers.0.bias", "extra", "layers.2.weight", "5, 8", "1, 8"):
        assert text in caplog.text
    changed = {line.split(":")[0] for line in differences(before, weights_of(model))}
    assert changed == {".layers.0.weight", ".layers.2.bias"}


def test_what_was_loaded_is_in_the_runs_log(tmp_path: Path) -> None:
    first = finished_run(tmp_path / "run")
    resumed = make_trainer(tmp_path / "run", max_epochs=3)
    resumed.load_checkpoint("latest.pth")
    resumed.train()
    log = Path(resumed.log_file).read_text(encoding="utf-8")
    assert os.path.join(first.ckpt_dir, "latest.pth") in log
    other = make_trainer(tmp_path / "other", Net(norm=True))
    other.load_checkpoint(checkpoint=first.model.state_dict())
    other.train()
    assert "layers.1.running_mean" in Path(other.log_file).read_text(encoding="utf-8")


def test_a_whole_state_given_as_weights_gives_its_weights(tmp_path: Path) -> None:
    first = finished_run(tmp_path / "run")
    state = torch.load(os.path.join(first.ckpt_dir, "latest.pth"), weights_only=True)
    model = Net(seed=1)
    trainer = make_trainer(tmp_path / "run", model)
    trainer.load_checkpoint(checkpoint=state)
    assert differences(weights_of(first.model), weights_of(model)) == []
    assert trainer.progress.epoch == 0


# ---------------------------------------------------------------- save_checkpoint


def test_a_saved_checkpoint_is_there_when_the_call_returns(tmp_path: Path) -> None:
    model = Net()
    found: list[Any] = []

    def save(trainer: Trainer) -> None:
        trainer.save_checkpoint("mine.pth")
        found.append(torch.load(os.path.join(trainer.ckpt_dir, "mine.pth"), weights_only=True))
        found.append(weights_of(model))

    trainer = make_trainer(tmp_path / "run", model, max_epochs=1, hooks=[On(after_epoch=save)])
    trainer.train()
    assert differences(*found) == []


def test_nan_weights_are_not_saved_over_good_ones(tmp_path: Path) -> None:
    trainer = finished_run(tmp_path / "run")
    path = Path(trainer.ckpt_dir, "latest.pth")
    before = path.read_bytes()
    with torch.no_grad():
        trainer.model.layers[0].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.0\.weight"):
        trainer.save_checkpoint("latest.pth", save_single_model=False)
    assert path.read_bytes() == before

"""Writers behind one seam: each gets the same, is cut when a run is resumed, and ends no run."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.small_hooks import On, at_iter
from tests.small_runs import make_batches, make_trainer, raised_by
from torch_frame import CheckpointerHook, EvalHook, HookBase, LoggerHook, SettingError, Trainer
from torch_frame.tracking.writers import JsonlWriter, RunInfo, TensorBoardWriter


class ListWriter:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.calls.append(("write", step, dict(values), dict(values.group), dict(values.at)))  # type: ignore[attr-defined]

    def image(self, step: int, name: str, image: Any) -> None:
        self.calls.append(("image", step, name, image.shape, image.dtype))

    def text(self, step: int, name: str, text: str) -> None:
        self.calls.append(("text", step, name, text))

    def histogram(self, step: int, name: str, values: Any) -> None:
        self.calls.append(("histogram", step, name, values.tolist()))

    def cut(self, step: int) -> None:
        self.calls.append(("cut", step))

    def close(self) -> None:
        self.calls.append(("close",))

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == kind]


class FullWriter(ListWriter):
    """Has the methods that a writer need not have."""

    def begin(self, run: RunInfo) -> None:
        self.calls.append(("begin", run.resumed_iter))

    def parameters(self, values: Mapping[str, Any]) -> None:
        self.calls.append(("parameters", dict(values)))

    def failed(self, error: BaseException) -> None:
        self.calls.append(("failed", type(error)))

    def state_dict(self) -> Any:
        return len(self.calls)

    def load_state_dict(self, state: Any) -> None:
        self.calls.append(("state", state))


def scores(model: Any, batch: Any) -> dict[str, list[float]]:
    return {"acc": [0.25, 0.75]}


def events(folder: str, kind: str = "scalars") -> dict[str, list[int]]:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(folder, size_guidance={"images": 0, "tensors": 0, "histograms": 0, "scalars": 0})
    read.Reload()
    of = {"scalars": read.Scalars, "images": read.Images, "tensors": read.Tensors, "histograms": read.Histograms}[kind]
    return {tag: [event.step for event in of(tag)] for tag in read.Tags()[kind]}


def rows_of(trainer: Trainer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(trainer.work_dir, "metrics.jsonl").read_text().splitlines()]


def test_a_writer_of_ones_own_gets_what_the_files_get(tmp_path: Path) -> None:
    writer = ListWriter()
    hooks = [EvalHook(make_batches(1), scores, prefix="val"), LoggerHook(2, writers=[writer, JsonlWriter()])]
    trainer = make_trainer(tmp_path / "run", hooks=hooks)
    trainer.train()
    rows = [(row.pop("iter"), {k: v for k, v in row.items() if k not in ("epoch", "time")}) for row in rows_of(trainer)]
    assert [(step, values) for step, values, _, _ in writer.of("write")] == rows
    *_, group, at = next(call for call in writer.of("write") if "val_acc" in call[1])
    assert (group["val_acc"], group["total_loss"], at["val_acc"], at["total_loss"]) == ("val", "train", 0, 4)
    assert writer.calls[-1] == ("close",)
    assert not Path(trainer.tb_log_dir).exists()


def test_longer_prefixes_are_groups_of_their_own(tmp_path: Path) -> None:
    writer = ListWriter()
    hooks = [EvalHook([0], scores, prefix=prefix) for prefix in ("val", "val_ood", "test")]
    make_trainer(tmp_path, hooks=[*hooks, LoggerHook(writers=[writer])], max_epochs=1).train()
    (_, _, group, _) = writer.of("write")[-1]
    assert {name: group[name] for name in ("val_acc", "val_ood_acc", "test_acc")} == {
        "val_acc": "val", "val_ood_acc": "val_ood", "test_acc": "test",
    }  # fmt: skip


def add_all(trainer: Trainer) -> None:
    trainer.add_image("picture", torch.rand(3, 4, 5))
    trainer.add_text("note", f"epoch {trainer.epoch}")
    trainer.add_histogram("weights", trainer.model.layers[0].weight)


def test_pictures_texts_and_histograms_are_in_tensorboard_at_their_steps(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", hooks=[On(after_epoch=add_all), LoggerHook()])
    trainer.train()
    assert events(trainer.tb_log_dir, "images") == {"picture": [4, 9]}
    assert events(trainer.tb_log_dir, "histograms") == {"weights": [4, 9]}
    assert {tag: steps for tag, steps in events(trainer.tb_log_dir, "tensors").items() if "note" in tag} == {
        "note/text_summary": [4, 9]
    }


def test_the_runs_settings_are_given_once(tmp_path: Path) -> None:
    writers = [FullWriter(), FullWriter()]

    def trainer_of(writer: FullWriter, epochs: int) -> Trainer:
        hooks = [CheckpointerHook(), LoggerHook(writers=[writer])]
        trainer = make_trainer(tmp_path / "run", hooks=hooks, max_epochs=epochs, clip_grad_norm=2.0)
        trainer.log_param("a line", width=64, name="small")
        return trainer

    first = trainer_of(writers[0], 1)
    first.train()
    (given,) = writers[0].of("parameters")
    expected = {"optimizer": "SGD", "lr": 0.05, "clip_grad_norm": 2.0, "max_epochs": 1, "width": 64, "name": "small"}
    assert {name: given[0][name] for name in expected} == expected
    resumed = trainer_of(writers[1], 2)
    resumed.load_checkpoint(Path(first.ckpt_dir, "latest.pth"))
    resumed.train()
    assert [call[0] for call in writers[1].calls[:3]] == ["state", "begin", "cut"]
    assert writers[1].of("cut") == [(5,)]
    assert writers[1].of("parameters") == []


def test_tensorboard_has_the_settings(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    trainer = make_trainer(tmp_path / "run", hooks=[LoggerHook()])
    trainer.train()
    read = EventAccumulator(trainer.tb_log_dir)
    read.Reload()
    content = read.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["optimizer"].string_value == "SGD"


def test_all_writers_are_cut_when_a_run_is_resumed(tmp_path: Path) -> None:
    def stop(trainer: Trainer) -> None:
        raise InterruptedError

    def trainer_of(*hooks: HookBase) -> Trainer:
        show = On(after_iter=lambda trainer: trainer.add_text("note", str(trainer.cur_iter)))
        hooks = [CheckpointerHook(), show, EvalHook([0], scores), LoggerHook(1), *hooks]
        return make_trainer(tmp_path / "run", max_epochs=3, hooks=hooks)

    raised_by(trainer_of(On(after_iter=at_iter(8, stop))).train, InterruptedError)
    trainer = trainer_of()
    trainer.load_checkpoint("latest.pth")
    trainer.train()
    assert events(trainer.tb_log_dir)["train/total_loss"] == list(range(15))
    assert events(trainer.tb_log_dir)["eval/eval_acc"] == [0, 1, 2]
    assert events(trainer.tb_log_dir, "tensors")["note/text_summary"] == list(range(15))
    assert [row["iter"] for row in rows_of(trainer) if "total_loss" in row] == list(range(15))


def test_what_is_logged_in_after_train_is_written(tmp_path: Path) -> None:
    late = On(after_train=lambda trainer: trainer.log(trainer.epoch, test_acc=0.75, smooth=False))
    trainer = make_trainer(tmp_path / "run", hooks=[late, LoggerHook(modes=["train", "test"])])
    trainer.train()
    assert [row["test_acc"] for row in rows_of(trainer) if "test_acc" in row] == [0.75]
    assert events(trainer.tb_log_dir)["test/test_acc"] == [1]


def test_what_was_logged_before_an_error_is_written(tmp_path: Path) -> None:
    def fail(trainer: Trainer) -> None:
        raise InterruptedError

    writer = FullWriter()
    hooks = [On(after_iter=at_iter(7, fail)), LoggerHook(50, writers=[writer, JsonlWriter()])]
    trainer = make_trainer(tmp_path / "run", hooks=hooks)
    raised_by(trainer.train, InterruptedError)
    assert [row["iter"] for row in rows_of(trainer)] == [4, 7]
    assert [call[0] for call in writer.calls[-3:]] == ["failed", "write", "close"]


def test_writers_files_lie_where_they_were_asked_for_whatever_the_current_folder_is_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "first")
    hook = LoggerHook(progress_bar=False, writers=[JsonlWriter("rows.jsonl"), TensorBoardWriter("curves")])
    trainer = make_trainer(tmp_path / "run", max_epochs=1, hooks=[hook])
    monkeypatch.chdir(tmp_path / "second")
    trainer.train()
    assert {path.name for path in (tmp_path / "first").iterdir()} == {"rows.jsonl", "curves"}
    assert not list((tmp_path / "second").iterdir())


def test_period_0_writes_after_each_epoch(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", hooks=[LoggerHook(0)])
    trainer.train()
    assert [row["iter"] for row in rows_of(trainer)] == [4, 9]


def test_a_second_logger_hook_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", hooks=[LoggerHook(), LoggerHook(10)])
    with pytest.raises(SettingError, match="Two LoggerHooks"):
        trainer.train()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"writers": ListWriter}, TypeError, "list of writers"),
        ({"writers": [ListWriter]}, TypeError, "the class ListWriter"),
        ({"writers": [object()]}, TypeError, "'write', 'image'"),
        ({"writers": [], "tb_log_dir": "x"}, SettingError, "tb_log_dir"),
        ({"writers": [], "flush_secs": 3}, SettingError, "flush_secs"),
    ],
)
def test_what_is_no_writer_is_refused(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        LoggerHook(**arguments)


class Failing(ListWriter):
    """Fails whenever it is given a row."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        super().write(step, values)  # type: ignore[arg-type]
        raise self.error


@pytest.mark.parametrize(
    ("error", "attempts"), [(OSError(28, "No space left on device"), 20), (RuntimeError("no answer"), 3)]
)
def test_a_writer_that_fails_is_told_once_and_ends_no_run(
    error: Exception, attempts: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failing, other = Failing(error), ListWriter()
    trainer = make_trainer(tmp_path / "run", hooks=[LoggerHook(1, writers=[failing, other])], max_epochs=4)
    with caplog.at_level(logging.WARNING, "torch_frame"):
        trainer.train()
    assert len(failing.of("write")) == attempts
    assert len(other.of("write")) == 20
    assert failing.calls[-1] == ("close",)
    told = [line for line in caplog.messages if "Failing.write failed" in line]
    assert len(told) == (1 if attempts == 20 else 2)
    assert ("given up" in told[-1]) == (attempts == 3)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_metrics_jsonl_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    trainer = make_trainer(tmp_path / "run", hooks=[LoggerHook(1)], create_new_dir=None)
    with caplog.at_level(logging.WARNING, "torch_frame"):
        trainer.train()
    assert sum("JsonlWriter.write failed" in line for line in caplog.messages) == 1
    assert events(trainer.tb_log_dir)["train/total_loss"] == list(range(10))


def test_a_default_writer_that_cannot_begin_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    trainer = make_trainer(tmp_path / "run", hooks=[LoggerHook(1, tb_log_dir=blocked / "tb")])
    with caplog.at_level(logging.WARNING, "torch_frame"):
        trainer.train()
    assert "TensorBoardWriter is left out" in caplog.text
    assert len(rows_of(trainer)) == 10


def test_a_writer_that_was_asked_for_and_cannot_begin_is_an_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    hook = LoggerHook(writers=[JsonlWriter(blocked / "rows.jsonl")])
    trainer = make_trainer(tmp_path / "run", hooks=[hook])
    raised_by(trainer.train, OSError)
    assert trainer.progress.iter == 0


def test_overrides_of_1_7_are_called_with_its_writer(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")

    class Own(LoggerHook):
        def _write_tensorboard(self) -> None:
            super()._write_tensorboard()
            self._tb_writer.add_scalar("own/tag", 1.0, self.trainer.cur_iter)

    trainer = make_trainer(tmp_path / "run", hooks=[Own(2)])
    trainer.train()
    found = events(trainer.tb_log_dir)
    assert found["own/tag"] == found["train/total_loss"] == [1, 3, 4, 6, 8, 9]


def test_a_line_shows_what_was_made_in_its_epoch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hooks = [EvalHook([0], scores, period=3), LoggerHook(progress_bar=False)]
    trainer = make_trainer(tmp_path / "run", max_epochs=7, hooks=hooks)
    losses = []
    trainer.register_hooks([On(after_epoch=lambda trainer: losses.append(trainer.value("total_loss")))])
    trainer.train()
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("Epoch ") and "/7" in line]
    assert [n for n, line in enumerate(lines, 1) if " 0.5000 " in line] == [3, 6, 7]
    assert all(f" {loss:.4f} " in line for line, loss in zip(lines, losses, strict=True))


def test_a_state_from_before_the_seam_cuts_the_files_too(tmp_path: Path) -> None:
    hook = LoggerHook()
    hook.load_state_dict(
        {"last_write": {}, "run_id": "r", "files": {"metrics.jsonl": {"size": 3}, "tensorboard": {"a": 1}}}
    )
    assert hook._saved == {"JsonlWriter": {"size": 3}, "TensorBoardWriter": {"a": 1}}


def test_two_writers_of_one_kind_keep_their_own_files(tmp_path: Path) -> None:
    writers = [JsonlWriter(tmp_path / "a.jsonl"), JsonlWriter(tmp_path / "b.jsonl"), TensorBoardWriter(tmp_path / "tb")]
    trainer = make_trainer(tmp_path / "run", hooks=[CheckpointerHook(), LoggerHook(writers=writers)])
    trainer.train()
    first, second = (
        [{**json.loads(line), "time": None} for line in (tmp_path / name).read_text().splitlines()]
        for name in ("a.jsonl", "b.jsonl")
    )
    assert first == second != []
    assert os.listdir(tmp_path / "tb")
    assert np.isfinite(trainer.value("total_loss"))


def test_other_writers_may_be_given_when_a_run_is_resumed(tmp_path: Path) -> None:
    def trainer_of(writers: list[Any], epochs: int) -> Trainer:
        hooks = [CheckpointerHook(), LoggerHook(1, writers=writers)]
        return make_trainer(tmp_path / "run", hooks=hooks, max_epochs=epochs, resume="auto")

    trainer_of([TensorBoardWriter()], 1).train()
    trainer = trainer_of([JsonlWriter(), TensorBoardWriter()], 2)
    trainer.train()
    assert [row["iter"] for row in rows_of(trainer)] == list(range(5, 10))
    assert events(trainer.tb_log_dir)["train/total_loss"] == list(range(10))


def test_a_second_train_continues_the_files(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", hooks=[CheckpointerHook(), LoggerHook(1)], max_epochs=1)
    trainer.train()
    trainer.max_epochs = 2
    trainer.train()
    assert [row["iter"] for row in rows_of(trainer)] == list(range(10))
    assert events(trainer.tb_log_dir)["train/total_loss"] == list(range(10))

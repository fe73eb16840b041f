"""The writers for trackers, against the real packages, offline. They are not in .venv: `make test-trackers` has them."""

from __future__ import annotations

import json
import logging
import math
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_hooks import On, at_iter
from tests.small_runs import make_trainer, raised_by
from torch_frame import CheckpointerHook, HookBase, LoggerHook, Trainer
from torch_frame.tracking.experiments import ExperimentWriter, MlflowWriter
from torch_frame.tracking.writers import JsonlWriter

pytestmark = pytest.mark.filterwarnings("default")  # of the packages' own


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path.parent / "trackio"))  # read once, when it is imported
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("GIT_PYTHON_REFRESH", "quiet")


def make_writer(package: str, folder: Path) -> Any:
    pytest.importorskip(package)
    if package == "mlflow":
        return MlflowWriter("tests", tracking_uri=store(folder))
    settings: dict[str, Any] = {"swanlab": {"mode": "offline"}, "wandb": {}, "trackio": {}}[package]
    return ExperimentWriter(package, folder.name, **settings)  # type: ignore[arg-type]


def store(folder: Path) -> str:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    return (folder / "mlruns").as_uri()


def logged(package: str, folder: Path) -> list[dict[str, Any]]:
    """The runs in the tracker's store, oldest first: name, "state", "config", "loss": {step: value}, "media": {name, ...}."""
    return {"wandb": _wandb, "trackio": _trackio, "swanlab": _swanlab, "mlflow": _mlflow}[package](folder)


def records_of(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: 7 bytes, then LevelDB's log format (blocks of 32 KiB; crc, length, type, data)."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or a record's last part
            yield record
            record = b""


def _wandb(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.glob("run*/wandb/offline-run-*/run-*.wandb"), key=os.path.getmtime)
    return [_wandb_run(path) for path in paths]


def _wandb_run(path: Path) -> dict[str, Any]:
    """Read until the exit is there: another process writes the file, a moment after `finish`."""
    from wandb.proto import wandb_internal_pb2

    run: dict[str, Any] = {"state": None}
    end = time.monotonic() + 20
    while run["state"] is None and time.monotonic() < end:
        run = {"config": {}, "loss": {}, "media": set(), "state": None}
        for record in records_of(path.read_bytes()):
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            for config in (message.run.config, message.config):
                run["config"] |= {item.key: json.loads(item.value_json) for item in config.update}
            if message.HasField("history"):
                items = message.history.item
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
                run["media"] |= values.keys() & {"picture", "note", "weights"}
                if "total_loss" in values:
                    run["loss"][message.history.step.num] = values["total_loss"]
            if message.HasField("exit"):
                run["state"] = message.exit.exit_code
        time.sleep(0.1)
    return run


def _trackio(folder: Path) -> list[dict[str, Any]]:
    from trackio import SQLiteStorage

    runs = []
    for name in SQLiteStorage.get_runs(folder.name):
        name = name if isinstance(name, str) else name["name"]
        rows = SQLiteStorage.get_logs(folder.name, name)
        runs.append(
            {
                "name": name,
                "config": SQLiteStorage.get_run_config(folder.name, name),
                "loss": {row["step"]: row["total_loss"] for row in rows if "total_loss" in row},
                "media": {key for row in rows for key in row if key in ("picture", "note", "weights")},
                "steps": [row["step"] for row in rows if "total_loss" in row],
            }
        )
    return sorted(runs, key=lambda run: len(run["name"]))


def _swanlab(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.glob("run*/swanlog/run-*/run-*.swanlab"), key=os.path.getmtime)
    return [{"path": path, "text": path.read_bytes(), "config": {}} for path in paths]


def _mlflow(folder: Path) -> list[dict[str, Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store(folder))
    experiment = client.get_experiment_by_name("tests")
    runs = []
    for run in reversed(client.search_runs([experiment.experiment_id])):
        points = client.get_metric_history(run.info.run_id, "total_loss")
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        runs.append(
            {
                "state": run.info.status,
                "config": run.data.params,
                "loss": {point.step: point.value for point in points},
                "steps": [point.step for point in points],
                "media": files,
            }
        )
    return runs


def add_all(trainer: Trainer) -> None:
    trainer.add_image("picture", torch.rand(3, 4, 5))
    trainer.add_image("grey", torch.rand(4, 5))
    trainer.add_text("note", "a <b> & c")
    trainer.add_histogram("weights", trainer.model.layers[0].weight)


def trainer_of(writer: Any, folder: Path, *hooks: HookBase, epochs: int = 2, jsonl: bool = True) -> Trainer:
    writers = [writer, *([JsonlWriter()] if jsonl else [])]
    show = On(after_epoch=add_all)
    all_hooks = [CheckpointerHook(), show, LoggerHook(1, writers=writers, progress_bar=False), *hooks]
    return make_trainer(folder / "run", max_epochs=epochs, hooks=all_hooks, create_new_dir=None)


PACKAGES = ["wandb", "trackio", "swanlab", "mlflow"]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_run_is_in_the_tracker(package: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "torch_frame"):
        trainer = trainer_of(make_writer(package, tmp_path), tmp_path)
        trainer.train()
    assert [line for line in caplog.messages if "failed" in line or "given up" in line] == []
    (run,) = logged(package, tmp_path)
    if package == "swanlab":  # its file is its own: the names and the settings are in it
        assert all(word in run["text"] for word in (b"total_loss", b"picture", b"note"))
        assert ("swanlab has no histograms" in caplog.text) is True
        return
    rows = [json.loads(line) for line in Path(trainer.work_dir, "metrics.jsonl").read_text().splitlines()]
    assert run["loss"] == pytest.approx({row["iter"]: row["total_loss"] for row in rows})
    assert str(run["config"]["optimizer"]) == "SGD"
    assert float(run["config"]["lr"]) == 0.05
    expected = {"images", "texts", "histograms"} if package == "mlflow" else {"picture", "note", "weights"}
    assert run["media"] >= expected
    assert run.get("state") in (0, "FINISHED", None)


@pytest.mark.parametrize("package", PACKAGES)
def test_after_a_crash_the_trackers_run_is_closed_as_failed(package: str, tmp_path: Path) -> None:
    def stop(trainer: Trainer) -> None:
        raise InterruptedError

    trainer = trainer_of(make_writer(package, tmp_path), tmp_path, On(after_iter=at_iter(3, stop)))
    raised_by(trainer.train, InterruptedError)
    (run,) = logged(package, tmp_path)
    if package == "swanlab":
        assert b"InterruptedError" in run["text"]
        return
    assert run.get("state") in (1, "FAILED", None)
    assert sorted(run["loss"]) == [0, 1, 2, 3]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_resumed_run_begins_with_the_rows_before_it(package: str, tmp_path: Path) -> None:
    def stop(trainer: Trainer) -> None:
        raise InterruptedError

    crashed = trainer_of(make_writer(package, tmp_path), tmp_path, On(after_iter=at_iter(7, stop)), epochs=3)
    raised_by(crashed.train, InterruptedError)
    resumed = trainer_of(make_writer(package, tmp_path), tmp_path, epochs=3)
    resumed.load_checkpoint(Path(crashed.ckpt_dir, "latest.pth"))
    resumed.train()
    runs = logged(package, tmp_path)
    assert len(runs) == 2
    if package == "swanlab":
        return
    assert sorted(runs[0]["loss"]) == list(range(8))
    assert sorted(runs[1]["loss"]) == list(range(15))
    assert runs[1].get("steps", list(range(15))) == list(range(15))
    assert all(math.isfinite(value) for value in runs[1]["loss"].values())


@pytest.mark.parametrize("package", ["trackio", "mlflow"])
def test_a_run_that_was_saved_at_its_last_row_is_continued(package: str, tmp_path: Path) -> None:
    first = trainer_of(make_writer(package, tmp_path), tmp_path, epochs=1)
    first.train()
    resumed = trainer_of(make_writer(package, tmp_path), tmp_path, epochs=2)
    resumed.load_checkpoint(Path(first.ckpt_dir, "latest.pth"))
    resumed.train()
    (run,) = logged(package, tmp_path)
    assert run["steps"] == list(range(10))
    assert run.get("state") in ("FINISHED", None)


@pytest.mark.parametrize("package", ["trackio", "mlflow"])
def test_without_metrics_jsonl_points_may_be_there_twice_and_that_is_told(
    package: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = trainer_of(make_writer(package, tmp_path), tmp_path, epochs=1, jsonl=False)
    first.train()
    resumed = trainer_of(make_writer(package, tmp_path), tmp_path, epochs=2, jsonl=False)
    resumed.load_checkpoint(Path(first.ckpt_dir, "latest.pth"))
    with caplog.at_level(logging.WARNING, "torch_frame"):
        resumed.train()
    assert "may be there twice" in caplog.text
    assert len(logged(package, tmp_path)) == 1


def test_a_run_of_wandb_that_the_script_has_begun_is_used_and_left_open(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    own = wandb.init(project="tests", dir=str(tmp_path / "run0"), mode="offline")
    trainer_of(make_writer("wandb", tmp_path), tmp_path).train()
    assert wandb.run is own
    own.finish()
    (run,) = logged("wandb", tmp_path)
    assert sorted(run["loss"]) == list(range(10))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_that_is_missing_is_named_before_the_first_step(package: str, tmp_path: Path) -> None:
    try:
        __import__(package)
        pytest.skip("installed")
    except ModuleNotFoundError:
        pass
    writer = MlflowWriter() if package == "mlflow" else ExperimentWriter(package)  # type: ignore[arg-type]
    trainer = trainer_of(writer, tmp_path)
    error = raised_by(trainer.train, ModuleNotFoundError)
    assert "pip install" in str(error)
    assert trainer.progress.iter == 0


def test_another_package_is_refused() -> None:
    with pytest.raises(ValueError, match="'wandb', 'trackio' or 'swanlab'"):
        ExperimentWriter("comet")  # type: ignore[arg-type]

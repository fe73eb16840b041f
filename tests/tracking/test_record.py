"""What is left for `torch-frame show` is whole, cut on resume, and ends no run."""

import json
import logging
import math
from pathlib import Path

import pytest

from torch_frame.tracking.record import RunFiles, RunRecord, entries_in
from torch_frame.tracking.table import Entry


def entry_of(epoch: int, **more: object) -> Entry:
    return Entry(f"Epoch {epoch + 1}/9", epoch * 10 + 9, epoch, {"total_loss": 1.0 / (epoch + 1)}, **more)  # type: ignore[arg-type]


def begun(folder: Path, resumed_iter: int | None = None, num_lines: int | None = None) -> RunRecord:
    record = RunRecord(str(folder), resumed_iter)
    record.begin({"max_epochs": 9, "settings": {"lr": 0.1}}, num_lines)
    return record


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    record = begun(tmp_path)
    entries = [entry_of(0, best=["total_loss"], lr=[0.1, 0.01], per_s=3.0), entry_of(1)]
    for entry in entries:
        record.add(entry)
    record.end("finished", seconds=2.5)
    run = RunFiles.read(tmp_path)
    assert run.entries == entries
    assert (run.how, run.settings, run.facts["seconds"]) == ("finished", {"lr": 0.1}, 2.5)
    assert run.best("total_loss") == entries[0]


@pytest.mark.parametrize(
    ("resumed_iter", "num_lines", "kept"), [(None, None, 0), (20, None, 2), (20, 1, 1), (15, None, 1)]
)
def test_a_resumed_run_cuts_what_it_writes_again(
    resumed_iter: int | None, num_lines: int | None, kept: int, tmp_path: Path
) -> None:
    record = begun(tmp_path)
    for epoch in range(4):
        record.add(entry_of(epoch))
    assert begun(tmp_path, resumed_iter, num_lines).num_lines == kept
    assert [entry.epoch for entry in entries_in(tmp_path / "table.jsonl")] == list(range(kept))


def test_the_time_of_a_resumed_run_is_that_of_all_its_parts(tmp_path: Path) -> None:
    begun(tmp_path).end("stopped", seconds=100.0)
    assert begun(tmp_path, resumed_iter=10).seconds_before == 100.0
    assert begun(tmp_path).seconds_before == 0.0


def test_a_killed_process_is_told_from_a_running_one(tmp_path: Path) -> None:
    begun(tmp_path)
    assert RunFiles.read(tmp_path).how == "running"
    facts = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**facts, "pid": 2**22 + 1}))  # more than Linux gives
    assert RunFiles.read(tmp_path).how == "killed"


def test_what_is_known_later_is_written_at_once(tmp_path: Path) -> None:
    begun(tmp_path).note(columns=["b", "a"])
    assert RunFiles.read(tmp_path).columns == ["b", "a"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nothing"):
        RunFiles.read(tmp_path / "nothing")


def test_half_a_line_and_odd_lines_are_left_out(tmp_path: Path) -> None:
    record = begun(tmp_path)
    record.add(entry_of(0))
    with (tmp_path / "table.jsonl").open("a") as file:
        file.write('[1, 2]\nnull\n{"values": 3}\n{"label": "Epoch 2/9", "iter": 19, "ep')
    assert entries_in(tmp_path / "table.jsonl") == [entry_of(0)]


def test_values_that_are_not_finite_come_back(tmp_path: Path) -> None:
    record = begun(tmp_path)
    record.add(Entry("Epoch 1", 0, 0, {"a": math.inf, "b": math.nan}, lr=[math.nan]))
    (entry,) = entries_in(tmp_path / "table.jsonl")
    assert entry.values["a"] == math.inf
    assert math.isnan(entry.values["b"])
    assert (tmp_path / "table.jsonl").read_text().count("null") == 6  # those, and what is not known


@pytest.mark.parametrize("content", ["", "nothing", "[]", '{"how": '])
def test_a_damaged_run_file_is_as_none(content: str, tmp_path: Path) -> None:
    begun(tmp_path).add(entry_of(0))
    (tmp_path / "run.json").write_text(content)
    run = RunFiles.read(tmp_path)
    assert (run.how, run.settings, len(run.entries)) == ("unknown", {}, 1)


def test_a_folder_that_is_gone_is_told_once_and_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = RunRecord(str(tmp_path / "gone"), None)
    with caplog.at_level(logging.WARNING, "torch_frame"):
        record.begin({})
        record.add(entry_of(0))
        record.end("finished")
    assert len(caplog.messages) == 1
    assert "the run goes on" in caplog.text


def test_a_run_without_a_table_is_read_from_its_metrics(tmp_path: Path) -> None:
    rows = [{"iter": 4, "epoch": 0, "time": 1.0, "lr": 0.1, "total_loss": 3.0}]
    rows += [
        {"iter": 9, "epoch": 0, "time": 2.0, "lr": 0.2, "total_loss": 2.0, "eval_acc": 0.5},
        {"iter": 9, "epoch": 0, "n": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (entry,) = RunFiles.read(tmp_path).entries
    assert (entry.label, entry.iter, entry.lr) == ("Epoch 1", 9, (0.2,))
    assert {name: value for name, value in entry.values.items() if name != "n"} == {"total_loss": 2.0, "eval_acc": 0.5}


def test_a_folder_without_a_run_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no run: there is no run\.json"):
        RunFiles.read(tmp_path)

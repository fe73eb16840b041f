"""Tests of the metric files."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tracking.pseudo_terminal import run_script
from torch_frame.tracking.log_files import EventFiles, JsonlFile


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_row_can_be_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlFile(path)
    for step in range(3):
        writer.write({"iter": step, "total_loss": 0.5})
        assert len(_rows(path)) == step + 1
    writer.close()
    writer.close()


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (math.nan, None),
        (-math.inf, None),
        (np.float32(0.5), 0.5),
        (np.float64("nan"), None),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array([2.0]), 2.0),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (torch.tensor([[7]]), 7),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.tensor(math.inf), None),
        ([1, np.float32(2), math.nan], [1, 2.0, None]),
        ({"a": torch.tensor(1)}, {"a": 1}),
        ("训练", "训练"),
        (None, None),
        (True, True),
        (10**20, 10**20),
    ],
)
def test_values_become_what_json_knows(value: Any, written: Any, tmp_path: Path) -> None:
    writer = JsonlFile(tmp_path / "metrics.jsonl")
    writer.write({"x": value})
    writer.close()
    (row,) = _rows(tmp_path / "metrics.jsonl")
    assert row == {"x": written}
    assert type(row["x"]) is type(written)


@pytest.mark.parametrize(
    ("value", "words"),
    [(torch.ones(2), "has 2 elements"), (np.ones(0), "has 0 elements"), (1j, "complex"), ({1}, "set")],
)
def test_a_value_that_is_no_number_gets_a_sentence_and_writes_nothing(value: Any, words: str, tmp_path: Path) -> None:
    writer = JsonlFile(tmp_path / "metrics.jsonl")
    with pytest.raises(TypeError, match=rf"row\['x'\] .*{words}"):
        writer.write({"iter": 1, "x": value})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_text_is_utf_8_and_stray_surrogates_are_escapes(tmp_path: Path) -> None:
    writer = JsonlFile(tmp_path / "metrics.jsonl")
    writer.write({"名": "é\udc80"})
    writer.close()
    assert "名" in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert _rows(tmp_path / "metrics.jsonl") == [{"名": "é\udc80"}]


def _write(path: Path, last: str = "") -> None:
    path.write_text("".join(f'{{"iter": {step}}}\n' for step in range(5)) + last, encoding="utf-8")


@pytest.mark.parametrize("keep", [None, 10])
@pytest.mark.parametrize(
    ("last", "num_rows"), [("", 5), ('{"iter": 5, "lo', 5), ('{"iter": 5}', 6), ("\0\0\0", 5), ('"' + "x" * 200_000, 5)]
)
def test_a_half_written_last_line_is_cut_off(keep: int | None, last: str, num_rows: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, last)
    writer = JsonlFile(path, keep_until_iter=keep)
    writer.write({"iter": 9})
    writer.close()
    assert [row["iter"] for row in _rows(path)] == [*range(num_rows), 9]


@pytest.mark.parametrize("text", ["", '{"iter": 0', "\n"])
@pytest.mark.parametrize("keep", [None, 3])
def test_a_file_without_a_whole_row_is_continued(text: str, keep: int | None, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    writer = JsonlFile(path, keep)
    writer.write({"iter": 1})
    writer.close()
    assert path.read_text().strip() == '{"iter": 1}'


@pytest.mark.parametrize("keep", [-1, 0, 2, 4])
def test_later_rows_are_cut_off_for_a_resumed_run(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, '{"note": "no iter"}\n{"iter": null}\n{"iter": 99}\n')
    JsonlFile(path, keep_until_iter=keep).close()
    rows = _rows(path)
    assert [row["iter"] for row in rows if row.get("iter") is not None] == list(range(keep + 1))
    assert rows[-2:] == [{"note": "no iter"}, {"iter": None}]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("num_before", [0, 1, 3, 20])
def test_what_was_written_after_a_mark_is_cut_off_whatever_its_iteration(num_before: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlFile(path)
    for row in range(num_before):
        writer.write({"iter": row, "time": row / 7})
    mark = writer.mark()
    before = path.read_bytes()
    writer.write({"iter": max(num_before - 1, 0), "eval_acc": 0.5})
    writer.write({"iter": num_before})
    writer.close()
    with path.open("a") as file:
        file.write('{"iter": 5, "lo')
    JsonlFile(path, num_before - 1, keep_until=mark).close()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("change", ["shorter", "another", "gone"])
def test_of_a_file_that_does_not_have_the_marked_place_later_rows_are_cut_off(change: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path)
    writer = JsonlFile(path)
    mark = writer.mark()
    writer.close()
    if change == "shorter":
        _write(path)
        path.write_bytes(path.read_bytes()[:-3])
    elif change == "another":
        _write(path, '{"iter": 2, "of": "another run"}\n')
        path.write_bytes(path.read_bytes().replace(b'"iter": 0', b'"iter": 1'))
    else:
        path.unlink()
    JsonlFile(path, 1, keep_until=mark).close()
    assert [row["iter"] for row in _rows(path)] == {"shorter": [0, 1], "another": [1, 1], "gone": []}[change]


def test_a_file_that_is_gone_has_no_mark(tmp_path: Path) -> None:
    writer = JsonlFile(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").unlink()
    assert writer.mark() is None
    writer.close()


def test_what_a_killed_process_left_of_a_cut_is_removed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl.tmp").write_text("half")
    JsonlFile(tmp_path / "metrics.jsonl").close()
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_cut_that_fails_leaves_the_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        JsonlFile(path, keep_until_iter=1)
    assert len(_rows(path)) == 5
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_link_stays_a_link(tmp_path: Path) -> None:
    _write(tmp_path / "real.jsonl")
    (tmp_path / "link.jsonl").symlink_to("real.jsonl")
    JsonlFile(tmp_path / "link.jsonl", keep_until_iter=1).close()
    assert (tmp_path / "link.jsonl").is_symlink()
    assert len(_rows(tmp_path / "real.jsonl")) == 2


def test_scalars_can_be_read_from_tensorboards_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    writer = EventFiles(tmp_path / "tb")
    for step in range(3):
        writer.write("train/total_loss", torch.tensor(step / 2), step)
    writer.close()
    writer.close()
    done = run_script(
        """
        import os, warnings
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        events = EventAccumulator(os.environ["TB"])
        events.Reload()
        print([(event.step, event.value) for event in events.Scalars("train/total_loss")])
        """,
        TB=str(tmp_path / "tb"),
        PYTHONWARNINGS="default",
    )
    assert done.stdout.decode().strip() == "[(0, 0.0), (1, 0.5), (2, 1.0)]"


def test_importing_the_module_does_not_import_tensorboard() -> None:
    done = run_script(
        """
        import sys
        import torch_frame.tracking.log_files
        assert not [name for name in sys.modules if name.split(".")[0] == "tensorboard"]
        """
    )
    assert done.returncode == 0, done.stderr.decode()


def test_writing_is_quiet_where_warnings_are_errors(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    done = run_script(
        """
        import os
        from torch_frame.tracking.log_files import EventFiles
        writer = EventFiles(os.environ["TB"], purge_step=3, flush_secs=5)
        writer.write("a", 1.0, 3)
        writer.close()
        """,
        TB=str(tmp_path),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_missing_tensorboard_gets_a_sentence() -> None:
    done = run_script(
        """
        import sys
        sys.modules["tensorboard"] = None  # as if it were not installed
        from torch_frame.tracking.log_files import EventFiles
        try:
            EventFiles("never_made")
        except ModuleNotFoundError as error:
            print(error)
        """
    )
    assert b"pip install 'torch-frame[tensorboard]'" in done.stdout


def test_scalars_written_together_are_read_one_by_one(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = EventFiles(tmp_path)
    for step in range(3):
        writer.write_all({"train/total_loss": step / 2, "train/lr": 0.125}, step)
    writer.close()
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/total_loss")] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert [(event.step, event.value) for event in events.Scalars("train/lr")] == [(step, 0.125) for step in range(3)]


def _points(folder: Path, tag: str) -> list[tuple[int, float]]:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_event_files_end_where_they_ended_and_later_ones_of_the_run_are_removed(tmp_path: Path) -> None:
    others = EventFiles(tmp_path, run_id="other")
    others.write("other", 9.0, 9)
    others.close()
    first = EventFiles(tmp_path, run_id="run", filename_suffix=".mine")
    first.write("eval_acc", 0.1, 0)
    first.flush()
    sizes = first.sizes()
    first.write("eval_acc", 0.2, 1)
    first.close()
    for value in (0.3, 0.4):  # two processes that were killed before they saved anything
        again = EventFiles(tmp_path, purge_step=100, run_id="run", filename_suffix=".mine", keep=sizes)
        assert _points(tmp_path, "eval_acc") == [(0, pytest.approx(0.1))]
        again.write("eval_acc", value, 1)
        again.close()
    assert _points(tmp_path, "eval_acc") == [(0, pytest.approx(0.1)), (1, pytest.approx(0.4))]
    assert _points(tmp_path, "other") == [(9, 9.0)]


def test_files_of_one_second_are_read_in_the_order_they_were_made(tmp_path: Path) -> None:
    script = f"""
from torch_frame.tracking.log_files import EventFiles
for number in range(12):  # TensorBoard numbers the files of a process from 0, and reads them in the order of their names
    files = EventFiles({str(tmp_path)!r}, run_id="run")
    files.write("number", number, number)
    files.close()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert len(list(tmp_path.iterdir())) == 12
    assert [value for _, value in _points(tmp_path, "number")] == list(range(12))


def test_of_a_folder_that_is_not_to_be_seen_no_file_is_known_or_removed(tmp_path: Path) -> None:
    writer = EventFiles(tmp_path / "tb", run_id="run")
    writer.write("a", 1.0, 0)
    writer.close()
    (tmp_path / "tb").rename(tmp_path / "elsewhere")
    assert writer.sizes() is None
    (tmp_path / "elsewhere").rename(tmp_path / "tb")
    EventFiles(tmp_path / "tb", run_id="run", keep=None).close()
    assert _points(tmp_path / "tb", "a") == [(0, 1.0)]

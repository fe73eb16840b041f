"""Tests of the metric files."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tracking.pseudo_terminal import run_script
from torch_frame.tracking.writers import JsonlWriter, TensorBoardWriter


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_row_can_be_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
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
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
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
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(TypeError, match=rf"row\['x'\] .*{words}"):
        writer.write({"iter": 1, "x": value})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_text_is_utf_8_and_stray_surrogates_are_escapes(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
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
    writer = JsonlWriter(path, keep_until_iter=keep)
    writer.write({"iter": 9})
    writer.close()
    assert [row["iter"] for row in _rows(path)] == [*range(num_rows), 9]


@pytest.mark.parametrize("text", ["", '{"iter": 0', "\n"])
@pytest.mark.parametrize("keep", [None, 3])
def test_a_file_without_a_whole_row_is_continued(text: str, keep: int | None, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    writer = JsonlWriter(path, keep)
    writer.write({"iter": 1})
    writer.close()
    assert path.read_text().strip() == '{"iter": 1}'


@pytest.mark.parametrize("keep", [-1, 0, 2, 4])
def test_later_rows_are_cut_off_for_a_resumed_run(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, '{"note": "no iter"}\n{"iter": null}\n{"iter": 99}\n')
    JsonlWriter(path, keep_until_iter=keep).close()
    rows = _rows(path)
    assert [row["iter"] for row in rows if row.get("iter") is not None] == list(range(keep + 1))
    assert rows[-2:] == [{"note": "no iter"}, {"iter": None}]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_cut_that_fails_leaves_the_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        JsonlWriter(path, keep_until_iter=1)
    assert len(_rows(path)) == 5
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_link_stays_a_link(tmp_path: Path) -> None:
    _write(tmp_path / "real.jsonl")
    (tmp_path / "link.jsonl").symlink_to("real.jsonl")
    JsonlWriter(tmp_path / "link.jsonl", keep_until_iter=1).close()
    assert (tmp_path / "link.jsonl").is_symlink()
    assert len(_rows(tmp_path / "real.jsonl")) == 2


def test_scalars_can_be_read_from_tensorboards_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    writer = TensorBoardWriter(tmp_path / "tb")
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
        import torch_frame.tracking.writers
        assert not [name for name in sys.modules if name.split(".")[0] == "tensorboard"]
        """
    )
    assert done.returncode == 0, done.stderr.decode()


def test_writing_is_quiet_where_warnings_are_errors(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    done = run_script(
        """
        import os
        from torch_frame.tracking.writers import TensorBoardWriter
        writer = TensorBoardWriter(os.environ["TB"], purge_step=3, flush_secs=5)
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
        from torch_frame.tracking.writers import TensorBoardWriter
        try:
            TensorBoardWriter("never_made")
        except ModuleNotFoundError as error:
            print(error)
        """
    )
    assert b"pip install 'torch-frame[tensorboard]'" in done.stdout


def test_scalars_written_together_are_read_one_by_one(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = TensorBoardWriter(tmp_path)
    for step in range(3):
        writer.write_all({"train/total_loss": step / 2, "train/lr": 0.125}, step)
    writer.close()
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/total_loss")] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert [(event.step, event.value) for event in events.Scalars("train/lr")] == [(step, 0.125) for step in range(3)]

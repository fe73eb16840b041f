"""Curves of runs: each run is there, under a name of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from torch_frame.report.curves import plot_curves

pytest.importorskip("matplotlib")


def run_of(folder: Path, losses: list[float | None], end: str = "", **more: float) -> Path:
    folder.mkdir(parents=True)
    rows = [{"iter": i, "epoch": 0, "time": 1.0, "total_loss": loss, **more} for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + end, encoding="utf-8")
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were saved, by the real method."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **kw: (figures.append(figure), save(figure, *args, **kw))
    )
    return figures


def curves(figure: Any) -> list[dict[str, list[float]]]:
    return [{line.get_label(): line.get_ydata().tolist() for line in axes.lines} for axes in figure.axes]


def test_runs_whose_folders_have_one_name_are_all_drawn(tmp_path: Path, drawn: list[Any]) -> None:
    runs = [run_of(tmp_path / name / "run", [value]) for name, value in (("a", 1.0), ("b", 2.0))]
    assert plot_curves(runs, tmp_path / "x.png").stat().st_size > 0
    assert curves(drawn[0]) == [{os.path.join("a", "run"): [1.0], os.path.join("b", "run"): [2.0]}]


def test_the_folder_that_one_is_in_has_its_name(
    tmp_path: Path, drawn: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_of(tmp_path / "_run", [1.0]))
    plot_curves(["."], tmp_path / "x.png")
    assert curves(drawn[0]) == [{"run": [1.0]}]


@pytest.mark.filterwarnings("error")
def test_what_a_run_lacks_is_left_out_and_what_all_lack_is_told(tmp_path: Path, drawn: list[Any]) -> None:
    first = run_of(tmp_path / "a", [1.0, None], end='{"iter": 2, "total_l', acc=0.5)
    second, empty = run_of(tmp_path / "b", [None]), run_of(tmp_path / "c", [])
    plot_curves([first, second, empty], tmp_path / "x.png")
    assert curves(drawn[0]) == [{"a": [1.0]}, {"a": [0.5, 0.5]}]
    plot_curves([second], tmp_path / "x.png")
    assert curves(drawn[1]) == [{}]
    with pytest.raises(ValueError, match=r"No run has 'accuracy'; in metrics\.jsonl are 'total_loss', 'acc'"):
        plot_curves([first], tmp_path / "x.png", ["accuracy"])
    with pytest.raises(ValueError, match=r"No run has a value to draw; in metrics\.jsonl are none"):
        plot_curves([empty], tmp_path / "x.png")
